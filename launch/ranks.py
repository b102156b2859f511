"""The processes of a run that Lightning starts beside the first one: they end together, and with the right code.

Decisions that are not obvious
* Lightning kills the first process as soon as another one ends with anything but 0, so nobody hears why. Our watch
  takes the children from its launcher, whose own watch then has none; it leaves the first process time to notice by
  itself, which it does in its next exchange with the one that is gone.
* The exit code of a child says what the first process ends with: 2 and 1 are its own mistake or error, which it has
  printed, 128 + n a signal that it was told to end by.
* An error that only says that another process is gone is not the cause. The first process then asks its children;
  a child waits for the first process to end it.
* A process dies with the one that started it. That is set by the child itself, before anything heavy is imported.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

_MAIN = "RUN_MAIN_PID"  # tells the processes that Lightning starts whose they are
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when the one that started it ends
_POLL_S = 0.1
_GRACE_S = 5.0  # for a process to end in good order before it is ended
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
"""By which a run is asked to end; what a platform lacks is left out."""


class _Watch(threading.Thread):
    """Ends this process some seconds after a child failed, if it has not done so by itself."""

    def __init__(self, launcher: Any) -> None:
        super().__init__(daemon=True, name="ranks")
        self.launcher = launcher
        self.children: list[subprocess.Popen] = []  # of local rank 1, 2, …
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(_POLL_S):
            self.take()
            if (failed := self.failure()) and not self.over.wait(_GRACE_S):
                end_now(_report(*failed))

    def take(self) -> None:
        """The children, from the launcher that has started them."""
        with contextlib.suppress(IndexError):  # several threads may do this at once, and so may a signal's handler
            while True:
                self.children.append(self.launcher.procs.pop(0))

    def failure(self) -> tuple[int, int] | None:
        """Local rank and return code, as of Popen, of a child that failed."""
        codes = enumerate([child.poll() for child in self.children], start=1)
        return next(((rank, code) for rank, code in codes if code), None)


_watches: list[_Watch] = []
_code: int | None = None  # what this process leaves with


def started_by_lightning() -> bool:
    """Is this a process that Lightning has started beside the first one?"""
    return _MAIN in os.environ and os.environ.get("LOCAL_RANK", "0") != "0" and not _of_torchrun()


def _of_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_parent() -> None:
    """To be called first in a process: one that a launcher has started does not outlive it (on Linux).

    torchrun's processes are told by SIGTERM, on which they save; without Lightning's first process there is nobody
    to go on with.
    """
    if not (_of_torchrun() or started_by_lightning()):
        os.environ[_MAIN] = str(os.getpid())
        return
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM if _of_torchrun() else signal.SIGKILL)
    if started_by_lightning() and os.getppid() != int(os.environ[_MAIN]):
        os._exit(1)  # it was gone before


def watch(trainer: Any) -> None:
    """Watch the processes that a Trainer is about to start; to be called before `fit` or `test`."""
    from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

    # Lightning's would replace ours (launch/stop_signals.py); see callbacks/graceful.py on what they do.
    trainer._signal_connector.register_signal_handlers = _register_none
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        _watches.append(_Watch(launcher))
        _watches[-1].start()


def _register_none() -> None:
    """A function with a name, since a Trainer goes into processes that are started by spawn."""


def kill() -> None:
    """End the other processes at once; their endings mean nothing any more."""
    for watched in _watches:
        watched.over.set()
        watched.take()
        for child in watched.children:
            child.kill()
    _watches.clear()


def num_children() -> int:
    """Processes that Lightning has started beside this one."""
    for watched in _watches:
        watched.take()
    return sum(len(watched.children) for watched in _watches)


def finish(wait_s: float = 30) -> None:
    """Let the other processes come to their end; what then is left is killed.

    Raises SystemExit when one of them failed.
    """
    until, failed = time.monotonic() + wait_s, failure()
    for watched in _watches:
        watched.over.set()
        watched.take()
        for child in watched.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
        failed = failed or watched.failure()
    kill()
    if failed:
        raise SystemExit(_report(*failed))


def failure(wait_s: float = 0) -> tuple[int, int] | None:
    """Local rank and return code of a child that failed, or does so within *wait_s* seconds."""
    until = time.monotonic() + wait_s
    while True:
        failed = next((found for watched in _watches if (found := watched.failure())), None)
        if failed or time.monotonic() >= until:
            return failed
        time.sleep(_POLL_S)


def is_consequence(error: BaseException) -> bool:
    """Does an error only say that another process is gone, or what another one says as well?"""
    if getattr(error, "told_elsewhere", False):
        return True
    return type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or "/gloo/" in str(error)


def cause_elsewhere() -> int | None:
    """The exit code that another process's end gives this one; None when nobody else is known to have failed."""
    if started_by_lightning():
        time.sleep(4 * _GRACE_S)  # the first process ends this one
        return None
    failed = failure(wait_s=_GRACE_S)
    kill()
    return _report(*failed) if failed else None


def _report(rank: int, code: int) -> int:
    """Says why the child ended, unless it has done so; returns the exit code of the run."""
    number = code - 128 if code > 128 else -code  # killed by the signal before it could answer
    if number in SIGNALS:
        say(f"{signal.Signals(number).name}: stopped")
        return 128 + number
    if code > 0:
        return 2 if code == 2 else 1
    name = signal.Signals(-code).name
    why = ", the machine may be out of memory" if name == "SIGKILL" else ""
    say(f"failed: rank {rank} was killed ({name}{why}); exp_manager.resume_if_exists=true continues the run")
    return 1


def say(line: str) -> None:
    """Not print(): it may have been interrupted, or be in use by a thread that hangs."""
    with contextlib.suppress(OSError):  # nobody reads
        os.write(2, f"{line}\n".encode())


def end_workers() -> None:
    """Kill the loader workers at the very end of a process; by themselves they would take five seconds to notice."""
    import multiprocessing

    if workers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take it for an accident
        for worker in workers:
            worker.kill()


def leave(code: int) -> NoReturn:
    """Exit this process with *code* in good order, only that Python itself is not taken down.

    A thread of gloo may let go of the tensors of the last exchange so late that the Python it needs for that is gone,
    and then ends the process by SIGABRT; `destroy_process_group` does not wait for it while a DDP module is referred to
    (PyTorch's pull request 179291).
    """
    global _code
    _code = code
    sys.exit(code)


def end_before_python() -> None:
    """To be registered as the first exit handler, which is the last one that is called."""
    if _code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_code)


def leave_like_a_script() -> None:
    """`leave` for a process that multiprocessing has started, whose exit code is no concern of ours unless it is 0."""
    from multiprocessing.util import Finalize

    def done() -> None:
        global _code
        _code = 0 if sys.exc_info()[0] is None else None

    atexit.register(end_before_python)
    Finalize(None, done, exitpriority=0)


def end_now(code: int) -> NoReturn:
    """End this process and all that it has started, whatever its threads wait for."""
    try:
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    finally:
        os._exit(code)
