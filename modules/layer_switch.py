"""Dense layers become low-rank ones, or low-rank ones another rank, in a network that is being trained."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modules.low_rank import LowRankLayer, factorised, replace_layer, resized
from modules.optimizer_state import Replacement, of_factorising, of_resizing, replace_parameters

Replaced = dict[str, tuple[nn.Module, nn.Module]]


def switch_layers(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    optimizers: Iterable[Optimizer] = (),
    moments: str = "project",
    share: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Replaced, list[str]]:
    """Give layers of *model* the ranks named, in place, and let the state of *optimizers* follow.

    *ranks*: layer -> rank; dense layers are factorised, factorised ones take a smaller rank. *moments*: as
    `modules.optimizer_state.replace_parameters` has it. *share*: gives every process the first one's tensor, on the
    CPU; without it, processes whose decompositions differ in the last bit would drift apart.

    Returns what was replaced, name -> (old layer, new layer), and the kinds of optimiser state that begin anew.

    Raises ValueError for a layer that cannot have the rank; nothing is changed then.
    """
    share = share or (lambda tensor: tensor)
    replaced: Replaced = {}
    replacements: list[Replacement] = []
    for name, rank in ranks.items():
        old = model.get_submodule(name)
        new, replacement = _shrink(old, rank, share) if isinstance(old, LowRankLayer) else _factorise(old, rank, share)
        replaced[name] = (old, new)
        replacements.append(replacement)
    for name, (_, new) in replaced.items():  # all or, after an error, none
        replace_layer(model, name, new)
    lost: set[str] = set()
    for optimizer in optimizers:
        lost.update(replace_parameters(optimizer, replacements, moments=moments))
    return replaced, sorted(lost)


def _factorise(old: nn.Module, rank: int, share: Callable[[Tensor], Tensor]) -> tuple[LowRankLayer, Replacement]:
    new = factorised(old, rank)
    with torch.no_grad():
        for factor in (new.u, new.v):
            factor.copy_(share(factor.detach().cpu()))
    weight: Any = old.weight
    return new, of_factorising(weight, new.u, new.v)


def _shrink(old: LowRankLayer, rank: int, share: Callable[[Tensor], Tensor]) -> tuple[LowRankLayer, Replacement]:
    if not 1 <= rank <= old.rank:
        raise ValueError(f"a layer of rank {old.rank} cannot take rank {rank}; ranks only fall")
    u, v, right, left = (share(part.contiguous()) for part in resized(old.u, old.v, rank))
    new = type(old)(u.to(old.u), v.to(old.v), old.dense)
    new.u.requires_grad_(old.u.requires_grad)
    new.v.requires_grad_(old.v.requires_grad)
    new.bias = old.bias
    new.train(old.training)
    return new, of_resizing((old.u, old.v), (new.u, new.v), right=right, left=left)
