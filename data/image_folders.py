"""Folders of images: what they hold as manifest rows, split by source photo, checked.

    images/ masks/ (x.jpg with x.png or x_mask.png)       images whose marks are known
    watermarked/ clean/ [masks/]                          the same photo with and without marks
    {train,test}/{Watermarked_image,Watermark_free_image,Mask}   CLWD
    anything else                                         photos to draw marks on

Files belong together by their path below their folder without its suffix. Hidden files are passed over. A mask that
is missing or ambiguous is an error: an image with marks must never be learned as one without.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.audio import PathLike
from data.corpus import SPLITS
from data.errors import DataError
from data.folders import contents
from data.image_cache import PhotoReader, read_example
from data.images import IMAGE_SUFFIXES
from data.manifest import LINE_KEY, read_manifest

log = logging.getLogger(__name__)

Row = dict[str, Any]

_CLWD = ("Watermarked_image", "Watermark_free_image", "Mask")
_MASK_SUFFIX = "_mask"


def scan_images(folder: PathLike, *, allow_missing_mask: str = "error") -> list[Row]:
    """Manifest rows for a folder of images, in the order of their paths; its layout (see above) is recognised.

    Args:
        folder: where the images, or the folders of the layout, are.
        allow_missing_mask: "error", or "clean": an image without mask is known to have no marks. Of `watermarked`
            images each needs its mask or its clean photo all the same.

    Returns:
        Rows with absolute paths. An image with mask and clean photo gets its mask, and the hash of the clean photo as
        `source`. Those of CLWD have their `split`.

    Raises:
        DataError: no images, half a layout, an image without mask or with two, or two files with one stem.
    """
    if allow_missing_mask not in ("error", "clean"):
        raise DataError(f"allow_missing_mask must be error or clean, got {allow_missing_mask!r}")
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder")
    if any((root / split / _CLWD[0]).is_dir() for split in SPLITS):
        return scan_clwd(root)
    marked, masks, clean = root / "watermarked", root / "masks", root / "clean"
    if marked.is_dir():
        rows = _pairs(marked, masks, clean)
    elif masks.is_dir():
        if not (root / "images").is_dir():
            raise DataError(f"{root}: holds masks, but neither images nor watermarked; there is {contents(root)}")
        rows = _with_masks(root / "images", masks, allow_missing_mask=allow_missing_mask)
    else:
        rows = _photos(root)
    if not rows:
        raise DataError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}); there is {contents(root)}")
    return rows


def scan_clwd(folder: PathLike) -> list[Row]:
    """Manifest rows of CLWD (Liu et al., "WDNet", WACV 2021), its own `split` in each.

    Raises:
        DataError: as `scan_images`, or no such corpus.
    """
    root = Path(os.path.abspath(folder))
    rows = []
    for split in SPLITS:
        marked, clean, masks = (root / split / name for name in _CLWD)
        if marked.is_dir():
            rows += [row | {"split": split} for row in _pairs(marked, masks, clean)]
    if not rows:
        raise DataError(f"{folder}: looked for train/{_CLWD[0]} and test/{_CLWD[0]} with images in it")
    return rows


def split_by_source(
    rows: Iterable[Mapping[str, Any]], *, val_fraction: float = 0.1, test_fraction: float = 0.1
) -> dict[str, list[Row]]:
    """Split rows into train, val and test such that no source photo is in two of them.

    The source is the row's `source`, else the content of its clean photo, else of its image: the same file under two
    names stays together. The draw depends on the sources alone, not on the order of the rows or where they lie.
    Rows that have their `split` keep it; where none is val, val is drawn from train.

    Args:
        rows: of images, see data/manifest.py.
        val_fraction, test_fraction: shares of the sources; above 0, at least one source where there are three.

    Raises:
        DataError: fractions that leave nothing, some rows with `split` and some without, or an unreadable file.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise DataError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must leave a part to train on")
    rows = [dict(row) for row in rows]
    given = {row.get("split") for row in rows}
    if None in given and len(given) > 1:
        without = next(row for row in rows if "split" not in row)
        raise DataError(f"{without['image_filepath']}: has no split, others have; give all rows one or none")
    splits: dict[str, list[Row]] = {split: [row for row in rows if row.get("split") == split] for split in SPLITS}
    if None in given:
        splits = _draw(rows, {"test": test_fraction, "val": val_fraction})
    elif "val" not in given:
        drawn = _draw(splits["train"], {"val": val_fraction})
        splits |= {"train": drawn["train"], "val": [row | {"split": "val"} for row in drawn["val"]]}
    return splits


def check_image_splits(folder: Path, *, given: str = "") -> list[str]:
    """One line per problem of the manifests {train,val,test}.jsonl that are in `folder`.

    Each image, mask and clean photo must be readable and of one size, and no source photo in two splits.

    Args:
        folder: where the manifests are.
        given: a split that the corpus comes with; its source photos may be those of other splits.
    """
    paths = {split: path for split in SPLITS if (path := folder / f"{split}.jsonl").exists()}
    if not paths:
        return [f"{folder / 'train.jsonl'}: no such manifest; check the path"]
    problems: list[str] = []
    seen: dict[str, str] = {}  # source -> split
    for split, path in paths.items():
        try:
            rows = read_manifest(path)
        except DataError as error:
            problems.append(str(error))
            continue
        for row in rows:
            try:
                read_example(row, reader=PhotoReader())
            except DataError as error:
                problems.append(str(error))
                continue
            other = seen.setdefault(source_of(row), split)
            if other != split and given not in (split, other):
                line = row[LINE_KEY]
                problems.append(f"{row['image_filepath']}: {line}: its source photo is also in {paths[other].name}")
    return problems


def source_of(row: Mapping[str, Any]) -> str:
    """What tells the source photo of a row from others: its `source`, or a hash of the clean photo or of the image.

    Raises:
        DataError: the file cannot be read.
    """
    if "source" in row:
        return row["source"]
    return _hash(row.get("clean_filepath", row["image_filepath"]))


def _hash(path: PathLike) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha1").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _draw(rows: list[Row], fractions: Mapping[str, float]) -> dict[str, list[Row]]:
    """The rows by split: each fraction of the sources, in an order that only the sources decide; train the rest."""
    by_source: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_source.setdefault(source_of(row), []).append(index)
    order = sorted(by_source, key=lambda source: hashlib.sha1(source.encode()).digest())
    split_of: dict[int, str] = {}
    start = 0
    for split, fraction in fractions.items():
        count = max(1, round(fraction * len(order))) if fraction > 0 else 0
        count = min(count, len(order) - start - 1)  # train comes first where there are not enough for all
        split_of |= {index: split for source in order[start : start + count] for index in by_source[source]}
        start += count
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for index, row in enumerate(rows):
        splits[split_of.get(index, "train")].append(row)
    return splits


def _photos(root: Path) -> list[Row]:
    """All images below a folder, as photos to draw marks on."""
    paths = _images_below(root)
    stems = {path.with_suffix("") for path in paths}
    for path in paths:
        stem = path.with_suffix("")
        if stem.name.endswith(_MASK_SUFFIX) and stem.with_name(stem.name.removesuffix(_MASK_SUFFIX)) in stems:
            raise DataError(f"{path}: looks like a mask among photos; put images and masks into images/ and masks/")
    return [{"image_filepath": str(path)} for path in paths]


def _with_masks(images: Path, masks: Path, *, allow_missing_mask: str) -> list[Row]:
    """Images with their masks; one without is an error, or known to have no marks."""
    images_by_stem, masks_by_stem = _by_stem(images), _by_stem(masks)
    rows, used = [], set()
    for stem, path in images_by_stem.items():
        mask = _mask_of(stem, masks_by_stem, images_by_stem)
        if mask is not None:
            used.add(mask)
            rows.append({"image_filepath": str(path), "mask_filepath": str(masks_by_stem[mask])})
        elif allow_missing_mask == "clean":
            rows.append({"image_filepath": str(path), "marked": False})
        else:
            raise DataError(
                f"{path}: has no mask {stem} or {stem}{_MASK_SUFFIX} in {masks}; add it, or take images without"
                " mask for unmarked ones with allow_missing_mask=clean"
            )
    _warn_unused(masks_by_stem, used, "mask without an image, left out")
    return rows


def _pairs(marked: Path, masks: Path, clean: Path) -> list[Row]:
    """Marked images with their masks where there is such a folder, else with their clean photos."""
    if not masks.is_dir() and not clean.is_dir():
        raise DataError(f"{marked}: needs {clean.name} or {masks.name} beside it; there is {contents(marked.parent)}")
    marked_by_stem, rows = _by_stem(marked), []
    clean_by_stem = _by_stem(clean) if clean.is_dir() else None
    if clean_by_stem is not None:
        missing = next((path for stem, path in marked_by_stem.items() if stem not in clean_by_stem), None)
        if missing is not None:
            raise DataError(f"{missing}: has no clean photo of this name in {clean}; add it or remove the image")
        _warn_unused(clean_by_stem, set(marked_by_stem), "clean photo without a watermarked image, left out")
    if not masks.is_dir():
        pairs = ((path, (clean_by_stem or {})[stem]) for stem, path in marked_by_stem.items())
        return [{"image_filepath": str(path), "clean_filepath": str(other)} for path, other in pairs]
    rows = _with_masks(marked, masks, allow_missing_mask="error")
    if clean_by_stem is not None:
        rows = [
            row | {"source": _hash(path)}
            for row, path in zip(rows, (clean_by_stem[stem] for stem in marked_by_stem), strict=True)
        ]
    return rows


def _mask_of(stem: str, masks: Mapping[str, Path], images: Mapping[str, Path]) -> str | None:
    """The key of an image's mask: its own stem, or that with _mask unless it is another image's."""
    long = stem + _MASK_SUFFIX
    found = [name for name in (stem, long) if name in masks and (name == stem or long not in images)]
    if len(found) > 1:
        raise DataError(f"{images[stem]}: has two masks, {masks[found[0]]} and {masks[found[1]]}; remove one")
    return found[0] if found else None


def _warn_unused(files: Mapping[str, Path], used: set[str], what: str) -> None:
    unused = [path for stem, path in files.items() if stem not in used]
    if unused:
        log.warning("%s: %s%s", unused[0], what, f" (and {len(unused) - 1} more)" if len(unused) > 1 else "")


def _by_stem(folder: Path) -> dict[str, Path]:
    """All images below a folder by their path in it without suffix."""
    found: dict[str, Path] = {}
    for path in _images_below(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise DataError(f"{path}: {found[stem].name} has the same stem; remove or rename one of them")
        found[stem] = path
    return found


def _images_below(folder: Path) -> list[Path]:
    """All images below a folder, sorted; hidden files and folders are passed over."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    odd = next((path for path in paths if any("\ud800" <= letter <= "\udfff" for letter in str(path))), None)
    if odd is not None:
        raise DataError(f"{str(odd)!r}: its name is not UTF-8 text, no manifest can hold it; rename it")
    return paths
