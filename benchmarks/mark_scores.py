"""What is measured of a detector of marks: pixel counts of each image, their summary, tables by kind of mark.

Micro values are of the counts summed over images, so that an image weighs by its pixels; their standard errors are
those of a bootstrap over images. Clean images belong to the micro values of the whole set: marks that were found there
are wrong pixels as any other.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.accept import mean_and_error
from metrics.calibration import scores
from metrics.segmentation import FALSE_ALARM_SHARE, boundary_f

_RESAMPLINGS = 2000
_SEED = 7

Detector = Callable[[np.ndarray], np.ndarray]
"""uint8 (H, W, 3) -> bool (H, W)"""


class Example(NamedTuple):
    """A photo whose marked pixels are known: uint8 `(H, W, 3)`, uint8 `(H, W)` of 0 and 1, and how it came about.

    *record* holds `script`, `layout`, `style` and `opacity` of a marked image and is empty for a clean one.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray
    record: dict[str, Any]


Row = dict[str, float]
"""Of one image: tp, fp, fn and tn in pixels, its IoU and the F1 of its boundaries."""


def score(found: np.ndarray, mask: np.ndarray) -> Row:
    """The values of one image. bool `(H, W)`, uint8 `(H, W)` of 0 and 1"""
    marked = mask == 1
    parts = {"tp": found & marked, "fp": found & ~marked, "fn": ~found & marked, "tn": ~found & ~marked}
    counts: Row = {name: int(np.count_nonzero(part)) for name, part in parts.items()}
    predicted, target = (torch.from_numpy(np.ascontiguousarray(part))[None, None] for part in (found, mask))
    return counts | {"iou": micro([counts])["iou"], "boundary_f": float(boundary_f(predicted, target))}


def micro(rows: Sequence[Row]) -> dict[str, float]:
    """IoU, precision and recall of summed counts."""
    sums = (torch.tensor(sum(int(row[key]) for row in rows)) for key in ("tp", "fp", "fn", "tn"))
    values = scores(*sums)
    return {name: float(values[name]) for name in ("iou", "precision", "recall")}


def false_alarm(row: Row) -> bool:
    """Whether a thousandth or more of a clean image was found to be marked."""
    return FALSE_ALARM_SHARE * row["fp"] >= row["fp"] + row["tn"]


def bootstrap_error(rows: Sequence[Row]) -> float:
    """Standard error of the micro IoU: its spread over sets of as many images drawn with replacement."""
    counts = np.array([[row["tp"], row["fp"] + row["fn"]] for row in rows], dtype=np.float64)  # (images, 2)
    if len(counts) < 2:
        return float("nan")
    drawn = np.random.default_rng(_SEED).integers(len(counts), size=(_RESAMPLINGS, len(counts)))
    right, wrong = np.moveaxis(counts[drawn].sum(1), -1, 0)  # (resamplings,) each
    return float(np.std(right / np.maximum(right + wrong, 1), ddof=1))


def summary(examples: Sequence[Example], rows: Sequence[Row]) -> dict[str, float]:
    """All that is reported of a detector, of its rows in the order of the examples."""
    marked = [row for example, row in zip(examples, rows, strict=True) if example.mask.any()]
    clean = [row for example, row in zip(examples, rows, strict=True) if not example.mask.any()]
    image_iou, image_iou_error = mean_and_error([row["iou"] for row in marked])
    return {
        **micro(rows),
        "iou_error": bootstrap_error(rows),
        "iou_marked": micro(marked)["iou"],
        "iou_marked_error": bootstrap_error(marked),
        "image_iou": image_iou,
        "image_iou_error": image_iou_error,
        "boundary_f": mean_and_error([row["boundary_f"] for row in marked])[0],
        "false_alarms": sum(false_alarm(row) for row in clean),
        "num_clean": len(clean),
    }


def main_table(summaries: dict[str, dict[str, float]]) -> list[str]:
    """A line for each detector."""
    titles = ("micro IoU", "marked only", "IoU per image", "precision", "recall", "boundary", "false alarms")
    lines = [f"{'':<16}" + "".join(f"{title:>16}" for title in titles)]
    for name, values in summaries.items():
        cells = [f"{values[key]:.3f} +- {values[key + '_error']:.3f}" for key in ("iou", "iou_marked", "image_iou")]
        cells += [f"{values[key]:.3f}" for key in ("precision", "recall", "boundary_f")]
        cells.append(f"{values['false_alarms']} of {values['num_clean']}")
        lines.append(f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def group_table(
    title: str, groups: dict[str, list[int]], rows: dict[str, list[Row]], notes: dict[str, str] | None = None
) -> list[str]:
    """Micro IoU of each group of images, given by their positions, for each detector."""
    lines = [f"{title:<18}{'images':>7}" + "".join(f"{name:>18}" for name in rows)]
    for group, members in groups.items():
        line = f"{group:<18}{len(members):>7}"
        for values in rows.values():
            line += f"{micro([values[index] for index in members])['iou']:>18.3f}"
        lines.append(line + (f"   {notes[group]}" if notes and group in notes else ""))
    return lines


def groups_by(examples: Sequence[Example], key: str) -> dict[str, list[int]]:
    """Positions of the marked examples by what their record says under *key*."""
    values = sorted({str(example.record[key]) for example in examples if example.record})
    return {
        value: [i for i, example in enumerate(examples) if example.record and str(example.record[key]) == value]
        for value in values
    }


def groups_by_opacity(examples: Sequence[Example], edges: Sequence[float]) -> dict[str, list[int]]:
    """Positions of the marked examples in each range of opacity from an edge up to the next."""
    groups = {}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        last = high == edges[-1]
        groups[f"opacity {low:g} to {high:g}"] = [
            index
            for index, example in enumerate(examples)
            if example.record and low <= example.record["opacity"] and (example.record["opacity"] < high or last)
        ]
    return {name: members for name, members in groups.items() if members}
