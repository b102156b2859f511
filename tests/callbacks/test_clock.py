"""CPU and wall-clock time of the process tree."""

import multiprocessing
import time

from callbacks import clock


def burn(seconds: float) -> None:
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass


def burn_and_wait(seconds: float, ready: object, leave: object) -> None:
    burn(seconds)
    ready.set()  # type: ignore[attr-defined]
    leave.wait()  # type: ignore[attr-defined]


def test_counts_this_process_and_children_alive_and_ended() -> None:
    """Each reading is rounded down to a tick of 10 ms, so that a difference may be a tick short: more is burnt."""
    before = clock.cpu_seconds()
    burn(0.12)
    own = clock.cpu_seconds() - before
    assert 0.09 < own < 0.5

    context = multiprocessing.get_context("fork")  # as data workers
    ready, leave = context.Event(), context.Event()
    child = context.Process(target=burn_and_wait, args=(0.23, ready, leave))
    child.start()
    ready.wait()
    alive = clock.cpu_seconds() - before - own
    leave.set()
    child.join()
    ended = clock.cpu_seconds() - before - own
    assert alive > 0.18
    assert ended >= alive - 0.02 and ended < 1.0


def test_restart_counts_from_here() -> None:
    origins = clock._cpu_origin, clock._wall_origin
    try:
        assert clock.wall_seconds() > 0
        clock.restart()
        assert clock.cpu_seconds() < 0.2 and clock.wall_seconds() < 0.2
    finally:
        clock._cpu_origin, clock._wall_origin = origins
