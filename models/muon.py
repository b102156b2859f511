"""Muon: momentum whose matrices are made orthogonal, so that all directions of a weight move alike. Adam elsewhere.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024 (method, coefficients); Liu et
al., "Muon is scalable for LLM training", 2025, arXiv:2502.16982, equation 4 (the scale at which Adam's learning rates
hold). torch.optim.Muon takes matrices only, and of a separator's weights most are 1x1 convolutions and norms, of an
echo canceller's most are convolutions; those are taken as the matrices (outputs, inputs x kernel) that they are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def is_matrix(weight: Tensor) -> bool:
    """Is this the weight of a linear layer or of a convolution, with several outputs and inputs?

    Filter banks and depthwise convolutions are not: (N, 1, L).
    """
    return weight.ndim >= 2 and weight.shape[0] > 1 and weight.shape[1] > 1


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly the closest matrix with orthonormal rows or columns: all but tiny singular values become 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration in float32, which need matrix products only.

    Shape: (…, M, N) -> (…, M, N).
    """
    a, b, c = _COEFFICIENTS
    x = matrix.float()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def _by_shape(weights: list[Tensor]) -> list[list[Tensor]]:
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
    for weight in weights:
        alike.setdefault((weight.shape, weight.dtype, weight.device), []).append(weight)
    return list(alike.values())


class Muon(Optimizer):
    """Muon for weights that are matrices (`is_matrix`), Adam for all others, at one learning rate.

    *momentum*: of Muon. *betas*, *eps*: of Adam. *weight_decay*: decoupled, for matrices only.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        params = list(params)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if is_matrix(p) == matrices], "matrices": matrices}
            for matrices in (True, False)
        ]
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # Empty ones too: what a checkpoint holds goes by position, and layers of rank 1 have no matrices.
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["matrices"]:
                for alike in _by_shape(weights):
                    self._move_matrices(alike, group)
            elif weights:
                self._move_others(weights, group)
        return loss

    def _move_matrices(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Weights of one shape together: their many small products become few."""
        directions = []
        for weight in weights:
            gradient, state = weight.grad, self.state[weight]
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(state["momentum"], group["momentum"]).flatten(1))  # Nesterov's
        scale = 0.2 * max(directions[0].shape) ** 0.5  # as large as Adam's
        for weight, update in zip(weights, orthogonalised(torch.stack(directions)), strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)

    def _move_others(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] |= {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self.state[weight] for weight in weights]
        adam(
            weights,
            [weight.grad for weight in weights],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
