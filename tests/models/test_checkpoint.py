"""`load(…, cached=True)`: one object for one file on one device."""

import os
from pathlib import Path

import pytest
import torch

from models import checkpoint
from models.checkpoint import _load_cached, load
from models.conv_tasnet import ConvTasNet
from models.plain import CheckpointError

SIZES = dict(num_filters=8, bottleneck_channels=4, hidden_channels=8, num_blocks=1, num_repeats=1)


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    _load_cached.cache_clear()


def write(path: Path, *, scale: float = 1.0) -> Path:
    system = ConvTasNet(**SIZES)  # type: ignore[arg-type]
    content = {"state_dict": {name: scale * tensor for name, tensor in system.state_dict().items()}}
    system.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def test_the_same_object_for_the_same_file(in_tmp: Path) -> None:
    file = write(in_tmp / "x.ckpt")
    first = load(file, cached=True)
    os.symlink(file, "other name.ckpt")
    assert load("x.ckpt", cached=True) is first and load("other name.ckpt", cached=True) is first
    assert load(file) is not first, "only where it is asked for"
    assert load(file, cached=True, packages=["mine"]) is not first


def test_each_device_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoint.read_trained  # to the CPU, so that another name of it can stand for a second device
    monkeypatch.setattr(checkpoint, "read_trained", lambda path, map_location: read(path))
    file = write(tmp_path / "x.ckpt")
    first = load(file, cached=True)
    other = load(file, cached=True, map_location="cpu:0")
    assert other is not first and load(file, cached=True, map_location=torch.device("cpu:0")) is other
    assert load(file, cached=True) is first


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path / "x.ckpt")
    first = load(file, cached=True)
    stat = file.stat()
    write(file, scale=2.0)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = load(file, cached=True)
    assert second is not first and load(file, cached=True) is second
    weight = next(iter(second.state_dict()))
    assert not torch.equal(first.state_dict()[weight], second.state_dict()[weight])


def test_four_are_kept(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{number}.ckpt") for number in range(5)]
    systems = [load(file, cached=True) for file in files]
    assert load(files[4], cached=True) is systems[4] and load(files[1], cached=True) is systems[1]
    assert load(files[0], cached=True) is not systems[0], "the one that was used longest ago is dropped"


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    file = write(tmp_path / "x.ckpt")
    load(file, cached=True)
    file.unlink()
    with pytest.raises(CheckpointError, match="x.ckpt: no such checkpoint file"):
        load(file, cached=True)
