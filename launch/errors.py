"""What counts as a user's mistake: one clear line and exit code 2, never a traceback.

Some other errors are told in one line too, with exit code 1: what happens to sound runs on machines that are full.
"""

import errno
import re
import traceback


class ConfigError(ValueError):
    """The command line or the configuration cannot be used; the message names the key and what to do."""


# By name, so that a command line that is wrong from the start need not import torch to say so.
_USERS_MISTAKES = {
    "ConfigError",
    "DataError",
    "CheckpointError",
    "MisconfigurationException",
    "InterpolationResolutionError",  # a value that another key points to was taken away, model.align=null
}


# Raised with a message that says all there is to say.
_KNOWN_FAULTS = {"CannotSave", "NotFinite", "OutOfMemoryError"}
_WORKER_GONE = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited unexp)")

_WITH_FEWER = (
    "lower data.loader.num_workers or data.loader.prefetch_factor; exp_manager.resume_if_exists=true continues the run"
)


def is_known_fault(error: BaseException) -> bool:
    """Whether one line tells all: no mistake of the user's, and none of ours that a traceback would help to find."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "DefaultCPUAllocator" in str(error):
        return True
    named = any(kind.__name__ in _KNOWN_FAULTS for kind in type(error).__mro__)
    return named or _WORKER_GONE.match(str(error)) is not None or _lost_a_worker(error)


def _lost_a_worker(error: BaseException) -> bool:
    """Whether a loader worker ended while it handed out a batch."""
    frames = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ConnectionError | EOFError) and "multiprocessing.resource_sharer" in frames


def is_users_mistake(error: BaseException) -> bool:
    return any(kind.__name__ in _USERS_MISTAKES for kind in type(error).__mro__)


def one_line(error: BaseException) -> str:
    """The message alone; of an error that crossed a loader's process, the last line of its traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if _lost_a_worker(error):
        return f"a loader worker ended, perhaps for lack of memory: {_WITH_FEWER}"
    if not lines:
        return type(error).__name__
    if key := getattr(error, "full_key", None):  # OmegaConf's: the cause, and lines about its own objects
        return f"{key}: {lines[0].rpartition(' raised while resolving interpolation: ')[2]}"
    if gone := _WORKER_GONE.match(lines[0]):
        how = f"was killed ({gone[2]}), usually for lack of memory" if gone[2] else "ended, perhaps for lack of memory"
        return f"a loader worker (pid {gone[1]}) {how}: {_WITH_FEWER}"
    if "DataLoader worker" not in lines[0]:
        return "\n".join(lines) if is_users_mistake(error) else lines[0]
    return lines[-1].partition(": ")[2] or lines[-1]
