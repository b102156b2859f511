"""A run as a process: what it costs to start, how it ends, and that ranks agree."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import torch

from models.checkpoint import read_checkpoint
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent.parent


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def test_help_is_quick(in_tmp: Path) -> None:
    """The best of two, since CPU time too suffers from neighbours. Nothing heavy may be imported."""
    costs = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "systems   conv_tasnet" in done.stdout
    assert min(costs) < 2.5
    code = "import sys, train; sys.exit(bool({'torch', 'pytorch_lightning', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def start_and_wait_for_step(arguments: list[str], step: int) -> subprocess.Popen:
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=ENVIRONMENT)  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if f"step {step}/" in line:
            return process
    raise AssertionError("ended before the step")


def test_sigterm_saves_and_the_run_goes_on(script, manifests: list[str], in_tmp: Path) -> None:
    """Stopped in the middle of an epoch and resumed, the weights are those of a run left alone."""
    base = ["model=conv_tasnet", *TINY, *manifests, "trainer.max_steps=60", "trainer.accumulate_grad_batches=1",
            "trainer.val_check_interval=50", "trainer.check_val_every_n_epoch=null", "data.train_mixtures=48",
            "callbacks.progress.every_n_steps=1", "test=false"]  # fmt: skip
    process = start_and_wait_for_step([*base, "exp_manager.version=stopped"], step=7)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert "SIGTERM: saved checkpoints/last.ckpt at step" in rest

    last = Path("runs/conv_tasnet/stopped/checkpoints/last.ckpt")
    stopped_at = read_checkpoint(last)["global_step"]
    assert 7 <= stopped_at < 60
    assert json.loads(Path("runs/conv_tasnet/stopped/summary.json").read_text())["status"] == "stopped"

    done = script("train", [*base, "exp_manager.resume_if_exists=true"])
    assert done.code == 0, done.text
    assert f"step {stopped_at + 1}/60" in done.out
    done = script("train", [*base, "exp_manager.version=alone"])
    assert done.code == 0, done.text
    ours = read_checkpoint(last)["state_dict"]
    alone = read_checkpoint("runs/conv_tasnet/alone/checkpoints/last.ckpt")["state_dict"]
    for name, tensor in alone.items():
        assert torch.equal(ours[name], tensor), name


def test_a_sweep_of_distributed_jobs(manifests: list[str], in_tmp: Path) -> None:
    """Two jobs of two processes: in each, both ranks have the job's rate, one directory, a log of their own."""
    arguments = ["-m", "model=conv_tasnet", *TINY, *manifests, "debug=fast", "test=false", "trainer.devices=2",
                 "trainer.max_steps=2", "model.optim.lr=0.25,0.125", "exp_manager.version=s"]  # fmt: skip
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = Path("runs/conv_tasnet/sweep-s")
    assert sorted(p.name for p in Path("runs/conv_tasnet").iterdir()) == ["sweep-s"], "rank 1 made no tree of its own"
    for job, rate in (("0", 0.25), ("1", 0.125)):
        content = read_checkpoint(sweep / job / "checkpoints" / "last.ckpt")
        assert content["optimizer_states"][0]["param_groups"][0]["lr"] == rate
        assert content["plan"]["machine"]["strategy"] == "DDPStrategy"
        assert content["plan"]["machine"]["devices"] == 2
        logs = {file.name for file in (sweep / job).glob("*.log")}
        assert logs == {"train.log", "train_ddp_process_1.log"}
        told = [
            line for line in (sweep / job / "train_ddp_process_1.log").read_text().splitlines() if "rank 1 of 2" in line
        ]
        assert len(told) == 1 and f"model.optim.lr={rate}" in told[0].split()


def test_interrupted_before_the_first_step(script, monkeypatch, manifests: list[str], in_tmp: Path) -> None:
    from launch import build

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build.Run, "data", interrupt)
    done = script("train", ["model=conv_tasnet", *TINY, *manifests])
    assert done.code == 130 and done.err == "interrupted\n"


def test_any_other_error_ends_with_its_cause(script, monkeypatch, manifests: list[str], in_tmp: Path) -> None:
    from models.conv_tasnet import ConvTasNet

    def fail(self, batch):
        raise RuntimeError("the cause\nand more")

    monkeypatch.setattr(ConvTasNet, "step", fail)
    done = script("train", ["model=conv_tasnet", *TINY, *manifests, "exp_manager.version=x"])
    assert done.code == 1
    assert done.err.splitlines()[-1] == "failed: RuntimeError: the cause"
    assert "in fail" in Path("runs/conv_tasnet/x/train.log").read_text(), "the traceback is in the log"
