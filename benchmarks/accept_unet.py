"""Watermark segmentation: ours against a threshold on local contrast, the same network untrained, and a mask of ones.

Ours is `experiment=unet_demo`, trained within the budget on marks that are drawn on the training photos
(benchmarks/training.py), for each seed of the protocol, or the checkpoint that --ckpt names. All look at the same
images in their own size: marks on photos, in font files, that no training has seen (benchmarks/mark_test_set.py), and
the photos themselves. Ours and the untrained network use the threshold that stands in the checkpoint; local contrast is
tuned on marks drawn on the validation photos. What is measured: benchmarks/mark_scores.py.

A training that is in the work folder is not run again, and one that was interrupted continues. The test set, and what
ours found of it, are written there to look at.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.accept import mean_and_error
from benchmarks.mark_baselines import tune
from benchmarks.mark_scores import (
    Detector,
    Example,
    Row,
    group_table,
    groups_by,
    groups_by_opacity,
    main_table,
    score,
    summary,
)
from benchmarks.mark_test_set import clean_examples, digest, draw_marks, font_files, write_examples
from benchmarks.training import ROOT, OurTraining, Plan, plan_training
from data.audio import atomic_path
from data.images import write_png
from data.manifest import read_manifest, write_manifest
from models import load
from models.base import System
from models.checkpoint import read_checkpoint

OURS, UNTRAINED, CONTRAST, ONES = "ours", "untrained", "local contrast", "all ones"
_RESERVE = 0.1  # of the budget
# What a training depends on; its plan and its result are of no use to another one.
_OF_TRAINING = (
    "experiment",
    "epochs",
    "batch_size",
    "cpu_minutes",
    "num_test_photos",
    "val_photos",
    "train_fonts",
    "train_scripts",
)
_COLOURS = {"tp": (0, 200, 0), "fp": (255, 0, 0), "fn": (0, 80, 255)}  # found rightly, wrongly, and missed


class Photos(NamedTuple):
    """Manifest rows of the photos to train on, to calibrate and tune on, and to test on; none in two of them."""

    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    test: list[dict[str, Any]]


def report(
    protocol: dict[str, Any], manifest: Path, work: Path, checkpoint: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """All measures of all contestants, tables by kind of mark, and what was reached of the goals."""
    photos = split(protocol, manifest)
    print(", ".join(f"{len(rows)} photos for {name}" for name, rows in photos._asdict().items()), flush=True)
    checkpoints, facts = {}, {}
    if checkpoint is None:
        for seed in protocol["train_seeds"]:
            checkpoints[seed], facts[seed] = train(protocol, manifest, photos, seed, work / f"seed{seed}")
    else:
        print(f"ours: {checkpoint}, trained elsewhere: no acceptance of the recipe")
        checkpoints, facts = {protocol["train_seeds"][0]: checkpoint}, {"checkpoint": str(checkpoint)}
    text, result = compare(checkpoints, protocol, photos, work)
    notes = verdicts(result["summaries"], protocol)
    if checkpoint is None:
        notes.append(budget_line([fact["cpu_minutes"] for fact in facts.values()], protocol["cpu_minutes"]))
    return "\n".join([text, "", *notes]), {"ours": facts, **result, "notes": notes}


def split(protocol: dict[str, Any], manifest: Path) -> Photos:
    """The last photos of the manifest are for the test, those that the protocol names for validation."""
    rows, num_test = read_manifest(manifest), protocol["num_test_photos"]
    others, test = rows[:-num_test], rows[-num_test:]
    named = set(protocol["val_photos"])
    val = [row for row in others if Path(row["image_filepath"]).stem in named]
    if len(val) < len(named) or len(val) == len(others):
        raise SystemExit(
            f"error: {manifest}: all of val_photos (protocol), and photos for training, must stand before its last"
            f" {num_test} lines"
        )
    return Photos([row for row in others if row not in val], val, test)


def train(
    protocol: dict[str, Any], manifest: Path, photos: Photos, seed: int, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a seed's training, which is run or continued where need be, and what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder / "train.jsonl", photos.train)
    write_manifest(folder / "val.jsonl", photos.val)
    epochs, batch_size = protocol["epochs"], protocol["batch_size"]
    overrides = [
        f"experiment={protocol['experiment']}",
        f"data.train_manifest={folder / 'train.jsonl'}",
        f"data.val_manifest={folder / 'val.jsonl'}",
        "data.test_manifest=null",
        f"data.synthesis.fonts=[{','.join(font_files(protocol['train_fonts']))}]",
        f"data.synthesis.scripts=[{','.join(protocol['train_scripts'])}]",
        f"data.batch_size={batch_size}",
        f"seed={seed}",
    ]

    def length(steps: int) -> list[str]:
        return [f"trainer.max_steps={steps}", f"data.train_examples={steps // epochs * batch_size}"]

    file = folder / "training.json"
    key = {name: protocol[name] for name in _OF_TRAINING} | {"recipe": recipe_digest(protocol["experiment"], manifest)}
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"protocol": key}
    if state["protocol"] != key:
        raise SystemExit(f"error: {file}: of another protocol; remove its folder or name another with --work")
    if "plan" not in state:
        budget = {"cpu_minutes": protocol["cpu_minutes"], "reserve": _RESERVE}
        plan = plan_training(overrides, length=length, epochs=epochs, work=folder, **budget)
        _write(file, state := state | {"plan": plan._asdict()})
    if "facts" not in state:
        training = OurTraining(overrides, length=length, plan=Plan(**state["plan"]), work=folder, resume=True)
        checkpoint, facts = training.finish()
        _write(file, state := state | {"checkpoint": str(checkpoint), "facts": facts})
    return Path(state["checkpoint"]), state["facts"]


def recipe_digest(experiment: str, manifest: Path) -> str:
    """Changes with the recipe and with the photos that are listed: results of others are not taken for its own."""
    names = (f"experiment/{experiment}", "model/unet", "data/unet")
    files = [*(ROOT / "config" / f"{name}.yaml" for name in names), manifest]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compare(
    checkpoints: dict[int, Path], protocol: dict[str, Any], photos: Photos, work: Path
) -> tuple[str, dict[str, Any]]:
    """Tables of all contestants on the test set of the protocol, and all their values.

    *checkpoints*: of ours, by the seed of its training.
    """
    detectors = our_detectors(checkpoints)
    examples = draw_test_set(protocol, photos.test, work / "test_set")
    detectors |= baselines(protocol, photos.val)
    rows: dict[str, list[Row]] = {}
    for name, detector in detectors.items():
        print(f"{name} …", flush=True)
        overlays = work / "overlays" / name.replace(" ", "_") if name.startswith(OURS) else None
        rows[name] = run(detector, examples, overlays)
    summaries = {name: summary(examples, values) for name, values in rows.items()}
    names = {example.name: example.record for example in examples}
    result = {"summaries": summaries, "images": names, "rows": rows, "masks_sha256": digest(examples)}
    lines = [
        f"{sum(bool(example.record) for example in examples)} marked images and"
        f" {sum(not example.record for example in examples)} clean ones, {same_set(result['masks_sha256'], protocol)}",
        *(f"{name}: {detector}" for name, detector in detectors.items() if name == CONTRAST),
        "",
        *main_table(summaries),
        "Micro values are of all pixels of all images, +- standard error over images; marked only: without the clean",
        "images. IoU per image and boundary (F, 2 pixels): means over marked images. False alarm: 0.1 % of the pixels.",
    ]
    tables = {
        "By opacity": groups_by_opacity(examples, protocol["opacity_edges"]),
        "By layout": groups_by(examples, "layout"),
        "By script": groups_by(examples, "script"),
        "By style": groups_by(examples, "style"),
    }
    notes = {script: fonts["note"] for script, fonts in protocol["test_fonts"].items()}
    shown = {name: values for name, values in rows.items() if not name.startswith(UNTRAINED)}
    for title, groups in tables.items():
        lines += ["", *group_table(title, groups, shown, notes if title == "By script" else None)]
    return "\n".join(lines), result


def draw_test_set(protocol: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> list[Example]:
    """Marked images, then each photo as it is; written to the folder too."""
    shutil.rmtree(folder, ignore_errors=True)
    paths = [Path(row["image_filepath"]) for row in rows]
    fonts = {script: font_files(known["files"]) for script, known in protocol["test_fonts"].items()}
    marks = protocol["marks"]
    examples = draw_marks(paths, num_images=marks["num_images"], fonts=fonts, marks=marks, seed=protocol["seed"])
    examples += clean_examples(paths)
    write_examples(examples, folder)
    return examples


def same_set(found: str, protocol: dict[str, Any]) -> str:
    if protocol.get("masks_sha256") is None:
        return "drawn with the seed of the protocol"
    if found == protocol["masks_sha256"]:
        return "the masks of the protocol"
    return "NOT the masks of the protocol: numpy, Pillow, fonts or photos are others"


def our_detectors(checkpoints: dict[int, Path]) -> dict[str, Detector]:
    """Each trained network, and the same one as it was before training."""
    found = {}
    for seed, checkpoint in checkpoints.items():
        system = load(checkpoint)
        torch.manual_seed(seed)
        untrained = type(system)(**read_checkpoint(checkpoint)["system"]["arguments"]).eval()
        which = f" {seed}" if len(checkpoints) > 1 else ""
        found |= {f"{OURS}{which}": detector_of(system), f"{UNTRAINED}{which}": detector_of(untrained)}
    return found


def detector_of(system: System) -> Detector:
    """A system with the threshold that it was calibrated to."""

    def detect(image: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # (3, H, W)
        return system.predict(image=pixels, outputs=("mask",))["mask"].numpy()

    return detect


def baselines(protocol: dict[str, Any], val_rows: list[dict[str, Any]]) -> dict[str, Detector]:
    """Local contrast, tuned on marks and photos of the validation, and the answer that all is marked."""
    fonts = dict.fromkeys(protocol["train_scripts"], font_files(protocol["train_fonts"]))
    paths, tuning = [Path(row["image_filepath"]) for row in val_rows], protocol["tuning"]
    examples = draw_marks(
        paths, num_images=tuning["num_images"], fonts=fonts, marks=protocol["marks"], seed=tuning["seed"]
    )
    examples += clean_examples(paths)
    return {
        CONTRAST: tune((example.image, example.mask) for example in examples),
        ONES: lambda image: np.ones(image.shape[:2], bool),
    }


def run(detector: Detector, examples: list[Example], overlays: Path | None) -> list[Row]:
    """The values of each example; *overlays*: where to draw what was found, wrongly found and missed."""
    rows = []
    for example in examples:
        found, marked = detector(example.image), example.mask == 1
        rows.append(score(found, example.mask))
        if overlays:
            parts = {"tp": found & marked, "fp": found & ~marked, "fn": ~found & marked}
            picture = example.image // 2
            for name, part in parts.items():
                picture[part] = picture[part] // 2 + np.array(_COLOURS[name], np.uint8) // 2
            write_png(overlays / f"{example.name}.png", np.concatenate([example.image, picture], axis=1))
    return rows


def verdicts(summaries: dict[str, dict[str, float]], protocol: dict[str, Any]) -> list[str]:
    """What was reached of the goals: the mean of the seeds' IoU, and the false alarms of the worst one."""
    ours = [values for name, values in summaries.items() if name.startswith(OURS)]
    goals = protocol["goals"]
    iou, over_seeds = mean_and_error([values["iou"] for values in ours])
    error = f" +- {over_seeds:.3f} over seeds" if len(ours) > 1 else f" +- {ours[0]['iou_error']:.3f}"
    alarms = max(values["false_alarms"] for values in ours)
    return [
        f"goal: micro IoU of {goals['micro_iou']:g}: {iou:.3f}{error}, {_verdict(iou >= goals['micro_iou'])}"
        f" by {abs(iou - goals['micro_iou']):.3f}",
        f"goal: false alarms on at most {goals['false_alarms']} of {ours[0]['num_clean']} clean images: {alarms},"
        f" {_verdict(alarms <= goals['false_alarms'])}",
    ]


def budget_line(cpu_minutes: list[float], allowed: float) -> str:
    most = max(cpu_minutes)
    return f"must hold: {allowed:g} CPU-minutes of training: {most:.1f}, {'PASS' if most <= allowed else 'FAIL'}"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def _write(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
