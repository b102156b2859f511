"""Scores that stand for a listener, by packages that need not be installed: PESQ, STOI, AECMOS, DNSMOS.

All of them judge 16 kHz. A clip that a scorer cannot judge (a silent reference, no utterance found, too short) raises
NoScore; no number is ever put in its place.

PESQ and STOI compare with the target. AECMOS and DNSMOS are networks that only listen, and they can be fooled: for a
recording of double talk answered by zeros AECMOS, which does not see levels, gives 4.6 of 5 for the echo and 5.0 for
the speech. Read these only beside the output level and a score that knows the target.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torchaudio.functional import resample
from torchmetrics.utilities.prints import rank_zero_only

log = logging.getLogger(__name__)

RATE_HZ = 16000
_MIN_S = 0.25  # what PESQ asks for
_SILENT_RMS = 2**-15 / 12**0.5  # the quantisation noise of 16-bit audio
# AECMOS judges the first 20 s and says so on every longer clip. One sample less keeps it quiet.
_AECMOS_SAMPLES = 20 * RATE_HZ - 1
_TALK_TYPES = {"double_talk": "dt", "far_end": "st", "near_end": "nst"}
_NEAR_END = ("double_talk", "near_end")


class NoScore(Exception):
    """A clip that a scorer cannot judge; the message says why."""


class Clip(NamedTuple):
    """One recording at 16 kHz within [-1, 1], each signal (T,) float32; `target` is None where it is unknown."""

    output: np.ndarray
    mic: np.ndarray
    far: np.ndarray
    target: np.ndarray | None
    scenario: str


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A way to score a clip.

    *imports*: modules that must be there. *install*: what pip installs them from. *columns*: the names of its scores,
    with the scenarios in which each means something. *score*: may raise NoScore. *needs_target*: clips without a
    target are none of its business.
    """

    imports: tuple[str, ...]
    install: str
    columns: Mapping[str, tuple[str, ...]]
    score: Callable[[Clip], dict[str, float]]
    needs_target: bool


def clip_at_16khz(
    output: Tensor, mic: Tensor, far: Tensor, target: Tensor | None, *, sample_rate: int, scenario: str
) -> Clip:
    """What the scorers take: resampled, and limited to full scale as any sound card does.

    Shape: (T,) each.
    """

    def prepared(signal: Tensor) -> np.ndarray:
        signal = resample(signal.detach().float().cpu(), sample_rate, RATE_HZ)
        return signal.clamp(-1, 1).numpy()

    return Clip(prepared(output), prepared(mic), prepared(far), None if target is None else prepared(target), scenario)


def importable(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the scorers whose packages are installed; one warning for each other that says what to install.

    Raises ValueError for a name that is none of SCORERS.
    """
    usable = []
    for name in checked_names(names):
        try:
            for module in SCORERS[name].imports:
                importlib.import_module(module)
        except ImportError as error:
            _warn(f"{name} is left out ({error}). To have it: pip install {SCORERS[name].install}")
        else:
            usable.append(name)
    return tuple(usable)


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of scorers. Raises ValueError for one that is none, and for what is no list."""
    unknown = [name for name in names if name not in SCORERS] if isinstance(names, list | tuple) else [names]
    if unknown:
        raise ValueError(f"scores must be a list of {', '.join(SCORERS)}, got {unknown[0]!r}")
    return tuple(names)


@rank_zero_only
def _warn(message: str) -> None:
    log.warning(message)


def applies(name: str, scenario: str, *, has_target: bool) -> bool:
    """Whether a scorer has anything to say on a clip."""
    scorer = SCORERS[name]
    return (has_target or not scorer.needs_target) and any(scenario in where for where in scorer.columns.values())


def score(name: str, clip: Clip) -> dict[str, float]:
    """The columns of a scorer for a clip, those that mean something in its scenario.

    Raises NoScore.
    """
    if clip.output.size < _MIN_S * RATE_HZ:
        raise NoScore(f"shorter than {_MIN_S} s")
    if not np.isfinite(clip.output).all():
        raise NoScore("the output is not finite")
    scores = SCORERS[name].score(clip)
    return {column: scores[column] for column, where in SCORERS[name].columns.items() if clip.scenario in where}


def _pesq(clip: Clip) -> dict[str, float]:
    """Wide-band PESQ, ITU-T P.862.2, MOS-LQO 1.04 to 4.64."""
    import pesq

    _require_sound(clip, "target", "output")
    try:
        return {"pesq": float(pesq.pesq(RATE_HZ, clip.target, clip.output, "wb"))}
    except (pesq.PesqError, ValueError) as error:  # no utterance found; NaN inside, of a constant output
        raise NoScore(str(error)) from error


def _stoi(clip: Clip) -> dict[str, float]:
    """Short-time objective intelligibility (Taal et al. 2011), 0 to 1."""
    import pystoi

    _require_sound(clip, "target", "output")
    with warnings.catch_warnings():
        # With too little speech it warns and returns 1e-5.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return {"stoi": float(pystoi.stoi(clip.target, clip.output, RATE_HZ))}
        except RuntimeWarning as warning:
            raise NoScore(str(warning)) from warning


def _aecmos(clip: Clip) -> dict[str, float]:
    """AECMOS (Purin et al. 2022), the 16 kHz model that is told the scenario: annoyance of the echo, and of any other
    degradation, 1 to 5, of the first 20 s.
    """
    from speechmos import aecmos

    _require_sound(clip, "mic")  # not the output: a mute answer to a recording has its score
    signals = {"lpb": clip.far, "mic": clip.mic, "enh": clip.output}
    signals = {name: signal[:_AECMOS_SAMPLES] for name, signal in signals.items()}
    found = aecmos.run(signals, RATE_HZ, _TALK_TYPES[clip.scenario])
    return {"aecmos_echo": float(found["echo_mos"]), "aecmos_degradation": float(found["deg_mos"])}


def _dnsmos(clip: Clip) -> dict[str, float]:
    """DNSMOS P.835 (Reddy et al. 2022): quality of speech, background and overall, 1 to 5."""
    from speechmos import dnsmos

    _require_sound(clip, "mic")
    found = dnsmos.run(clip.output, RATE_HZ)
    return {f"dnsmos_{name}": float(found[f"{name}_mos"]) for name in ("sig", "bak", "ovrl")}


def _require_sound(clip: Clip, *names: str) -> None:
    """PESQ fails in its own ways on silence; STOI returns 0, the networks a constant."""
    for name in names:
        if np.std(getattr(clip, name)) < _SILENT_RMS:
            raise NoScore(f"the {name} is silent")


_SPEECHMOS = {"install": "speechmos librosa onnxruntime requests", "needs_target": False}
SCORERS: Mapping[str, Scorer] = {
    "pesq": Scorer(imports=("pesq",), install="pesq", columns={"pesq": _NEAR_END}, score=_pesq, needs_target=True),
    "stoi": Scorer(imports=("pystoi",), install="pystoi", columns={"stoi": _NEAR_END}, score=_stoi, needs_target=True),
    # What the AEC Challenge reports of it; elsewhere its answer is a constant.
    "aecmos": Scorer(
        imports=("speechmos.aecmos",),
        columns={"aecmos_echo": ("double_talk", "far_end"), "aecmos_degradation": _NEAR_END},
        score=_aecmos,
        **_SPEECHMOS,
    ),
    "dnsmos": Scorer(
        imports=("speechmos.dnsmos",),
        columns={f"dnsmos_{name}": _NEAR_END for name in ("sig", "bak", "ovrl")},
        score=_dnsmos,
        **_SPEECHMOS,
    ),
}
