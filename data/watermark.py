"""Data of the segmentation system: photos on which marks are drawn while training runs, and photos with known marks.

A manifest's rows may be of all kinds in turn (data/manifest.py); a folder is scanned for the layouts that are in use
(data/image_folders.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from data.base import STAGES, SystemData
from data.checks import number, whole_number
from data.epochs import Setting, at_epoch, values_of
from data.errors import DataError
from data.image_cache import PhotoReader, is_known, read_example
from data.image_folders import scan_images, split_by_source
from data.images import MAX_PIXELS, NOT_KNOWN
from data.photo_crops import crop_pair, crop_photo
from data.photo_variety import PhotoVariety
from data.ranges import Range, check_range
from data.sampler import ItemKey, item_key
from data.watermark_synthesis import WatermarkSynthesis

_LEAST_CROP = 16  # pixels, the smallest that the network takes


class WatermarkDataset(Dataset):
    """Item `(index, epoch)`: a manifest row, drawn on if its marks are not known.

    In training the rows, shuffled once, come in turn, over epochs too. In evaluation each with known marks comes once,
    and after them the others in turn. Everything random is drawn from `np.random.default_rng([seed, epoch, index])`.

    Args:
        rows: manifest rows with `image_filepath`.
        num_items: examples per epoch, in evaluation of those that are drawn on; None: one of each row.
        crop: side of the square that is cut out, in pixels, by epoch as in data/epochs.py. None: photos whose marks are
            known come whole, others as a square of `synthesis_size` at most.
        synthesis: what draws marks.
        seed: see above.
        scale: [low, high], the range of the zoom of crops that are drawn on,
        known_scale: and of those whose marks are known.
        variety: what makes other photos of those that are drawn on in training.
        reader: of photos.

    Shape:
        An item is {"image": uint8 `(3, H, W)`, "mask": uint8 `(1, H, W)` of 0, 1 and 255 (not known), "size": int64
        `(2,)`, "name": the file}.

    Raises:
        ImageError: from an item, when its files cannot be used.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        num_items: int | None,
        crop: Setting[int] | None,
        synthesis: WatermarkSynthesis,
        seed: int,
        scale: tuple[float, float],
        known_scale: tuple[float, float],
        variety: PhotoVariety,
        reader: PhotoReader,
        synthesis_size: int,
    ) -> None:
        if crop is None:
            known, drawn = ([row for row in rows if is_known(row) is wanted] for wanted in (True, False))
            count = len(drawn) if num_items is None else num_items
            rows = [*known, *(drawn[index % len(drawn)] for index in range(count if drawn else 0))]
        else:  # an epoch may have fewer items than there are rows, and then begins where the last one ended
            rows = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]
        self.rows = rows
        self.drawn = [row for row in rows if not is_known(row)]
        self.num_items = len(rows) if num_items is None or crop is None else num_items
        self.crop = crop
        self.synthesis = synthesis
        self.seed = seed
        self.scale = scale
        self.known_scale = known_scale
        self.variety = variety
        self.reader = reader
        self.synthesis_size = synthesis_size

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, key: ItemKey | int) -> dict[str, Any]:
        index, epoch = item_key(key, len(self))
        rng = np.random.default_rng([self.seed, epoch, index])
        row = self.rows[(index + epoch * len(self)) % len(self.rows)] if self.crop is not None else self.rows[index]
        photo, mask = read_example(row, reader=self.reader)
        if self.crop is not None:
            side = at_epoch(self.crop, epoch)
            if mask is None:
                photo = crop_photo(photo, rng, side, scale=self.scale)
                apart = np.random.default_rng([self.seed, epoch, index, 1])  # marks stay where they are without it
                photo = self.variety(photo, apart, lambda: self._another_crop(apart, side))
            else:
                photo, mask = crop_pair(photo, mask, rng, side, scale=self.known_scale)
        elif mask is None:
            photo = _part(photo, self.synthesis_size, rng)
        if mask is None:
            photo, mask, _ = self.synthesis(photo, rng)
        image = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))
        return {
            "image": image,
            "mask": torch.tensor(mask)[None],
            "size": torch.tensor(image.shape[-2:]),
            "name": row["image_filepath"],
        }

    def _another_crop(self, rng: np.random.Generator, side: int) -> np.ndarray:
        """Of any photo that is drawn on. Shape: uint8 (side, side, 3)"""
        photo, _ = read_example(self.drawn[rng.integers(len(self.drawn))], reader=self.reader)
        return crop_photo(photo, rng, side, scale=self.scale)

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        """Items of several sizes are padded at the right and below, their masks with 255."""
        height, width = (max(int(item["size"][axis]) for item in items) for axis in (0, 1))
        return {
            "image": torch.stack([_padded(item["image"], height, width, 0) for item in items]),
            "mask": torch.stack([_padded(item["mask"], height, width, NOT_KNOWN) for item in items]),
            "size": torch.stack([item["size"] for item in items]),
            "name": [item["name"] for item in items],
        }


class WatermarkData(SystemData):
    """Data of the segmentation system. Batch: see `WatermarkDataset`, with B examples stacked.

    Args:
        images_dir: in place of manifests, a folder of photos, of images with masks, of marked with clean ones, or CLWD
            (data/image_folders.py), split by source photo.
        allow_missing_mask: what an image without a mask means: `error`, or `clean`: it has no mark.
        crop: side of a training example in pixels, or [[epoch, side], …].
        scale: [low, high], the range of the zoom of training crops that are drawn on,
        known_scale: and of those whose marks are known.
        synthesis_size: side of a validation or test example that is drawn on; smaller photos are taken whole, and so
            are all whose marks are known.
        variety: of training photos that are drawn on, arguments of `data.photo_variety.PhotoVariety`.
        train_examples, val_examples, test_examples: per epoch; None: one of each row, 0: none. In validation and test
            they count those that are drawn on, known ones all come once.
        eval_seed: seed of the validation's marks; those of the test have the next one.
        difference: of masks that are the difference of a marked and a clean photo, the `threshold` in levels of 255,
            `channels` (max or grey) and `open`.
        mask_ignore_value: of this value are the pixels of mask files that are not known; None: there are none.
        max_pixels: larger photos are refused before they are decoded.
        cache_limit_mb: of decoded photos kept in memory, of each stage and process, shared among its workers; 0:
            none are kept.
        synthesis: arguments of `data.watermark_synthesis.WatermarkSynthesis`.

        Others: as `SystemData`.
    """

    FOLDER_KEY = "images_dir"
    LENGTH_KEY = "crop"

    def __init__(
        self,
        *,
        train_manifest: str | None = None,
        val_manifest: str | None = None,
        test_manifest: str | None = None,
        images_dir: str | None = None,
        allow_missing_mask: str = "error",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        seed: int = 0,
        max_bad_files: int = 10,
        max_bad_fraction: float = 0.01,
        loader: dict[str, Any] | None = None,
        crop: Setting[int] = 256,
        scale: Range = (0.5, 2.0),
        known_scale: Range = (1.0, 1.0),
        variety: dict[str, Any] | None = None,
        synthesis_size: int = 512,
        train_examples: int | None = None,
        val_examples: int | None = None,
        test_examples: int | None = None,
        eval_seed: int = 5,
        difference: dict[str, Any] | None = None,
        mask_ignore_value: int | None = None,
        max_pixels: int = MAX_PIXELS,
        cache_limit_mb: float = 1024,
        synthesis: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            train_manifest=train_manifest,
            val_manifest=val_manifest,
            test_manifest=test_manifest,
            folder=images_dir,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            max_bad_files=max_bad_files,
            max_bad_fraction=max_bad_fraction,
            loader=loader,
        )
        if allow_missing_mask not in ("error", "clean"):
            raise ValueError(f"allow_missing_mask must be error or clean, got {allow_missing_mask!r}")
        for side in values_of("crop", crop):
            whole_number("crop", side, least=_LEAST_CROP)
        self.allow_missing_mask = allow_missing_mask
        self.crop = crop
        self.scales = {
            "scale": check_range("scale", scale, least=0.05, most=20),
            "known_scale": check_range("known_scale", known_scale, least=0.05, most=20),
        }
        try:
            self.variety = PhotoVariety(**(variety or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"variety.{str(error).rpartition('__init__() ')[2]}") from error
        self.synthesis_size = whole_number("synthesis_size", synthesis_size, least=_LEAST_CROP)
        counts = {"train": train_examples, "val": val_examples, "test": test_examples}
        self.num_examples = {
            stage: None if count is None else whole_number(f"{stage}_examples", count, least=int(stage == "train"))
            for stage, count in counts.items()
        }
        eval_seed = whole_number("eval_seed", eval_seed, least=0)
        self.seeds = {"train": seed, "val": eval_seed, "test": eval_seed + 1}
        if mask_ignore_value is not None:
            mask_ignore_value = whole_number("mask_ignore_value", mask_ignore_value, least=0)
        self.reading: dict[str, Any] = {
            "difference": _checked_difference(**(difference or {})),
            "ignore_value": mask_ignore_value,
            "max_pixels": whole_number("max_pixels", max_pixels, least=1),
            "limit_mb": number("cache_limit_mb", cache_limit_mb, least=0),
        }
        try:
            self.synthesis = WatermarkSynthesis(**(synthesis or {}))
        except DataError as error:  # about a file, not about a value
            raise DataError(f"data.synthesis.fonts: {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"synthesis.{str(error).rpartition('__init__() ')[2]}") from error

    def has_data(self, stage: str) -> bool:
        return self.num_examples[stage] != 0 and super().has_data(stage)

    def scan_folder(self, folder: str) -> dict[str, list[dict[str, Any]]]:
        parts = split_by_source(scan_images(folder, allow_missing_mask=self.allow_missing_mask))
        if empty := [stage for stage in STAGES if not parts[stage]]:
            raise DataError(
                f"{folder}: too few source photos to split, none is left for {' and '.join(empty)}; at least three are"
                " needed, or manifests (data.train_manifest, data.val_manifest)"
            )
        return parts

    def dataset(self, stage: str) -> Dataset | None:
        rows = self.rows(stage)
        if rows is None:
            return None
        if "image_filepath" not in rows[0]:
            raise DataError(
                f"{self.manifests[stage]}: holds recordings; segmentation needs rows with image_filepath"
                " (python -m data.prepare images writes them)"
            )
        return WatermarkDataset(
            rows,
            num_items=self.num_examples[stage],
            crop=self.crop if stage == "train" else None,
            synthesis=self.synthesis,
            seed=self.seeds[stage],
            **self.scales,
            variety=self.variety,
            reader=PhotoReader(**self.reading),
            synthesis_size=self.synthesis_size,
        )


def _checked_difference(
    *, threshold: float = 30, channels: str = "max", open: bool = False, **unknown: Any
) -> dict[str, Any]:
    """Arguments of `data.images.difference_mask`. Raises ValueError."""
    if unknown:
        raise ValueError(f"difference.{next(iter(unknown))}: no such key, there are threshold, channels, open")
    if channels not in ("max", "grey"):
        raise ValueError(f"difference.channels must be max or grey, got {channels!r}")
    if not isinstance(open, bool):
        raise ValueError(f"difference.open must be true or false, got {open!r}")
    return {
        "threshold": number("difference.threshold", threshold, least=0, most=255),
        "channels": channels,
        "open": open,
    }


def _part(photo: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A photo cut to `side` pixels at most in both directions, at a random place."""
    height, width = photo.shape[:2]
    top = int(rng.integers(max(height - side, 0) + 1))
    left = int(rng.integers(max(width - side, 0) + 1))
    return photo[top : top + side, left : left + side]


def _padded(pixels: Tensor, height: int, width: int, value: int) -> Tensor:
    return pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]), value=value)
