"""Photos are decoded once, within a limit; an example's mask is never made up."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data import image_cache
from data.errors import ImageError
from data.image_cache import PhotoReader, read_example

MIB_PHOTO = (256, 512)  # of 3 * 2**17 bytes: 0.375 MiB


def save(path: Path, level: int = 0, shape: tuple[int, int] = MIB_PHOTO) -> str:
    Image.fromarray(np.full((*shape, 3), level, np.uint8)).save(path)
    return str(path)


def test_a_photo_is_read_once(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 7)
    reader = PhotoReader(limit_mb=1)
    before = reader.image(path)
    Path(path).unlink()
    assert reader.image(path) is before and reader.kept_mb == 0.375
    with pytest.raises(ImageError, match="no such file"):  # a spawned worker starts with an empty memory
        pickle.loads(pickle.dumps(reader)).image(path)
    with pytest.raises(ValueError, match="read-only"):
        before[0, 0] = 1


def test_without_a_limit_nothing_is_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 7)
    reader = PhotoReader(limit_mb=0)
    reader.image(path)
    assert reader.kept_mb == 0
    save(tmp_path / "a.png", 8)
    assert reader.image(path)[0, 0, 0] == 8
    Path(path).unlink()
    with pytest.raises(ImageError, match="no such file"):
        reader.image(path)
    save(tmp_path / "a.png", 9)  # a failure is not remembered either
    assert reader.image(path)[0, 0, 0] == 9


def test_the_limit_holds_and_the_oldest_goes_first(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{number}.png", number) for number in range(6)]
    reader = PhotoReader(limit_mb=1)  # room for two
    for number, path in enumerate(paths):
        assert reader.image(path)[0, 0, 0] == number
        assert reader.kept_mb <= 1
    assert reader.kept_mb == 0.75
    for path in paths:
        Path(path).unlink()
    assert reader.image(paths[4])[0, 0, 0] == 4  # now 5 is the least recently used
    reader.image(save(tmp_path / "6.png"))
    assert reader.image(paths[4])[0, 0, 0] == 4
    with pytest.raises(ImageError, match="no such file"):
        reader.image(paths[5])


def test_a_photo_above_the_limit_drives_nothing_out(tmp_path: Path) -> None:
    small, large = save(tmp_path / "a.png"), save(tmp_path / "b.png", shape=(1024, 1024))
    reader = PhotoReader(limit_mb=1)
    reader.image(small)
    assert reader.image(large).shape == (1024, 1024, 3) and reader.kept_mb == 0.375


def test_a_failure_is_not_for_good(tmp_path: Path) -> None:
    reader, path = PhotoReader(limit_mb=1), str(tmp_path / "a.png")
    with pytest.raises(ImageError):
        reader.image(path)
    save(tmp_path / "a.png")
    assert reader.image(path).shape[:2] == MIB_PHOTO[:2]


def test_workers_share_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "get_worker_info", lambda: SimpleNamespace(num_workers=4))
    reader = PhotoReader(limit_mb=1)
    reader.image(save(tmp_path / "a.png"))  # 0.375 MiB
    assert reader.kept_mb == 0


def test_the_settings_of_reading_are_used(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 255, shape=(4, 4))
    assert (PhotoReader(ignore_value=255).mask(path) == 255).all() and (PhotoReader().mask(path) == 1).all()
    for read in (PhotoReader(max_pixels=15).image, PhotoReader(max_pixels=15).mask):
        with pytest.raises(ImageError, match="declares 4 x 4 pixels"):
            read(path)
    with pytest.raises(ValueError, match="limit_mb must be a number of at least 0"):
        PhotoReader(limit_mb=-1)


def test_examples(tmp_path: Path) -> None:
    image, clean = save(tmp_path / "image.png", 120, (6, 8)), save(tmp_path / "clean.png", 100, (6, 8))
    mask = save(tmp_path / "mask.png", 255, (6, 8))
    row, reader = {"image_filepath": image}, PhotoReader(difference={"threshold": 19})
    assert read_example(row, reader=reader)[1] is None
    for more, level in (
        ({"mask_filepath": mask}, 1),
        ({"mask_filepath": mask, "marked": True}, 1),
        ({"clean_filepath": clean}, 1),
        ({"marked": False}, 0),
    ):
        pixels, known = read_example(row | more, reader=reader)
        assert (pixels == 120).all() and known.shape == (6, 8) and known.dtype == np.uint8 and (known == level).all()
    assert not read_example(row | {"clean_filepath": clean}, reader=PhotoReader())[1].any()  # 20 is below 30


@pytest.mark.parametrize("key", ["mask_filepath", "clean_filepath"])
def test_a_mask_is_never_made_up(tmp_path: Path, key: str) -> None:
    """Not of zeros, not by scaling: the example fails, and says which file is to blame."""
    row = {"image_filepath": save(tmp_path / "a.png", 0, (6, 8))}
    other = tmp_path / "b.png"
    with pytest.raises(ImageError, match=r"b\.png: no such file"):
        read_example(row | {key: str(other)}, reader=PhotoReader())
    other.write_bytes(b"")
    with pytest.raises(ImageError, match=r"b\.png: is empty"):
        read_example(row | {key: str(other)}, reader=PhotoReader())
    save(other, 0, (8, 6))
    with pytest.raises(ImageError) as error:
        read_example(row | {key: str(other)}, reader=PhotoReader())
    assert str(error.value).startswith(f"{other}: is 6 x 8 pixels, but {row['image_filepath']} is 8 x 6; ")
