"""Loader workers that are forked, and forked anew when one never comes to life.

Python 3.11 leaves a child one of its own locks as it was in the parent. Where a thread of a library enters Python at
the moment of the fork, as gloo's may behind an exchange, it is held for ever: the child hangs before its first
instruction, and its parent waits for a batch until somebody looks. Seen once in some thousand forks of runs with two
processes.
"""

import multiprocessing.context
import multiprocessing.popen_fork
import os
import select
import signal
from typing import Any

_PATIENCE_S = 10.0  # a child takes milliseconds; doubled with each attempt, since a machine may be overloaded
_ATTEMPTS = 3
_tell: int | None = None  # the end of a pipe that a child writes to; in no other process than one that was just forked


def _born() -> None:
    global _tell
    if _tell is not None:
        os.write(_tell, b"1")
        os.close(_tell)
        _tell = None


os.register_at_fork(after_in_child=lambda: _born())


class _Popen(multiprocessing.popen_fork.Popen):
    def _launch(self, process_obj: Any) -> None:
        """Fork. Raises RuntimeError when no child comes to life."""
        global _tell
        for attempt in range(_ATTEMPTS):
            heard, _tell = os.pipe()
            try:
                super()._launch(process_obj)
            finally:
                os.close(_tell)
                _tell = None
            alive, _, _ = select.select([heard], [], [], _PATIENCE_S * 2**attempt)
            os.close(heard)
            if alive:
                return
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.finalizer()  # its pipes
        raise RuntimeError(
            f"a loader worker was forked {_ATTEMPTS} times and hangs each time; set"
            " data.loader.multiprocessing_context=forkserver"
        )


class _Process(multiprocessing.context.ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        return _Popen(process_obj)


class CheckedForkContext(multiprocessing.context.ForkContext):
    """multiprocessing's `fork`, whose processes live when they have started."""

    Process = _Process
