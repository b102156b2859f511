"""SIGTERM, SIGUSR1 and Ctrl-C while there is nothing to save: the process ends at once with 128 + n and one line.

In training callbacks/graceful.py has handlers of its own, which finish the step and save; it takes these back when
training is over. So these are at work during start-up, in the test after training and in the other scripts.

Decisions that are not obvious
* They stand before anything heavy is imported: torch alone takes seconds.
* A handler raises SystemExit, so that half-written files are removed on the way out. What libraries make of that,
  such as an ImportError, is told apart by `told`.
* Python calls a handler between two of its own instructions; a process that waits for its peers in C++ comes to none.
  So a thread hears of each signal through `signal.set_wakeup_fd`, and ends a process that is still there after a while.
* The other ranks are killed first. Otherwise they would complain about the one that is gone.
"""

import atexit
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from launch import ranks

_GRACE_S = 2.0
_ECHO_S = 1.0  # as in callbacks/graceful.py: launchers pass on what the sender may have sent to all

told = 0
"""The signal that this process was told to end by while nothing was there to save; 0 for none."""

_raised = False
_first = threading.Lock()


def install() -> None:
    """To be called first in a process that is a script's own; never undone."""
    ranks.die_with_parent()
    atexit.register(ranks.end_before_python)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in ranks.SIGNALS:
        signal.signal(number, _stop)
    sys.unraisablehook = _unraisable
    os.register_at_fork(after_in_child=_leave_to_parent)
    threading.Thread(target=_listen, args=(reader,), daemon=True, name="stop signals").start()


def ignore() -> None:
    """To be called at the end of a process that was stopped: Python gives up its handlers before it has ended."""
    for number in ranks.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop(signum: int, frame: FrameType | None) -> None:
    global _raised
    _note(signum)
    if not _raised:  # a second one must not interrupt the way out
        _raised = True
        raise SystemExit(128 + signum)


def _note(signum: int) -> None:
    global told
    if _first.acquire(blocking=False):
        told = signum
        if not (ranks.started_by_lightning() or os.environ.get("RANK", "0") != "0"):
            ranks.say(f"{signal.Signals(signum).name}: stopped")
        ranks.kill()


def _listen(reader: int) -> None:
    began = None
    while True:
        number = os.read(reader, 1)[0]
        if number not in ranks.SIGNALS:
            continue
        began = began or time.monotonic()
        if signal.getsignal(number) is _stop:
            _note(number)
        elif time.monotonic() - began < _ECHO_S:  # in training: it will be saved
            continue
        time.sleep(_GRACE_S)
        ranks.end_now(128 + number)


def _unraisable(unraisable: Any) -> None:
    """A handler's SystemExit is lost where Python cannot pass it on; `_listen` ends the process then."""
    if not (told and isinstance(unraisable.exc_value, SystemExit)):
        sys.__unraisablehook__(unraisable)


def _leave_to_parent() -> None:
    """Loader workers are forked from this process, and end with it."""
    signal.set_wakeup_fd(-1)
    for number in ranks.SIGNALS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)
