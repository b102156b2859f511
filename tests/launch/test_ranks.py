"""How one process learns from another one's end; real processes are in tests/faults/test_signals.py."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import ranks, stop_signals
from models.conv_tasnet import ConvTasNet
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent.parent
LOST = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234"


class Child:
    """As a Popen of a process that has ended, or with None has not."""

    def __init__(self, code: int | None) -> None:
        self.code, self.killed = code, False

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float) -> int | None:
        return self.code

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts children with the given codes beside this process."""

    def start(*codes: int | None) -> list[Child]:
        watch = ranks._Watch(SimpleNamespace(procs=[Child(code) for code in codes]))
        monkeypatch.setattr(ranks, "_watches", [watch])
        monkeypatch.setattr(ranks, "_GRACE_S", 0.0)
        watch.take()
        return watch.children  # type: ignore[return-value]

    return start


@pytest.mark.parametrize(
    ("code", "becomes", "said"),
    [
        (1, 1, ""),  # it has said why itself
        (2, 2, ""),
        (7, 1, ""),
        (143, 143, "SIGTERM: stopped\n"),
        (-signal.SIGTERM, 143, "SIGTERM: stopped\n"),
        (-signal.SIGINT, 130, "SIGINT: stopped\n"),
        (-signal.SIGUSR1, 138, "SIGUSR1: stopped\n"),
        (-signal.SIGKILL, 1, "failed: rank 2 was killed (SIGKILL, the machine may be out of memory);"
                             " exp_manager.resume_if_exists=true continues the run\n"),
        (-signal.SIGSEGV, 1, "failed: rank 2 was killed (SIGSEGV); exp_manager.resume_if_exists=true continues"
                             " the run\n"),
    ],
)  # fmt: skip
def test_the_end_of_a_child(started: Any, capfd: pytest.CaptureFixture, code: int, becomes: int, said: str) -> None:
    started(0, code)
    with pytest.raises(SystemExit) as stop:
        ranks.finish()
    assert stop.value.code == becomes and capfd.readouterr().err == said


def test_good_ends_are_waited_for(started: Any) -> None:
    children = started(0, 0)
    ranks.finish()
    assert ranks.failure() is None and ranks.num_children() == 0
    children = started(0, None)
    assert ranks.num_children() == 2
    ranks.finish(wait_s=0)
    assert children[1].killed, "what does not end is ended"


def test_the_watch_takes_the_children_and_ends_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    ended = threading.Event()

    def end_now(code: int) -> None:
        codes.append(code)
        watch.over.set()
        ended.set()

    monkeypatch.setattr(ranks, "end_now", end_now)
    monkeypatch.setattr(ranks, "_GRACE_S", 0.0)
    launcher = SimpleNamespace(procs=[Child(0), Child(2)])
    watch = ranks._Watch(launcher)
    watch.start()
    assert ended.wait(5) and codes == [2]
    assert launcher.procs == [], "Lightning's own watch has nobody to kill this process for"


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fail(message: str) -> None:
        def step(self: Any, batch: Any) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr(ConvTasNet, "step", step)

    return fail


def test_the_cause_is_another_process(script, started: Any, fails: Any, manifests: list[str], in_tmp) -> None:
    fails(LOST)
    started(1)
    done = script("train", ["model=conv_tasnet", *TINY, *manifests, "exp_manager.version=x"])
    assert done.code == 1 and "Traceback" not in done.text and "failed" not in done.text
    assert "Connection closed" in (in_tmp / "runs" / "conv_tasnet" / "x" / "train.log").read_text()
    children = started(None)
    done = script("train", ["model=conv_tasnet", *TINY, *manifests])
    assert done.code == 1 and LOST in done.err.splitlines()[-1], "nobody else has failed"
    assert children[0].killed


def test_an_own_error_ends_the_others(script, started: Any, fails: Any, manifests: list[str], in_tmp) -> None:
    fails("the cause")
    children = started(None)
    done = script("train", ["model=conv_tasnet", *TINY, *manifests])
    assert done.code == 1 and done.err.splitlines()[-1] == "failed: RuntimeError: the cause"
    assert children[0].killed


def test_whose_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RUN_MAIN_PID", "0")
    ranks.die_with_parent()  # the first one: its number goes to those that it starts
    assert os.environ["RUN_MAIN_PID"] == str(os.getpid()) and not ranks.started_by_lightning()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.started_by_lightning()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not ranks.started_by_lightning()


def test_told_outside_training(
    script, started: Any, fails: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture,
    manifests: list[str], in_tmp,
) -> None:  # fmt: skip
    """One line, the code of the signal, the others killed; whatever a library makes of it is no error."""
    monkeypatch.setattr(stop_signals, "told", 0)
    monkeypatch.setattr(stop_signals, "_raised", False)
    monkeypatch.setattr(stop_signals, "_first", threading.Lock())
    children = started(None)
    with pytest.raises(SystemExit) as stop:
        stop_signals._stop(signal.SIGUSR1, None)
    assert stop.value.code == 138 and children[0].killed
    stop_signals._stop(signal.SIGTERM, None)  # a later one does not interrupt the way out
    assert capfd.readouterr().err == "SIGUSR1: stopped\n"
    fails("initialisation was interrupted")
    done = script("train", ["model=conv_tasnet", *TINY, *manifests])
    assert done.code == 138 and "Traceback" not in done.text and "failed" not in done.text


LEAVES = """
import atexit, multiprocessing, sys
from launch import ranks, stop_signals

class Kept:
    def __del__(self):
        print("Python is taken down")

def work(code):
    ranks.leave_like_a_script()
    atexit.register(print, "exit handler")
    ranks.kept = Kept()
    if code:
        sys.exit(code)

if __name__ == "__main__":
    for code in (0, 7):
        process = multiprocessing.get_context("spawn").Process(target=work, args=(code,))
        process.start()
        process.join()
        print("child", process.exitcode, flush=True)
    stop_signals.install()
    atexit.register(print, "exit handler")
    kept = Kept()
    ranks.leave(3)
"""


def test_a_process_leaves_before_python_is_taken_down(tmp_path: Path) -> None:
    """A spawned process of which multiprocessing says 1 or more has told why; it ends as it always did."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    done = subprocess.run([sys.executable, "leaves.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    spawned = ["exit handler", "child 0", "exit handler", "Python is taken down", "child 7"]
    assert done.stdout.splitlines() == [*spawned, "exit handler"]
    assert (done.returncode, done.stderr) == (3, "")
