"""Photos and masks kept in memory: decoded once, up to a limit in megabytes, the least recently used dropped first.

Each loader worker fills a memory of its own, and they share the limit in equal parts. What cannot be read is tried
again the next time: whether a worker has met a file before must not decide what an item holds (data/bad_files.py).
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from data.checks import number
from data.errors import ImageError
from data.images import MAX_PIXELS, difference_mask, read_image, read_mask


class PhotoReader:
    """Reads images and masks, and keeps what it read.

    Args:
        limit_mb: megabytes (2**20 bytes) of pixels to keep, in all workers of a loader together; 0 keeps nothing.
            What is larger by itself is not kept.
        ignore_value: pixels of a mask with this stored value are not known, see `read_mask`.
        max_pixels: images and masks that declare more are refused.
        difference: settings of `difference_mask`, for photos whose clean version is known.
    """

    def __init__(
        self,
        *,
        limit_mb: float = 0.0,
        ignore_value: int | None = None,
        max_pixels: int = MAX_PIXELS,
        difference: Mapping[str, Any] | None = None,
    ) -> None:
        self.limit_mb = number("limit_mb", limit_mb, least=0)
        self.ignore_value = ignore_value
        self.max_pixels = max_pixels
        self.difference = dict(difference or {})
        self._kept: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()  # (sort, path), most recently used last
        self._num_bytes = 0

    @property
    def kept_mb(self) -> float:
        """Megabytes that are kept now."""
        return self._num_bytes / 2**20

    def image(self, path: str) -> np.ndarray:
        """As `read_image`; not to be written to."""
        return self._read("image", path)

    def mask(self, path: str) -> np.ndarray:
        """As `read_mask`; not to be written to."""
        return self._read("mask", path)

    def _read(self, sort: str, path: str) -> np.ndarray:
        key = (sort, path)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if sort == "image":
            pixels = read_image(path, max_pixels=self.max_pixels)
        else:
            pixels = read_mask(path, ignore_value=self.ignore_value, max_pixels=self.max_pixels)
        pixels.flags.writeable = False  # whoever asks next gets the same array
        self._keep(key, pixels)
        return pixels

    def _keep(self, key: tuple[str, str], pixels: np.ndarray) -> None:
        worker = get_worker_info()
        limit = self.limit_mb * 2**20 / (worker.num_workers if worker else 1)
        if pixels.nbytes > limit:
            return
        while self._num_bytes + pixels.nbytes > limit:
            self._num_bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[key] = pixels
        self._num_bytes += pixels.nbytes

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned worker gets: everything but the pixels, which it decodes when it needs them."""
        return self.__dict__ | {"_kept": OrderedDict(), "_num_bytes": 0}


def is_known(row: Mapping[str, Any]) -> bool:
    """Whether a manifest row of images says where the marks are, or that there are none."""
    return "mask_filepath" in row or "clean_filepath" in row or row.get("marked") is False


def read_example(row: Mapping[str, Any], *, reader: PhotoReader) -> tuple[np.ndarray, np.ndarray | None]:
    """The image of a manifest row and its mask; None for a photo to draw marks on.

    Args:
        row: a row of images, see data/manifest.py.
        reader: reads the files.

    Shape:
        Returns uint8 `(H, W, 3)` and uint8 `(H, W)` of 0, 1 and 255 (not known). Not to be written to.

    Raises:
        ImageError: a file cannot be read, or image and mask, or marked and clean, differ in size.
    """
    path = row["image_filepath"]
    image = reader.image(path)
    if "mask_filepath" in row:
        mask = reader.mask(row["mask_filepath"])
        _check_size(row["mask_filepath"], mask, path, image)
        return image, mask
    if "clean_filepath" in row:
        clean = reader.image(row["clean_filepath"])
        _check_size(row["clean_filepath"], clean, path, image)
        return image, difference_mask(image, clean, **reader.difference)
    return image, np.zeros(image.shape[:2], np.uint8) if is_known(row) else None


def _check_size(path: str, pixels: np.ndarray, image_path: str, image: np.ndarray) -> None:
    if pixels.shape[:2] != image.shape[:2]:
        (height, width), (image_height, image_width) = pixels.shape[:2], image.shape[:2]
        raise ImageError(
            f"{path}: is {width} x {height} pixels, but {image_path} is {image_width} x {image_height};"
            " they must show the same part at one size"
        )
