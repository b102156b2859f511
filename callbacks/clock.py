"""How much time and CPU time this run has used so far.

CPU time is what a budget is counted in: on a machine with noisy neighbours the wall clock says little. It covers the
whole process tree - the ranks that Lightning starts and all data workers - while they live and after they ended.
"""

import os
import time

import psutil

_cpu_origin = 0.0
_wall_origin = psutil.Process().create_time()


def cpu_seconds() -> float:
    """User plus system CPU seconds of this process and its descendants since it started, or since `restart`.

    A descendant that ended counts through its parent, which is told when it collects it. Under torchrun or srun the
    ranks are siblings, and each sees its own tree only. Takes a few milliseconds: not for every step of a fast loop.
    """
    return _tree_cpu_seconds() - _cpu_origin


def wall_seconds() -> float:
    """Wall-clock seconds since this process started, or since `restart`."""
    return time.time() - _wall_origin


def restart() -> None:
    """Count from here: for a second run in one process, such as the next job of a sweep."""
    global _cpu_origin, _wall_origin
    _cpu_origin = _tree_cpu_seconds()
    _wall_origin = time.time()


def _tree_cpu_seconds() -> float:
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for process in psutil.Process().children(recursive=True):
        try:
            used = process.cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended between the listing and the question; its parent's count has it by the next call
        total += used.user + used.system + used.children_user + used.children_system
    return total
