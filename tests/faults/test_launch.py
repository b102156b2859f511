"""Ways to start a run, with one result: one directory, one value of everything, the same weights.

Loopback and gloo only.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from models.checkpoint import read_checkpoint
from tests.conftest import TINY, TINY_ECHO, TINY_NEST, TINY_UNET

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parent.parent.parent

STEPS = 60
BASE = ["model=conv_tasnet", *TINY, f"trainer.max_steps={STEPS}", "trainer.max_epochs=-1", "test=false",
        "trainer.accumulate_grad_batches=1", "model.optim.lr=0.01", "callbacks.progress.every_n_steps=1",
        "callbacks.last.every_n_steps=1", "callbacks.figures=null"]  # fmt: skip
TRAIN = [sys.executable, str(ROOT / "train.py")]
RUNS = Path("runs/conv_tasnet")


def torchrun(*flags: str) -> list[str]:
    """One agent, at a free port unless *flags* name one."""
    endpoint = [] if any("endpoint" in flag for flag in flags) else ["--rdzv_endpoint=localhost:0"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d"]
    return [*agent, *endpoint, *flags, str(ROOT / "train.py")]


def start(command: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == code, out
    return out


def read_until(process: subprocess.Popen, text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended before {text}\n{seen}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert content["global_step"] == STEPS
    return content["state_dict"]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def told_by_ranks(run: Path) -> dict[int, list[str]]:
    """The overrides that each rank logged in a file of its own."""
    lines = [line for file in run.glob("*.log") for line in file.read_text().splitlines()]
    found = [re.search(r"rank (\d+) of \d+: (.*)", line) for line in lines]
    return {int(match[1]): match[2].split() for match in found if match}


@pytest.fixture(scope="module")
def undisturbed(manifests: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that Lightning started."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [*TRAIN, *BASE, *manifests, "trainer.devices=2", "exp_manager.version=x"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / RUNS / "x"


def test_two_processes_of_lightning(undisturbed: Path) -> None:
    assert [folder.name for folder in undisturbed.parent.iterdir()] == ["x"]
    assert {file.name for file in undisturbed.glob("*.log")} == {"train.log", "train_ddp_process_1.log"}
    own, other = told_by_ranks(undisturbed).values()
    assert own == other and "model.optim.lr=0.01" in own
    assert (undisturbed / ".hydra" / "overrides.yaml").is_file()


def test_torchrun(undisturbed: Path, manifests: list[str], in_tmp: Path) -> None:
    """It says how many processes there are, and names the directory."""
    finish(start([*torchrun("--nproc_per_node=2", "--rdzv_id=seven"), *BASE, *manifests]))
    assert [folder.name for folder in RUNS.iterdir()] == ["seven"]
    run = RUNS / "seven"
    assert {file.name for file in run.glob("*.log")} == {"train.log", "train_rank1.log"}
    own, other = told_by_ranks(run).values()
    assert own == other
    assert_equal(weights(run), weights(undisturbed))


def test_two_machines(manifests: list[str], in_tmp: Path) -> None:
    """Two agents of two processes each, none of which is told of `trainer.num_nodes`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--nnodes=2", "--nproc_per_node=2", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=four"]
    typed = [*BASE, *manifests, "trainer.max_steps=4"]
    agents = [start([*torchrun(*flags), *typed]) for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert [folder.name for folder in RUNS.iterdir()] == ["four"]
    run = RUNS / "four"
    assert {file.name for file in run.glob("*.log")} == {"train.log", *(f"train_rank{n}.log" for n in (1, 2, 3))}
    told = told_by_ranks(run)
    assert sorted(told) == [0, 1, 2, 3] and all(overrides == told[0] for overrides in told.values())
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    machine = content["plan"]["machine"]
    assert (machine["devices"], machine["nodes"]) == (2, 2) and len(content["callbacks"]["RngState"]["ranks"]) == 4


def test_a_sweep_under_torchrun(manifests: list[str], in_tmp: Path) -> None:
    """All ranks of a job have its rate and its directory. (trainer.devices=2: tests/launch/test_job.py)"""
    typed = [*BASE, *manifests, "trainer.max_steps=2", "model.optim.lr=0.25,0.125", "exp_manager.version=s"]
    finish(start([*torchrun("--nproc_per_node=2"), "-m", *typed]))
    assert [folder.name for folder in RUNS.iterdir()] == ["sweep-s"]
    for job, rate in (("0", 0.25), ("1", 0.125)):
        run = RUNS / "sweep-s" / job
        told = told_by_ranks(run)
        assert sorted(told) == [0, 1] and all(f"model.optim.lr={rate}" in overrides for overrides in told.values())
        content = read_checkpoint(run / "checkpoints" / "last.ckpt")
        assert content["optimizer_states"][0]["param_groups"][0]["lr"] == rate


SPAWNED = ["trainer.strategy=ddp_spawn", "trainer.devices=2", "data.loader.multiprocessing_context=spawn",
           "data.loader.num_workers=1", "exp_manager.version=spawned"]  # fmt: skip


def without(overrides: list[str], *keys: str) -> list[str]:
    return [override for override in overrides if not override.startswith(keys)]


def test_spawned_processes(undisturbed: Path, manifests: list[str], in_tmp: Path) -> None:
    """With loaders that are spawned too, and the test in processes of its own."""
    typed = without([*BASE, *manifests], "data.loader", "test=")
    out = finish(start([*TRAIN, *typed, *SPAWNED]))
    run = RUNS / "spawned"
    assert {file.name for file in run.glob("*.log")} == {"train.log", "train_rank1.log"}
    assert f"step {STEPS}/{STEPS}" in out and "test_si_sdri" in out
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) > 2 and rows[-1].split(",")[1] == str(STEPS), "the test goes on with the file"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS and {"val_si_sdri", "test_si_sdri"} <= set(summary["metrics"])
    assert_equal(weights(run), weights(undisturbed))


@pytest.mark.parametrize("system", ["deepvqe", "nest", "unet"])
def test_every_system_is_spawned(system: str, corpus: Path, photos: Path, manifests: list[str], in_tmp: Path) -> None:
    tiny = {"deepvqe": TINY_ECHO, "nest": TINY_NEST, "unet": TINY_UNET}[system]
    data = {
        "deepvqe": manifests,
        "nest": [f"model.train_ds.manifest_filepath={corpus / 'train.jsonl'}"],
        "unet": [f"data.train_manifest={photos / 'train.jsonl'}"],
    }
    typed = [f"model={system}", *without(tiny, "data.loader"), *data[system], *SPAWNED]
    finish(start([*TRAIN, *typed, "trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "test=false",
                  "data.batch_size=2" if system == "unet" else "trainer.max_epochs=-1"]))  # fmt: skip
    assert read_checkpoint(f"runs/{system}/spawned/checkpoints/last.ckpt")["global_step"] == 2


def test_a_mistake_and_a_signal_in_processes_that_are_no_scripts(manifests: list[str], in_tmp: Path) -> None:
    typed = [*TRAIN, *BASE, *manifests, "trainer.devices=2", "exp_manager.version=x"]
    out = finish(start([*typed, "trainer.strategy=ddp_fork", "data.batch_size=500"]), 2)
    assert out.splitlines()[-1].startswith("error: 64 examples are not one batch of 500")
    process = start([*typed, "trainer.strategy=ddp_spawn", "trainer.max_steps=4000"])
    read_until(process, "step 3/")
    process.terminate()
    finish(process, 143)
    assert 3 <= read_checkpoint(RUNS / "x" / "checkpoints" / "last.ckpt")["global_step"] < 4000


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK") if "train.py" in " ".join(process.cmdline()) else None
    except psutil.NoSuchProcess:
        return None


def test_torchrun_starts_a_killed_rank_again(undisturbed: Path, manifests: list[str], in_tmp: Path) -> None:
    """It goes on from last.ckpt by itself, in the same directory, to the same weights."""
    process = start([*torchrun("--nproc_per_node=2", "--max_restarts=1"), *BASE, *manifests])
    out = read_until(process, "step 5/")
    (second,) = (p for p in psutil.Process(process.pid).children(recursive=True) if rank_of(p) == "1")
    second.send_signal(signal.SIGKILL)
    out += finish(process)
    (run,) = RUNS.iterdir()
    assert "started anew, resuming" in out
    steps = [int(step) for step in re.findall(rf"step (\d+)/{STEPS}", out)]
    assert steps.count(1) == 1 and steps[-1] == STEPS
    assert_equal(weights(run), weights(undisturbed))


def test_two_ranks_resume_exactly(undisturbed: Path, manifests: list[str], in_tmp: Path) -> None:
    typed = [*BASE, *manifests, "trainer.devices=2", "exp_manager.version=x"]
    process = start([*TRAIN, *typed])
    read_until(process, "step 5/")
    process.terminate()
    finish(process, 143)
    stopped_at = read_checkpoint(RUNS / "x" / "checkpoints" / "last.ckpt")["global_step"]
    assert 5 <= stopped_at < STEPS
    out = finish(start([*TRAIN, *typed, "exp_manager.resume_if_exists=true"]))
    assert f"step {stopped_at + 1}/{STEPS}" in out
    assert_equal(weights(RUNS / "x"), weights(undisturbed))


RECORDER = """
import json
import pytorch_lightning as pl

class Recorder(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open(f"seen{trainer.global_rank}.txt", "a") as file:
            file.write(json.dumps([trainer.current_epoch, trainer.global_step, list(batch["name"])]) + "\\n")
"""


def seen() -> dict[int, list[str]]:
    """Epoch -> names of the examples that all ranks saw, in the order of steps."""
    files = [file.read_text().splitlines() for file in sorted(Path().glob("seen*.txt"))]
    rows = sorted((json.loads(line)[:2], rank, json.loads(line)[2]) for rank, file in enumerate(files) for line in file)
    epochs: dict[int, list[str]] = {}
    for (epoch, _), _, names in rows:
        epochs.setdefault(epoch, []).extend(names)
    return epochs


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes(
    before: int, after: int, manifests: list[str], in_tmp: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed epoch takes up the order where it was left: every example once."""
    (in_tmp / "recorder.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(in_tmp)
    typed = [*BASE, *manifests, "data.train_mixtures=32", "packages=[recorder]", "exp_manager.version=x",
             "+callbacks.recorder._target_=recorder.Recorder", "exp_manager.resume_if_exists=true"]  # fmt: skip

    def train(devices: int, steps: int) -> str:
        sizes = [f"trainer.devices={devices}", f"trainer.max_steps={steps}"]
        if devices == 1:
            done = script("train", [*typed, *sizes])
            assert done.code == 0, done.text
            return done.text
        return finish(start([*TRAIN, *typed, *sizes], PYTHONPATH=str(in_tmp)))

    train(before, 4)
    done = 4 * 2 * before  # examples
    assert len(seen()[0]) == done
    out = train(after, 4 + (32 - done) // (2 * after) + 1)
    assert f"epoch 0 goes on after {done} examples" in out
    epochs = seen()
    assert len(epochs[0]) == 32 and len(set(epochs[0])) == 32
    assert len(epochs[1]) == 2 * after


def with_bad_file(manifests: list[str], folder: Path) -> list[str]:
    """The training manifest gets a file that is empty."""
    train = Path(next(override for override in manifests if "train_manifest" in override).partition("=")[2])
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    (folder / "empty.wav").touch()
    for row in rows:
        row["audio_filepath"] = str(train.parent / row["audio_filepath"])
    rows[0]["audio_filepath"] = str(folder / "empty.wav")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*manifests, f"data.train_manifest={folder / 'train.jsonl'}"]


def test_bad_files_stop_no_rank(manifests: list[str], in_tmp: Path) -> None:
    """Both have the same number of batches, also where one has met with it."""
    typed = [*BASE, *with_bad_file(manifests, in_tmp), "trainer.devices=2", "exp_manager.version=x"]
    out = finish(start([*TRAIN, *typed, "trainer.max_steps=20"]))
    assert out.count("examples with this file are replaced") == 1
    assert json.loads((RUNS / "x" / "summary.json").read_text())["bad_files"] == 1


def test_too_many_bad_files_stop_all_ranks(manifests: list[str], in_tmp: Path) -> None:
    none = ["data.max_bad_files=0", "data.max_bad_fraction=0"]
    process = start([*TRAIN, *BASE, *with_bad_file(manifests, in_tmp), *none, "trainer.devices=2"])
    read_until(process, "step 1/")
    tree = psutil.Process(process.pid).children(recursive=True)
    out = finish(process, 2)
    assert "files cannot be used, more than data.max_bad_files=0" in out and "empty.wav" in out
    assert "Traceback" not in out
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert not alive


UNUSED = """
from torch import nn
from models.conv_tasnet import ConvTasNet

class WithUnused(ConvTasNet):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.spare = nn.Linear(1, 1)
"""


@pytest.mark.parametrize(
    ("strategy", "code", "line"),
    [
        (
            "ddp",
            1,
            "failed: RuntimeError: no gradient reaches spare.weight, spare.bias: freeze them (requires_grad_(False)),"
            " or set trainer.strategy=ddp_find_unused_parameters_true",
        ),
        ("ddp_find_unused_parameters_true", 0, "no gradient reaches spare.weight, spare.bias"),
    ],
    ids=["ddp", "unused allowed"],
)
def test_unused_parameters_are_named(strategy: str, code: int, line: str, manifests: list[str], in_tmp: Path) -> None:
    (in_tmp / "unused.py").write_text(UNUSED)
    typed = [*BASE, *manifests, "model._target_=unused.WithUnused", "packages=[unused]", "trainer.max_steps=3",
             f"trainer.strategy={strategy}", "trainer.devices=2"]  # fmt: skip
    out = finish(start([*TRAIN, *typed], PYTHONPATH=str(in_tmp)), code)
    assert line in out.splitlines()
