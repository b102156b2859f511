"""Which layers become low-rank ones, and of what rank: a pure function of their weights.

Every layer that has a matrix gets an answer, with its numbers; one that stays dense says why.

Sources: Wang et al., "Cuttlefish: Low-Rank Model Training without All the Tuning", 2023 (the scaled stable rank: that
of the weight, times full rank over stable rank of the fresh weight, so that a random one keeps all); the energy rule is
that of truncated singular value decompositions.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from modules.checks import choices, numbers
from modules.low_rank import LowRankLayer, break_even_rank, layers_with_matrices, no_candidate, shared_weights
from modules.spectrum import (
    captured_energy,
    rank_for_energy,
    rank_of_noise,
    singular_values_of,
    singular_values_of_factors,
    stable_rank,
)

RANK_BY = ("energy", "stable_rank", "ratio")
_OF_NOISE = 0.9  # a rank above this share of what noise of the same shape needs is that of noise


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides.

    *rank_by*: `energy`: the least rank with the share *energy* of the squared singular values; `stable_rank`: the
    scaled stable rank; `ratio`: this share of the full rank, *ratio*, or that of the first pattern in *ratios* found in
    the layer's name. *include*, *exclude*: regular expressions searched in names; none included: all are. *threshold*:
    least outputs and inputs of a matrix. *min_elements*: least entries. *min_energy*: what a rank must keep of the
    squared singular values, or the spectrum is too flat; one of `energy` must also be clearly below that of noise. 0:
    flat spectra are not refused. *min_ratio*: least share of the full rank that `energy` and `stable_rank` give: one
    direction may hold nearly all of a weight's energy, and still not all that it is for (an output layer begins with
    how frequent its classes are).
    """

    rank_by: str = "energy"
    energy: float = 0.9
    ratio: float = 0.25
    ratios: Mapping[str, float] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    threshold: int = 0
    min_elements: int = 0
    min_energy: float = 0.5
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        choices(rank_by=(self.rank_by, RANK_BY))
        ratios = {f"ratios[{pattern}]": ratio for pattern, ratio in self.ratios.items()}
        shares = {"energy": self.energy, "ratio": self.ratio, **ratios}
        numbers(least=0, most=1, min_energy=self.min_energy, min_ratio=self.min_ratio, **shares)
        for name, value in shares.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        numbers(least=0, most=math.inf, threshold=self.threshold, min_elements=self.min_elements)
        for pattern in (*self.include, *self.exclude, *self.ratios):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The answer for one layer. *rank*: None, it stays dense, for *reason*. The numbers are None where none was needed.

    *full*: the weight's full rank. *energy*: the share of the squared singular values in the first *wanted* of them,
    the rank that the rule asks for. *max_rank*: the largest that is worth it.
    """

    rank: int | None = None
    reason: str = ""
    full: int | None = None
    wanted: int | None = None
    energy: float | None = None
    stable_rank: float | None = None
    max_rank: int | None = None

    def described(self) -> str:
        """On one line."""
        if self.full is None:
            return f"dense: {self.reason}"
        numbers = f"rank {self.wanted} of {self.full} keeps {self.energy:.1%}, stable rank {self.stable_rank:.1f}"
        return f"rank {self.rank} of {self.full} ({numbers})" if self.rank else f"dense: {self.reason} ({numbers})"


def choose_ranks(
    model: nn.Module,
    rules: Rules,
    *,
    max_ranks: Mapping[str, int] | None = None,
    fresh_stable_ranks: Mapping[str, float] | None = None,
) -> dict[str, Choice]:
    """The answer for each layer of a model that has a matrix, by name.

    *max_ranks*: the largest rank at which a layer was measured to be faster by enough, 0 where none is; a layer that is
    not in it may have every rank with fewer numbers than its weight. *fresh_stable_ranks*: before training, for
    `rank_by="stable_rank"`.
    """
    max_ranks, fresh = max_ranks or {}, fresh_stable_ranks or {}
    layers = layers_with_matrices(model)
    return {
        name: Choice(reason=reason) if reason else _choose(name, layers[name], rules, max_ranks, fresh)
        for name, reason in _passed_over(model, rules).items()
    }


def candidates(model: nn.Module, rules: Rules) -> dict[str, nn.Module]:
    """The layers that rules and kinds leave, by name."""
    layers = layers_with_matrices(model)
    return {name: layers[name] for name, reason in _passed_over(model, rules).items() if not reason}


def _passed_over(model: nn.Module, rules: Rules) -> dict[str, str | None]:
    """Of each layer why it is no candidate, whatever its weight holds; None: it is one."""
    shared = shared_weights(model)
    without_gradient = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))  # torch's own attribute

    def why(name: str, layer: nn.Module) -> str | None:
        if reason := no_candidate(layer):
            return reason
        if name in shared:
            return f"its weight is also that of {shared[name]}"
        if f"{name}.weight" in without_gradient:
            return "never gets a gradient"
        if any(re.search(pattern, name) for pattern in rules.exclude):
            return "excluded"
        if rules.include and not any(re.search(pattern, name) for pattern in rules.include):
            return "not included"
        outputs, inputs = _sides(layer)
        if min(outputs, inputs) < rules.threshold:
            return f"{outputs} x {inputs}, below threshold={rules.threshold}"
        if outputs * inputs < rules.min_elements:
            return f"{outputs * inputs} entries, below min_elements={rules.min_elements}"
        return None

    return {name: why(name, layer) for name, layer in layers_with_matrices(model).items()}


def _choose(
    name: str, layer: nn.Module, rules: Rules, max_ranks: Mapping[str, int], fresh: Mapping[str, float]
) -> Choice:
    weight: Any = layer.weight
    if not weight.isfinite().all():
        return Choice(reason="its weight is not finite")
    s = singular_values_of(weight)
    full, own_stable_rank = len(s), stable_rank(s)
    if not own_stable_rank > 0:
        return Choice(reason="its weight is zero")
    if rules.rank_by == "energy":
        wanted = rank_for_energy(s, rules.energy)
    elif rules.rank_by == "ratio":
        wanted = max(1, round(ratio_of(name, rules) * full))
    else:
        fresh_one = fresh.get(name) or own_stable_rank  # not known, or of a weight that began as zero
        wanted = min(full, math.ceil(own_stable_rank * full / fresh_one))
    if rules.rank_by != "ratio":
        wanted = max(wanted, math.ceil(rules.min_ratio * full))
    kept = captured_energy(s, wanted)
    worth = min(break_even_rank(weight.shape), max_ranks.get(name, full))
    rank, reason = wanted, ""
    if kept < rules.min_energy:
        rank, reason = None, f"its spectrum is too flat, below min_energy={rules.min_energy:g}"
    elif rules.rank_by == "energy" and rules.min_energy > 0 and wanted > _OF_NOISE * (noise := _noise(layer, rules)):
        rank, reason = None, f"its spectrum is as flat as that of noise, whose rank would be {noise}"
    elif wanted > worth:
        rank = None
        measured = name in max_ranks and max_ranks[name] < break_even_rank(weight.shape)
        reason = "too little speed-up" if measured else "as many operations as before"
        reason += f" above rank {worth}" if worth else " at any rank"
    return Choice(
        rank=rank,
        reason=reason,
        full=full,
        wanted=wanted,
        energy=kept,
        stable_rank=own_stable_rank,
        max_rank=worth,
    )


def choose_smaller_ranks(model: nn.Module, rules: Rules) -> dict[str, Choice]:
    """For each factorised layer of a model the ratio of its full rank that the rules name, if it is smaller."""
    chosen = {}
    for name, layer in layers_with_matrices(model).items():
        if not isinstance(layer, LowRankLayer):
            continue
        if not (layer.u.isfinite().all() and layer.v.isfinite().all()):
            chosen[name] = Choice(reason="its weight is not finite")
            continue
        full = min(layer.u.shape[0], layer.v.shape[1])
        wanted = min(max(1, round(ratio_of(name, rules) * full)), layer.rank)
        s = singular_values_of_factors(layer.u, layer.v)
        unchanged = wanted == layer.rank
        chosen[name] = Choice(
            rank=None if unchanged else wanted,
            reason="has that rank" if unchanged else "",
            full=full,
            wanted=wanted,
            energy=captured_energy(s, wanted),
            stable_rank=stable_rank(s),
            max_rank=layer.rank,
        )
    return chosen


def ratio_of(name: str, rules: Rules) -> float:
    """The share of the full rank for a layer: of the first pattern that is found in its name, or that of all."""
    return next((ratio for pattern, ratio in rules.ratios.items() if re.search(pattern, name)), rules.ratio)


def _noise(layer: nn.Module, rules: Rules) -> int:
    """The rank that the energy rule would ask of a random weight."""
    return math.ceil(rank_of_noise(*_sides(layer), rules.energy))


def _sides(layer: nn.Module) -> tuple[int, int]:
    weight: Any = layer.weight
    return weight.shape[0], math.prod(weight.shape[1:])
