"""The batch size that is found: by speed and memory, measured once, and the run is as if it had been typed."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from launch import batch_size, micro_batch
from launch.batch_size import Settings, Trial
from launch.errors import ConfigError
from models.checkpoint import read_checkpoint
from models.conv_tasnet import ConvTasNet
from tests.conftest import TINY

BASE = ["model=conv_tasnet", *TINY, "data.train_mixtures=32", "data.batch_size=8", "trainer.accumulate_grad_batches=1",
        "trainer.max_epochs=1", "callbacks.figures=null", "test=false", "logger=none"]  # fmt: skip


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock by which batches of 4 are processed fastest; the sizes that were measured."""
    measured: list[int] = []

    def seconds(step: Callable, batches: list[Any]) -> float:
        step(batches[0])
        measured.append(len(batches[0]["mixture"]))
        return measured[-1] / (10 - abs(measured[-1] - 4))

    monkeypatch.setattr(batch_size, "_seconds_per_step", seconds)
    return measured


def test_a_run_as_if_it_were_typed(script, manifests: list[str], in_tmp: Path, fastest: list[int]) -> None:
    smaller = ["data.batch_size=4", "trainer.accumulate_grad_batches=2"]
    plain = script("train", [*BASE, *manifests, *smaller, "exp_manager.version=typed"])
    assert plain.code == 0, plain.text
    found = script("train", [*BASE, *manifests, "find_batch_size=true", "exp_manager.version=found"])
    assert found.code == 0, found.text
    assert fastest == [1, 2, 4, 8, 16], "two in a row were no faster"
    assert "         4           10 " in found.out and "chosen" in found.out
    assert "as decided on this run's machine: data.batch_size=4 trainer.accumulate_grad_batches=2" in found.out
    run = in_tmp / "runs" / "conv_tasnet" / "found"
    one, other = (read_checkpoint(run.parent / name / "checkpoints" / "last.ckpt") for name in ("typed", "found"))
    assert one["global_step"] == other["global_step"] == 4
    assert all(torch.equal(one["state_dict"][name], weight) for name, weight in other["state_dict"].items())
    decided = {"data.batch_size": {"was": 8, "is": 4}, "trainer.accumulate_grad_batches": {"was": 1, "is": 2}}
    for plan in (json.loads((run / "plan.json").read_text()), other["plan"]):
        assert plan["micro_batch"] == decided and plan["find_batch_size"]["batch_size"] == 4
        assert [trial["batch_size"] for trial in plan["find_batch_size"]["tried"]] == [1, 2, 4, 8, 16]

    fastest.clear()
    (run / "plan.json").unlink()  # the checkpoint knows it too
    again = [*BASE, *manifests, "find_batch_size=true", "exp_manager.version=found", "trainer.max_epochs=2"]
    resumed = script("train", [*again, "exp_manager.resume_if_exists=true"])
    assert resumed.code == 0 and not fastest, resumed.text
    assert "data.batch_size=4" in resumed.out and "steps            8" in resumed.out


def test_not_in_a_dry_run_nor_in_a_run_that_has_begun(
    script, manifests: list[str], in_tmp: Path, fastest: list[int]
) -> None:
    done = script("train", [*BASE, *manifests, "find_batch_size.enabled=true", "dry_run=true"])
    assert done.code == 0 and "find_batch_size: not measured in a dry run" in done.out, done.text
    assert not fastest


@pytest.mark.parametrize(("most", "sizes"), [(4, [1, 2, 4]), (0, [])])
def test_out_of_memory_ends_the_search(
    script,
    manifests: list[str],
    in_tmp: Path,
    fastest: list[int],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    sizes: list[int],
) -> None:
    step = ConvTasNet.step

    def limited(system: ConvTasNet, batch: dict[str, Any]) -> dict[str, Any]:
        if len(batch["mixture"]) > most and system.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(system, batch)

    monkeypatch.setattr(ConvTasNet, "step", limited)
    done = script("train", [*BASE, *manifests, "find_batch_size=true", "trainer.limit_val_batches=0"])
    assert fastest == sizes and "out of memory" in done.out
    if sizes:
        assert done.code == 0 and "data.batch_size=4" in done.out, done.text
    else:
        assert done.code == 2 and "error: find_batch_size: a single example does not fit" in done.err, done.text


def test_no_size_beyond_the_limits(script, manifests: list[str], in_tmp: Path, fastest: list[int]) -> None:
    """Of sizes, of memory (what the process has already is more than that share), and of examples."""
    typed = [*BASE, *manifests, "trainer.max_steps=1", "trainer.limit_val_batches=0"]
    done = script("train", [*typed, "find_batch_size={enabled: true, max_batch_size: 3}"])
    assert done.code == 0 and fastest == [1, 2], done.text
    assert "data.batch_size=2 trainer.accumulate_grad_batches=4" in done.out
    fastest.clear()
    done = script("train", [*typed, "find_batch_size={enabled: true, max_memory_share: 0.001}"])
    assert done.code == 0 and fastest == [1] and "batch size 2 would need about" in done.out, done.text
    fastest.clear()
    done = script("train", [*typed, "find_batch_size=true", "data.train_mixtures=9"])
    assert done.code == 0 and fastest == [1, 2, 4, 8] and "batch size 16: 9 examples are not one batch" in done.out


def decided(rates: dict[int, float], config: dict[str, Any], key: str = "data.batch_size") -> dict[str, Any]:
    decision, _ = batch_size.decide([Trial(size, rate, 100.0) for size, rate in rates.items()], config, key)
    return {name: value["is"] for name, value in decision.items()}


def test_a_step_keeps_its_examples_where_it_can(caplog: pytest.LogCaptureFixture) -> None:
    def config(size: int, accumulated: int, **trainer: Any) -> dict[str, Any]:
        return {"data": {"batch_size": size}, "trainer": {"accumulate_grad_batches": accumulated, **trainer}}

    assert decided({1: 1, 4: 3, 8: 2}, config(2, 4)) == {
        "data.batch_size": 4,
        "trainer.accumulate_grad_batches": 2,
    }
    assert decided({4: 1}, config(4, 2)) == {}
    nest = {"model": {"train_ds": {"batch_size": 8}}, **config(0, 2, val_check_interval=2500, limit_train_batches=0.5)}
    assert decided({16: 1}, nest, "model.train_ds.batch_size") == {
        "model.train_ds.batch_size": 16,
        "trainer.accumulate_grad_batches": 1,
        "trainer.val_check_interval": 1250,
    }
    assert not [message for message in caplog.messages if "a step has" in message]
    assert decided({32: 1}, config(8, 1)) == {"data.batch_size": 32}
    assert caplog.messages[-1].startswith("a step has 32 examples of each process now, where 8 are configured")
    assert decided({4: 1}, config(6, 1)) == {"data.batch_size": 4, "trainer.accumulate_grad_batches": 2}
    assert caplog.messages[-1].startswith("a step has 8 examples of each process now, where 6 are configured")


def test_what_it_would_need_follows_from_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = batch_size._Memory(torch.device("cpu"), 0.5)
    memory.start, memory.limit = 100, 500
    assert memory.has_room_for(1)
    weight = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    memory.held(optimizer)
    assert memory.start == 140, "gradients and momentum"
    memory.peaks[1] = 240
    assert memory.has_room_for(2)
    memory.peaks[2] = 340
    assert not memory.has_room_for(4)


@pytest.mark.parametrize(
    ("section", "trainer", "says"),
    [
        ("yes", {}, "find_batch_size.enabled must be true or false, got 'yes'"),
        ({"enabled": True, "share": 1}, {}, "find_batch_size.share: no such key, there are enabled, max_memory_share"),
        ({"max_memory_share": 0}, {}, "find_batch_size.max_memory_share must be a number above 0 up to 1, got 0"),
        ({"max_batch_size": 0.5}, {}, "find_batch_size.max_batch_size must be a whole number of at least 1, got 0.5"),
        (True, {"strategy": "ddp_fork"}, "find_batch_size cannot measure for trainer.strategy=ddp_fork, which forks"),
        (True, {"strategy": "fsdp"}, "find_batch_size cannot measure for trainer.strategy=fsdp, which shares weights"),
        (True, {"accelerator": "mps"}, "find_batch_size cannot measure the memory of trainer.accelerator=mps"),
    ],
)
def test_what_is_refused(section: Any, trainer: dict[str, Any], says: str) -> None:
    (line,) = batch_size.problems(section, {"strategy": "auto", "accelerator": "cpu", **trainer})
    assert line.startswith(says)


def test_settings() -> None:
    assert batch_size.settings(True) == Settings(enabled=True)
    assert batch_size.settings({"enabled": False, "max_memory_share": 1}) == Settings(max_memory_share=1)
    assert batch_size.problems(False, {"strategy": "fsdp", "accelerator": "mps"}) == []


def test_processes_that_start_with_the_first_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "_LOOK_EVERY_S", 0.01)
    with pytest.raises(ConfigError, match="the first process has written nothing to .*plan.json"):
        batch_size.wait_for_plan(tmp_path, wait_s=0.02)
    plan = {"micro_batch": {}, "find_batch_size": {"batch_size": 4}}

    def first() -> None:
        time.sleep(0.1)
        micro_batch.write(tmp_path, plan)

    thread = threading.Thread(target=first)
    thread.start()
    assert batch_size.wait_for_plan(tmp_path) == plan
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes(launcher: str, manifests: list[str], in_tmp: Path) -> None:
    """Started by the first when it has decided, or by a launcher at the same time."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--nnodes=1", "--master_port=29653"]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else ()), str(Path(train.__file__).resolve())]
    typed = [*BASE, *manifests, "trainer.devices=2", "trainer.limit_val_batches=0", "exp_manager.version=two"]
    typed += ["find_batch_size={enabled: true, max_batch_size: 2}"]
    done = subprocess.run([*command, *typed], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "distributed_backend=gloo" in done.stdout + done.stderr
    run = in_tmp / "runs" / "conv_tasnet" / "two"
    chosen = json.loads((run / "plan.json").read_text())["find_batch_size"]["batch_size"]
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert content["plan"]["micro_batch"]["data.batch_size"] == {"was": 8, "is": chosen}
    assert content["global_step"] == 32 // (2 * 8), "a step has as many examples as before"
