"""exp_manager's switches: loggers, checkpoints, archives, whether there must be something to resume."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from launch import exp_manager
from launch.checkpoint import RunCheckpointIO, locate, remove_leftovers
from launch.command_line import CONFIG_DIR
from launch.errors import ConfigError
from launch.targets import Blueprint
from models.conv_tasnet import ConvTasNet
from models.nest import NEST
from tests.conftest import TINY, TINY_NEST


def composed(**typed: Any) -> dict[str, Any]:
    section = OmegaConf.load(CONFIG_DIR / "exp_manager" / "default.yaml")
    monitor = {"metric": "val_loss", "mode": "min"}
    cfg = OmegaConf.create({"monitor": monitor, "exp_manager": OmegaConf.merge(section, typed)})
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    return config | {
        "logger": {"tensorboard": {"_target_": "x"}, "csv": {"_target_": "y"}},
        "callbacks": {"checkpoint": {"_target_": "c"}, "last": {"_target_": "l"}, "rng": {"_target_": "r"}},
    }


def test_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed()
    before = {key: dict(config[key]) for key in ("logger", "callbacks")}
    exp_manager.switch(config, "runs/x")
    assert {key: config[key] for key in before} == before, "the defaults switch nothing"

    config = composed(create_tensorboard_logger=False)
    exp_manager.switch(config, "runs/x")
    assert config["logger"] == {"tensorboard": None, "csv": {"_target_": "y"}}

    config = composed(create_wandb_logger=True, wandb_logger_kwargs={"project": "p", "tags": ["a"]}, name="n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"create_wandb_logger=true: .* pip install wandb$"):
        exp_manager.switch(config, "runs/x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    config["logger"] = None
    exp_manager.switch(config, "runs/x")
    wandb = config["logger"]["wandb"]
    assert (wandb["name"], wandb["project"], wandb["tags"], wandb["save_dir"]) == ("n", "p", ["a"], "runs/x")
    from pytorch_lightning.loggers import Logger

    assert not Blueprint("logger.wandb", wandb, Logger).problems, "a class that may be built, with its arguments"


def test_no_checkpoints() -> None:
    config = composed(create_checkpoint_callback=False)
    exp_manager.switch(config, "runs/x")
    assert config["callbacks"] == {"checkpoint": None, "last": None, "rng": {"_target_": "r"}}


def test_unknown_keys_are_named_once() -> None:
    config = composed(ema={"enable": True, "decay": 0.9}, wandb_logger_kwargs={"entity": "e"})
    config["exp_manager"]["checkpoint_callback_params"]["save_last"] = True
    lines = exp_manager.problems(config, ConvTasNet)
    assert [line.partition(":")[0] for line in lines] == [
        "exp_manager.checkpoint_callback_params.save_last",
        "exp_manager.ema",
    ]


def test_a_section_stays_one() -> None:
    """Said before values that refer to one are looked up."""
    for given, wrong in (
        ({}, []),
        ({"wandb_logger_kwargs": None}, []),  # as in NeMo
        (
            {"checkpoint_callback_params": None, "wandb_logger_kwargs": 5},
            ["checkpoint_callback_params", "wandb_logger"],
        ),
    ):
        section = {"checkpoint_callback_params": {"monitor": "${monitor.metric}"}, "wandb_logger_kwargs": {}} | given
        cfg = OmegaConf.create({"exp_manager": section})
        if not wrong:
            exp_manager.check_sections(cfg)
            continue
        with pytest.raises(ConfigError) as raised:
            exp_manager.check_sections(cfg)
        lines = str(raised.value).splitlines()
        assert len(lines) == len(wrong)
        assert all(line.startswith(f"exp_manager.{name}") for line, name in zip(lines, wrong, strict=True))
        assert lines[0].endswith("must be a section of keys with values, got None")


def test_archives_are_for_systems_that_have_them() -> None:
    config = composed(checkpoint_callback_params={"always_save_nemo": True})
    (line,) = exp_manager.problems(config, ConvTasNet)
    key = "exp_manager.checkpoint_callback_params.always_save_nemo"
    assert line == f"{key}=true: ConvTasNet cannot be written as a .nemo archive"
    assert exp_manager.problems(config, NEST) == []


def test_an_archive_comes_and_goes_with_its_checkpoint(tmp_path: Path) -> None:
    io = RunCheckpointIO({}, lambda path: path.touch())
    for name in ("x--val_loss=1.500-step=3.ckpt", "last.ckpt"):
        io.save_checkpoint({"state_dict": {"w": torch.ones(1)}}, tmp_path / "checkpoints" / name)
    folder = tmp_path / "checkpoints"
    archive = folder / "x--val_loss=1.500-step=3.nemo"
    assert archive.exists() and not (folder / "last.nemo").exists()
    (folder / "y.nemo.tmp").touch()
    remove_leftovers(folder)
    assert sorted(file.suffix for file in folder.iterdir()) == [".ckpt", ".ckpt", ".nemo"]
    assert locate(tmp_path) == archive.with_suffix(".ckpt"), "the best, whatever its name"
    io.remove_checkpoint(archive.with_suffix(".ckpt"))
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("validated", "name"), [(True, "val_loss=2.346"), (False, "train_loss=2.346")])
def test_file_names_as_nemo_writes_them(validated: bool, name: str) -> None:
    pattern = "${name}--{${exp_manager.checkpoint_callback_params.monitor}:.3f}-{step}"
    params = {"monitor": "val_loss", "mode": "min", "filename": pattern}
    cfg = OmegaConf.create({"name": "x", "monitor": {}, "exp_manager": {"checkpoint_callback_params": params}})
    if not validated:
        exp_manager.monitor_training_loss(cfg)
    resolved = OmegaConf.to_container(cfg, resolve=True)["exp_manager"]["checkpoint_callback_params"]  # type: ignore[index, call-overload]
    checkpoint = ModelCheckpoint(filename=resolved["filename"], monitor=resolved["monitor"])
    metrics = {"val_loss": torch.tensor(2.3456), "train_loss": torch.tensor(2.3456), "step": torch.tensor(7)}
    assert checkpoint.format_checkpoint_name(metrics) == f"x--{name}-step=7.ckpt"


def test_another_monitor_is_kept() -> None:
    params = {"monitor": "train_accuracy", "mode": "max"}
    cfg = OmegaConf.create({"monitor": {}, "exp_manager": {"checkpoint_callback_params": params}})
    exp_manager.monitor_training_loss(cfg)
    assert (cfg.monitor.metric, cfg.exp_manager.checkpoint_callback_params) == ("train_loss", params)


def test_typed_parameters_reach_the_callback(script, manifests: list[str], in_tmp: Path) -> None:
    """Of any system; without validation the training loss names the file."""
    params = "exp_manager.checkpoint_callback_params"
    typed = [f"{params}.save_top_k=2", f"{params}.filename='a{{train_loss:.1f}}-{{step}}'",
             "exp_manager.create_tensorboard_logger=false", "exp_manager.version=v", "debug=fast"]  # fmt: skip
    done = script("train", ["model=conv_tasnet", *TINY, manifests[0], *typed, "trainer.max_epochs=2"])
    assert done.code == 0, done.text
    folder = Path("runs/conv_tasnet/v")
    names = sorted(file.name for file in (folder / "checkpoints").iterdir())
    assert [name.partition("=")[0] for name in names] == ["atrain_loss", "atrain_loss", "last.ckpt"]
    assert not any(folder.glob("events.*")) and (folder / "metrics.csv").exists()


def test_nothing_to_resume(script, nest_manifests: list[str], in_tmp: Path) -> None:
    typed = [*TINY_NEST, *nest_manifests, "exp_manager.resume_ignore_no_checkpoint=false"]
    done = script("train", ["--config-name=nest_fast-conformer", *typed])
    assert done.code == 2
    assert "exp_manager.resume_ignore_no_checkpoint=false: no checkpoint in " in done.err
    assert not any(in_tmp.iterdir()), "no directory is left"
