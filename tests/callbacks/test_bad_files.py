import multiprocessing
from types import SimpleNamespace

import pytest
import torch.distributed

import callbacks.bad_files as module
from callbacks.bad_files import CountBadFiles, gather
from data.base import SystemData
from data.errors import DataError


def two_ranks(monkeypatch, own, other, **limits):
    """A trainer as one of two ranks sees it, with what both have found."""
    data = SystemData(**limits)
    data.merge_bad_files(own)
    monkeypatch.setattr(module, "gather", lambda found: {**other, **found})
    return SimpleNamespace(world_size=2, datamodule=data)


def at_batch_end(callback, trainer, batch_idx):
    callback.on_train_batch_end(trainer, None, None, None, batch_idx)


def test_ranks_compare_every_n_steps_and_after_validation(monkeypatch):
    trainer = two_ranks(monkeypatch, {"a.wav": "a.wav: is empty"}, {"b.wav": "b.wav: is empty"})
    callback = CountBadFiles(every_n_steps=3)
    at_batch_end(callback, trainer, 1)
    assert set(trainer.datamodule.bad_files) == {"a.wav"}
    at_batch_end(callback, trainer, 2)
    assert set(trainer.datamodule.bad_files) == {"a.wav", "b.wav"}
    for hook in ("on_validation_end", "on_test_end"):
        trainer = two_ranks(monkeypatch, {}, {"b.wav": "b.wav: is empty"})
        getattr(callback, hook)(trainer, None)
        assert set(trainer.datamodule.bad_files) == {"b.wav"}


def test_all_ranks_stop_with_the_same_list(monkeypatch):
    one, other = {"a.wav": "a.wav: is empty"}, {"b.wav": "b.wav: is a folder"}
    messages = []
    for own, others in ((one, other), (other, one)):
        trainer = two_ranks(monkeypatch, own, others, max_bad_files=1)
        with pytest.raises(DataError) as error:
            CountBadFiles().on_validation_end(trainer, None)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and messages[0].endswith("a.wav: is empty\nb.wav: is a folder")


def test_a_single_process_and_foreign_data_are_left_alone(monkeypatch):
    monkeypatch.setattr(module, "gather", lambda found: pytest.fail("nothing to compare"))
    for trainer in (
        SimpleNamespace(world_size=1, datamodule=SystemData()),
        SimpleNamespace(world_size=2, datamodule=None),
    ):
        at_batch_end(CountBadFiles(every_n_steps=1), trainer, 0)


@pytest.mark.parametrize("bad_files", [{}, {"a.wav": "a.wav: is empty", "b.wav": "b.wav: is empty"}])
def test_the_number_is_logged_when_there_are_any(tiny, tmp_path, bad_files):
    data = tiny.Data(validation=False)
    data.bad_files = bad_files
    trainer = tiny.make_trainer(tmp_path, [CountBadFiles()], max_epochs=1)
    trainer.fit(tiny.Tiny(), data)
    logged = trainer.callback_metrics.get("bad_files")
    assert logged == (2.0 if bad_files else None)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        CountBadFiles(every_n_steps=0)


def _rank(rank, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    queue.put(gather({f"{rank}.wav": f"{rank}.wav: is empty"}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gather_over_two_processes():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, 29731, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    assert results[0] == results[1] == {f"{rank}.wav": f"{rank}.wav: is empty" for rank in range(2)}
