"""Local contrast: what it sees, and that tuning finds what was hidden."""

import numpy as np

from benchmarks.mark_baselines import LocalContrast, contrast, tune


def strokes(seed: int, *, level: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth ramp with a little noise and lines of 2 pixels that are brighter by `level`; where the lines are."""
    rng = np.random.default_rng(seed)
    image = 60 + np.arange(64)[:, None] + rng.integers(0, 4, size=(64, 64))
    mask = np.zeros((64, 64), np.uint8)
    for line in rng.choice(5, 3, replace=False):
        mask[12 * line + 4 : 12 * line + 6] = 1
    return np.repeat((image + level * mask)[:, :, None], 3, 2).astype(np.uint8), mask


def test_contrast_is_none_on_an_even_ground_and_the_step_on_a_point() -> None:
    image = np.full((9, 9, 3), 100, np.uint8)
    for centre in ("mean", "median"):
        assert not contrast(image, centre, 5).any()
    image[4, 4, 1] = 150
    assert contrast(image, "median", 5)[4, 4] == 50, "the channel that differs most"
    assert contrast(image, "mean", 5)[4, 4] == 48 and contrast(image, "mean", 5)[4, 3] == 2


def test_tuning_finds_the_lines() -> None:
    found = tune((strokes(seed, level=20) for seed in range(3)), {"mean": [3, 15], "median": [9]})
    image, mask = strokes(9, level=20)
    wrong = np.count_nonzero(found(image) != (mask == 1))
    assert wrong < 0.02 * mask.size, str(found)
    assert found.window > 3, "a window as narrow as the line sees its edges only"
    assert str(found).startswith(f"more than {found.threshold} levels off the")


def test_the_threshold_has_the_best_micro_iou() -> None:
    examples = [strokes(seed, level=6) for seed in range(2)]
    found = tune(examples, {"mean": [9]})

    def iou(threshold: int) -> float:
        masks = [(LocalContrast("mean", 9, threshold)(image), mask == 1) for image, mask in examples]
        return sum((a & b).sum() for a, b in masks) / sum((a | b).sum() for a, b in masks)

    assert iou(found.threshold) == max(iou(threshold) for threshold in range(20))
