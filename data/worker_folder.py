"""The folder in which the loader workers of a process keep their sockets, and its removal.

Each worker makes a temporary folder for the socket through which it hands out its batches, and removes it when it ends;
killed by SIGKILL it cannot. So they make them inside a folder of the process that they work for, whose name tells the
machine and the process. It goes with the process, or, where that was killed, with the next one that starts workers.
"""

import atexit
import functools
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

import psutil

_PREFIX = f"loader-{re.sub('[^A-Za-z0-9]', '', platform.node())[-8:]}-"
_LONGEST = 70  # characters: the whole address of a socket may have 107, and 33 come behind the folder


@functools.cache
def worker_folder() -> str | None:
    """This process's folder, made when it is first asked for; folders of processes that are gone are removed then.

    None where its name would be too long for a socket: each worker's folder lies where they do without this.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        number = left.name.removeprefix(_PREFIX).partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)  # not ours, or another process does the same
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
    if len(folder) > _LONGEST:
        os.rmdir(folder)
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
