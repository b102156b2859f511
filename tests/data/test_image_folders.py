"""Layouts of image folders, their mistakes, and splits by source photo."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from data.errors import DataError
from data.image_folders import check_image_splits, scan_images, source_of, split_by_source
from data.manifest import read_manifest, write_manifest


def put(folder: Path, *names: str, size: tuple[int, int] = (4, 4)) -> None:
    """Images that all differ: their colour is their name's."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, tuple(sum(map(ord, name[i::3])) * 37 % 256 for i in range(3))).save(path)


def names(rows: list[dict], folder: Path) -> list[dict]:
    """Rows with paths as written in the tests."""
    return [
        {
            key: str(Path(value).relative_to(folder)) if key.endswith("_filepath") else value
            for key, value in row.items()
            if key != "source"
        }
        for row in rows
    ]


def test_photos_to_draw_on(tmp_path: Path) -> None:
    put(tmp_path, "b/2.JPG", "a.png", "b/1.webp", ".hidden.png", ".cache/3.png", "clean/4.bmp")
    (tmp_path / "notes.txt").touch()
    assert names(scan_images(tmp_path), tmp_path) == [
        {"image_filepath": name} for name in ("a.png", "b/1.webp", "b/2.JPG", "clean/4.bmp")
    ]


def test_images_with_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "images/1.jpg", "images/x/2.png", "images/3.v1.tif")
    put(tmp_path, "masks/1.png", "masks/x/2_mask.bmp", "masks/3.v1.png", "masks/4.png", "masks/.5.png")
    assert names(scan_images(tmp_path), tmp_path) == [
        {"image_filepath": "images/1.jpg", "mask_filepath": "masks/1.png"},
        {"image_filepath": "images/3.v1.tif", "mask_filepath": "masks/3.v1.png"},
        {"image_filepath": "images/x/2.png", "mask_filepath": "masks/x/2_mask.bmp"},
    ]
    assert "masks/4.png: mask without an image" in caplog.text


def test_a_mask_of_another_image_is_no_second_one(tmp_path: Path) -> None:
    put(tmp_path, "images/a.png", "images/a_mask.png", "masks/a.png", "masks/a_mask.png")
    assert [row["mask_filepath"][-10:] for row in scan_images(tmp_path)] == ["asks/a.png", "a_mask.png"]


def test_marked_and_clean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "watermarked/1.jpg", "watermarked/2.jpg", "clean/1.png", "clean/2.jpg", "clean/3.jpg")
    assert names(scan_images(tmp_path), tmp_path) == [
        {"image_filepath": "watermarked/1.jpg", "clean_filepath": "clean/1.png"},
        {"image_filepath": "watermarked/2.jpg", "clean_filepath": "clean/2.jpg"},
    ]
    assert "clean/3.jpg: clean photo without" in caplog.text
    put(tmp_path, "masks/1.png", "masks/2_mask.png")
    rows = scan_images(tmp_path)  # a mask says it better than the difference
    assert names(rows, tmp_path) == [
        {"image_filepath": "watermarked/1.jpg", "mask_filepath": "masks/1.png"},
        {"image_filepath": "watermarked/2.jpg", "mask_filepath": "masks/2_mask.png"},
    ]
    assert rows[0]["source"] == source_of({"image_filepath": str(tmp_path / "clean" / "1.png")})


def clwd(folder: Path, train: int = 8) -> Path:
    for split, count in (("train", train), ("test", 2)):
        for stem in (f"{number}gpj" for number in range(count)):  # of these letters strip('.jpg') would eat the last
            put(folder / split, f"Watermarked_image/{stem}.jpg", f"Watermark_free_image/{stem}.jpg")
            put(folder / split, f"Mask/{stem}.png", f"Alpha/{stem}.png", f"Watermark/{stem}.png")
    return folder


def test_clwd(tmp_path: Path) -> None:
    rows = scan_images(clwd(tmp_path))
    assert [row["split"] for row in rows] == ["train"] * 8 + ["test"] * 2
    assert names(rows, tmp_path)[8] == {
        "image_filepath": "test/Watermarked_image/0gpj.jpg",
        "mask_filepath": "test/Mask/0gpj.png",
        "split": "test",
    }
    parts = split_by_source(rows, val_fraction=0.25)
    assert {split: len(part) for split, part in parts.items()} == {"train": 6, "val": 2, "test": 2}
    assert all(row["split"] == split for split, part in parts.items() for row in part)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "holds no image"),
        (("images/1.png", "images/2.png", "masks/1.png"), r"images/2\.png: has no mask 2 or 2_mask in"),
        (("images/1.png", "masks/1.png", "masks/1_mask.png"), r"images/1\.png: has two masks, .*1\.png and .*1_mask"),
        (("images/1.png", "images/1.jpg", "masks/1.png"), r"images/1\.png: 1\.jpg has the same stem"),
        (("images/1.png", "masks/1.png", "masks/1.bmp"), r"masks/1\.png: 1\.bmp has the same stem"),
        (("masks/1.png",), "holds masks, but neither images nor watermarked; there is masks"),
        (("watermarked/1.png",), "watermarked: needs clean or masks beside it"),
        (("watermarked/1.png", "clean/2.png"), r"watermarked/1\.png: has no clean photo"),
        (("watermarked/1.png", "clean/1.png", "masks/2.png"), r"watermarked/1\.png: has no mask"),
        (("train/Watermarked_image/1.jpg", "train/Mask/2.png"), r"Watermarked_image/1\.jpg: has no mask"),
        (("a.jpg", "a_mask.png"), r"a_mask\.png: looks like a mask among photos"),
        (("a.jpg", "\udcff.png"), r"udcff\.png': its name is not UTF-8"),
    ],
)
def test_a_mistake_names_the_file(tmp_path: Path, files: tuple[str, ...], says: str) -> None:
    put(tmp_path, *files)
    with pytest.raises(DataError, match=says) as error:
        scan_images(tmp_path)
    assert "\n" not in str(error.value)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such folder"):
        scan_images("none")
    with pytest.raises(DataError, match="allow_missing_mask must be error or clean, got 'yes'"):
        scan_images(tmp_path, allow_missing_mask="yes")


def test_an_image_without_mask_may_be_known_to_be_clean(tmp_path: Path) -> None:
    put(tmp_path, "images/1.png", "images/2.png", "masks/1.png")
    rows = names(scan_images(tmp_path, allow_missing_mask="clean"), tmp_path)
    assert rows[1] == {"image_filepath": "images/2.png", "marked": False}
    put(tmp_path, "watermarked/1.png", "watermarked/2.png")  # an image that is called marked has a mask
    with pytest.raises(DataError, match=r"watermarked/2\.png: has no mask"):
        scan_images(tmp_path, allow_missing_mask="clean")


def by_name(parts: dict[str, list[dict]]) -> dict[str, list[str]]:
    return {split: sorted(Path(row["image_filepath"]).name for row in part) for split, part in parts.items()}


def test_a_split_does_not_depend_on_order_or_place(tmp_path: Path) -> None:
    put(tmp_path / "one", *(f"{number}.png" for number in range(16)))
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deeper")
    one, two = scan_images(tmp_path / "one"), scan_images(tmp_path / "two")
    first = by_name(split_by_source(one))
    assert first == by_name(split_by_source(one[::-1])) == by_name(split_by_source(two))
    assert {split: len(part) for split, part in first.items()} == {"train": 12, "val": 2, "test": 2}
    assert sorted(name for part in first.values() for name in part) == sorted(f"{n}.png" for n in range(16))
    assert by_name(split_by_source(one, val_fraction=0.5))["test"] == first["test"]  # the test set stays


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_sources(count: int) -> None:
    rows = [{"image_filepath": f"{number}.png", "source": str(number)} for number in range(count)]
    sizes = {split: len(part) for split, part in split_by_source(rows).items()}
    assert sizes["train"] >= 1 and sum(sizes.values()) == count
    assert count < 3 or min(sizes.values()) >= 1
    assert split_by_source(rows, val_fraction=0, test_fraction=0)["train"] == rows


def test_one_photo_is_in_one_split(tmp_path: Path) -> None:
    """Twenty marked versions of ten photos: by the clean photo's content, and by a stated source."""
    put(tmp_path, *(f"{number}.png" for number in range(10)))
    for number in range(10):
        shutil.copy(tmp_path / f"{number}.png", tmp_path / f"copy{number}.png")
    pairs = [
        {"image_filepath": f"marked{name}{number}", "clean_filepath": str(tmp_path / f"{name}{number}.png")}
        for number in range(10)
        for name in ("", "copy")
    ]
    stated = [{"image_filepath": f"{name}{number}", "source": str(number)} for number in range(10) for name in "ab"]
    for rows in (pairs, stated):
        parts = split_by_source(rows, val_fraction=0.3, test_fraction=0.3)
        numbers = [{row["image_filepath"][-1] for row in part} for part in parts.values()]
        assert [len(part) for part in numbers] == [4, 3, 3] and len(set.union(*numbers)) == 10


def test_mistakes_of_a_split(tmp_path: Path) -> None:
    row = {"image_filepath": str(tmp_path / "a.png")}
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(No such file"):
        split_by_source([row])
    with pytest.raises(DataError, match="must leave a part to train on"):
        split_by_source([row], val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(DataError, match=r"a\.png: has no split, others have"):
        split_by_source([row | {"split": "val"}, row])


def test_a_check_reads_everything(tmp_path: Path) -> None:
    put(tmp_path, "images/1.png", "images/2.png", "images/3.png", "masks/1.png", "masks/2.png")
    put(tmp_path, "masks/3.png", size=(4, 5))
    Image.new("L", (4, 4)).save(tmp_path / "masks" / "1.png")
    Image.new("L", (4, 4), 38).save(tmp_path / "masks" / "2.png")
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "again.png")
    rows = [{"image_filepath": f"images/{n}.png", "mask_filepath": f"masks/{n}.png"} for n in (1, 2, 3)]
    write_manifest(tmp_path / "train.jsonl", rows)
    write_manifest(tmp_path / "val.jsonl", [{"image_filepath": "again.png"}])
    (tmp_path / "test.jsonl").write_text("{}\n")
    problems = check_image_splits(tmp_path)
    assert len(problems) == 4
    assert problems[0].startswith(f"{tmp_path / 'masks' / '2.png'}: not a mask, its largest value is 38")
    assert problems[1].startswith(f"{tmp_path / 'masks' / '3.png'}: is 4 x 5 pixels, but ")
    assert problems[2] == f"{tmp_path / 'again.png'}: val.jsonl, line 1: its source photo is also in train.jsonl"
    assert problems[3].startswith(f"{tmp_path / 'test.jsonl'}, line 1: ")
    assert len(check_image_splits(tmp_path, given="val")) == 3
    assert check_image_splits(tmp_path / "none") == [
        f"{tmp_path / 'none' / 'train.jsonl'}: no such manifest; check the path"
    ]
    assert [row["image_filepath"] for row in read_manifest(tmp_path / "val.jsonl")] == [str(tmp_path / "again.png")]
