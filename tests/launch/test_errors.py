"""What is a user's mistake, and what is said about it."""

import threading
from multiprocessing import resource_sharer
from multiprocessing.connection import Listener

import pytest
import torch
from omegaconf import OmegaConf

from callbacks.not_finite import NotFinite
from callbacks.saving import CannotSave
from launch.build import plain
from launch.errors import is_known_fault, is_users_mistake, one_line


def test_a_section_that_another_key_points_into_is_gone() -> None:
    cfg = OmegaConf.create({"model": {"align": None}, "data": {"max_delay_ms": "${model.align.max_delay_ms}"}})
    with pytest.raises(ValueError) as raised:
        plain(cfg)
    assert is_users_mistake(raised.value)
    line = one_line(raised.value)
    assert line.startswith("data.max_delay_ms: Error trying to access model.align.max_delay_ms") and "\n" not in line
    assert not is_users_mistake(ValueError("of ours"))


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "(pid 7) was killed (Killed), usually for"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "(pid 7, 8) ended, perhaps for"),
    ],
)
def test_a_loader_worker_that_is_gone(text: str, how: str) -> None:
    assert is_known_fault(RuntimeError(text)) and not is_users_mistake(RuntimeError(text))
    line = one_line(RuntimeError(text))
    assert line.startswith(f"a loader worker {how} lack of memory: lower data.loader.num_workers or ")
    assert line.endswith("exp_manager.resume_if_exists=true continues the run")


def test_a_loader_worker_that_is_gone_while_it_hands_out_a_batch() -> None:
    """Of other lost connections nothing is known."""
    listener = Listener(address=None)
    thread = threading.Thread(target=lambda: listener.accept().close(), daemon=True)
    thread.start()
    with pytest.raises((ConnectionError, EOFError)) as caught:
        resource_sharer._resource_sharer.get_connection((listener.address, 1))
    thread.join()
    listener.close()
    assert is_known_fault(caught.value)
    assert one_line(caught.value).startswith("a loader worker ended, perhaps for lack of memory: lower data.loader.num")
    assert not is_known_fault(ConnectionResetError(104, "Connection reset by peer"))


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(13, "Permission denied"), False),
        (CannotSave("last.ckpt could not be written"), True),
        (NotFinite("loss is not finite"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("Caught ValueError in DataLoader worker process 0."), False),
    ],
)
def test_faults_that_one_line_tells(error: Exception, known: bool) -> None:
    assert is_known_fault(error) == known
