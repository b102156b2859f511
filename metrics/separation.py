"""How well talkers were separated: SI-SDR, its improvement over the unprocessed mixture, and SDR, all in dB.

Every mixture gets one status, and only `ok` (and `not_finite`, which must show) enter the averages; the others are
counted:
* silent: a target is silent, which no estimate can be compared with. The talkers beside it are not scored either: with
  one of them alone the mixture would nearly be its own answer.
* silent_estimate: an estimate is constant. Its ratio is minus infinity (torchmetrics gives 0 dB for its SI-SDR).
* perfect: an estimate, or the mixture itself, equals its target to 100 dB or better; one such value would outweigh
  dozens of real ones.
* not_finite: an estimate holds NaN or infinity. The averages become NaN.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.audio import (
    permutation_invariant_training,
    scale_invariant_signal_distortion_ratio,
    signal_distortion_ratio,
)

PERFECT_DB = 100.0
# The quantisation noise of 16-bit audio: below this RMS (full scale 1, mean removed) there is no signal.
SILENT_RMS = 2**-15 / math.sqrt(12)
# Estimates have no scale that could be compared with full scale; here is where float32 leaves nothing of a signal.
SILENT_ESTIMATE_RMS = 1e-9
SDR_TAPS = 512
STATUSES = ("ok", "not_finite", "silent", "silent_estimate", "perfect")
_AVERAGED = ("ok", "not_finite")


class Score(NamedTuple):
    """Of one mixture: its status, and means over its sources in dB. NaN where there is no ratio.

    `sdr` is None when it was not asked for, or the mixture is shorter than the filter that SDR allows for.
    """

    status: str
    si_sdr: float = math.nan
    si_sdri: float = math.nan
    sdr: float | None = None


def si_sdr(estimates: Tensor, targets: Tensor) -> Tensor:
    """Scale-invariant SDR in dB (Le Roux et al. 2019, arXiv:1811.02508), means removed, in float64.

    Shape: (…, T), (…, T) -> (…).
    """
    return scale_invariant_signal_distortion_ratio(estimates.double(), targets.double(), zero_mean=True)


def sdr(estimates: Tensor, targets: Tensor) -> Tensor:
    """SDR in dB as BSS-eval defines it (Vincent et al. 2006), with a filter of 512 taps allowed, in float64.

    Shape: (…, T), (…, T) -> (…).

    Raises torch.linalg.LinAlgError for a silent target.
    """
    return signal_distortion_ratio(estimates.double(), targets.double(), filter_length=SDR_TAPS)


def score_mixture(estimates: Tensor, targets: Tensor, mixture: Tensor, *, with_sdr: bool = False) -> Score:
    """Score one mixture under the permutation with the best mean SI-SDR, which SDR takes over.

    *with_sdr*: SDR takes some 20 ms per source, which a validation need not spend.

    Shape: (C, T), (C, T), (T,).
    """
    # float64: in float32 a perfect estimate reaches 85 dB only, and could not be told from a good one.
    estimates, targets, mixture = estimates.double(), targets.double(), mixture.double()
    if targets.shape[-1] == 0 or _is_silent(targets, SILENT_RMS):
        return Score("silent")
    if not bool(estimates.isfinite().all()):
        return Score("not_finite", sdr=math.nan if with_sdr else None)
    _, permutation = permutation_invariant_training(estimates[None], targets[None], si_sdr)
    estimates = estimates[permutation[0]]
    after = si_sdr(estimates, targets)  # (C,)
    before = si_sdr(mixture.expand_as(targets), targets)
    values = after.mean().item(), (after - before).mean().item()
    if _is_silent(estimates, SILENT_ESTIMATE_RMS):
        return Score("silent_estimate", *values)
    is_perfect = bool((torch.cat([after, before]) > PERFECT_DB).any())
    long_enough = targets.shape[-1] >= SDR_TAPS
    mean_sdr = sdr(estimates, targets).mean().item() if with_sdr and long_enough else None
    return Score("perfect" if is_perfect else "ok", *values, mean_sdr)


def _is_silent(signals: Tensor, rms: float) -> bool:
    """Whether any of the signals is. Shape: (C, T)."""
    return bool((signals.std(-1, correction=0) < rms).any())


class SeparationMetrics(Metric):
    """Averages over mixtures, with the best permutation of the estimates for each.

    Sums are taken over all processes. Where these have different numbers of batches, an example that is repeated to
    make them equal (data/sampler.py) counts twice.

    `compute()` returns float32 scalars: `si_sdr`, `si_sdri` (improvement over the mixture), with *sdr* also `sdr`; for
    each `<name>_stderr`, the standard error of its mean over mixtures; `num_mixtures` (all that were seen), and of
    these `num_silent`, `num_silent_estimates` and `num_perfect`, with *sdr* also `num_short`: averaged, but too short
    for an SDR. Means are NaN when there is nothing to average, standard errors below two mixtures.
    """

    full_state_update = False
    higher_is_better = True

    sums: Tensor
    squares: Tensor
    counts: Tensor
    num_of: Tensor

    def __init__(self, *, sdr: bool = False) -> None:
        super().__init__()
        self.columns = ("si_sdr", "si_sdri", "sdr") if sdr else ("si_sdr", "si_sdri")
        self._last: list[Score] = []
        # Sums, so that ranks add up to exactly one process's result; float64, so that large sets do too.
        for name, dtype in (("sums", torch.float64), ("squares", torch.float64), ("counts", torch.int64)):
            self.add_state(name, torch.zeros(len(self.columns), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("num_of", torch.zeros(len(STATUSES), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, estimates: Tensor, targets: Tensor, mixture: Tensor, length: Tensor) -> None:
        """Adds a batch; samples from `length` on are ignored.

        Shape: estimates (B, C, T), targets (B, C, T), mixture (B, T), length (B,) in samples.
        """
        _check_shapes(estimates, targets, mixture, length)
        scores = []
        for item, num_samples in enumerate(length.tolist()):
            cut = slice(None, num_samples)
            signals = estimates[item, :, cut], targets[item, :, cut], mixture[item, cut]
            scores.append(score_mixture(*signals, with_sdr="sdr" in self.columns))
        self._last = scores
        found = [sum(score.status == status for score in scores) for status in STATUSES]
        self.num_of += torch.tensor(found).to(self.num_of.device)
        for column, name in enumerate(self.columns):
            values = [getattr(score, name) for score in scores if score.status in _AVERAGED]
            values = [value for value in values if value is not None]
            self.sums[column] += sum(values)
            self.squares[column] += sum(value**2 for value in values)
            self.counts[column] += len(values)

    def rows(self) -> list[dict[str, float | str | None]]:
        """One for each mixture of the last update: the averaged values in dB, and `status`."""
        return [{**{name: getattr(s, name) for name in self.columns}, "status": s.status} for s in self._last]

    def per_mixture(self) -> tuple[Tensor, Tensor]:
        """SI-SDR and SI-SDRi in dB of each mixture of the last update, NaN if silent. Shape: (B,) each."""
        values = torch.tensor([(score.si_sdr, score.si_sdri) for score in self._last]).reshape(-1, 2)
        return values[:, 0], values[:, 1]

    def compute(self) -> dict[str, Tensor]:
        values = {}
        for column, name in enumerate(self.columns):
            total, count = self.sums[column], self.counts[column]
            mean = total / count  # 0 / 0 is NaN
            variance = (self.squares[column] - count * mean.square()).clamp_min(0) / (count - 1)
            values[name] = mean
            values[f"{name}_stderr"] = torch.where(count > 1, (variance / count).sqrt(), math.nan)
        num = dict(zip(STATUSES, self.num_of, strict=True))
        values["num_mixtures"] = self.num_of.sum()
        values["num_silent"] = num["silent"]
        values["num_silent_estimates"] = num["silent_estimate"]
        values["num_perfect"] = num["perfect"]
        if "sdr" in self.columns:
            values["num_short"] = self.counts[0] - self.counts[2]
        return {name: value.float() for name, value in values.items()}


def _check_shapes(estimates: Tensor, targets: Tensor, mixture: Tensor, length: Tensor) -> None:
    batch, num_sources, num_samples = targets.shape
    expected = {
        "estimates": (batch, num_sources, num_samples),
        "mixture": (batch, num_samples),
        "length": (batch,),
    }
    given = {"estimates": estimates, "mixture": mixture, "length": length}
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, as the targets have, got {tuple(given[name].shape)}")
