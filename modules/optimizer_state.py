"""Optimiser state that follows parameters which take the place of others in mid-training.

The optimiser object and its groups stay, so learning-rate schedules, gradient scalers and Lightning's wrappers go on.

For W = u v with frozen factors the gradients are G_u = G vᵀ and G_v = uᵀ G, linear in G: running means of gradients are
carried over exactly. Running means of squares are not linear; for entries of G that are independent of one another
E[G_u²] = E[G²] (v ∘ v)ᵀ, which is taken, but never less than the square of the mean.

State that is neither begins anew as a whole: a count of steps without the means that belong to it makes the next steps
too large.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modules.spectrum import in_float64

MOMENTS = ("project", "reset")
_MEANS = {"exp_avg", "momentum_buffer", "momentum", "grad_avg"}
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}

State = dict[str, Any]


class Replacement(NamedTuple):
    """*old* parameters of a layer, the *new* ones, and how a matrix of running means of gradients of the old ones
    becomes one of the new: `project(means, square)`, with all entries squared for means of squares."""

    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    project: Callable[[list[Tensor], bool], list[Tensor]]


def of_factorising(weight: nn.Parameter, u: nn.Parameter, v: nn.Parameter) -> Replacement:
    """A weight (M, …) that became u (M, r) and v (r, N)."""

    def project(means: list[Tensor], square: bool) -> list[Tensor]:
        matrix = in_float64(means[0]).flatten(1)  # (M, N)
        left, right = in_float64(u), in_float64(v)
        if square:
            left, right = left.square(), right.square()
        return [matrix @ right.mT, left.mT @ matrix]

    return Replacement((weight,), (u, v), project)


def of_resizing(
    old: tuple[nn.Parameter, nn.Parameter], new: tuple[nn.Parameter, nn.Parameter], *, right: Tensor, left: Tensor
) -> Replacement:
    """Factors that became u' = u right, v' = left v (`modules.low_rank.resized`)."""

    def project(means: list[Tensor], square: bool) -> list[Tensor]:
        of_u, of_v = in_float64(left), in_float64(right)
        if square:
            of_u, of_v = of_u.square(), of_v.square()
        return [in_float64(means[0]) @ of_u.mT, of_v.mT @ in_float64(means[1])]

    return Replacement(old, new, project)


def replace_parameters(optimizer: Optimizer, replacements: list[Replacement], *, moments: str = "project") -> list[str]:
    """Put new parameters into the places of old ones in their groups, and their state into the place of the old.

    *moments*: `project` carries running means over; `reset` begins them at zero, as on the first step.

    Returns the kinds of state that could not be carried over and begin anew.
    """
    if moments not in MOMENTS:
        raise ValueError(f"moments={moments}: choose from {', '.join(MOMENTS)}")
    by_old = {id(old): replacement for replacement in replacements for old in replacement.old}
    lost: set[str] = set()
    for group in optimizer.param_groups:
        placed: list[nn.Parameter] = []
        for parameter in group["params"]:
            if (replacement := by_old.get(id(parameter))) is None:
                placed.append(parameter)
            elif parameter is replacement.old[0]:
                placed += replacement.new
                _carry(optimizer, group, replacement, moments, lost)
        group["params"][:] = placed  # the same list: wrappers hold it
    return sorted(lost)


@torch.no_grad()
def _carry(optimizer: Optimizer, group: dict[str, Any], replacement: Replacement, moments: str, lost: set[str]) -> None:
    states: list[State] = [dict(optimizer.state.pop(old, {})) for old in replacement.old]
    if not all(states):
        return  # no step yet
    unknown = {name for name, value in states[0].items() if not _is_known(name, value, replacement.old[0])}
    if moments == "reset" or unknown:
        if moments == "project":
            lost |= unknown
        if isinstance(optimizer, torch.optim.Adagrad):  # others make their state at a parameter's first step
            for new in replacement.new:
                start = torch.full_like(new, group["initial_accumulator_value"])
                optimizer.state[new] = {"step": torch.zeros_like(states[0]["step"]), "sum": start}
        return
    carried: list[State] = [{} for _ in replacement.new]
    for name, value in states[0].items():
        if _is_per_entry(value):
            projected = replacement.project([state[name] for state in states], name in _SQUARES)
            values = [part.to(value).contiguous() for part in projected]
        else:
            values = [value.clone() if isinstance(value, Tensor) else value for _ in carried]
        for state, own in zip(carried, values, strict=True):
            state[name] = own
    for state, new in zip(carried, replacement.new, strict=True):
        _raise_squares(state, group)
        optimizer.state[new] = state


def _is_per_entry(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _is_known(name: str, value: Any, parameter: nn.Parameter) -> bool:
    """Is it a mean, or a mean of squares, or else one number?"""
    if not _is_per_entry(value):
        return not isinstance(value, list | dict)
    return name in _MEANS | _SQUARES and value.shape == parameter.shape


def _raise_squares(state: State, group: dict[str, Any]) -> None:
    """Means of squares to the squares of the means, where they are below: Adam's once both are free of their start."""
    mean = next((state[name] for name in ("exp_avg", "grad_avg") if name in state), None)
    if mean is None:
        return
    share = 1.0
    if "betas" in group and float(state.get("step", 0)) > 0:
        of_means, of_squares = (1 - float(beta) ** float(state["step"]) for beta in group["betas"])
        share = of_squares / of_means**2
    for name in _SQUARES & state.keys():
        state[name] = torch.maximum(state[name], share * mean.square())


def names_in_groups(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The names of an optimiser's parameters, group by group, in order."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def arrange(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], groups: list[list[str]]) -> None:
    """Bring an optimiser's parameters into the groups and the order of a checkpoint, whose state goes by position.

    Raises ValueError when they are not the same parameters.
    """
    present = sorted(name for group in names_in_groups(optimizer, parameters) for name in group)
    named = isinstance(groups, list) and all(isinstance(names, list) for names in groups)  # a file may hold anything
    wanted = sorted(str(name) for names in groups for name in names) if named else None
    if wanted != present or len(groups) != len(optimizer.param_groups):
        raise ValueError("the checkpoint's optimiser has other parameters than this run's")
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = [parameters[name] for name in names]
