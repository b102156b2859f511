"""Values of the trainer section that are of another kind, and what the Trainer itself refuses."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from callbacks.dbc import DBC
from callbacks.ema import EMA
from callbacks.low_rank import LowRank
from launch.command_line import CONFIG_DIR
from launch.trainer_section import refused_strategies, wrong_strategy, wrong_values
from tests.conftest import TINY

DEFAULT = {
    key: value
    for key, value in OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "trainer" / "default.yaml")).items()  # type: ignore[union-attr]
    if key != "default_root_dir"
}


def test_values_that_fit() -> None:
    assert wrong_values(DEFAULT) == []
    more = {
        "max_steps": 2e4,
        "max_epochs": None,
        "devices": [0, 1],
        "val_check_interval": 1.0,
        "max_time": "00:01:00:00",
    }
    assert wrong_values(DEFAULT | more) == []
    assert wrong_values(DEFAULT | {"devices": -1, "val_check_interval": 0.5, "gradient_clip_val": 0.0}) == []


@pytest.mark.parametrize(
    ("key", "values", "needed"),
    [
        ("max_steps", ["abc", None, -2, True, 1.5], "a whole number of at least -1"),
        ("max_epochs", ["abc", -2], "a whole number of at least -1 or null"),
        ("accumulate_grad_batches", [0, None, {"0": 2}], "a whole number of at least 1"),
        ("gradient_clip_val", ["abc", -1], "a number of at least 0 or null"),
        ("limit_train_batches", ["all"], "a number of at least 0 or null"),
        ("val_check_interval", [0, -1, 1.5, True], "a number of batches, a fraction of an epoch or null"),
        ("max_time", [1], 'a time as "DD:HH:MM:SS" or null'),
        ("devices", ["abc", 0, -2, [], ["a"], True], "a number of at least 1, a list of GPUs, -1 or auto"),
        ("inference_mode", ["abc"], "true or false"),
    ],
)
def test_values_that_do_not(key: str, values: list, needed: str) -> None:
    for value in values:
        given = "null" if value is None else value
        assert wrong_values(DEFAULT | {key: value}) == [f"trainer.{key}={given}: give {needed}"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"strategy": "auto"}, None),
        ({"strategy": "ddp_spawn_find_unused_parameters_true"}, None),
        ({"strategy": "deepspeed"}, "choose from auto, ddp,"),
        ({"strategy": {"find_unused_parameters": True}}, "choose from auto, ddp,"),
        ({"strategy": "fsdp", "accelerator": "cuda"}, None),
        ({"strategy": "fsdp", "accelerator": "cuda", "gradient_clip_val": 5.0}, "cannot clip gradients by their norm"),
        ({"strategy": "ddp_fork", "accelerator": "cuda"}, "CUDA does not work in a process that was forked"),
    ],
)
def test_strategies(given: dict, line: str | None) -> None:
    lines = wrong_strategy({"accelerator": "cpu", "devices": 1} | given)
    assert len(lines) == (line is not None)
    assert line is None or lines[0].startswith(f"trainer.strategy={given['strategy']}: ") and line in lines[0]


def test_processes_are_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"}
    assert wrong_strategy(section) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wrong_strategy(section) == ["trainer.strategy=ddp_spawn: torchrun has started the processes; use ddp"]


def test_callbacks_refuse_by_name() -> None:
    class Refuses:
        refuses_strategy = {"fsdp": "it needs whole weights", "ddp_spawn": "it cannot"}

    callbacks = {"one": Refuses, "other": dict, "wrong": None}
    line = (
        "callbacks.one does not work with trainer.strategy=fsdp: it needs whole weights; use ddp, or callbacks.one=null"
    )
    assert refused_strategies({"strategy": "fsdp"}, callbacks) == [line]
    assert len(refused_strategies({"strategy": "ddp_spawn_find_unused_parameters_true"}, callbacks)) == 1
    for name in ("auto", "ddp", "ddp_find_unused_parameters_true"):
        assert refused_strategies({"strategy": name}, callbacks) == []


def test_ours_refuse_sharded_parameters() -> None:
    for name, cls in {"low_rank": LowRank, "dbc": DBC, "ema": EMA}.items():
        (line,) = refused_strategies({"strategy": "fsdp"}, {name: cls})
        assert line.startswith(f"callbacks.{name} does not work with trainer.strategy=fsdp: ")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["trainer.max_steps=abc", "trainer.max_time=1"], "trainer.max_steps=abc: give a whole number"),
        (["trainer.devices=[0]"], "trainer.devices=[0]: a list names GPUs"),
        (["trainer.precision=foo"], "trainer: Precision 'foo' is invalid"),
        (["trainer.strategy=foo"], "trainer.strategy=foo: choose from auto, ddp, ddp_spawn, ddp_fork"),
        (["trainer.strategy=fsdp"], "trainer.strategy=fsdp: it needs CUDA GPUs; use trainer.strategy=ddp"),
        (["cpu_threads=abc"], "cpu_threads=abc: give a whole number"),
    ],
)
def test_one_line_each(script, manifests: list[str], in_tmp: Path, typed: list[str], line: str) -> None:
    done = script("train", ["model=conv_tasnet", *TINY, *manifests, *typed, "dry_run=true"])
    lines = done.err.splitlines()
    assert done.code == 2 and lines[0].startswith(f"error: {line}") and len(lines) == len(typed), done.text
