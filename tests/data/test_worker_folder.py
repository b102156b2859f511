"""Nothing of loader workers stays among the temporary files, however their process ended."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import SequentialSampler

from data import worker_folder as module
from data.loader import make_loader


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files whose name is short, as pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        module.worker_folder.cache_clear()
        yield Path(folder)
        module.worker_folder.cache_clear()


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(1000)


def test_sockets_lie_in_the_folder_of_the_process(temporary: Path) -> None:
    batches = iter(make_loader(Items(), sampler=SequentialSampler(Items()), batch_size=2, num_workers=1))
    next(batches)
    (folder,) = temporary.iterdir()
    assert folder.name.startswith(f"{module._PREFIX}{os.getpid()}-") and list(folder.rglob("listener-*"))
    del batches
    assert not list(folder.iterdir()), "a worker that ends by itself leaves nothing"


def test_what_a_killed_process_left_goes_with_the_next_one(temporary: Path) -> None:
    child = os.fork()
    if child == 0:
        batches = iter(make_loader(Items(), sampler=SequentialSampler(Items()), batch_size=2, num_workers=1))
        next(batches)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = temporary.iterdir()
    assert f"-{child}-" in left.name
    (temporary / "loader-elsewhere-1-x").mkdir()  # of another machine with the same temporary folder
    own = module.worker_folder()
    assert own and sorted(temporary.iterdir()) == sorted([Path(own), temporary / "loader-elsewhere-1-x"])


def test_a_name_too_long_for_sockets_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = temporary / ("x" * 50)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert module.worker_folder() is None and not list(long.iterdir())
    loader = make_loader(Items(), sampler=SequentialSampler(Items()), batch_size=20, num_workers=1)
    assert len(list(loader)) == 2
