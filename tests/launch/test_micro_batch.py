"""A batch that memory is too small for: halved, with the same steps, and never tried again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.mixtures import SeparationData
from data.ssl import SelfSupervisedData
from launch import micro_batch
from launch.errors import ConfigError
from models.checkpoint import read_checkpoint
from models.conv_tasnet import ConvTasNet
from tests.conftest import TINY

BASE = ["model=conv_tasnet", *TINY, "data.train_mixtures=20", "data.batch_size=4", "trainer.accumulate_grad_batches=1",
        "trainer.max_epochs=2", "callbacks.last.every_n_steps=1", "callbacks.figures=null", "test=false",
        "exp_manager.create_tensorboard_logger=false"]  # fmt: skip
HALVE = "callbacks.out_of_memory.halve_batch=true"


class Memory:
    """Of a machine that has room for `most` examples from step `since` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.since, self.seen = 100, 0, []
        memory, step = self, ConvTasNet.step

        def limited(system: ConvTasNet, batch: dict[str, Any]) -> dict[str, Any]:
            if system.trainer.training:
                size = len(batch["mixture"])
                if size > memory.most and system.global_step >= memory.since:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                memory.seen += [(system.global_step, float(one.square().sum())) for one in batch["mixture"]]
            return step(system, batch)

        monkeypatch.setattr(ConvTasNet, "step", limited)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


def test_halved_in_the_middle_of_an_epoch(script, manifests: list[str], in_tmp: Path, memory: Memory) -> None:
    whole = script("train", [*BASE, *manifests, "exp_manager.version=whole"])
    assert whole.code == 0, whole.text
    expected, memory.seen = memory.seen, []
    memory.most, memory.since = 2, 3
    done = script("train", [*BASE, *manifests, "exp_manager.version=x", HALVE])
    assert done.code == 0, done.text
    assert "  data.batch_size=2 trainer.accumulate_grad_batches=2: as many examples to a step" in done.out
    assert "going on with data.batch_size=2 trainer.accumulate_grad_batches=2" in done.out
    assert memory.seen == expected, "each step sees the same examples as with the whole batch"
    run = in_tmp / "runs" / "conv_tasnet" / "x"
    one, other = (read_checkpoint(run.parent / name / "checkpoints" / "last.ckpt") for name in ("whole", "x"))
    assert one["global_step"] == other["global_step"] == 10
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=1e-3, atol=1e-5)
    decided = {"data.batch_size": {"was": 4, "is": 2}, "trainer.accumulate_grad_batches": {"was": 1, "is": 2}}
    assert json.loads((run / "plan.json").read_text())["micro_batch"] == decided == other["plan"]["micro_batch"]

    (run / "plan.json").unlink()  # the checkpoint knows it too
    again = [*BASE, *manifests, "exp_manager.version=x", "trainer.max_epochs=3", "exp_manager.resume_if_exists=true"]
    memory.seen = []
    resumed = script("train", again)
    assert resumed.code == 0 and "as decided on this run's machine: data.batch_size=2" in resumed.out, resumed.text
    assert "out of memory" not in resumed.text and len(memory.seen) == 20
    assert json.loads((run / "plan.json").read_text())["micro_batch"] == decided


def test_without_it_the_run_ends(script, manifests: list[str], in_tmp: Path, memory: Memory) -> None:
    memory.most = 2
    done = script("train", [*BASE, *manifests])
    assert done.code == 1 and "Traceback" not in done.text
    assert done.err.splitlines()[-1] == "failed: CUDA out of memory. Tried to allocate 2.00 GiB."
    memory.most = 0
    done = script("train", [*BASE, *manifests, HALVE, "data.batch_size=1"])
    assert done.code == 1 and "the batch is a single example already" in done.out


@pytest.mark.slow
def test_a_new_start_in_a_sweep(script, manifests: list[str], in_tmp: Path, memory: Memory) -> None:
    memory.most = 1
    command = [*BASE, *manifests, HALVE, "-m", "model.optim.lr=1e-3,2e-3", "trainer.max_epochs=1"]
    done = script("train", [*command, "exp_manager.version=s", "data.train_mixtures=8"])
    assert done.code == 0, done.text
    for job in ("0", "1"):
        plan = json.loads((in_tmp / "runs" / "conv_tasnet" / "sweep-s" / job / "plan.json").read_text())
        assert plan["micro_batch"]["data.batch_size"] == {"was": 4, "is": 1}
        assert plan["machine"]["accumulate_grad_batches"] == 4


def test_what_is_halved() -> None:
    """Intervals that count batches go with it; evaluation has a size of its own, NEST its own keys."""
    data = SeparationData(sample_rate=8000, batch_size=6, eval_batch_size=3)
    trainer = {"accumulate_grad_batches": 2, "val_check_interval": 10, "limit_train_batches": 0.5}
    config: dict[str, Any] = {"trainer": trainer, "data": {"batch_size": 6, "eval_batch_size": 3}, "model": {}}
    first = micro_batch._halved("train", data, config, {})
    assert first == {
        "data.batch_size": {"was": 6, "is": 3},
        "trainer.accumulate_grad_batches": {"was": 2, "is": 4},
        "trainer.val_check_interval": {"was": 10, "is": 20},
    }
    assert micro_batch.follow(first, config) and config["data"]["batch_size"] == 3
    data = SeparationData(sample_rate=8000, batch_size=3, eval_batch_size=3)
    second = micro_batch._halved("train", data, config, first)
    assert second and second["data.batch_size"] == {"was": 6, "is": 1}
    assert second["trainer.val_check_interval"] == {"was": 10, "is": 60}
    third = micro_batch._halved("val", data, config, second)
    assert third == {**second, "data.eval_batch_size": {"was": 3, "is": 1}}
    assert not micro_batch.follow(third, config), "configured otherwise"

    sections = {"train_ds": {"batch_size": 8}, "validation_ds": {"batch_size": 4}}
    nest: dict[str, Any] = {"trainer": {"accumulate_grad_batches": 1}}
    nest |= {name: {key: dict(values) for key, values in sections.items()} for name in ("model", "data")}
    for stage in ("train", "val"):
        decision = micro_batch._halved(stage, SelfSupervisedData(**sections), nest, {})
        assert decision and micro_batch.follow(decision, nest)
    for name in ("model", "data"):
        assert nest[name] == {"train_ds": {"batch_size": 4}, "validation_ds": {"batch_size": 2}}


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="plan.json: not JSON any more"):
        micro_batch.decided(tmp_path, None)
