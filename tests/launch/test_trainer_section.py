"""Values of the trainer section that are of another kind, and what the Trainer itself refuses."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.command_line import CONFIG_DIR
from launch.trainer_section import wrong_values
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
    ("typed", "line"),
    [
        (["trainer.max_steps=abc", "trainer.max_time=1"], "trainer.max_steps=abc: give a whole number"),
        (["trainer.devices=[0]"], "trainer.devices=[0]: a list names GPUs"),
        (["trainer.precision=foo"], "trainer: Precision 'foo' is invalid"),
        (["trainer.strategy=foo"], "trainer: You selected an invalid strategy name"),
        (["cpu_threads=abc"], "cpu_threads=abc: give a whole number"),
    ],
)
def test_one_line_each(script, manifests: list[str], in_tmp: Path, typed: list[str], line: str) -> None:
    done = script("train", ["model=conv_tasnet", *TINY, *manifests, *typed, "dry_run=true"])
    lines = done.err.splitlines()
    assert done.code == 2 and lines[0].startswith(f"error: {line}") and len(lines) == len(typed), done.text
