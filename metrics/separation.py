"""How well talkers were separated: SI-SDR and its improvement over the unprocessed mixture, in dB.

Cases that have no meaningful ratio are counted and stay out of the averages:
* silent: a mixture with a target that is silent, which no estimate can be compared with.
* perfect: an estimate, or the mixture itself, that equals its target to 100 dB or better; one such value
  would outweigh dozens of real ones.
A silent *estimate* scores 0 dB, as torchmetrics has it.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.audio import (
    permutation_invariant_training,
    scale_invariant_signal_distortion_ratio,
)

PERFECT_DB = 100.0
# The quantisation noise of 16-bit audio: below this RMS (full scale 1, mean removed) there is no signal.
SILENT_RMS = 2**-15 / math.sqrt(12)


class SeparationMetrics(Metric):
    """Averages over mixtures, with the best permutation of the estimates for each; right under DDP.

    `compute()` returns float32 scalars: `si_sdr`, `si_sdri` (improvement over the mixture), `si_sdri_stderr`
    (standard error of its mean over mixtures), `num_mixtures` (all that were seen), and of these `num_silent`
    and `num_perfect`. Means are NaN when there is nothing to average, the standard error below two mixtures.
    """

    full_state_update = False
    higher_is_better = True

    sum_si_sdr: Tensor
    sum_si_sdri: Tensor
    sum_si_sdri_squared: Tensor
    num_mixtures: Tensor
    num_silent: Tensor
    num_perfect: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Sums, so that ranks add up to exactly one process's result; float64, so that large sets do too.
        for name in ("sum_si_sdr", "sum_si_sdri", "sum_si_sdri_squared"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("num_mixtures", "num_silent", "num_perfect"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self._last = (torch.empty(0), torch.empty(0))

    def update(self, estimates: Tensor, targets: Tensor, mixture: Tensor, length: Tensor) -> None:
        """Adds a batch; samples from `length` on are ignored.

        Shape: estimates (B, C, T), targets (B, C, T), mixture (B, T), length (B,) in samples.
        """
        _check_shapes(estimates, targets, mixture, length)
        scores = []
        for item, num_samples in enumerate(length.tolist()):
            cut = slice(None, num_samples)
            scores.append(score_mixture(estimates[item, :, cut], targets[item, :, cut], mixture[item, cut]))
        self.num_mixtures += len(scores)
        self.num_silent += sum(score is None for score in scores)
        valid = [score for score in scores if score is not None]
        self.num_perfect += sum(is_perfect for _, _, is_perfect in valid)
        for value, improvement, is_perfect in valid:
            if not is_perfect:
                self.sum_si_sdr += value
                self.sum_si_sdri += improvement
                self.sum_si_sdri_squared += improvement**2
        rows = [(math.nan, math.nan) if score is None else score[:2] for score in scores]
        si_sdr, si_sdri = torch.tensor(rows, dtype=torch.float32).reshape(-1, 2).unbind(-1)
        self._last = (si_sdr, si_sdri)

    def per_mixture(self) -> tuple[Tensor, Tensor]:
        """SI-SDR and SI-SDRi in dB of each mixture of the last update, NaN if silent. Shape: (B,) each."""
        return self._last

    def compute(self) -> dict[str, Tensor]:
        count = (self.num_mixtures - self.num_silent - self.num_perfect).double()
        mean = self.sum_si_sdri / count  # 0 / 0 is NaN
        variance = (self.sum_si_sdri_squared - count * mean.square()).clamp_min(0) / (count - 1)
        stderr = torch.where(count > 1, (variance / count).sqrt(), math.nan)
        values = {
            "si_sdr": self.sum_si_sdr / count,
            "si_sdri": mean,
            "si_sdri_stderr": stderr,
            "num_mixtures": self.num_mixtures,
            "num_silent": self.num_silent,
            "num_perfect": self.num_perfect,
        }
        return {name: value.float() for name, value in values.items()}


def score_mixture(estimates: Tensor, targets: Tensor, mixture: Tensor) -> tuple[float, float, bool] | None:
    """SI-SDR and SI-SDRi in dB of one mixture, means over its sources, and whether it counts as perfect.

    None when a target is silent. Shape: (C, T), (C, T), (T,).
    """
    # float64: in float32 a perfect estimate reaches 85 dB only, and could not be told from a good one.
    estimates, targets, mixture = estimates.double(), targets.double(), mixture.double()
    if targets.shape[-1] == 0 or bool((targets.std(-1, correction=0) < SILENT_RMS).any()):
        return None
    if not bool(estimates.isfinite().all()):
        return math.nan, math.nan, False  # a network that broke must show in the average
    _, permutation = permutation_invariant_training(estimates[None], targets[None], _si_sdr)
    after = _si_sdr(estimates[permutation[0]], targets)  # (C,)
    before = _si_sdr(mixture.expand_as(targets), targets)
    is_perfect = bool((torch.cat([after, before]) > PERFECT_DB).any())
    return after.mean().item(), (after - before).mean().item(), is_perfect


def _si_sdr(estimates: Tensor, targets: Tensor) -> Tensor:
    return scale_invariant_signal_distortion_ratio(estimates, targets, zero_mean=True)


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
