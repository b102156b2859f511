"""A worker that hangs at its birth is noticed, killed and forked anew."""

import multiprocessing
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import SequentialSampler

from data import forking
from data.loader import make_loader


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


@pytest.fixture
def stillborn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that holds how many of the next children hang before their first instruction."""
    left, born = tmp_path / "left", forking._born

    def hang() -> None:
        if forking._tell is not None and (number := int(left.read_text())):
            left.write_text(str(number - 1))
            time.sleep(60)
        born()

    monkeypatch.setattr(forking, "_born", hang)
    monkeypatch.setattr(forking, "_PATIENCE_S", 0.3)
    return left


def test_forked_anew(stillborn: Path) -> None:
    stillborn.write_text("2")
    loader = make_loader(Items(), sampler=SequentialSampler(Items()), batch_size=2, num_workers=2)
    assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3, 4, 5]
    assert stillborn.read_text() == "0"
    assert len(psutil.Process().children()) <= 2, "those that hang are gone"


def test_given_up_with_a_line(stillborn: Path) -> None:
    stillborn.write_text("9")
    loader = make_loader(Items(), sampler=SequentialSampler(Items()), batch_size=2, num_workers=1)
    with pytest.raises(RuntimeError, match="forked 3 times .* data.loader.multiprocessing_context=forkserver"):
        iter(loader)
    assert not multiprocessing.active_children()


def test_other_forks_are_left_alone(stillborn: Path) -> None:
    stillborn.write_text("1")
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join(10)
    assert process.exitcode == 0 and stillborn.read_text() == "1"
