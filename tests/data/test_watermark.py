"""Data of the segmentation system: what an item is a function of, sizes, kinds of rows, and what is refused."""

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.distortions import Distortions
from data.errors import DataError, ImageError
from data.manifest import read_manifest, write_manifest
from data.watermark import WatermarkData
from data.watermark_synthesis import WatermarkSynthesis

ROOT = Path(__file__).parents[2]


def data_of(**options: Any) -> WatermarkData:
    return WatermarkData(**{"crop": 32, "batch_size": 2, "synthesis_size": 48, "loader": {"num_workers": 0}} | options)


def dataset(data: WatermarkData, stage: str = "train") -> Any:
    data.setup("fit" if stage == "train" else "validate" if stage == "val" else "test")
    return data._datasets[stage].dataset  # type: ignore[union-attr]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in ("image", "mask"))


def test_an_item_is_a_function_of_seed_epoch_and_index(photos: Path) -> None:
    train = str(photos / "train.jsonl")
    items, again = dataset(data_of(train_manifest=train)), dataset(data_of(train_manifest=train))
    again[3, 1], again[0, 2]
    assert same(items[2, 1], again[2, 1])
    assert not same(items[2, 1], items[2, 2]) and not same(items[2, 1], items[1, 1])
    assert not same(items[2, 1], dataset(data_of(train_manifest=train, seed=9))[2, 1])
    item = items[0, 0]
    assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.uint8
    assert item["mask"].shape == (1, 32, 32) and set(item["mask"].unique().tolist()) <= {0, 1}


def test_workers_make_the_same_batches(photos: Path) -> None:
    batches = []
    for workers in (0, 1):
        data = data_of(train_manifest=str(photos / "train.jsonl"), loader={"num_workers": workers})
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
    assert len(batches[0]) == len(batches[1]) == 2
    assert all(same(one, other) for one, other in zip(*batches, strict=True))


def test_crops_grow_with_the_epochs(photos: Path) -> None:
    items = dataset(data_of(train_manifest=str(photos / "train.jsonl"), crop=[[0, 32], [2, 48], [5, 64]]))
    assert [items[0, epoch]["image"].shape[-1] for epoch in (0, 1, 2, 4, 5, 9)] == [32, 32, 48, 48, 64, 64]


def test_examples_per_epoch_and_none(photos: Path) -> None:
    data = data_of(
        train_manifest=str(photos / "train.jsonl"),
        val_manifest=str(photos / "val.jsonl"),
        test_manifest=str(photos / "test.jsonl"),
        train_examples=10,
        val_examples=3,
        test_examples=0,
    )
    assert len(dataset(data)) == 10 and len(dataset(data, "val")) == 3
    assert not data.has_data("test")
    names = [Path(dataset(data, "val")[index, 0]["name"]).name for index in range(3)]
    assert names == ["4.png", "5.png", "4.png"]


def test_known_marks_are_evaluated_once_each_however_many_are_drawn(photos: Path, tmp_path: Path) -> None:
    masked = read_manifest(photos / "masked.jsonl")
    write_manifest(tmp_path / "mixed.jsonl", [read_manifest(photos / "val.jsonl")[0], *masked])
    for count in (1, 3):
        mixed = dataset(data_of(val_manifest=str(tmp_path / "mixed.jsonl"), val_examples=count), "val")
        names = [Path(mixed[index, 0]["name"]).name for index in range(len(mixed))]
        assert names == ["0.png", "1.png", "2.png"] + count * ["4.png"]
    assert len(dataset(data_of(val_manifest=str(photos / "masked.jsonl"), val_examples=48), "val")) == 3


def test_a_short_epoch_goes_on_where_the_last_one_ended(photos: Path) -> None:
    items = dataset(data_of(train_manifest=str(photos / "train.jsonl"), train_examples=3))
    names = [items[index, epoch]["name"] for epoch in range(4) for index in range(3)]
    assert len(set(names[:4])) == 4 and names[:4] == names[4:8] == names[8:]


def test_validation_is_the_same_whatever_the_training_seed(photos: Path) -> None:
    val = str(photos / "val.jsonl")
    one, other = (dataset(data_of(val_manifest=val, seed=seed), "val") for seed in (0, 1))
    assert same(one[0, 0], other[0, 0])
    assert not same(one[0, 0], dataset(data_of(val_manifest=val, eval_seed=6), "val")[0, 0])
    assert one[0, 0]["image"].shape == (3, 48, 48)
    whole = dataset(data_of(val_manifest=val, synthesis_size=512), "val")[0, 0]
    assert whole["image"].shape == (3, 96, 96)


def test_known_marks_come_whole_in_evaluation_and_are_padded_with_what_is_not_known(photos: Path) -> None:
    data = data_of(val_manifest=str(photos / "masked.jsonl"), eval_batch_size=3)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch["size"].tolist() == [[72, 88], [72, 96], [72, 104]]
    assert batch["image"].shape == (3, 3, 72, 104) and batch["mask"].shape == (3, 1, 72, 104)
    for index, width in enumerate((88, 96, 104)):
        assert (batch["mask"][index, :, :, width:] == 255).all() and not batch["image"][index, :, :, width:].any()
        known = batch["mask"][index, 0, :, :width]
        assert torch.equal(known.nonzero(), torch.cartesian_prod(torch.arange(30, 40), torch.arange(10, 60, 5)))


def test_a_manifest_may_hold_all_kinds_of_rows(tmp_path: Path) -> None:
    plain = np.full((40, 40, 3), 100, np.uint8)
    marked = plain.copy()
    marked[10:20, 10:20] = 200
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20], mask[0] = 255, 77
    for name, pixels in {"plain": plain, "marked": marked, "mask": mask}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rows = [
        {"image_filepath": "marked.png", "mask_filepath": "mask.png"},
        {"image_filepath": "marked.png", "clean_filepath": "plain.png"},
        {"image_filepath": "plain.png", "marked": False},
        {"image_filepath": "plain.png"},
    ]
    write_manifest(tmp_path / "all.jsonl", rows)
    options = {"val_manifest": str(tmp_path / "all.jsonl"), "mask_ignore_value": 77, "synthesis": {"clean_p": 0.0}}
    items = dataset(data_of(**options), "val")
    known, difference, clean, drawn = (items[index, 0]["mask"][0] for index in range(4))
    assert (known[0] == 255).all() and int((known == 1).sum()) == 100
    assert int(difference.sum()) == 100 and int(difference.max()) == 1
    assert not clean.any() and drawn.any()
    assert not dataset(data_of(**options, difference={"threshold": 150}), "val")[1, 0]["mask"].any()
    (tmp_path / "mask.png").unlink()
    with pytest.raises(ImageError, match=r"mask\.png: no such file"):
        dataset(data_of(**options), "val")[0, 0]


def test_known_marks_are_cropped_with_their_photo(photos: Path) -> None:
    items = dataset(data_of(train_manifest=str(photos / "masked.jsonl"), train_examples=12))
    found = [items[index, 0] for index in range(12)]
    assert any(item["mask"].any() for item in found)
    for item in found:  # the fixture's marks are white, all else is painted
        assert (item["image"].permute(1, 2, 0)[item["mask"][0] == 1] == 255).all()


def test_a_folder_in_place_of_manifests(photos: Path) -> None:
    data = data_of(images_dir=str(photos / "photos"))
    data.setup()
    sizes = {stage: len(data.rows(stage) or ()) for stage in ("train", "val", "test")}
    assert sum(sizes.values()) == 8 and min(sizes.values()) >= 1
    (photos / "two").mkdir()
    for number in range(2):
        shutil.copy(photos / "photos" / f"{number}.png", photos / "two")
    with pytest.raises(DataError, match="two: too few source photos to split"):
        data_of(images_dir=str(photos / "two")).setup()
    with pytest.raises(ValueError, match="give either images_dir or manifests"):
        data_of(images_dir=str(photos / "photos"), val_manifest="x")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"crop": 8}, "^crop must be"),
        ({"crop": [[1, 32]]}, "^crop: give a value"),
        ({"scale": [2, 1]}, "^scale"),
        ({"known_scale": 1}, "^known_scale"),
        ({"synthesis_size": 0}, "^synthesis_size"),
        ({"train_examples": 0}, "^train_examples"),
        ({"val_examples": -1}, "^val_examples"),
        ({"allow_missing_mask": "yes"}, "^allow_missing_mask"),
        ({"max_pixels": 0}, "^max_pixels"),
        ({"cache_limit_mb": -1}, "cache_limit_mb|limit_mb"),
        ({"difference": {"treshold": 3}}, r"^difference\.treshold: no such key"),
        ({"difference": {"channels": "rgb"}}, r"^difference\.channels"),
        ({"difference": {"open": 1}}, r"^difference\.open"),
        ({"mask_ignore_value": "255"}, "^mask_ignore_value"),
        ({"synthesis": {"opacity": [0.5, 2]}}, r"^synthesis\.opacity"),
        ({"synthesis": {"opacitty": 1}}, r"^synthesis\..*opacitty"),
        ({"synthesis": {"scripts": ["klingon"]}}, r"^synthesis\.scripts"),
    ],
)
def test_settings_that_cannot_be_used(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        data_of(train_manifest="x", **options)


def test_recordings_are_not_for_segmentation(corpus: Path) -> None:
    with pytest.raises(DataError, match="holds recordings; segmentation needs rows with image_filepath"):
        data_of(train_manifest=str(corpus / "train.jsonl")).setup("fit")


def test_the_yaml_says_what_the_synthesis_does_by_default() -> None:
    section = yaml.safe_load((ROOT / "config" / "data" / "unet.yaml").read_text())["synthesis"]
    parameters = inspect.signature(WatermarkSynthesis).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    defaults |= {field.name: field.default for field in dataclasses.fields(Distortions)}

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    assert section == {name: plain(value) for name, value in defaults.items()}
