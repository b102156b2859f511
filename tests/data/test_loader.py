import os
import signal
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from data.errors import AudioError
from data.loader import available_cores, choose_loader_settings, make_loader
from data.sampler import EpochSampler


class Numbers(Dataset):
    """Items (index, epoch, pid, torch threads); item 99 cannot be read."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        if key[0] == 99:
            raise AudioError("x.wav: is empty (0 bytes)")
        return torch.tensor([*key, os.getpid(), torch.get_num_threads()])


def test_nothing_that_torch_refuses_at_zero_workers():
    settings = choose_loader_settings(num_workers=0, multiprocessing_context="spawn", prefetch_factor=3)
    assert settings == {"num_workers": 0, "pin_memory": False}


@pytest.mark.parametrize(
    "accelerator, cores, processes, workers",
    [("cpu", 1, 1, 0), ("cpu", 2, 1, 0), ("cpu", 4, 1, 3), ("cpu", 4, 2, 0), ("cuda", 2, 1, 1), ("cuda", 64, 4, 8)]
    + [("cuda", 16, 4, 3)],
)
def test_auto_workers(accelerator, cores, processes, workers):
    settings = choose_loader_settings(accelerator=accelerator, cores=cores, processes=processes)
    assert settings["num_workers"] == workers
    assert settings["pin_memory"] == (accelerator == "cuda")
    assert ("prefetch_factor" in settings) == (workers > 0)


def test_what_is_given_is_kept():
    settings = choose_loader_settings(num_workers=2, prefetch_factor=7, pin_memory=True, persistent_workers=False)
    assert settings == {
        "num_workers": 2,
        "pin_memory": True,
        "prefetch_factor": 7,
        "persistent_workers": False,
        "multiprocessing_context": None,
    }


@pytest.mark.parametrize(
    "bad",
    [
        {"num_workers": -1},
        {"num_workers": "many"},
        {"pin_memory": "yes"},
        {"num_workers": 1, "prefetch_factor": 0},
        {"num_workers": 1, "multiprocessing_context": "thread"},
        *({"num_workers": value} for value in (1.5, None, True)),
        *({"prefetch_factor": value} for value in ("abc", 1.5, None)),  # also where no worker would read it
        {"pin_memory": 1.5},
        {"persistent_workers": "abc"},
    ],
)
def test_bad_values_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=rf"^loader\.{list(bad)[-1]} must be"):
        choose_loader_settings(**bad)


def test_available_cores():
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("drop_last, sizes", [(True, [4, 4]), (False, [4, 4, 2])])
def test_the_last_batch_follows_the_sampler(drop_last, sizes):
    sampler = EpochSampler(range(10), drop_last=drop_last)
    batches = list(make_loader(Numbers(10), sampler=sampler, batch_size=4, num_workers=0))
    assert [len(batch) for batch in batches] == sizes


def test_iterators_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    next(iter(make_loader(Numbers(4), sampler=EpochSampler(range(4)), batch_size=2, num_workers=0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_give_the_same_items_run_one_thread_and_outlive_the_signals_of_the_group():
    sampler = EpochSampler(range(12), seed=1)
    alone = torch.cat(list(make_loader(Numbers(12), sampler=sampler, batch_size=2, num_workers=0)))
    loader = make_loader(Numbers(12), sampler=sampler, batch_size=2, num_workers=1, prefetch_factor=1)
    batches = iter(loader)
    seen = [next(batches)]
    worker, threads = seen[0][0, 2:].tolist()
    assert worker != os.getpid() and threads == 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker, number)
    seen.extend(batches)
    assert np.array_equal(torch.cat(seen)[:, :2], alone[:, :2])


def test_an_error_of_a_worker_keeps_its_type_and_line():
    sampler = EpochSampler(range(100), shuffle=False)
    loader = make_loader(Numbers(100), sampler=sampler, batch_size=100, num_workers=1)
    with pytest.raises(AudioError) as error:
        next(iter(loader))
    assert str(error.value) == "x.wav: is empty (0 bytes)"


class Complains(Dataset):
    """Says in the worker what its thread would that hands out batches."""

    def __len__(self):
        return 1

    def __getitem__(self, key):
        for error in (ConnectionResetError("reset"), EOFError("ended"), ValueError("of another kind")):
            sys.excepthook(type(error), error, None)
        return torch.tensor(key)


def test_a_worker_says_nothing_when_the_process_that_fetched_is_gone(capfd):
    list(make_loader(Complains(), sampler=EpochSampler(range(1)), batch_size=1, num_workers=1))
    said = capfd.readouterr().err
    assert "of another kind" in said and "reset" not in said and "ended" not in said
