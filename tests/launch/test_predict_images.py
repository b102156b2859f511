"""Predictions from images, by a system that takes what is bright for marked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from data.manifest import write_manifest
from launch.errors import ConfigError
from launch.predict import run

SYSTEM = """
from collections.abc import Sequence

import torch

from models.base import System


class Bright(System):
    inputs = {"image": "image"}
    outputs = {"mask": "image", "probability": "image", "overlay": "image", "regions": "records"}

    def __init__(self, *, optim=None):
        super().__init__(optim=optim)

    def step(self, batch):
        return {}

    def predict(
        self,
        image,
        *,
        threshold: float = 0.5,
        region: Sequence[int] | None = None,
        outputs: Sequence[str] = ("mask", "probability", "overlay", "regions"),
    ):
        height, width = image.shape[1:]
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
        if region is not None and region[0] + region[2] > width:
            raise ValueError(f"region must lie inside the image, whose width is {width}")
        if width == 31:
            raise torch.OutOfMemoryError("CUDA out of memory")
        probability = image[0] / 255
        mask = probability >= threshold
        regions = [{"area": int(mask.sum())}]
        results = {"mask": mask, "probability": probability, "overlay": image, "regions": regions}
        return {name: results[name] for name in outputs} | {"threshold": threshold}
"""


@pytest.fixture(autouse=True)
def checkpoint(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bright.ckpt, of the system above."""
    Path("bright.py").write_text(SYSTEM)
    monkeypatch.syspath_prepend(in_tmp)
    described = {"name": "bright.Bright", "arguments": {}}
    torch.save({"format_version": 1, "system": described, "state_dict": {}, "config": {}}, "bright.ckpt")


def predict(**typed: Any) -> None:
    defaults = {"ckpt_path": "bright.ckpt", "packages": ["bright"], "input": "in", "output": "out", "device": "cpu"}
    run(OmegaConf.create(defaults | typed))


def write(name: str, *, width: int = 20, height: int = 12, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(name)
    return pixels


def read(name: str) -> np.ndarray:
    with Image.open(name) as image:
        return np.array(image)


def test_each_result_has_its_file() -> None:
    pixels = write("in/a/x.png")
    predict(threshold=0.25)
    red = pixels[:, :, 0]
    np.testing.assert_array_equal(read("out/a/x_mask.png"), 255 * (red >= 0.25 * 255))
    np.testing.assert_array_equal(read("out/a/x_probability.png"), red)
    np.testing.assert_array_equal(read("out/a/x_overlay.png"), pixels)
    assert json.loads(Path("out/a/x_regions.json").read_text()) == {
        "image": {"file": "in/a/x.png", "width": 20, "height": 12},
        "threshold": 0.25,
        "regions": [{"area": int((red >= 0.25 * 255).sum())}],
    }
    assert len(list(Path("out").rglob("*"))) == 5, "no leftovers"


def test_only_results_that_come_are_written() -> None:
    write("in/x.png")
    predict(outputs=["overlay", "mask"])
    assert sorted(file.name for file in Path("out").iterdir()) == ["x_mask.png", "x_overlay.png"]


def test_a_photo_comes_upright(in_tmp: Path) -> None:
    pixels = write("x.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels).save("turned.png", exif=exif)
    predict(input="turned.png", outputs=["overlay"])
    np.testing.assert_array_equal(read("out/turned_overlay.png"), np.rot90(pixels, -1))


def test_bad_files_among_good_ones(caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(("a.png", "c.jpg", "d.webp", "e.png")):
        write(f"in/{name}", seed=number)
    Path("in/b.png").touch()
    Path("in/e.png").write_bytes(Path("in/e.png").read_bytes()[:200])
    write("in/f.tif", width=31)
    with pytest.raises(ConfigError) as caught, caplog.at_level("INFO"):
        predict(outputs=["mask"])
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["in/b.png", "in/e.png", "in/f.tif"]
    assert "device's memory is not enough" in lines[2]
    done = [line.partition(" -> ")[0] for line in caplog.messages if " -> " in line]
    assert done == ["in/a.png", "in/c.jpg", "in/d.webp"] and "3 of 6 done" in caplog.messages
    assert len(list(Path("out").iterdir())) == 3


def test_an_option_that_does_not_suit_every_image() -> None:
    for name, width in (("a", 9), ("b", 20), ("c", 9), ("d", 8)):
        write(f"in/{name}.png", width=width)
    with pytest.raises(ConfigError) as caught:
        predict(region=[2, 0, 10, 5])
    assert str(caught.value).splitlines() == [
        "in/a.png, in/c.png: region=[2,0,10,5]: region must lie inside the image, whose width is 9",
        "in/d.png: region=[2,0,10,5]: region must lie inside the image, whose width is 8",
    ]
    assert Path("out/b_mask.png").exists()
    with pytest.raises(ConfigError, match="^threshold=1.5: threshold must be from 0 to 1, got 1.5$"):
        predict(threshold=1.5)  # suits none: said once, without names


def test_results_beside_their_images_are_no_images(caplog: pytest.LogCaptureFixture) -> None:
    write("in/x.jpg")
    write("in/sea_mask.png")  # a name of that kind, but there is no sea.png
    for _ in range(2):
        with caplog.at_level("INFO"):
            predict(output="in")
        assert "2 of 2 done" in caplog.messages
        caplog.clear()
    assert len(list(Path("in").iterdir())) == 10
    write("deep/in/x.png")
    for _ in range(2):
        predict(input="deep", output="deep/out", outputs=["mask"])
    assert [str(file) for file in sorted(Path("deep/out").rglob("*.png"))] == ["deep/out/in/x_mask.png"]


def test_an_image_that_a_result_would_replace() -> None:
    write("x.png")
    before = write("x_mask.png", seed=1)
    with pytest.raises(ConfigError, match="x_mask.png: this input would be replaced by a result"):
        predict(input="*.png", output=".", outputs=["mask"])
    np.testing.assert_array_equal(read("x_mask.png"), before)


def test_a_manifest_of_images() -> None:
    write("photos/a/x.png")
    write("photos/b/x.png")
    rows = [{"image_filepath": f"photos/{name}/x.png", "marked": False} for name in "ba"]
    write_manifest("photos.jsonl", rows)
    predict(input="photos.jsonl", outputs=["mask"])
    assert sorted(map(str, Path("out").rglob("*.png"))) == ["out/a/x_mask.png", "out/b/x_mask.png"]
