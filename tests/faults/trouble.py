"""A callback for tests: a machine that is full, at a named step. And how runs with it are started and compared.

`TROUBLE` is `<kind>:<process>:<step>`; without it the callback does nothing, so that the run left alone has it too.
"""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAME = Path("runs") / "conv_tasnet"
STEPS = 8  # of an epoch; two epochs
_KIND, _PROCESS, _STEP = (os.environ.get("TROUBLE", "") + "::").split(":")[:3]
_FILLER = Path("runs") / "filler"
_save = torch.save


class Trouble(pl.Callback):
    """*disk*: full at the step and the one after it. *memory*: for batches of more than two. *nan*: loss, from there.
    *worker*: is killed."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        step = pl_module.step

        def troubled(batch: dict[str, Any]) -> dict[str, Any]:
            output = step(batch)
            if self._now(trainer) and _KIND == "memory" and len(batch["mixture"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return {**output, "loss": output["loss"] * torch.nan} if self._now(trainer) and _KIND == "nan" else output

        if stage == "fit" and _KIND in ("memory", "nan"):
            pl_module.step = troubled  # type: ignore[method-assign]

    @staticmethod
    def _now(trainer: pl.Trainer) -> bool:
        return trainer.training and trainer.global_rank == int(_PROCESS) and trainer.global_step >= int(_STEP)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if _KIND == "worker" and self._now(trainer):
            os.kill(psutil.Process().children()[-1].pid, signal.SIGKILL)
        elif _KIND == "disk" and trainer.is_global_zero:
            (_fill if int(_STEP) <= trainer.global_step <= int(_STEP) + 1 else _clear)()


def _fill() -> None:
    if Path("runs").is_mount():
        try:
            with _FILLER.open("ab", buffering=0) as file:
                while file.write(bytes(1024)):
                    pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    torch.save = _half if not Path("runs").is_mount() else _save


def _clear() -> None:
    _FILLER.unlink(missing_ok=True)
    torch.save = _save


def _half(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(
    *arguments: str, trouble: str = "", prefix: tuple[str, ...] = (), launch: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """train.py to its end, which leaves no process behind. *prefix*: before python; *launch*: before train.py."""
    process = subprocess.Popen(
        [*prefix, sys.executable, *launch, str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "TROUBLE": trouble},
        start_new_session=True,
    )
    out, _ = process.communicate(timeout=240)
    left = [p.pid for p in psutil.process_iter(["pid"]) if _session(p.pid) == process.pid]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in left if psutil.pid_exists(pid)], timeout=20)
    assert not alive, f"left behind: {alive}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, "")


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def assert_same(one: Any, other: Any) -> None:
    """Of two checkpoints, all but what the machine and the configuration say."""
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "SeparationData"):
        _assert_same(one[key], other[key], key)


def _assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_same(one[key], other[key], f"{where}, {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for mine, theirs in zip(one, other, strict=True):
            _assert_same(mine, theirs, where)
    else:
        assert one == other, where
