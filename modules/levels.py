"""Levels of separated sources. SI-SDR does not see the scale (or the sign) of an estimate, so a network trained with
it puts out any; what a listener wants is the scale at which the sources add up to the mixture.
"""

import torch
from torch import Tensor

# Of the mean energy of the sources. Keeps a source that is all but silent from being blown up to explain noise.
_RIDGE = 1e-4


def restore_levels(sources: Tensor, mixture: Tensor) -> Tensor:
    """Scale each source by the one gain with which all of them together explain the mixture best (least squares).

    Silence stays silence.

    Shape: sources (B, C, T), mixture (B, T) -> (B, C, T).
    """
    basis = sources.double()
    energies = basis @ basis.mT  # (B, C, C)
    ridge = _RIDGE * energies.diagonal(dim1=-2, dim2=-1).mean(-1)  # (B,)
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    # One tiny constant more, so that silence can be solved for too.
    system = energies + (ridge + torch.finfo(basis.dtype).tiny)[:, None, None] * identity
    gains = torch.linalg.solve(system, basis @ mixture.double().unsqueeze(-1))  # (B, C, 1)
    return (basis * gains.nan_to_num()).to(sources.dtype)
