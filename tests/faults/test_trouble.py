"""A full disk, a killed loader worker, too little memory, NaN: told in one line, and the run goes on from where it was.

With one process and with two.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import read_checkpoint
from tests.conftest import TINY
from tests.faults.trouble import NAME, STEPS, assert_same, run

pytestmark = pytest.mark.faults
BASE = ["model=conv_tasnet", *TINY, "data.loader.num_workers=1", "data.train_mixtures=32", "data.batch_size=4",
        "trainer.accumulate_grad_batches=1", "trainer.max_epochs=2", "callbacks.last.every_n_steps=1", "test=false",
        "callbacks.figures=null", "exp_manager.create_tensorboard_logger=false", "packages=[trouble]",
        "+callbacks.trouble={_target_:trouble.Trouble}"]  # fmt: skip
RESUME = "exp_manager.resume_if_exists=true"
LAST = Path("checkpoints") / "last.ckpt"
FULL = "checkpoints/last.ckpt could not be written (No space left on device): "


def processes(number: int) -> list[str]:
    return [f"trainer.devices={number}", f"data.batch_size={4 // number}"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def command(request: pytest.FixtureRequest, manifests: list[str]) -> list[str]:
    return [*BASE, *manifests, *processes(request.param)]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The last checkpoint of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(*command, f"exp_manager.exp_dir={folder}", "exp_manager.version=x")
    assert done.returncode == 0, done.stdout
    content = read_checkpoint(folder / "conv_tasnet" / "x" / LAST)
    assert content["global_step"] == 2 * STEPS
    return content


def small_disk(kilobytes: int) -> tuple[str, ...]:
    """What starts a command with a disk of its own at runs/; nothing where that is refused."""
    Path("runs").mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs runs && "
    allowed = shutil.which("unshare") and not subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount}true"]).returncode
    # The disk is gone with the command: what is on it is copied.
    keep = 'cp -r kept/. runs; "$@"; code=$?; rm -rf kept; cp -r runs kept; exit $code'
    return ("unshare", "-rm", "sh", "-c", mount + keep, "sh") if allowed else ()


@pytest.mark.parametrize("chosen", ["stop", "continue"])
def test_disk_full(command: list[str], alone: dict, in_tmp: Path, chosen: str, record_property: Any) -> None:
    disk = small_disk(2000)
    Path("kept").mkdir()
    record_property(
        "lines", [f"disk full: {'a small tmpfs' if disk else 'mounting is refused: a writer raises ENOSPC'}"]
    )
    more = [*command, "exp_manager.version=x", f"exp_manager.on_full_disk={chosen}"]
    done = run(*more, trouble="disk:0:5", prefix=disk)
    runs = Path("kept" if disk else "runs") / "conv_tasnet" / "x"
    assert "Traceback" not in done.stdout and not list(runs.rglob("*.tmp")), done.stdout
    if chosen == "continue":
        assert done.returncode == 0, done.stdout
        assert done.stdout.count(FULL) == 2 and done.stdout.count("the disk takes checkpoints again") == 1
        assert_same(read_checkpoint(runs / LAST), alone)
        return
    assert done.returncode == 1, done.stdout
    assert done.stdout.count(FULL) == 1 and done.stdout.splitlines()[-1].startswith(f"failed: {FULL}")
    assert read_checkpoint(runs / LAST)["global_step"] == 4
    assert not disk or "summary.json cannot be written (No space left on device)" in done.stdout
    (runs.parent.parent / "filler").unlink(missing_ok=True)
    resumed = run(*more, RESUME, prefix=disk)
    assert resumed.returncode == 0, resumed.stdout
    assert_same(read_checkpoint(runs / LAST), alone)


def test_worker_killed(command: list[str], alone: dict, in_tmp: Path) -> None:
    """As the kernel does when memory is short; of two processes in the second one."""
    rank = "1" if "trainer.devices=2" in command else "0"
    done = run(*command, "exp_manager.version=x", trouble=f"worker:{rank}:5")
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    last = done.stdout.splitlines()[-1]
    # Torch finds out by the signal, or by waiting for a batch, and then does not know how it ended.
    assert re.match(
        r"failed: a loader worker (\(pid \d+\) )?(was killed \(Killed\)|ended), \w+ for lack of memory: ", last
    )
    assert last.endswith("exp_manager.resume_if_exists=true continues the run")
    # At the end of step 5, which the first process may not have saved yet when the second one ends.
    assert 4 <= read_checkpoint(NAME / "x" / LAST)["global_step"] < 2 * STEPS
    resumed = run(*command, "exp_manager.version=x", RESUME)
    assert resumed.returncode == 0, resumed.stdout
    assert_same(read_checkpoint(NAME / "x" / LAST), alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_of_one_of_two_processes(manifests: list[str], in_tmp: Path, rank: int) -> None:
    command = [*BASE, *manifests, "trainer.devices=2", "data.batch_size=4", "callbacks.out_of_memory.halve_batch=true"]
    done = run(*command, "exp_manager.version=x", trouble=f"memory:{rank}:2")
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    assert f"out of memory at step 2, process {rank}, with a batch of mixture (4, 2000) float32" in done.stdout
    assert "going on with data.batch_size=2 trainer.accumulate_grad_batches=2" in done.stdout
    content = read_checkpoint(NAME / "x" / LAST)
    assert content["global_step"] == STEPS and content["plan"]["machine"]["devices"] == 2
    assert content["plan"]["micro_batch"]["data.batch_size"] == {"was": 4, "is": 2}
    assert not list(NAME.rglob("*.tmp"))


def test_memory_under_torchrun(manifests: list[str], in_tmp: Path) -> None:
    """The launcher starts all again, and they read what was decided."""
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", "--rdzv_backend=c10d")
    arguments = [*BASE, *manifests, "data.batch_size=4", "callbacks.out_of_memory.halve_batch=true"]
    done = run(
        *arguments, "exp_manager.version=x", trouble="memory:1:2", launch=(*launch, "--rdzv_endpoint=localhost:0")
    )
    assert done.returncode == 0, done.stdout
    assert "as decided on this run's machine: data.batch_size=2" in done.stdout
    assert read_checkpoint(NAME / "x" / LAST)["global_step"] == STEPS


def test_nan_of_one_of_two_processes(manifests: list[str], in_tmp: Path) -> None:
    """All leave the steps out, and end together."""
    command = [*BASE, *manifests, *processes(2), "callbacks.not_finite.max_in_a_row=3"]
    done = run(*command, "exp_manager.version=x", trouble="nan:1:2")
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    line = "failed: loss or gradient was not finite in 3 steps in a row, the last is 5; lower model.optim.lr"
    assert done.stdout.count("failed: ") == 1 and done.stdout.splitlines()[-1].startswith(line)
    assert done.stdout.count("step 3 is left out, its loss is not finite") == 1, "the process that had it names it"
    assert json.loads((NAME / "x" / "summary.json").read_text())["status"] == "failed"
    os.remove(NAME / "x" / "summary.json")
    resumed = run(*command, "exp_manager.version=x", RESUME, trouble="nan:1:9")  # goes on counting, and gets over it
    assert resumed.returncode == 1 and "the last is 12" in resumed.stdout.splitlines()[-1], resumed.stdout
