"""Golden tables: numbers of parameters, sizes of batches, thresholds, places of tiles, windows, blended images."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from data.blending import composite, mask_of, to_uint8
from metrics.calibration import THRESHOLDS, calibrated_threshold, counts_at, probability_histogram, scores
from modules.adaptive_batch import next_size
from modules.smp_encoder import SmpNetwork
from modules.tiling import gaussian_window, tile_starts
from modules.unet import UNet
from tests.golden_suite.reference import Kind, Reference
from tests.golden_suite.suite import Check, GoldenError

WINDOW = 1e-6  # absolute; the largest weight is 1
BLEND = 1e-9  # levels of 255
SCORE = 1e-9
SMP_VERSION = "0.6.0"
OURS = r"base(\d+)_bilinear=(True|False)_in(\d+)_classes=?(\d+)"
SMP = r"smp(\S+) (\w+) (\S+)(?: in(\d+) classes(\d+))?"
TABLE = ("rule", "cases")


# Parameters


def parameter_counts(path: Path, table: dict[str, Any], check: Check) -> None:
    """Of our networks; those of segmentation_models_pytorch have a case of their own (smp_parameter_counts)."""
    for name, expected in table.items():
        if match := re.fullmatch(OURS, name):
            base, bilinear, in_channels, num_classes = match.groups()
            up = "bilinear" if bilinear == "True" else "transposed"
            sizes = {"base_channels": int(base), "in_channels": int(in_channels), "num_classes": int(num_classes)}
            check.equal(name, _num_parameters(partial(UNet, up=up, **sizes)), expected)
        elif not re.fullmatch(SMP, name):
            raise GoldenError(f"{path}: {name} is neither compared nor known not to be ours")


def smp_parameter_counts(path: Path, table: dict[str, Any], check: Check) -> None:
    """Through our adapter, with the version of the package that the table is of."""
    for name, expected in table.items():
        if (match := re.fullmatch(SMP, name)) is None:
            continue
        version, architecture, encoder, in_channels, num_classes = match.groups()
        if version != SMP_VERSION:
            raise GoldenError(f"{path}: {name} is of a version that no case knows")
        sizes = {"in_channels": int(in_channels or 3), "num_classes": int(num_classes or 1)}
        encoder = encoder.replace("timm-mobilenetv3", "tu-tf_mobilenetv3")  # an older name of the same
        make = partial(SmpNetwork, name=f"{architecture}/{encoder}", **sizes)
        try:
            actual: int | str = _num_parameters(make)
        except ValueError as error:
            actual = str(error)
        if isinstance(expected, str):  # "error: …"
            reason = expected.removeprefix("error: ")
            check.equal(f"{name}: refused", isinstance(actual, str) and reason in actual, True)
        else:
            check.equal(name, actual, expected)


def _num_parameters(make: Callable[[], nn.Module]) -> int:
    """Of a network without memory: some have a hundred million."""
    with torch.device("meta"), _RealSequences():
        return sum(parameter.numel() for parameter in make().parameters())


class _RealSequences(TorchFunctionMode):
    """Even so linspace gives numbers: Mix Transformers read rates of theirs from one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **({"device": "cpu"} if func is torch.linspace else {}), **(kwargs or {}))


# Batches, thresholds, tiles


def adaptive_batch(path: Path, case: dict[str, Any], check: Check) -> None:
    size, *limits = (case["params"].pop(name) for name in ("cur", "lo", "hi"))
    check.equal("params that no case knows", case["params"], {})
    sizes = []
    for event in case["events"]:
        said = {
            "success_rate": event.get("success"),
            "memory_share": event.get("mem"),
            "out_of_memory": event.get("oom"),
        }
        known = {name: value for name, value in said.items() if value is not None}
        if len(known) != len(event):
            raise GoldenError(f"{path}: no case knows the event {event}")
        size = next_size(size, least=limits[0], most=limits[1], **known)
        sizes.append(size)
    check.equal("sizes", sizes, case["expected"])


def threshold(path: Path, case: dict[str, Any], check: Check) -> None:
    """Rows of threshold, TP, FP, FN, F1 and IoU, and which F1 is best, all from one histogram."""
    probability = torch.tensor(case["p"], dtype=torch.float64)  # which 0.45 is no more, once it was float32
    histogram = probability_histogram(probability, torch.tensor(case["t"]))
    counts = counts_at(histogram)
    for value, *row in case["rows"]:
        tp, fp, fn, tn = counts[_index(path, value)]
        check.equal(f"{value}: tp, fp, fn", [int(tp), int(fp), int(fn)], row[:3])
        found = scores(tp, fp, fn, tn)
        check.close(f"{value}: F1, IoU", torch.stack([found["dice"], found["iou"]]), row[3:], tolerance=SCORE)
    best = calibrated_threshold(histogram)
    check.close("best threshold", best, case["best_threshold_f1"], tolerance=SCORE)
    best_f1 = scores(*counts[_index(path, best)])["dice"]
    check.close("best F1", best_f1, case["best_f1"], tolerance=SCORE)


def _index(path: Path, value: float) -> int:
    index = round(100 * value) - 1
    if not (0 <= index < len(THRESHOLDS) and abs(THRESHOLDS[index] - value) < 1e-9):
        raise GoldenError(f"{path}: {value} is no threshold of ours")
    return index


def tiles(path: Path, case: dict[str, Any], check: Check) -> None:
    starts = [tile_starts(size, tile, case["step"]) for size, tile in zip(case["image"], case["tile"], strict=True)]
    check.equal(f"{case['image']} in {case['tile']}", starts, case["expected"])


# A table's keys -> what compares one of its cases.
TABLES = {
    frozenset({"events", "params", "expected"}): adaptive_batch,
    frozenset({"p", "t", "rows", "best_threshold_f1", "best_f1"}): threshold,
    frozenset({"image", "tile", "step", "expected"}): tiles,
}


def table(path: Path, content: dict[str, Any], check: Check) -> None:
    """`rule`, which is for readers, and `cases`."""
    check.equal(f"{path.name}: keys that no case knows", sorted(content.keys() - set(TABLE)), [])
    for case in content["cases"]:
        if (compare := TABLES.get(frozenset(case))) is None:
            raise GoldenError(f"{path}: no case knows what it holds: {', '.join(case)}")
        compare(path, case, check)


# Images


def _windows(reference: Reference, check: Check) -> None:
    for name in reference:
        if match := re.fullmatch(r"gauss_(\d+)x(\d+)", name):
            height, width = map(int, match.groups())
            check.close(name, gaussian_window(height, width), reference[name], tolerance=WINDOW)


def _blending(reference: Reference, check: Check) -> None:
    """Of a photo I, a colour W and a coverage; Pillow's own, which rounds twice, differs by up to a level."""
    photo, colour = (reference[name].numpy() for name in ("I", "W"))
    coverage = reference["coverage"].numpy() / 255
    for name, rule in (("mask_cov_ge_half", "half"), ("mask_cov_gt0", "any")):
        if name in reference:
            check.equal(name, mask_of(coverage, rule=rule).tolist(), reference[name].tolist())
    for name in (name for name in reference if name.startswith("J_float_op")):
        opacity = name.removeprefix("J_float_op")
        image = composite(photo, colour, float(opacity) * coverage)
        check.close(name, image, reference[name], tolerance=BLEND)
        rounded = torch.from_numpy(to_uint8(image)).int()
        if f"J_uint8_op{opacity}" in reference:
            check.equal(f"J_uint8_op{opacity}", rounded.tolist(), reference[f"J_uint8_op{opacity}"].tolist())
        if f"J_pillow_op{opacity}" in reference:
            difference = (rounded - reference[f"J_pillow_op{opacity}"].int()).abs().max().item()
            check.equal(f"J_pillow_op{opacity}: within one level", difference <= 1, True)
            if f"maxdiff_op{opacity}" in reference:
                check.equal(f"maxdiff_op{opacity}", [difference], reference[f"maxdiff_op{opacity}"].tolist())


KINDS = (
    Kind(lambda names: "I" in names and "W" in names and "coverage" in names, _blending),
    Kind(lambda names: any(name.startswith("gauss_") for name in names), _windows),
)
