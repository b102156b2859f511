"""Recorded calls, what cancellers make of them, and how well: the measures of the echo acceptance run.

Decisions that are not obvious
* Classical cancellers delay their output by a few milliseconds, which SI-SDR would take for noise. One constant shift
  of each, found on near ends without echo by cross-correlation with the microphone, is taken out before anything is
  scored, and reported; ours have none. The cross-correlation is whitened: high-pass filters, which the classical
  cancellers have, turn the phase of low voices so far that the highest peak of the plain one lies elsewhere.
* For the same phases SI-SDR calls even a perfect near end poor. SDR as BSS-eval defines it allows the output to be a
  filtered target (512 taps), and stands beside it for a fair comparison.
* Each clean signal is also fed as microphone with a silent far end: all of it should come out.
* Recordings that are no independent examples (`count_once` of the protocol) are averaged first.
* AECMOS judges the second half of far-end single talk, as in the AEC Challenge. Of double talk the Challenge takes the
  end of recordings longer than 15 s; these are shorter and judged whole.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.accept import Scores, mean_and_error
from data.audio import read_audio
from data.manifest import read_manifest
from metrics import perceptual
from metrics.echo import CAP_DB, echo_ratios, is_silent, ratio_db, speech_ratios
from metrics.separation import sdr

Canceller = Callable[[Tensor, Tensor], Tensor]
Values = dict[str, float | None]

_MAX_SHIFT_S = 0.03
_ALONE = "_alone"  # name of a clean signal without far end, after the clip's
_KINDS = {
    "synthetic doubletalk": "synthetic",
    "real doubletalk": "double_talk",
    "real far-end single talk": "far_end",
    "real near-end single talk": "near_end",
}


class Clip(NamedTuple):
    """A recorded call: *mic*, *far* and *clean* (None where it is unknown), (T,) each.

    *kind*: synthetic (double talk), double_talk, far_end, near_end, alone (a clean signal without far end).
    """

    name: str
    kind: str
    mic: Tensor
    far: Tensor
    clean: Tensor | None


class Measure(NamedTuple):
    """A line of the table: one value over the clips of some kinds; their mean, or the one farthest from zero."""

    title: str
    value: str
    kinds: tuple[str, ...]
    worst: bool = False


_NEAR_END = ("near_end", "alone")
MEASURES = {
    "si_sdri": Measure("double talk: SI-SDRi dB", "si_sdri_db", ("synthetic",)),
    "sdri": Measure("double talk: SDRi dB, 512 taps", "sdri_db", ("synthetic",)),
    "pesq": Measure("double talk: PESQ-WB", "pesq", ("synthetic",)),
    "erle": Measure("far end: ERLE, 2nd half, dB", "erle_late_db", ("far_end",)),
    "far_end_echo": Measure("far end: AECMOS echo", "aecmos_echo", ("far_end",)),
    "level": Measure("near end: level dB", "level_db", _NEAR_END),
    "worst_level": Measure("near end: worst level dB", "level_db", _NEAR_END, worst=True),
    "near_end_degradation": Measure("near end: AECMOS degradation", "aecmos_degradation", ("near_end",)),
    "echo": Measure("real double talk: AECMOS echo", "aecmos_echo", ("double_talk",)),
    "degradation": Measure("  AECMOS degradation", "aecmos_degradation", ("double_talk",)),
    "double_talk_level": Measure("  level dB", "level_db", ("double_talk",)),
}


def read_clips(manifest: Path, sample_rate: int) -> list[Clip]:
    """The recordings of a manifest, and each clean signal once more as a microphone without echo."""
    clips = []
    for row in read_manifest(manifest, required=("id", "kind", "mic_filepath", "farend_filepath", "duration")):
        kind = next((kind for text, kind in _KINDS.items() if row["kind"].startswith(text)), None)
        if kind is None:
            raise SystemExit(f"error: {manifest}: {row['id']}: kind={row['kind']}: none of {', '.join(_KINDS)}")
        keys = ("mic_filepath", "farend_filepath", "clean_filepath")
        mic, far, clean = (read_audio(row[k], sample_rate=sample_rate) if k in row else None for k in keys)
        if clean is not None:
            clean = clean * row.get("clean_scale", 1.0)
        clips.append(Clip(row["id"], kind, mic, far, clean))
    clean = {clip.name: clip.clean for clip in clips if clip.clean is not None}
    return clips + [Clip(f"{name}{_ALONE}", "alone", mic, torch.zeros_like(mic), None) for name, mic in clean.items()]


def cancel(
    canceller: Canceller, clips: Sequence[Clip], sample_rate: int, *, may_be_late: bool
) -> tuple[dict[str, Tensor], int]:
    """The output for each clip, and by how many samples it came late if it may: that much is taken out.

    An output that is not finite ends the run: no mean could show it.
    """
    outputs = {clip.name: canceller(clip.mic, clip.far) for clip in clips}
    if broken := [name for name, output in outputs.items() if not bool(output.isfinite().all())]:
        raise SystemExit(f"error: the output for {', '.join(broken)} is not finite")
    if not may_be_late:
        return outputs, 0
    without_echo = [(outputs[clip.name], clip.mic) for clip in clips if clip.kind in _NEAR_END]
    delay = constant_delay(without_echo, max_samples=round(_MAX_SHIFT_S * sample_rate))
    return {name: advanced(output, delay) for name, output in outputs.items()}, delay


def constant_delay(pairs: Sequence[tuple[Tensor, Tensor]], *, max_samples: int) -> int:
    """By how many samples the first signals lag behind the second, at most *max_samples* either way.

    The highest peak of their generalised cross-correlations (PHAT; Knapp and Carter 1976), summed; 0 where they have
    nothing in common.

    Shape: (T,), (T,) of each pair.
    """
    total = torch.zeros(2 * max_samples + 1, dtype=torch.float64)
    for late, early in pairs:
        size = len(late) + max_samples
        spectrum = torch.fft.rfft(late.double(), size) * torch.fft.rfft(early.double(), size).conj()
        phases = spectrum / spectrum.abs().clamp_min(1e-9 * float(spectrum.abs().max()) + 1e-30)
        total += torch.fft.irfft(phases, size).roll(max_samples)[: 2 * max_samples + 1]
    return int(total.argmax()) - max_samples if total.max() > 0 else 0


def advanced(signal: Tensor, num_samples: int) -> Tensor:
    """The signal that many samples earlier (later if negative), with zeros where it has no samples. Shape: (T,)."""
    moved = torch.zeros_like(signal)
    if num_samples >= 0:
        moved[: len(signal) - num_samples] = signal[num_samples:]
    else:
        moved[-num_samples:] = signal[:num_samples]
    return moved


def score(clip: Clip, output: Tensor, *, sample_rate: int, scorers: Sequence[str]) -> Values:
    """What is measured of one output; None where there is no answer."""
    values: Values = {"level_db": ratio_db(output, clip.mic)}
    if clip.kind == "synthetic" and clip.clean is not None:
        values |= speech_ratios(output, clip.mic, clip.clean)
        values["sdri_db"] = _sdr_db(output, clip.clean) - _sdr_db(clip.mic, clip.clean)
    if clip.kind == "far_end":
        values |= echo_ratios(output, clip.mic)
    wanted = {"synthetic": "pesq", "alone": None}.get(clip.kind, "aecmos")
    if wanted not in scorers:
        return values
    part = slice(len(output) // 2, None) if clip.kind == "far_end" else slice(None)
    scenario = "double_talk" if clip.kind == "synthetic" else clip.kind
    clean = None if clip.clean is None else clip.clean[part]
    signals = perceptual.clip_at_16khz(
        output[part], clip.mic[part], clip.far[part], clean, sample_rate=sample_rate, scenario=scenario
    )
    try:
        return values | perceptual.score(wanted, signals)
    except perceptual.NoScore:
        return values


def _sdr_db(signal: Tensor, clean: Tensor) -> float:
    """SDR with a filter of 512 taps allowed, within +-80 dB; silence has -80 dB."""
    return -CAP_DB if is_silent(signal) else min(CAP_DB, max(-CAP_DB, sdr(signal, clean).item()))


def collect(
    measure: Measure, values: dict[str, dict[str, Values]], clips: Sequence[Clip], count_once: Sequence[Sequence[str]]
) -> Scores:
    """Of each contestant a value for each independent example of a measure; NaN where there is none."""
    group_of = {name: group[0] for group in count_once for name in group}
    examples: dict[tuple[str, str], list[str]] = {}
    for clip in clips:
        if clip.kind in measure.kinds:
            recording = clip.name.removesuffix(_ALONE)
            examples.setdefault((clip.kind, group_of.get(recording, recording)), []).append(clip.name)
    scores: Scores = {}
    for contestant, by_clip in values.items():
        found = [[by_clip[name].get(measure.value) for name in names] for names in examples.values()]
        scores[contestant] = [mean_and_error([v for v in row if v is not None])[0] for row in found]
    return scores


def known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def summary(measure: Measure, values: Sequence[float]) -> tuple[float, float]:
    """What a measure makes of a contestant's values: the worst, or their mean and its standard error; NaN for none."""
    if measure.worst:
        return max(known(values), key=abs, default=math.nan), math.nan
    return mean_and_error(known(values))


def table(scores: dict[str, Scores]) -> str:
    """A line for each measure, with the number of independent examples; a column for each contestant."""
    contestants = list(next(iter(scores.values())))
    lines = [" " * 36 + "".join(f"{name:>15}" for name in contestants)]
    for key, by_contestant in scores.items():
        count = max(len(known(values)) for values in by_contestant.values())
        cells = [_cell(*summary(MEASURES[key], values)) for values in by_contestant.values()]
        lines.append(f"{f'{MEASURES[key].title} ({count})':<36}" + "".join(f"{text:>15}" for text in cells))
    return "\n".join(lines)


def _cell(value: float, error: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if math.isnan(error) else f"{value:.2f} +- {error:.2f}"
