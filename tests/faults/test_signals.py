"""Several ranks and signals: saved at the step, all processes gone, the right exit code."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from models.checkpoint import read_checkpoint
from tests.conftest import TINY

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parent.parent.parent
BASE = ["model=conv_tasnet", *TINY, "trainer.max_steps=400", "trainer.accumulate_grad_batches=1", "trainer.devices=2",
        "trainer.max_epochs=-1", "callbacks.progress.every_n_steps=1", "test=false",
        "exp_manager.version=x"]  # fmt: skip
LAST = Path("runs/conv_tasnet/x/checkpoints/last.ckpt")


def start(*command: str) -> subprocess.Popen:
    """In a process group of its own, so that all of it can be told at once."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("ended before " + text + "\n" + "".join(seen))


def ended(process: subprocess.Popen, tree: list[psutil.Process]) -> int:
    process.communicate(timeout=90)
    _, alive = psutil.wait_procs(tree, timeout=15)
    assert not alive, f"left behind: {alive}"
    return process.returncode


@pytest.mark.parametrize("whole_group", [False, True], ids=["main process", "whole group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_two_processes(manifests: list[str], in_tmp: Path, number: int, code: int, whole_group: bool) -> None:
    process = start(str(ROOT / "train.py"), *BASE, *manifests)
    wait_for(process, "step 5/")
    tree = psutil.Process(process.pid).children(recursive=True)
    assert tree, "a second rank is running"
    os.killpg(process.pid, number) if whole_group else os.kill(process.pid, number)
    assert ended(process, tree) == code
    assert 5 <= read_checkpoint(LAST)["global_step"] < 400


def test_torchrun(manifests: list[str], in_tmp: Path) -> None:
    run = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    arguments = [a for a in BASE if not a.startswith(("trainer.devices", "trainer.max_steps"))]
    process = start(*run, str(ROOT / "train.py"), *arguments, "trainer.max_steps=6", *manifests)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    content = read_checkpoint(LAST)
    assert content["global_step"] == 6 and content["plan"]["machine"]["devices"] == 2
