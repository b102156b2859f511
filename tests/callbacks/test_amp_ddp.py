"""Precision and distribution that switch themselves on: what they ask the Trainer for, and when."""

import logging

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from callbacks.amp import AutoPrecision
from callbacks.ddp import AutoDDP
from launch.build import merge_trainer_kwargs

PLAIN = nn.Linear(2, 2)
WITH_BATCH_NORM = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def section(accelerator: str = "cpu", devices=1, num_nodes: int = 1, strategy: str = "auto") -> dict:
    return {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes, "strategy": strategy}


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_precision_by_device(monkeypatch: pytest.MonkeyPatch, bf16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    auto = AutoPrecision()
    assert auto.trainer_kwargs(system=PLAIN, trainer=section("cuda")) == {"precision": expected}
    assert auto.trainer_kwargs(system=PLAIN, trainer=section("cpu")) == {}, "off on a CPU unless asked"
    asked = AutoPrecision(precision="bf16-mixed")
    assert asked.trainer_kwargs(system=PLAIN, trainer=section("cpu")) == {"precision": "bf16-mixed"}
    with pytest.raises(ValueError, match="precision=half: choose from"):
        AutoPrecision(precision="half")


@pytest.mark.parametrize(("devices", "num_nodes", "on"), [(1, 1, False), (2, 1, True), (1, 2, True), ([0, 3], 1, True)])
def test_ddp_with_more_than_one_process(devices, num_nodes: int, on: bool) -> None:
    asked = AutoDDP().trainer_kwargs(system=PLAIN, trainer=section("cuda", devices, num_nodes))
    assert isinstance(asked.get("strategy"), DDPStrategy) is on
    assert "sync_batchnorm" not in asked
    assert AutoDDP(enabled=False).trainer_kwargs(system=PLAIN, trainer=section("cuda", devices, num_nodes)) == {}


def test_ddp_options() -> None:
    strategy = AutoDDP().trainer_kwargs(system=PLAIN, trainer=section(devices=2))["strategy"]
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, "static_graph": False}
    fixed = nn.Linear(2, 2)
    fixed.static_graph = True
    strategy = AutoDDP(gradient_as_bucket_view=False).trainer_kwargs(system=fixed, trainer=section(devices=2))[
        "strategy"
    ]
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": False, "static_graph": True}
    with pytest.raises(ValueError, match="static_graph=maybe"):
        AutoDDP(static_graph="maybe")


def test_a_typed_name_keeps_the_options(caplog: pytest.LogCaptureFixture) -> None:
    """One process too: it is what was typed. Another strategy than DDP is left to the Trainer."""
    caplog.set_level(logging.INFO)
    fixed = nn.Linear(2, 2)
    fixed.static_graph = True
    for name, start_method, options in (
        ("ddp", "popen", {"static_graph": True}),
        ("ddp_spawn", "spawn", {"static_graph": True}),
        ("ddp_fork_find_unused_parameters_true", "fork", {"static_graph": False, "find_unused_parameters": True}),
    ):
        strategy = AutoDDP().trainer_kwargs(system=fixed, trainer=section(strategy=name))["strategy"]
        assert strategy._start_method == start_method
        assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, **options}
    assert AutoDDP(enabled=False).trainer_kwargs(system=fixed, trainer=section(strategy="ddp")) == {}
    assert not caplog.text
    assert AutoDDP().trainer_kwargs(system=fixed, trainer=section("cuda", 2, strategy="fsdp")) == {}
    assert "callbacks.ddp stands back: trainer.strategy=fsdp is set" in caplog.text


def test_what_was_typed_is_completed() -> None:
    """The name gives way to the strategy that it stands for; any other value that is set stays."""
    given = section(devices=2, strategy="ddp_spawn") | {"sync_batchnorm": False}
    merged = merge_trainer_kwargs(given, {"ddp": AutoDDP(static_graph=True)}, PLAIN, ["trainer.strategy=ddp_spawn"])  # type: ignore[arg-type]
    assert merged["strategy"]._start_method == "spawn" and merged["strategy"]._ddp_kwargs["static_graph"] is True
    assert merged["sync_batchnorm"] is False


def test_batch_norm_is_synchronised_on_gpus() -> None:
    assert AutoDDP().trainer_kwargs(system=WITH_BATCH_NORM, trainer=section("cuda", 2))["sync_batchnorm"] is True
    assert "sync_batchnorm" not in AutoDDP().trainer_kwargs(system=WITH_BATCH_NORM, trainer=section("cpu", 2))
    never = AutoDDP(sync_batchnorm=False)
    assert "sync_batchnorm" not in never.trainer_kwargs(system=WITH_BATCH_NORM, trainer=section("cuda", 2))
