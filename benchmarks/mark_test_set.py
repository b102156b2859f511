"""Photos that marks are drawn on once and for all, for tests: all scripts, layouts and opacities in equal shares.

Image i takes script i mod 5, layout i mod 7, photo i mod n, each in the order listed, and one of the two ranges of
opacity by turns within each script. What cannot be seen, and text in a script's name that is an address, a number or a
date as in any other (Latin stands for these), is drawn again. What is drawn is a function of (seed, i) and the versions
of numpy, Pillow and its FreeType; `digest` says whether two sets are the same.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mark_scores import Example
from data.fonts import PACKAGES
from data.images import read_image, write_png
from data.manifest import write_manifest
from data.watermark_synthesis import WatermarkSynthesis

_TRIES = 50
_IN_ITS_SCRIPT = ("words", "random")  # kinds of text that are in no other script


def font_files(names: Sequence[str]) -> list[str]:
    """Files of the packages of data/fonts.py, named as in "zhplot/fonts/NotoSansSC-Regular.ttf"."""
    files = []
    for name in names:
        package, _, rest = name.partition("/")
        spec = importlib.util.find_spec(package) if package in PACKAGES else None
        found = [Path(folder) / rest for folder in (spec.submodule_search_locations or [] if spec else [])]
        if not any(file.is_file() for file in found):
            raise SystemExit(f"error: font {name}: not installed; pip install {package.replace('_', '-')}")
        files.append(str(next(file for file in found if file.is_file())))
    return files


def draw_marks(
    photos: Sequence[Path], *, num_images: int, fonts: dict[str, list[str]], marks: dict[str, Any], seed: int
) -> list[Example]:
    """Marked images.

    *fonts*: font files (paths) by script; these are the scripts. *marks*: `layouts`; `opacity`, a list of ranges [low,
    high] that are drawn from in equal shares; `synthesis`, what else `WatermarkSynthesis` takes.
    """
    scripts, ranges = list(fonts), marks["opacity"]
    examples = []
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        script = scripts[index % len(scripts)]
        layout = marks["layouts"][index % len(marks["layouts"])]
        opacity = float(rng.uniform(*ranges[index // len(scripts) % len(ranges)]))
        photo = photos[index % len(photos)]
        synthesis = WatermarkSynthesis(
            fonts=fonts[script],
            scripts=[script],
            layouts=[layout],
            opacity=[opacity, opacity],
            clean_p=0.0,
            **marks["synthesis"],
        )
        image, mask, mark = _draw(synthesis, read_image(photo), rng, photo)
        record = {"script": script, "layout": layout, "opacity": opacity, "style": mark["style"], "photo": photo.name}
        examples.append(Example(f"{index:02d}_{script}_{layout}", image, mask, record | {"mark": mark}))
    return examples


def _draw(
    synthesis: WatermarkSynthesis, photo: np.ndarray, rng: np.random.Generator, path: Path
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Image, mask and record of a mark that can be seen and is in its script."""
    for _ in range(_TRIES):
        image, mask, record = synthesis(photo, rng)
        for mark in record["marks"]:
            if mark["script"] == "latin" or mark["kind"] in _IN_ITS_SCRIPT:
                return image, mask, mark
    raise SystemExit(f"error: {path}: none of {_TRIES} marks on it can be seen and is in {synthesis.scripts[0]}")


def clean_examples(photos: Sequence[Path]) -> list[Example]:
    """The photos as they are."""
    images = [(photo, read_image(photo)) for photo in photos]
    return [Example(f"clean_{photo.stem}", image, np.zeros(image.shape[:2], np.uint8), {}) for photo, image in images]


def digest(examples: Sequence[Example]) -> str:
    """Of all masks in their order; images would differ with the JPEG decoder."""
    return hashlib.sha256(b"".join(np.packbits(example.mask).tobytes() for example in examples)).hexdigest()


def write_examples(examples: Sequence[Example], folder: Path) -> None:
    """As PNG files with a manifest beside them that evaluate.py takes, and what was drawn as JSON."""
    rows = []
    for example in examples:
        write_png(folder / f"{example.name}.png", example.image)
        write_png(folder / f"{example.name}_mask.png", example.mask == 1)
        (folder / f"{example.name}.json").write_text(json.dumps(example.record, indent=2) + "\n")
        rows.append(
            {
                "image_filepath": str((folder / f"{example.name}.png").absolute()),
                "mask_filepath": str((folder / f"{example.name}_mask.png").absolute()),
            }
        )
    write_manifest(folder / "manifest.jsonl", rows)
