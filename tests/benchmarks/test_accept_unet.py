"""Watermark acceptance: the frozen protocol, how images are drawn and counted, a run with stand-ins for training."""

import copy
import functools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import accept_unet
from benchmarks.accept import HERE, main
from benchmarks.accept_unet import compare, split, train, verdicts
from benchmarks.mark_baselines import tune
from benchmarks.mark_scores import bootstrap_error, false_alarm, groups_by_opacity, micro, score
from benchmarks.mark_test_set import clean_examples, digest, draw_marks, font_files, write_examples
from benchmarks.training import Plan
from data.images import read_image, read_mask, write_png
from data.manifest import read_manifest, write_manifest

ROOT = Path(__file__).parent.parent.parent
PROTOCOL: dict[str, Any] = yaml.safe_load((HERE / "protocols" / "unet.yaml").read_text())
SANS, NANUM = "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf", "koreanize_matplotlib/fonts/NanumGothic.ttf"
SMALL = copy.deepcopy(PROTOCOL) | {
    "num_test_photos": 3,
    "val_photos": ["photo3", "photo4"],
    "train_scripts": ["latin", "korean"],
    "train_fonts": [SANS, NANUM],
    "test_fonts": {"latin": {"files": [SANS], "note": "same font"}, "korean": {"files": [NANUM], "note": "same font"}},
    "tuning": {"num_images": 4, "seed": 3},
    "masks_sha256": None,
}
SMALL["marks"] |= {"num_images": 8}


@pytest.fixture
def manifest(in_tmp: Path) -> Path:
    """Photos 0 to 2 to train on, 3 and 4 for validation, 5 to 7 for the test: smooth grounds."""
    rng, rows = np.random.default_rng(0), []
    for index in range(8):
        ramp = np.linspace(*rng.uniform(40, 200, 2), 96)[:, None, None] + rng.uniform(0, 40, 3)
        write_png(in_tmp / f"photo{index}.png", np.broadcast_to(ramp, (96, 128, 3)).astype(np.uint8))
        rows.append({"image_filepath": str(in_tmp / f"photo{index}.png")})
    write_manifest(in_tmp / "manifest_images.jsonl", rows)
    return in_tmp / "manifest_images.jsonl"


def oracle(work: Path, wrong: Callable[[np.ndarray], np.ndarray] = lambda mask: mask) -> accept_unet.Detector:
    """Knows the masks of the test set, once they are written."""

    def detect(image: np.ndarray) -> np.ndarray:
        for row in read_manifest(work / "test_set" / "manifest.jsonl"):
            if np.array_equal(read_image(row["image_filepath"]), image):
                return wrong(read_mask(row["mask_filepath"]) == 1)
        raise AssertionError("an image that is not in the test set")

    return detect


def test_protocol_is_frozen() -> None:
    fixed = {"seed": 7, "num_test_photos": 16, "cpu_minutes": 40, "train_seeds": [1], "experiment": "unet_demo"}
    assert {name: PROTOCOL[name] for name in fixed} == fixed
    assert PROTOCOL["goals"] == {"micro_iou": 0.55, "false_alarms": 2}
    marks = PROTOCOL["marks"]
    assert marks["num_images"] == 60 and marks["opacity"] == [[0.1, 0.4], [0.4, 0.9]] and len(marks["layouts"]) == 7
    assert list(PROTOCOL["test_fonts"]) == ["latin", "chinese", "japanese", "korean", "cyrillic"]


def test_no_font_file_is_trained_on_and_tested_on() -> None:
    tested = {file for known in PROTOCOL["test_fonts"].values() for file in known["files"]}
    assert not tested & set(PROTOCOL["train_fonts"])
    notes = {script: known["note"] for script, known in PROTOCOL["test_fonts"].items()}
    for script, known in PROTOCOL["test_fonts"].items():
        families = {Path(file).parent for file in known["files"]}
        another = not families & {Path(file).parent for file in PROTOCOL["train_fonts"]}
        assert notes[script].startswith("another family") == another, script


def test_a_font_that_is_not_there_is_one_line() -> None:
    for name in ("zhplot/fonts/other.ttf", "os/path.ttf"):
        with pytest.raises(SystemExit, match=f"error: font {name}: not installed; pip install"):
            font_files([name])


def test_every_script_layout_and_opacity_has_its_share(manifest: Path) -> None:
    photos = [Path(row["image_filepath"]) for row in read_manifest(manifest)]
    fonts = {"latin": font_files([SANS]), "korean": font_files([NANUM])}
    marks = SMALL["marks"] | {"layouts": ["corner", "centre", "stamp"]}
    drawn = [draw_marks(photos, num_images=12, fonts=fonts, marks=marks, seed=seed) for seed in (7, 7, 8)]
    examples = drawn[0]
    assert digest(drawn[0]) == digest(drawn[1]) != digest(drawn[2])
    assert set(Counter((e.record["script"], e.record["layout"]) for e in examples).values()) == {2}
    faint = Counter(e.record["script"] for e in examples if e.record["opacity"] < 0.4)
    assert faint == {"latin": 3, "korean": 3}
    groups = groups_by_opacity(examples + clean_examples(photos), [0.1, 0.4, 0.9])
    assert [len(members) for members in groups.values()] == [6, 6]
    for example in examples:
        assert example.mask.mean() >= 0.001 and example.record["mark"]["opacity"] == example.record["opacity"]
        letters = [c for c in example.record["mark"]["text"] if "가" <= c <= "힣"]
        assert bool(letters) == (example.record["script"] == "korean"), "no address in a script's name"


def test_written_images_are_those_that_were_drawn(manifest: Path, in_tmp: Path) -> None:
    photos = [Path(row["image_filepath"]) for row in read_manifest(manifest)][:2]
    examples = draw_marks(photos, num_images=1, fonts={"latin": font_files([SANS])}, marks=SMALL["marks"], seed=7)
    examples += clean_examples(photos)
    write_examples(examples, in_tmp / "set")
    for row, example in zip(read_manifest(in_tmp / "set" / "manifest.jsonl"), examples, strict=True):
        assert np.array_equal(read_image(row["image_filepath"]), example.image)
        assert np.array_equal(read_mask(row["mask_filepath"]), example.mask)
    assert not examples[1].mask.any() and np.array_equal(examples[1].image, read_image(photos[0]))


def test_counts_of_one_image_and_of_many() -> None:
    mask, found = np.zeros((10, 10), np.uint8), np.zeros((10, 10), bool)
    mask[2:6, 2:6], found[2:6, 2:4] = 1, True
    half = score(found, mask)
    assert (half["tp"], half["fp"], half["fn"], half["tn"]) == (8, 0, 8, 84) and half["iou"] == 0.5
    clean = score(found, np.zeros_like(mask))
    assert clean["iou"] == 0 and false_alarm(clean) and not false_alarm(score(mask == 2, mask * 0))
    assert micro([half, clean]) == {"iou": 8 / 24, "precision": 0.5, "recall": 0.5}
    assert bootstrap_error([half, half]) == 0 and bootstrap_error([half, clean]) > 0.1


def test_bootstrap_of_equal_sizes_is_the_error_of_a_mean() -> None:
    """Where all images have one union, the micro IoU is the mean of the images' IoU."""
    tp = np.random.default_rng(1).integers(0, 101, 50)
    rows = [{"tp": int(n), "fp": 0, "fn": 100 - int(n), "tn": 0} for n in tp]
    assert bootstrap_error(rows) == pytest.approx(np.std(tp / 100, ddof=1) / np.sqrt(50), rel=0.08)


def test_a_checkpoint_is_scored_beside_all_others(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    work = manifest.parent / "work"
    known = {"ours": oracle(work / "unet"), "untrained": lambda image: np.zeros(image.shape[:2], bool)}
    monkeypatch.setattr(accept_unet, "tune", functools.partial(tune, windows={"mean": [9, 25]}))
    monkeypatch.setattr(accept_unet, "our_detectors", lambda checkpoints: known)
    monkeypatch.setattr(accept_unet, "split", lambda protocol, manifest: split(SMALL, manifest))
    monkeypatch.setattr(accept_unet, "compare", lambda c, protocol, photos, work: compare(c, SMALL, photos, work))
    checkpoint = manifest.parent / "x.ckpt"
    checkpoint.touch()
    arguments = ["unet", f"--data={manifest.parent}", f"--work={work}", f"--ckpt={checkpoint}"]
    assert main(arguments) == 0

    printed = capsys.readouterr().out
    assert "3 photos for train, 2 photos for val, 3 photos for test" in printed
    assert "trained elsewhere: no acceptance of the recipe" in printed and "must hold" not in printed
    assert "8 marked images and 3 clean ones, drawn with the seed of the protocol" in printed
    assert "goal: micro IoU of 0.55: 1.000 +- 0.000, reached by 0.450" in printed
    assert "at most 2 of 3 clean images: 0, reached" in printed
    assert "local contrast: more than" in printed and "   same font" in printed
    result = json.loads((work / "unet" / "result.json").read_text())
    assert list(result["summaries"]) == ["ours", "untrained", "local contrast", "all ones"]
    ones, none = result["summaries"]["all ones"], result["summaries"]["untrained"]
    assert (ones["recall"], ones["false_alarms"], none["iou"], none["false_alarms"]) == (1, 3, 0, 0)
    assert none["iou"] < ones["iou"] < result["summaries"]["local contrast"]["iou"] < 1
    assert len(result["rows"]["ours"]) == len(result["images"]) == 11 and len(result["masks_sha256"]) == 64
    for name in result["images"]:
        assert (work / "unet" / "overlays" / "ours" / f"{name}.png").is_file()


def test_verdicts() -> None:
    values = {"iou": 0.6, "iou_error": 0.02, "false_alarms": 3, "num_clean": 16}
    good, bad = verdicts({"ours": values, "all ones": values | {"iou": 0.0}}, PROTOCOL)
    assert good.endswith("0.600 +- 0.020, reached by 0.050") and bad.endswith("16 clean images: 3, missed")
    both = verdicts({"ours 1": values, "ours 2": values | {"iou": 0.4, "false_alarms": 1}}, PROTOCOL)
    assert both[0].endswith("0.500 +- 0.100 over seeds, missed by 0.050") and both[1].endswith(": 3, missed")
    assert accept_unet.budget_line([39.0, 41.0], 40).endswith("41.0, FAIL")


def test_masks_that_are_not_the_protocols_are_said(manifest: Path) -> None:
    assert accept_unet.same_set("a", {"masks_sha256": "a"}) == "the masks of the protocol"
    assert accept_unet.same_set("b", {"masks_sha256": "a"}).startswith("NOT the masks of the protocol")


def test_no_photo_serves_two_purposes(manifest: Path) -> None:
    photos = split(SMALL, manifest)
    names = [[Path(row["image_filepath"]).stem for row in rows] for rows in photos]
    assert names == [["photo0", "photo1", "photo2"], ["photo3", "photo4"], ["photo5", "photo6", "photo7"]]
    with pytest.raises(SystemExit, match="manifest_images.jsonl: all of val_photos"):
        split(SMALL | {"val_photos": ["photo7"]}, manifest)


def test_a_training_is_planned_and_run_once(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    typed: dict[str, Any] = {}

    class Training:
        def __init__(self, overrides: list[str], **options: Any) -> None:
            typed.update(options, overrides=overrides)

        def finish(self) -> tuple[Path, dict[str, Any]]:
            calls.append("train")
            if calls.count("train") == 1:
                raise SystemExit("interrupted")
            return Path("last.ckpt"), {"cpu_minutes": 1.0}

    def plan(overrides: list[str], **options: Any) -> Plan:
        calls.append("plan")
        return Plan(100, 1.0, 2.0)

    monkeypatch.setattr(accept_unet, "plan_training", plan)
    monkeypatch.setattr(accept_unet, "OurTraining", Training)
    monkeypatch.setattr(accept_unet, "recipe_digest", lambda experiment, manifest: "x")
    folder, photos = manifest.parent / "seed1", split(SMALL, manifest)
    with pytest.raises(SystemExit, match="interrupted"):
        train(SMALL, manifest, photos, 1, folder)
    for _ in range(2):
        assert train(SMALL, manifest, photos, 1, folder) == (Path("last.ckpt"), {"cpu_minutes": 1.0})
    assert calls == ["plan", "train", "train"] and typed["resume"] and typed["plan"] == Plan(100, 1.0, 2.0)
    assert {"experiment=unet_demo", "seed=1", "data.synthesis.scripts=[latin,korean]"} <= set(typed["overrides"])
    assert typed["length"](50)[1] == f"data.train_examples={50 // SMALL['epochs'] * SMALL['batch_size']}"
    assert [Path(row["image_filepath"]).stem for row in read_manifest(folder / "train.jsonl")][-1] == "photo2"
    with pytest.raises(SystemExit, match="training.json: of another protocol"):
        train(SMALL | {"cpu_minutes": 41}, manifest, photos, 1, folder)


def test_the_network_of_a_checkpoint_and_the_same_one_untrained(manifest: Path) -> None:
    from models.unet import UNet

    torch.manual_seed(0)
    system = UNet(base_channels=4, depth=3)
    torch.nn.init.constant_(system.network.head.bias, 9.0)
    arguments = {"base_channels": 4, "depth": 3}
    content = {"format_version": 1, "system": {"name": "models.unet.UNet", "arguments": arguments}, "config": {}}
    torch.save(content | {"state_dict": system.state_dict(), "structure": []}, manifest.parent / "x.ckpt")
    found = accept_unet.our_detectors({1: manifest.parent / "x.ckpt"})
    image = read_image(manifest.parent / "photo0.png")
    assert found["ours"](image).all(), "its bias says so"
    assert found["untrained"](image).shape == (96, 128) and found["untrained"](image).mean() < 0.5


@pytest.mark.slow
def test_a_small_acceptance_run(in_tmp: Path) -> None:
    """The whole harness with a training, on noise that bears the protocol's names."""
    rng, rows = np.random.default_rng(1), []
    others = [f"other{index}" for index in range(4)]
    for name in [*others, *PROTOCOL["val_photos"], *(f"test{index}" for index in range(16))]:
        write_png(in_tmp / f"{name}.png", rng.integers(90, 120, (120, 160, 3)).astype(np.uint8))
        rows.append({"image_filepath": f"{name}.png"})
    write_manifest(in_tmp / PROTOCOL["manifest"], rows)
    command = [sys.executable, "-m", "benchmarks.accept", "unet", f"--data={in_tmp}", f"--work={in_tmp / 'work'}"]
    done = subprocess.run([*command, "--cpu-minutes=4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((in_tmp / "work" / "unet" / "result.json").read_text())
    assert list(result["summaries"]) == ["ours", "untrained", "local contrast", "all ones"]
    assert len(result["images"]) == 76 and 0 < result["ours"]["1"]["steps"] <= result["ours"]["1"]["planned_steps"]
