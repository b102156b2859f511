"""What is typed: order of flags, precedence, suggestions, the allow-list."""

import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import command_line
from launch.build import merge_trainer_kwargs
from launch.errors import ConfigError
from launch.targets import Blueprint
from models.base import System
from models.checkpoint import find_class
from tests.conftest import TINY


def composed(script, arguments: list[str], path: Path) -> dict:
    """The configuration that a dry run leaves behind when it is asked to print it."""
    done = script("train", [*arguments, "--cfg", "job"])
    assert done.code == 0, done.text
    return OmegaConf.to_container(OmegaConf.create(done.out), resolve=False)  # type: ignore[return-value]


def test_flags_may_stand_anywhere() -> None:
    argv = ["model=conv_tasnet", "-m", "model.optim.lr=1,2", "--config-dir", "extra", "seed=3"]
    prepared = command_line.prepare(argv, "train")
    assert prepared == ["-m", "--config-dir", "extra", "model=conv_tasnet", "model.optim.lr=1,2", "seed=3"]
    assert command_line.prepare(prepared, "train") == prepared, "children of a distributed run start from the result"


def test_values_that_hydra_would_refuse_are_quoted() -> None:
    typed = ["ckpt_path=a--val_loss=1.2.ckpt", "x='a=b'", "x=[a=b]", "model.lr=1,2", "checkpoint=a=b", "y", "z=größe#1"]
    prepared = command_line.prepare(["model=conv_tasnet", *typed], "train")[1:]
    assert prepared == ["ckpt_path='a--val_loss=1.2.ckpt'", *typed[1:4], "ckpt_path='a=b'", "y", "z='größe#1'"]
    assert command_line.prepare(["model=conv_tasnet", *prepared], "train")[1:] == prepared


def test_precedence(script, in_tmp: Path) -> None:
    """typed > experiment > model file > default"""
    default = composed(script, ["model=conv_tasnet"], in_tmp)
    assert default["trainer"]["log_every_n_steps"] == 50, "from trainer/default.yaml"
    assert default["trainer"]["gradient_clip_val"] == 5.0, "the model file sets what is open in the default"
    assert default["model"]["num_filters"] == 512

    recipe = composed(script, ["experiment=conv_tasnet_demo"], in_tmp)
    assert recipe["model"]["num_filters"] != 512, "a recipe changes the model file's values"
    assert recipe["trainer"]["accumulate_grad_batches"] == 1

    typed = composed(script, ["experiment=conv_tasnet_demo", "model.num_filters=7", "debug=fast"], in_tmp)
    assert typed["model"]["num_filters"] == 7
    assert typed["trainer"]["max_steps"] == 4, "debug comes after the recipe"


def test_every_default_has_a_comment() -> None:
    """`+` is never needed, so the YAML is the manual."""
    bare = []
    for file in command_line.CONFIG_DIR.rglob("*.yaml"):
        if file.parent.name in ("experiment", "debug", "hydra", "job_logging"):
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            key, colon, rest = line.partition(":")
            value = rest.partition("#")[0].strip()
            plain = colon and value and not key.strip().startswith(("#", "-", "_target_", "defaults"))
            if plain and "#" not in rest and file.parent.name in ("trainer", "data", "exp_manager", "config"):
                bare.append(f"{file.name}:{number}: {line}")
    allowed = ("accelerator: cpu", "devices: 1", "devices: -1", "strategy: ddp", "default_root_dir: null")
    assert not [line for line in bare if not line.endswith(allowed)], "one-line comment missing"


def test_learning_rates_are_numbers(script, in_tmp: Path) -> None:
    config = composed(script, ["model=conv_tasnet", "model.optim.lr=1e-4"], in_tmp)
    assert math.isclose(config["model"]["optim"]["lr"], 1e-4)


def test_a_slip_after_plus_is_noticed(script, manifests: list[str], in_tmp: Path) -> None:
    arguments = ["model=conv_tasnet", *TINY, *manifests, "+trainer.max_step=3", "dry_run=true"]
    done = script("train", arguments)
    assert done.code == 2
    assert "trainer.max_step: Trainer has no such argument; did you mean max_steps?" in done.err


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("os.system", "not in an allowed package"),
        ("models.base.pl.Trainer", "cannot be imported"),
        ("models.base.Any", "not a System"),
        ("models.base.torch.load", "cannot be imported"),
        ("models.conv_tasnet.Network", "not a System"),
        ("models.conv_tasnet.Nothing", "has no Nothing"),
        ("modelsx.conv_tasnet.ConvTasNet", "not in an allowed package"),
        ("", "not in an allowed package"),
    ],
)
def test_only_allowed_classes(target: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_class(target, System)


def test_nested_targets_are_refused() -> None:
    node = {"_target_": "models.conv_tasnet.ConvTasNet", "optim": {"name": "adam", "x": [{"_target_": "os.system"}]}}
    problems = Blueprint("model", node, System).problems
    assert problems == ["model.optim.x[0]._target_=os.system: no nested class can be chosen here"]


def test_trainer_arguments_of_callbacks(caplog: pytest.LogCaptureFixture) -> None:
    class Wants:
        def trainer_kwargs(self, *, system, trainer):
            return {"precision": "bf16-mixed", "strategy": "ddp"}

    caplog.set_level("INFO")
    section = {"precision": None, "strategy": "fsdp", "devices": 2}
    merged = merge_trainer_kwargs(section, {"amp": Wants()}, None, [])  # type: ignore[dict-item, arg-type]
    assert merged == {"precision": "bf16-mixed", "strategy": "fsdp", "devices": 2}
    assert "callbacks.amp stands back: trainer.strategy=fsdp is set" in caplog.text
    with pytest.raises(ConfigError, match="leave one of them out"):
        merge_trainer_kwargs(section, {"amp": Wants()}, None, ["callbacks.amp.x=1", "trainer.strategy=fsdp"])  # type: ignore[dict-item, arg-type]


def test_a_foreign_primary_counts_as_typed(script, manifests: list[str], in_tmp: Path) -> None:
    """Its missing sections come from train.yaml; the command line still comes after it."""
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "run.yaml").write_text("model:\n  num_filters: 32\n  num_blocks: 1\nseed: 9\n")
    flags = [f"--config-path={in_tmp / 'mine'}", "--config-name=run"]
    config = composed(script, ["model=conv_tasnet", *flags, "seed=5"], in_tmp)
    assert (config["model"]["num_filters"], config["model"]["num_blocks"]) == (32, 1)
    assert config["seed"] == 5 and config["model"]["kernel_size"] == 16
    done = script("train", ["model=conv_tasnet", *flags, *manifests, "trainer.accelerator=cpu", "dry_run=true"])
    assert done.code == 0 and "dry run" in done.out, done.text
    done = script("train", ["model=conv_tasnet", *flags, "model.num_filter=3"])
    assert done.code == 2 and "Did you mean model.num_filters" in done.err
    done = script("train", ["model=conv_tasnet", flags[0], "--config-name=nothing"])
    assert done.code == 2 and "nothing.yaml is not there" in done.err


def test_children_compose_the_same_foreign_primary(in_tmp: Path) -> None:
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "run.yaml").write_text("seed: 9\n")
    once = command_line.prepare(
        [f"--config-path={in_tmp / 'mine'}", "--config-name", "run", "model=conv_tasnet"], "train"
    )
    assert once[1:3] == ["--config-name", "over_train_run"]
    assert command_line.prepare(once, "train") == once


def test_a_slip_without_a_system(script, in_tmp: Path) -> None:
    done = script("train", ["seed=3", "model.train_ds.manifest_filepat=train.json"])
    assert done.code == 2
    slip = "error: model.train_ds.manifest_filepat=train.json: no system has such a key. Did you mean model.train_ds."
    assert done.err.startswith(slip + "manifest_filepath")
    assert "choose a system: model=" in script("train", ["seed=3"]).err


@pytest.mark.parametrize("override", ["trainer=null", "exp_manager=null", "+callbacks=null"])
def test_sections_that_cannot_be_left_out(script, in_tmp: Path, override: str) -> None:
    done = script("train", ["model=conv_tasnet", override])
    assert (done.code, done.err) == (2, f"error: {override}: the section cannot be left out\n")


@pytest.mark.parametrize("key", ["model.optim", "model.optim.sched", "model.train_ds", "data.loader"])
def test_a_value_in_place_of_a_section(script, in_tmp: Path, key: str) -> None:
    done = script("train", ["model=nest", "model.train_ds.manifest_filepath=x.json", f"{key}=foo"])
    assert (done.code, done.err) == (2, f"error: {key}=foo: must be a section of keys with values\n"), done.text


def test_a_file_where_runs_should_lie(script, in_tmp: Path) -> None:
    (in_tmp / "file").write_text("")
    done = script("train", ["model=nest", "model.train_ds.manifest_filepath=x.json", "exp_manager.exp_dir=file/a"])
    assert (done.code, done.err) == (2, "error: exp_manager.exp_dir=file/a: file is a file, not a folder\n"), done.text
