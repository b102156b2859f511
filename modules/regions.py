"""What was found, as a list: the connected components of a mask, with their boxes and their pixels.

Masks are (H, W) bool tensors, on the CPU or not; what comes back lies on the CPU. Boxes are
[x, y, width, height] in pixels, from the top left corner.

Pixels are listed as COCO's uncompressed run-length encoding: `{"size": [H, W], "counts": [...]}` with the lengths of
runs of 0, 1, 0, ... of the whole image, column after column.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.checks import whole_numbers


def regions(mask: Tensor, probability: Tensor) -> list[dict[str, Any]]:
    """All components, from top to bottom and from left to right.

    Pixels that touch at a corner belong together: strokes are thin and slanted.

    Shape: mask (H, W) bool, probability (H, W) -> dicts of plain numbers: `bbox`, `area` in pixels,
    `mean_probability` over them, `rle`.

    >>> regions(torch.eye(3) > 0, torch.full((3, 3), 0.5))
    [{'bbox': [0, 0, 3, 3], 'area': 3, 'mean_probability': 0.5, 'rle': {'size': [3, 3], 'counts': [0, 1, 3, 1, 3, 1]}}]
    """
    from scipy.ndimage import find_objects  # a slow import, as below, that masks alone do not need

    labels = _label(mask)
    areas = np.bincount(labels.ravel())
    likely = probability.detach().cpu().numpy()
    found = []
    for index, box in enumerate(find_objects(labels), start=1):
        inside = labels[box] == index  # (height, width) of the box
        top, left = box[0].start, box[1].start
        found.append(
            {
                "bbox": [left, top, inside.shape[1], inside.shape[0]],
                "area": int(areas[index]),
                "mean_probability": float(likely[box][inside].mean(dtype=np.float64)),
                "rle": _encode(inside, top=top, left=left, size=labels.shape),
            }
        )
    return sorted(found, key=lambda region: (region["bbox"][1], region["bbox"][0]))


def remove_doubtful(mask: Tensor, probability: Tensor, *, min_area: int, least: float) -> Tensor:
    """The mask without components of fewer than *min_area* pixels, or whose probability is below *least* everywhere.

    The latter is thresholding with hysteresis: Canny, "A Computational Approach to Edge Detection", IEEE TPAMI 8(6),
    1986, section VI. With a *least* that all pixels of the mask reach no component goes by it.
    Shape: mask (H, W) bool, probability (H, W) -> (H, W) bool.
    """
    labels = _label(mask)
    areas = np.bincount(labels.ravel())
    kept = np.zeros(len(areas), dtype=bool)
    kept[labels[(probability >= least).cpu().numpy()]] = True
    kept &= areas >= min_area
    kept[0] = False
    return torch.from_numpy(kept[labels])


def _label(mask: Tensor) -> np.ndarray:
    """Number of each pixel's component, 0 where there is none. Shape: (H, W) -> (H, W) int32."""
    from scipy.ndimage import label

    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape (height, width), got {mask.dtype} of {tuple(mask.shape)}")
    labels, _ = label(mask.cpu().numpy(), structure=np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    return labels


def _encode(inside: np.ndarray, *, top: int, left: int, size: tuple[int, ...]) -> dict[str, list[int]]:
    """The encoding of a component from its box alone, which is most often far smaller than the image."""
    height, width = size
    columns = np.pad(inside.T.astype(np.int8), ((0, 0), (1, 1)))  # (box width, box height + 2)
    edges = np.diff(columns)  # 1 where a run begins, -1 behind its end
    places = (left + np.arange(len(columns)))[:, None] * height + top + np.arange(edges.shape[1])  # in the whole image
    begins, ends = places[edges == 1], places[edges == -1]
    apart = begins[1:] != ends[:-1]  # a run down to the last row goes on in the first row of the next column
    begins, ends = begins[np.append(True, apart)], ends[np.append(apart, True)]
    bounds = np.concatenate([[0], np.stack([begins, ends], 1).ravel(), [height * width]])
    counts = np.diff(bounds).tolist()
    return {"size": [height, width], "counts": counts if counts[-1] else counts[:-1]}


def decode(rle: dict[str, list[int]]) -> Tensor:
    """The mask that a run-length encoding stands for. Shape: (H, W) bool.

    >>> decode({"size": [2, 3], "counts": [1, 2, 3]}).int()
    tensor([[0, 1, 0],
            [1, 0, 0]], dtype=torch.int32)
    """
    height, width = rle["size"]
    counts = torch.tensor(rle["counts"])
    values = torch.arange(len(counts)) % 2 == 1
    return values.repeat_interleave(counts).view(width, height).T  # (H, W)


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """The mask and all pixels that are at most *pixels* away from it. Shape: (H, W) bool -> same.

    A disk is a stack of horizontal runs, so a run of each length grows along the rows and is moved up and down: that
    takes 2 * pixels + 1 passes, where a disk as a whole takes about 3 * pixels**2.
    """
    from scipy.ndimage import maximum_filter1d

    if pixels:
        whole_numbers(pixels=pixels)
    grown = mask.cpu().clone()
    if not pixels or not grown.any():
        return grown
    source, target = grown.numpy().copy(), grown.numpy()
    for distance in range(pixels + 1):
        reach = int((pixels**2 - distance**2) ** 0.5)
        run = maximum_filter1d(source, 2 * reach + 1, axis=1, mode="constant", cval=0)
        rows = max(len(source) - distance, 0)
        target[distance:] |= run[:rows]
        target[:rows] |= run[distance:]
    return grown
