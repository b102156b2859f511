"""Images of any size in overlapping tiles, which go through a network in batches and are blended.

Source: the sliding window of nnU-Net (Isensee et al., "nnU-Net: a self-configuring method for deep learning-based
biomedical image segmentation", Nature Methods 18, 2021): evenly spread tiles, weighted by a Gaussian, for a network
knows least about the pixels at a tile's edge.

Decisions that are not obvious:
* The window is the outer product of two one-dimensional ones. So is the grid of tiles, hence also the sum of all
  windows over the image: weights are divided by it per axis, beforehand, and then sum to one in every pixel.
* Logits are blended, not probabilities, in float64 and on the CPU: the device's memory then depends on the batch and
  not on the image, and tiles that agree give that value to the last bit.
* An image smaller than a tile in one direction has tiles of its own height or width; no pixel is made up.
"""

from collections.abc import Callable, Iterator
from itertools import product
from math import ceil

import torch
from torch import Tensor

from modules.adaptive_batch import AdaptiveBatch
from modules.checks import numbers, whole_numbers


def tile_starts(size: int, tile: int, step: float) -> list[int]:
    """First pixels of as few tiles as cover an axis of *size* pixels, evenly spread.

    *step*: most that lies between two starts, as a share of the tile, from above 0 to 1.

    Raises ValueError for a tile that exceeds the axis.

    >>> tile_starts(1000, 512, 0.75)
    [0, 244, 488]
    """
    if tile > size:
        raise ValueError(f"a tile of {tile} pixels does not fit into {size}")
    num_steps = ceil((size - tile) / (tile * step))
    return [round((size - tile) / max(num_steps, 1) * index) for index in range(num_steps + 1)]


def gaussian_window(height: int, width: int) -> Tensor:
    """Weights of a tile's pixels: a Gaussian of an eighth of the tile around pixel (height // 2, width // 2), where it
    is 1; nowhere 0. Shape: (height, width) float32.
    """
    return (_gaussian(height)[:, None] * _gaussian(width)).float()


def _gaussian(size: int) -> Tensor:
    """Shape: (size,) float64. At the edge, four deviations out, it is exp(-8)."""
    return torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - size // 2) / (size / 8)) ** 2)


def _axis_weights(size: int, tile: int, starts: list[int]) -> list[Tensor]:
    """Weights of every tile along one axis; those of a pixel sum to one. Shape: (tile,) float64 each."""
    window = _gaussian(tile)
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    return [window / total[start : start + tile] for start in starts]


def predict_in_tiles(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    tile: int = 512,
    overlap: float = 0.5,
    batch: AdaptiveBatch,
) -> Tensor:
    """Logits of an image of any size, from tiles that overlap.

    Arguments
        network: logits (n, 1, h, w) of tiles (n, C, h, w), which have the image's type and device; moving them to
            another is up to it.
        image: of any type; it stays where it is.
        tile: side of a tile in pixels.
        overlap: least share of a tile that the next one covers too, from 0 to 0.99.
        batch: decides how many tiles go through the network at a time.

    Shape: (C, H, W) -> (1, H, W) float32 on the CPU.

    Raises ValueError for arguments that do not fit.

    >>> image = torch.rand(1, 100, 70)
    >>> torch.equal(predict_in_tiles(lambda tiles: tiles, image, tile=32, batch=AdaptiveBatch()), image)
    True
    """
    whole_numbers(tile=tile)
    numbers(overlap=overlap, least=0, most=0.99)
    if image.ndim != 3 or not image.numel():
        raise ValueError(f"image must have shape (channels, height, width), got {tuple(image.shape)}")
    height, width = image.shape[1:]
    tile_height, tile_width = min(tile, height), min(tile, width)
    rows = tile_starts(height, tile_height, 1 - overlap)
    columns = tile_starts(width, tile_width, 1 - overlap)

    def cut() -> Iterator[Tensor]:
        for top, left in product(rows, columns):
            yield image[:, top : top + tile_height, left : left + tile_width]

    places = product(
        zip(rows, _axis_weights(height, tile_height, rows), strict=True),
        zip(columns, _axis_weights(width, tile_width, columns), strict=True),
    )
    blended = torch.zeros(1, height, width, dtype=torch.float64)
    for ((top, row_weights), (left, column_weights)), logits in zip(places, batch.run(network, cut()), strict=True):
        weights = row_weights[:, None] * column_weights  # (h, w)
        logits = logits.detach().to("cpu", torch.float64)  # (1, h, w)
        blended[:, top : top + tile_height, left : left + tile_width].addcmul_(weights, logits)
    return blended.float()
