"""How well echo was cancelled, in each scenario apart, because each asks something else.

* far_end (far-end single talk: all that the microphone hears is echo): ERLE, over the whole clip and over its second
  half, when a canceller has had time to adapt. Nowhere else: with a talker in the room it would punish keeping them.
* near_end (nothing to cancel) and double_talk: SI-SDR against the target, PESQ and STOI where there is one, AECMOS and
  DNSMOS.
* everywhere: the level of the output against the microphone. Silence is perfect by ERLE and nearly so by AECMOS; here
  it shows.

Ratios end at +-80 dB, which is what silence gets: one infinite value would hide all others. What is undefined is left
out; what cannot be scored, though it should be, is left out and counted as failed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad
from torchmetrics import Metric

from metrics import perceptual
from metrics.separation import SILENT_ESTIMATE_RMS, SILENT_RMS, si_sdr

SCENARIOS = ("double_talk", "far_end", "near_end")
CAP_DB = 80.0
_NEAR_END = ("double_talk", "near_end")
# As in losses/echo.py, which may not be imported here.
_FAR_END_RMS = 10 ** (-70 / 20)
_FAR_END_RANGE = 10 ** (-40 / 20)
# Columns of a row whose mean goes by another name.
_NAMES = {"erle_db": "erle", "erle_late_db": "erle_late", "si_sdr_db": "si_sdr", "si_sdri_db": "si_sdri"}
_DELAY_NAMES = {"delay_correct": "delay_accuracy", "delay_error_ms": "delay_error_ms"}  # of all scenarios together

Values = dict[str, float | None]


def ratio_db(numerator: Tensor, denominator: Tensor) -> float:
    """10 log10 of the ratio of the energies of two signals, within +-80 dB.

    Shape: (T,), (T,).
    """
    return _capped(10 * torch.log10(numerator.double().square().sum() / denominator.double().square().sum()))


def echo_ratios(output: Tensor, mic: Tensor) -> Values:
    """`erle_db` and `erle_late_db`, the echo return loss enhancement of far-end single talk: energy of the microphone
    over energy of the output, of the whole clip and of its second half; None where the microphone is silent.

    Cancelling all but a thousandth of the amplitude is 60 dB, doing nothing 0 dB.

    Shape: (T,), (T,).
    """
    half = mic.shape[-1] // 2
    parts = {"erle_db": slice(None), "erle_late_db": slice(half, None)}
    return {name: None if is_silent(mic[part]) else ratio_db(mic[part], output[part]) for name, part in parts.items()}


def speech_ratios(output: Tensor, mic: Tensor, target: Tensor) -> Values:
    """`si_sdr_db` of the output, and `si_sdri_db`, its improvement over the microphone; None where the
    target is silent.

    A constant output has -80 dB: the ratio of silence is minus infinity. Where the microphone already is the target, up
    to its level, there is nothing to improve, and `si_sdri_db` is None.

    Shape: (T,) each.
    """
    if is_silent(target):
        return {"si_sdr_db": None, "si_sdri_db": None}
    after, before = (
        -CAP_DB if bool(signal.double().std(correction=0) < SILENT_ESTIMATE_RMS) else _capped(si_sdr(signal, target))
        for signal in (output, mic)
    )
    return {"si_sdr_db": after, "si_sdri_db": None if before == CAP_DB else after - before}


def far_active_frames(far: Tensor, *, hop_samples: int, num_frames: int) -> Tensor:
    """Which frames of the far end carry sound, as the delay's loss sees it: those not more than 40 dB below the
    loudest, and above -70 dB of full scale. Frame k is the two hops around sample k * hop_samples.

    Shape: (T,) -> (frames,) bool.
    """
    missing = (num_frames + 1) * hop_samples - (far.shape[-1] + hop_samples)
    power = pad(far[None], (hop_samples, max(0, missing))).square()
    rms = avg_pool1d(power, 2 * hop_samples, stride=hop_samples)[0, :num_frames].sqrt()
    return (rms > _FAR_END_RMS) & (rms >= _FAR_END_RANGE * rms.max())


def estimated_delay(delay_distribution: Tensor, far: Tensor, *, hop_samples: int) -> int | None:
    """The most likely delay in frames, by the mean distribution over the frames in which the far end is active; None
    where none is. Frames after the end of the far end are padding.

    Shape: (frames, D), (T,).
    """
    num_frames = min(delay_distribution.shape[0], 1 + far.shape[-1] // hop_samples)
    active = far_active_frames(far, hop_samples=hop_samples, num_frames=num_frames)
    if not active.any():
        return None
    return int(delay_distribution[:num_frames].float()[active].mean(0).argmax())


def is_silent(signal: Tensor) -> bool:
    """Constant but for the quantisation noise of 16-bit audio, or without samples. Shape: (T,)."""
    return signal.shape[-1] == 0 or bool(signal.double().std(correction=0) < SILENT_RMS)


class EchoMetrics(Metric):
    """Means over clips, per scenario.

    Sums are taken over all processes. Where these have different numbers of batches, an example that is repeated to
    make them equal (data/sampler.py) counts twice.

    `compute()` returns float32 scalars, those that at least one clip has contributed to:
    * `erle_far_end`, `erle_late_far_end` in dB;
    * `si_sdr_<scenario>`, `si_sdri_<scenario>` in dB, of double_talk and near_end with a target;
    * `level_db_<scenario>`, RMS of the output over the microphone's;
    * of *scores*, `pesq_<scenario>`, `stoi_<scenario>`, `dnsmos_{sig,bak,ovrl}_<scenario>` and
      `aecmos_degradation_<scenario>` of double_talk and near_end, `aecmos_echo_<scenario>` of double_talk and far_end;
    * `delay_accuracy`, share of clips whose estimated delay is within one frame of the true one (in whole frames), and
      `delay_error_ms`, the mean distance between the two;
    * `num_<scenario>`, clips; `num_failed_<score>` for erle, si_sdr and each of *scores*, clips that could not be
      scored, where there are any.

    *sample_rate* in Hz. *hop_samples* of the delay distribution's frames. *scores*: some of pesq, stoi, aecmos, dnsmos;
    one whose package is missing is left out, with a warning.
    """

    full_state_update = False

    sums: Tensor
    counts: Tensor
    num_of: Tensor
    num_failed: Tensor

    def __init__(self, *, sample_rate: int, hop_samples: int, scores: Sequence[str] = ()) -> None:
        super().__init__()
        self.sample_rate, self.hop_samples = sample_rate, hop_samples
        self.scores = perceptual.importable(scores)
        listened = [column for name in self.scores for column in perceptual.SCORERS[name].columns]
        self.columns = (*_NAMES, *listened, "level_db", "delay_ms", "delay_error_ms")
        self._averaged = (*_NAMES, *listened, "level_db", *_DELAY_NAMES)
        self._failing = ("erle", "si_sdr", *self.scores)
        self._last: list[dict] = []
        # Sums, so that ranks add up to exactly one process's result; float64, so that large sets do too.
        of_columns = (len(self._averaged), len(SCENARIOS))
        self.add_state("sums", torch.zeros(of_columns, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(of_columns, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_of", torch.zeros(len(SCENARIOS), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_failed", torch.zeros(len(self._failing), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        output: Tensor,
        mic: Tensor,
        far: Tensor,
        target: Tensor,
        has_target: Tensor,
        length: Tensor,
        scenario: Tensor,
        delay_samples: Tensor | None = None,
        delay_distribution: Tensor | None = None,
    ) -> None:
        """Adds a batch; samples from `length` on are ignored.

        Shape: output, mic, far, target (B, T), has_target (B,) bool, length (B,) in samples, scenario (B,) index of
        SCENARIOS, delay_samples (B,) the true delay, negative where unknown, delay_distribution (B, frames, D) over
        delays in frames.
        """
        _check_shapes(output, mic=mic, far=far, target=target, has_target=has_target, length=length, scenario=scenario)
        signals = [signal.detach().float().cpu() for signal in (output, mic, far, target)]
        delays = [-1.0] * len(output) if delay_samples is None else delay_samples.tolist()
        known, places = has_target.tolist(), scenario.tolist()
        self._last = []
        for item, num_samples in enumerate(length.tolist()):
            clip = [signal[item, :num_samples] for signal in signals]
            place = places[item]
            row: dict = {"scenario": SCENARIOS[place], **dict.fromkeys(self.columns)}
            row |= self._scores(*clip, has_target=known[item], scenario=SCENARIOS[place])
            if delay_distribution is not None:
                row |= self._delay(delay_distribution[item].detach().cpu(), clip[2], delays[item])
            self._last.append(row)
            self._add(row, place)

    def rows(self) -> list[dict[str, float | str | None]]:
        """One for each clip of the last update: `scenario` and *columns*, None where undefined."""
        return [{name: row[name] for name in ("scenario", *self.columns)} for row in self._last]

    def compute(self) -> dict[str, Tensor]:
        values = {}
        for index, column in enumerate(self._averaged):
            if column in _DELAY_NAMES:
                found = [(_DELAY_NAMES[column], self.sums[index].sum(), self.counts[index].sum())]
            else:
                names = [f"{_NAMES.get(column, column)}_{scenario}" for scenario in SCENARIOS]
                found = list(zip(names, self.sums[index], self.counts[index], strict=True))
            values |= {name: total / count for name, total, count in found if count > 0}
        for prefix, names, counts in (
            ("num_", SCENARIOS, self.num_of),
            ("num_failed_", self._failing, self.num_failed),
        ):
            values |= {prefix + name: count for name, count in zip(names, counts, strict=True) if count > 0}
        return {name: value.float() for name, value in values.items()}

    def _scores(
        self, output: Tensor, mic: Tensor, far: Tensor, target: Tensor, *, has_target: bool, scenario: str
    ) -> dict:
        """Everything but the delay; `failed` names what could not be scored. Shape: (T,) each."""
        row: dict = {"level_db": None if is_silent(mic) else ratio_db(output, mic), "failed": []}
        if scenario == "far_end":
            row |= echo_ratios(output, mic)
            row["failed"] += ["erle"] if row["erle_db"] is None else []
        elif has_target:
            row |= speech_ratios(output, mic, target)
            row["failed"] += ["si_sdr"] if row["si_sdr_db"] is None else []
        wanted = [name for name in self.scores if perceptual.applies(name, scenario, has_target=has_target)]
        if wanted:
            known = target if has_target else None
            clip = perceptual.clip_at_16khz(output, mic, far, known, sample_rate=self.sample_rate, scenario=scenario)
        for name in wanted:
            try:
                row |= perceptual.score(name, clip)
            except perceptual.NoScore:
                row["failed"].append(name)
        return row

    def _delay(self, delay_distribution: Tensor, far: Tensor, true_samples: float) -> Values:
        """Shape: (frames, D), (T,)."""
        frames = estimated_delay(delay_distribution, far, hop_samples=self.hop_samples)
        if frames is None:
            return {}
        ms_per_sample = 1000 / self.sample_rate
        values: Values = {"delay_ms": frames * self.hop_samples * ms_per_sample}
        if true_samples >= 0:
            values["delay_error_ms"] = abs(frames * self.hop_samples - true_samples) * ms_per_sample
            values["delay_correct"] = float(abs(frames - round(true_samples / self.hop_samples)) <= 1)
        return values

    def _add(self, row: dict, place: int) -> None:
        self.num_of[place] += 1
        for name in row["failed"]:
            self.num_failed[self._failing.index(name)] += 1
        for index, column in enumerate(self._averaged):
            if row.get(column) is not None:
                self.sums[index, place] += row[column]
                self.counts[index, place] += 1


def _capped(value_db: Tensor) -> float:
    return value_db.clamp(-CAP_DB, CAP_DB).item()  # NaN stays NaN


def _check_shapes(output: Tensor, **given: Tensor) -> None:
    for name, value in given.items():
        expected = output.shape if name in ("mic", "far", "target") else output.shape[:1]
        if value.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)}, as the output has, got {tuple(value.shape)}")
