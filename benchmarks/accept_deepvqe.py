"""Echo cancellation of recorded calls: ours against classical cancellers, doing nothing, and silence.

Ours is `experiment=deepvqe_demo`, trained on the folder's talkers and noises with synthetic echo within the budget
(benchmarks/training.py), or the checkpoint that --ckpt names. What is measured, and how: benchmarks/echo_scores.py.
All outputs are written below the work folder, to listen to.
"""

import importlib.util
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accept import Scores, mean_and_error
from benchmarks.echo_baselines import speex, webrtc_aec3
from benchmarks.echo_scores import MEASURES, Canceller, Clip, Values, cancel, collect, known, read_clips, score, summary
from benchmarks.echo_scores import table as score_table
from benchmarks.training import OurTraining, plan_training
from data.audio import write_audio
from data.manifest import read_manifest, write_manifest
from metrics import perceptual
from models import load
from models.base import System
from models.checkpoint import read_checkpoint

OURS, REFERENCE = "ours", "AEC3"
# name -> canceller, package, what pip installs it from
BASELINES = {
    "AEC3": (webrtc_aec3, "livekit", "livekit==1.2.1"),
    "AEC3 + NS": (partial(webrtc_aec3, noise_suppression=True), "livekit", "livekit==1.2.1"),
    "speex": (speex, "pyaec", "pyaec==1.0.1"),
    "speex + supp.": (partial(speex, suppression=True), "pyaec", "pyaec==1.0.1"),
}
SCORERS = ("pesq", "aecmos")
_PAIRED = ("si_sdri", "sdri", "pesq", "degradation")
_RESERVE = 0.05  # of the budget


def report(
    protocol: dict[str, Any], manifest: Path, work: Path, checkpoint: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """Every measure of every contestant, ours against AEC3, and what was reached of the goals."""
    clips = read_clips(manifest, protocol["sample_rate"])
    facts: dict[str, Any] = {"checkpoint": str(checkpoint)} if checkpoint else {}
    if checkpoint is None:
        checkpoint, facts = start_ours(protocol, manifest.parent, work).finish()
    else:
        print(f"ours: {checkpoint}, trained elsewhere: no acceptance of the recipe")
    contestants = our_cancellers(checkpoint, protocol) | baselines()
    scores, values, delays = run_contestants(contestants, clips, protocol, work)
    lines = [
        score_table(scores),
        "Mean +- standard error over so many independent recordings. Silence has the best AECMOS (1 to 5), and doing",
        "nothing a good degradation: read them beside the level and the echo.",
        *(f"{name}: output {delay} samples late, taken out" for name, delay in delays.items() if delay),
        *paired(scores),
        *verdicts(scores, protocol),
    ]
    result = {"ours": facts, "scores": scores, "clips": values, "delay_samples": delays, "notes": lines[3:]}
    return "\n".join(lines), result


def start_ours(protocol: dict[str, Any], folder: Path, work: Path) -> OurTraining:
    """The recipe on the folder's talkers, its epochs stretched or cut to fit."""
    speech = folder / protocol["speech_manifest"]
    val_speakers = set(protocol["val_speakers"])
    rows = read_manifest(speech)
    parts = {
        "train": [row for row in rows if row["speaker"] not in val_speakers],
        "val": [row for row in rows if row["speaker"] in val_speakers],
    }
    for name, part in parts.items():
        if len({row["speaker"] for row in part}) < 2:
            raise SystemExit(f"error: {speech}: fewer than two talkers for {name} (val_speakers of the protocol)")
        write_manifest(work / f"{name}.jsonl", part)
    noise = folder / protocol["noise_manifest"]
    epochs, batch_size = protocol["epochs"], protocol["batch_size"]
    overrides = [
        f"experiment={protocol['experiment']}",
        f"data.train_manifest={work / 'train.jsonl'}",
        f"data.val_manifest={work / 'val.jsonl'}",
        "data.test_manifest=null",
        f"data.noise_manifest={noise}",
        f"data.val_noise_manifest={noise}",
        *(f"data.{stage}rir_manifest=null" for stage in ("", "val_", "test_")),
        "data.test_noise_manifest=null",
        f"data.batch_size={batch_size}",
        f"seed={protocol['train_seed']}",
    ]

    def length(steps: int) -> list[str]:
        return [f"trainer.max_steps={steps}", f"data.train_examples={steps // epochs * batch_size}"]

    plan = plan_training(
        overrides,
        length=length,
        epochs=epochs,
        cpu_minutes=protocol["cpu_minutes"],
        reserve=_RESERVE,
        work=work,
    )
    return OurTraining(overrides, length=length, plan=plan, work=work)


def our_cancellers(checkpoint: Path, protocol: dict[str, Any]) -> dict[str, Canceller]:
    """The trained network, and the same one as it was before training."""
    system = load(checkpoint)
    torch.manual_seed(protocol["train_seed"])
    untrained = type(system)(**read_checkpoint(checkpoint)["system"]["arguments"]).eval()

    def canceller(system: System, mic: Tensor, far: Tensor) -> Tensor:
        return system.predict(mic=mic, far=far, sample_rate=protocol["sample_rate"])["enhanced"]

    return {OURS: partial(canceller, system), "untrained": partial(canceller, untrained)}


def baselines() -> dict[str, Canceller]:
    """The classical cancellers that are installed, doing nothing, and silence; a line for each that is missing."""
    found: dict[str, Canceller] = {}
    for name, (canceller, package, install) in BASELINES.items():
        if importlib.util.find_spec(package):
            found[name] = canceller
        else:
            print(f"{name}: not installed, left out; pip install {install}")
    return found | {"unprocessed": lambda mic, far: mic, "silence": lambda mic, far: torch.zeros_like(mic)}


def run_contestants(
    contestants: dict[str, Canceller], clips: list[Clip], protocol: dict[str, Any], work: Path
) -> tuple[dict[str, Scores], dict[str, dict[str, Values]], dict[str, int]]:
    """Per measure the scores of all; per contestant every value of every clip; and the constant delays."""
    sample_rate, scorers = protocol["sample_rate"], perceptual.importable(SCORERS)
    values: dict[str, dict[str, Values]] = {}
    delays: dict[str, int] = {}
    shutil.rmtree(work / "audio", ignore_errors=True)
    for name, canceller in contestants.items():
        print(f"{name} …", flush=True)
        outputs, delays[name] = cancel(canceller, clips, sample_rate, may_be_late=name in BASELINES)
        values[name] = {
            clip.name: score(clip, outputs[clip.name], sample_rate=sample_rate, scorers=scorers) for clip in clips
        }
        for clip in clips:
            folder = name.replace(" ", "_")
            write_audio(work / "audio" / folder / f"{clip.name}.wav", outputs[clip.name], sample_rate)
    scores = {key: collect(measure, values, clips, protocol["count_once"]) for key, measure in MEASURES.items()}
    return scores, values, delays


def paired(scores: dict[str, Scores]) -> list[str]:
    """Ours minus AEC3, of the same recordings."""
    lines = []
    for key in _PAIRED:
        mean, error = lead(scores[key])
        if not math.isnan(mean):
            lines.append(f"ours minus {REFERENCE}, {MEASURES[key].title.strip()}: {mean:+.2f} +- {error:.2f}")
    return lines


def lead(scores: Scores) -> tuple[float, float]:
    """Mean of ours minus AEC3 and its standard error; NaN where there is nothing to compare."""
    pairs = zip(scores.get(OURS, []), scores.get(REFERENCE, []), strict=False)
    return mean_and_error(known([a - b for a, b in pairs]))


def verdicts(scores: dict[str, Scores], protocol: dict[str, Any]) -> list[str]:
    """What must hold, and the goals."""
    must, goals = protocol["must_hold"], protocol["goals"]

    def ours(key: str) -> float:
        return summary(MEASURES[key], scores[key][OURS])[0]

    level = ours("worst_level")
    verdict = "not measured" if math.isnan(level) else ("PASS" if abs(level) <= must["level_db"] else "FAIL")
    lines = [
        f"must hold: near ends without echo keep their level within {must['level_db']:g} dB: {level:+.2f}: {verdict}"
    ]
    reached = {
        f"ERLE of {goals['erle_db']:g} dB": ours("erle") - goals["erle_db"],
        f"SI-SDRi of {goals['si_sdri_db']:g} dB": ours("si_sdri") - goals["si_sdri_db"],
        f"PESQ ahead of {REFERENCE}": lead(scores["pesq"])[0],
        f"AECMOS degradation ahead of {REFERENCE}": lead(scores["degradation"])[0],
    }
    for name, margin in reached.items():
        verdict = "not measured" if math.isnan(margin) else ("reached" if margin > 0 else "missed")
        lines.append(f"goal: {name}: {margin:+.2f}: {verdict}")
    return lines
