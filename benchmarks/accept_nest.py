"""Self-supervised pre-training on half an hour of speech: what was learned, beside answers that look at nothing.

Ours is `experiment=nest_demo`, trained within the budget for each seed of the protocol (benchmarks/training.py).
* Masked accuracy on talkers that were never heard, their recordings noisy and masked as in validation, several times:
  beside the best constant answers, and beside repeating the token of the last frame that is not masked.
* How well the encoder's features tell these talkers apart (benchmarks/speaker_probe.py): beside those of the same
  encoder before its training, and beside a log-mel spectrogram.

Each talker gives one value per contestant, over all seeds their mean: standard errors are those over talkers.
A seed whose result is in the work folder is not run again, and one that was interrupted continues.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accept import Scores, mean_and_error, summarise, table
from benchmarks.speaker_probe import Features, accuracies, read_segments
from benchmarks.training import ROOT, OurTraining, Plan, plan_training
from data.audio import atomic_path
from data.loader import available_cores
from data.manifest import read_manifest, write_manifest
from data.ssl import SelfSupervisedData
from models.checkpoint import build_system, read_checkpoint
from models.nest import NEST
from modules.mel import MelPreprocessor

CONFIG = ROOT / "config"
OURS = "ours"
CONSTANT, BEST_CONSTANT, REPEAT = "training's commonest token", "test's commonest token", "last visible token"
UNTRAINED, LOG_MEL, CHANCE = "untrained encoder", "log-mel mean + std", "chance"
TITLES = {"accuracy": "Masked accuracy", "probe": "Talkers told apart"}
_RESERVE = 0.3  # of the budget: a step costs more beside another training than in the calibration
# What a training depends on; its plan is of no use to another one.
_OF_TRAINING = (
    "recipe",
    "experiment",
    "cpu_minutes",
    "validations",
    "num_test_speakers",
    "num_val_speakers",
    "noise_manifest",
)


def report(protocol: dict[str, Any], manifest: Path, work: Path) -> tuple[str, dict[str, Any]]:
    """Both measures for every seed and over all of them, and what was reached of the goals."""
    protocol = protocol | {"recipe": recipe_digest(protocol["experiment"], manifest)}
    parts = split(protocol, manifest)
    print(", ".join(f"{len(rows)} talkers for {name}" for name, rows in parts.items()), flush=True)
    run_seeds(protocol, manifest, parts, work)
    seeds = {}
    for seed in protocol["train_seeds"]:
        file = work / f"seed{seed}" / "result.json"
        seeds[seed] = json.loads(file.read_text())
        _same(file, seeds[seed].pop("protocol"), protocol)
    lines: list[str] = []
    result: dict[str, Any] = {"talkers": [row["speaker"] for row in parts["test"]], "seeds": seeds}
    for measure, title in TITLES.items():
        by_seed = {seed: found[measure] for seed, found in seeds.items()}
        rows = {f"seed {seed}": summarise(scores) for seed, scores in by_seed.items()}
        rows["all seeds"] = summarise(mean_over_seeds(list(by_seed.values())))
        for name, part in rows.items():
            lines += [f"{title}, {name}", table(part, "%"), ""]
        result[measure] = rows
    lines += [tokens_line(seed, found["tokens"]) for seed, found in seeds.items()]
    lines += ["", *verdicts(result, protocol["goals"])]
    return "\n".join(lines), result | {"notes": lines}


def recipe_digest(experiment: str, manifest: Path) -> str:
    """Changes with the recipe and with the data that are listed: results of others are not taken for its own."""
    files = [CONFIG / "experiment" / f"{experiment}.yaml", CONFIG / "model" / "nest.yaml", manifest]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def split(protocol: dict[str, Any], manifest: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows for training, validation and test, no talker in two of them."""
    rows = read_manifest(manifest)
    if len({row["speaker"] for row in rows}) < len(rows):
        raise SystemExit(f"error: {manifest}: the protocol needs one recording per talker")
    val, test = protocol["num_val_speakers"], protocol["num_test_speakers"]
    if len(rows) < val + test + 2:
        raise SystemExit(f"error: {manifest}: {len(rows)} talkers are too few for {val} + {test} that are held out")
    return {"train": rows[val:-test], "val": rows[:val], "test": rows[-test:]}


def run_seeds(protocol: dict[str, Any], manifest: Path, parts: dict[str, list[dict[str, Any]]], work: Path) -> None:
    """Train and score the seeds that have no result yet, as many at a time as there are cores.

    They share one calibration, and each pays for it.
    """
    missing = [seed for seed in protocol["train_seeds"] if not (work / f"seed{seed}" / "result.json").is_file()]
    at_a_time = available_cores()
    for group in (missing[start : start + at_a_time] for start in range(0, len(missing), at_a_time)):
        trainings = {seed: start_seed(protocol, manifest, parts, seed, work) for seed in group}
        for seed, training in trainings.items():
            print(f"seed {seed} …", flush=True)
            checkpoint, facts = training.finish()
            scores = score_seed(protocol, parts, seed, checkpoint, work / f"seed{seed}")
            result = {"protocol": protocol, "training": facts} | scores
            _write(work / f"seed{seed}" / "result.json", result)


def start_seed(
    protocol: dict[str, Any], manifest: Path, parts: dict[str, list[dict[str, Any]]], seed: int, work: Path
) -> OurTraining:
    """The training of a seed, begun or continued."""
    folder = work / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        # All talkers before the next draw: what is added to a recording is never its own speech.
        times = protocol["mask_draws"] if name == "test" else 1
        write_manifest(folder / f"{name}.jsonl", [row | {"id": row["speaker"]} for row in rows] * times)
    noise = manifest.parent / protocol["noise_manifest"]
    overrides = [
        f"experiment={protocol['experiment']}",
        f"model.train_ds.manifest_filepath={folder / 'train.jsonl'}",
        f"model.validation_ds.manifest_filepath={folder / 'val.jsonl'}",
        "model.test_ds.manifest_filepath=null",
        *(f"model.{part}_ds.noise_manifest={noise}" for part in ("train", "validation", "test")),
        f"seed={seed}",
    ]
    validations = protocol["validations"]

    def length(steps: int) -> list[str]:
        return [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps // validations}"]

    file, key = work / "plan.json", {name: protocol[name] for name in _OF_TRAINING}
    if not file.is_file():
        budget = {"cpu_minutes": protocol["cpu_minutes"], "reserve": _RESERVE}
        plan = plan_training(overrides, length=length, epochs=validations, work=work, **budget)
        _write(file, {"protocol": key, "plan": plan._asdict()})
    known = json.loads(file.read_text())
    _same(file, known["protocol"], key)
    return OurTraining(overrides, length=length, plan=Plan(**known["plan"]), work=folder, resume=True)


def score_seed(
    protocol: dict[str, Any], parts: dict[str, list[dict[str, Any]]], seed: int, checkpoint: Path, folder: Path
) -> dict[str, Any]:
    """Percent for each talker, of what came out of a training and of all that it is compared with."""
    content = read_checkpoint(checkpoint)
    system = build_system(content, checkpoint)
    assert isinstance(system, NEST)
    torch.manual_seed(seed)
    untrained = NEST(**content["system"]["arguments"]).eval()
    accuracy, tokens = score_masked(system, content["config"]["data"]["validation_ds"], folder)
    return {"accuracy": accuracy, "probe": score_probe(system, untrained, parts["test"], protocol), "tokens": tokens}


@torch.inference_mode()
def score_masked(system: NEST, validation_ds: dict[str, Any], work: Path) -> tuple[Scores, dict[str, float]]:
    """Percent of masked tokens that are right, of each talker; how the tokens are distributed."""
    counts = torch.zeros(system.num_books, system.num_classes, dtype=torch.long)
    for _, output in evaluated(system, validation_ds, work / "train.jsonl"):
        counts += histogram(_with_books(output["tokens"])[output["valid"]], system.num_classes)
    commonest = counts.argmax(1)  # (N,)
    metric = system.make_metric("test")
    masked: dict[str, list[dict[str, Tensor]]] = {}
    for batch, output in evaluated(system, validation_ds, work / "test.jsonl"):
        system.update_metric(metric, batch, output)
        guesses, tokens = _with_books(output["log_probs"].argmax(2)), _with_books(output["tokens"])
        for item, name in enumerate(batch["name"]):
            chosen, valid = output["selected"][item], output["valid"][item]
            repeated = last_visible(tokens[item], valid & ~chosen, commonest)
            answers = {"target": tokens[item], OURS: guesses[item], REPEAT: repeated}
            masked.setdefault(name, []).append({key: answer[chosen] for key, answer in answers.items()})
    talkers = {name: {key: torch.cat([m[key] for m in items]) for key in items[0]} for name, items in masked.items()}
    best = histogram(torch.cat([answers["target"] for answers in talkers.values()]), system.num_classes).argmax(1)
    scores: Scores = {OURS: [], CONSTANT: [], BEST_CONSTANT: [], REPEAT: []}
    for name, answers in talkers.items():
        if not len(answers["target"]):
            raise SystemExit(f"error: {name}: nothing is masked in its recording; raise mask_draws in the protocol")
        answers |= {CONSTANT: commonest, BEST_CONSTANT: best}
        for contestant, values in scores.items():
            values.append(100 * float((answers[contestant] == answers["target"]).double().mean()))
    return scores, {key: float(value) for key, value in metric.compute().items()}


def evaluated(
    system: NEST, validation_ds: dict[str, Any], manifest: Path
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Batches of a manifest as validation makes and masks them, and what the system makes of them."""
    data = SelfSupervisedData(validation_ds=validation_ds, test_manifest=str(manifest), loader={"num_workers": 0})
    data.setup("test")
    for batch in data.test_dataloader():
        yield batch, system.step(batch)


def last_visible(tokens: Tensor, visible: Tensor, otherwise: Tensor) -> Tensor:
    """Each frame answers the token of the last visible frame up to it, or of the first one where there is none.

    Frames that are masked in part are visible here: too easy for this answer rather than too hard. *otherwise* `(N,)`
    is the answer where nothing is visible.

    Shape: `(T, N)`, `(T,)` bool -> `(T, N)`.
    """
    if not visible.any():
        return otherwise.expand_as(tokens)
    frames = torch.arange(len(tokens))
    last = torch.where(visible, frames, -1).cummax(0).values
    return tokens[torch.where(last < 0, frames[visible][0], last)]


def histogram(tokens: Tensor, num_classes: int) -> Tensor:
    """How often each class of each book occurs. `(M, N)` -> `(N, C)`"""
    return torch.stack([torch.bincount(book, minlength=num_classes) for book in tokens.T])


def _with_books(tokens: Tensor) -> Tensor:
    """(B, T[, N]) -> (B, T, N)"""
    return tokens[..., None] if tokens.ndim == 2 else tokens


def score_probe(system: NEST, untrained: NEST, rows: list[dict[str, Any]], protocol: dict[str, Any]) -> Scores:
    """Percent of each talker's segments that are recognised."""
    train, test = read_segments(rows, protocol["probe"], sample_rate=protocol["sample_rate"])
    contestants = {
        OURS: encoder_layers(system),
        UNTRAINED: encoder_layers(untrained),
        LOG_MEL: log_mel(protocol["sample_rate"]),
    }
    scores = {name: [100 * value for value in accuracies(f, train, test)] for name, f in contestants.items()}
    return scores | {CHANCE: [100 / len(rows)] * len(rows)}


def encoder_layers(system: NEST) -> Features:
    """Mean and standard deviation over time of what each layer puts out."""

    def features(audio: Tensor) -> Tensor:
        outputs: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output)

        hooks = [layer.register_forward_hook(keep) for layer in system.encoder.layers]
        try:
            _, length = system.encode(audio, torch.full((len(audio),), audio.shape[1]))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([mean_and_std(frames[:, : int(length[0])]) for frames in outputs], 1)

    return features


def log_mel(sample_rate: int) -> Features:
    """The same of a log-mel spectrogram that is not normalised."""
    preprocessor = MelPreprocessor(sample_rate=sample_rate, normalize=None).eval()

    def features(audio: Tensor) -> Tensor:
        mel, length = preprocessor(audio, torch.full((len(audio),), audio.shape[1]))
        return mean_and_std(mel.transpose(1, 2)[:, : int(length[0])])[:, None]

    return features


def mean_and_std(frames: Tensor) -> Tensor:
    """(B, T, D) -> (B, 2 D)"""
    return torch.cat([frames.mean(1), frames.std(1)], 1)


def mean_over_seeds(scores: list[Scores]) -> Scores:
    """Each talker's mean of the seeds."""
    return {name: torch.tensor([s[name] for s in scores]).mean(0).tolist() for name in scores[0]}


def tokens_line(seed: int, tokens: dict[str, float]) -> str:
    return (
        f"seed {seed}: codebook perplexity {tokens['codebook_perplexity']:.1f},"
        f" {100 * tokens['codebook_usage']:.0f} % of the classes in use,"
        f" {100 * tokens['masked_share']:.0f} % of the tokens masked"
    )


def verdicts(result: dict[str, Any], goals: dict[str, float]) -> list[str]:
    """What was reached of the goals, and where ours stands beside the log-mel spectrogram."""
    lines = []
    for rival in (CONSTANT, BEST_CONSTANT, REPEAT):
        gain, error, text = lead(result, "accuracy", rival)
        reached = gain > goals["accuracy_errors"] * error
        lines.append(f"goal: {text}, {goals['accuracy_errors']:g} standard errors: {_verdict(reached)}")
    gain, _, text = lead(result, "probe", UNTRAINED)
    lines.append(f"goal: {text}, {goals['probe_points']:g} points: {_verdict(gain >= goals['probe_points'])}")
    return [*lines, lead(result, "probe", LOG_MEL)[2]]


def lead(result: dict[str, Any], measure: str, rival: str) -> tuple[float, float, str]:
    """Ours minus the rival over all seeds, its standard error over the talkers, and both in words."""
    found = {name: next(row for row in rows if row["name"] == rival) for name, rows in result[measure].items()}
    gain, error = found["all seeds"]["gain"], found["all seeds"]["gain_error"]
    over_seeds = mean_and_error([row["gain"] for name, row in found.items() if name != "all seeds"])[1]
    text = f"{TITLES[measure]}, ours minus {rival}: {gain:+.2f} +- {error:.2f} (over seeds +- {over_seeds:.2f})"
    return gain, error, text


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def _same(file: Path, known: Any, protocol: Any) -> None:
    if known != json.loads(json.dumps(protocol)):
        raise SystemExit(f"error: {file}: of another protocol; remove its folder or name another with --work")


def _write(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
