"""The demo photos: those inside the scikit-image and scikit-learn wheels, with manifests; nothing is downloaded.

    <output>/photos/<name>.png or .jpg   copied byte for byte
    <output>/{train,val,test}.jsonl      photos to draw marks on; which is where is fixed, split by source
    <output>/LICENSES.txt                where each photo comes from, and its terms

Drawings and the smallest pictures are left out. Two show text that belongs to the scene (`page`, `text`): a mark
drawn on them has to be told from it.
"""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from data.audio import atomic_path
from data.corpus import SPLITS, begin_corpus, damaged_files, finish_corpus, is_finished, read_corpus
from data.errors import DataError
from data.image_folders import check_image_splits
from data.manifest import write_manifest

FORMAT = 1

_PACKAGES = {"scikit-image": ("skimage", "data"), "scikit-learn": ("sklearn", "datasets/images")}
_INSTALL = "pip install -r requirements-demo.txt"


@dataclass(frozen=True)
class Photo:
    """A photo of a wheel. `terms` as that wheel's documentation states them."""

    file: str
    split: str
    terms: str
    package: str = "scikit-image"
    source: str = ""
    """The scene, where several photos show one; else the file's stem."""


_CC0 = "CC0"
_PUBLIC = "public domain"
_STEREO = "Middlebury 2014 stereo benchmark (Scharstein et al., GCPR 2014); no terms stated"
_CC_BY = "CC BY 2.0"

PHOTOS = (
    Photo("astronaut.png", "train", f"{_PUBLIC} (NASA)"),
    Photo("brick.png", "train", f"{_CC0} (CC0Textures)"),
    Photo("camera.png", "train", f"{_CC0} (Lav Varshney)"),
    Photo("chelsea.png", "train", f"{_CC0} (Stefan van der Walt)"),
    Photo("grass.png", "train", f"{_CC0} (linolafett)"),
    Photo("hubble_deep_field.jpg", "train", f"{_PUBLIC} (NASA)"),
    Photo("ihc.png", "train", "no known copyright restrictions (CMMI)"),
    Photo("moon.png", "train", "no terms stated"),
    Photo("motorcycle_left.png", "train", _STEREO, source="motorcycle"),
    Photo("motorcycle_right.png", "train", _STEREO, source="motorcycle"),
    Photo("page.png", "train", "no terms stated"),
    Photo("retina.jpg", "train", f"{_CC0} (Mikael Häggström)"),
    Photo("rocket.jpg", "train", f"{_PUBLIC} (SpaceX)"),
    Photo("text.png", "train", f"{_PUBLIC} (Wikipedia)"),
    Photo("coins.png", "val", "no known copyright restrictions (Brooklyn Museum)"),
    Photo("flower.jpg", "val", f"{_CC_BY} (vultilion)", "scikit-learn"),
    Photo("gravel.png", "val", f"{_CC0} (CC0Textures)"),
    Photo("china.jpg", "test", f"{_CC_BY} (danielbuechele)", "scikit-learn"),
    Photo("clock_motion.png", "test", f"{_PUBLIC} (Stefan van der Walt)"),
    Photo("coffee.png", "test", f"{_CC0} (Rachel Michetti)"),
)


def make_demo_photos(output: str | os.PathLike[str]) -> None:
    """Copy the photos into the folder `output`, or find that they are there already; says on stdout what it does.

    Raises:
        DataError: a wheel or a photo in it is missing, or the folder holds other files under the names needed.
    """
    folder = Path(output)
    planned = [f"photos/{photo.file}" for photo in PHOTOS]
    planned += [f"{split}.jsonl" for split in SPLITS] + ["LICENSES.txt"]
    made_by = {"corpus": "demo_photos", "format": FORMAT}
    if is_finished(folder, made_by=made_by):
        print(f"{folder}: the demo photos are complete ({len(PHOTOS)} photos), nothing to do")
        return
    originals = {photo.file: _original(photo) for photo in PHOTOS}  # before anything is written
    begin_corpus(folder, made_by=made_by, planned=planned)
    for name, original in originals.items():
        with atomic_path(folder / "photos" / name) as temporary:
            shutil.copyfile(original, temporary)
    for split in SPLITS:
        rows = [
            {"image_filepath": f"photos/{photo.file}", "source": photo.source or Path(photo.file).stem, "split": split}
            for photo in PHOTOS
            if photo.split == split
        ]
        write_manifest(folder / f"{split}.jsonl", rows)
        print(f"{folder / split}.jsonl: {len(rows)} photos")
    lines = [f"{photo.file}: from the {photo.package} wheel; {photo.terms}\n" for photo in PHOTOS]
    with atomic_path(folder / "LICENSES.txt") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    finish_corpus(folder, made_by=made_by, planned=planned)


def check_demo_photos(output: str | os.PathLike[str]) -> list[str]:
    """What is wrong with the photos in `output`, one line per problem; writes nothing."""
    folder = Path(output)
    corpus = read_corpus(folder)
    if corpus is None or corpus.made_by.get("corpus") != "demo_photos":
        return [f"{folder}: no demo photos here; make them with: python -m data.prepare demo_photos --output {folder}"]
    if not corpus.complete or corpus.made_by.get("format") != FORMAT:
        return [f"{folder}: the photos are unfinished or of another version; run the same command without --check"]
    return damaged_files(folder, corpus) or check_image_splits(folder)


def _original(photo: Photo) -> Path:
    """Where a photo lies in its wheel, found without importing the package."""
    package, inner = _PACKAGES[photo.package]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{photo.package} is not installed, its photos are needed: {_INSTALL}")
    path = Path(spec.submodule_search_locations[0], inner, photo.file)
    if not path.is_file():
        raise DataError(f"{path}: no such photo in this version of {photo.package}: {_INSTALL}")
    return path
