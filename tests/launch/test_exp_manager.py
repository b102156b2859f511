"""exp_manager's switches: loggers, callbacks, checkpoints, archives, what is resumed, what is told to be unknown.

Where a run lives (exp_dir, name, version, explicit_log_dir, use_datetime_version) is tested in test_run_dir.py.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from callbacks import clock
from launch import exp_manager
from launch.checkpoint import RunCheckpointIO, locate, remove_leftovers
from launch.command_line import CONFIG_DIR
from launch.errors import ConfigError
from launch.resume import is_complete
from launch.targets import Blueprint
from models.checkpoint import read_checkpoint
from models.conv_tasnet import ConvTasNet
from models.nemo import read_nemo
from models.nest import NEST
from tests.conftest import TINY, TINY_NEST


def composed(**typed: Any) -> dict[str, Any]:
    section = OmegaConf.load(CONFIG_DIR / "exp_manager" / "default.yaml")
    monitor = {"metric": "val_loss", "mode": "min"}
    cfg = OmegaConf.create({"monitor": monitor, "exp_manager": OmegaConf.merge(section, typed)})
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    return config | {
        "logger": {"tensorboard": {"_target_": "x"}, "csv": {"_target_": "y"}},
        "callbacks": {name: {"_target_": name} for name in ("checkpoint", "last", "graceful", "rng")},
        "ckpt_path": None,
    }


def switched(**typed: Any) -> dict[str, Any]:
    """The callbacks that are another than before."""
    config = composed(**typed)
    before = dict(config["callbacks"])
    exp_manager.switch(config, "runs/x")
    return {name: node for name, node in config["callbacks"].items() if node != before.get(name, "none")}


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


def test_the_writer_of_tensorboard() -> None:
    config = composed(summary_writer_kwargs={"flush_secs": 5, "prefix": "p"})
    exp_manager.switch(config, "runs/x")
    assert config["logger"]["tensorboard"] == {"_target_": "x", "flush_secs": 5, "prefix": "p"}
    assert exp_manager.problems(config, ConvTasNet) == []
    config = composed(summary_writer_kwargs={"log_dir": "x"})
    (line,) = exp_manager.problems(config, ConvTasNet)
    assert line.startswith("exp_manager.summary_writer_kwargs.log_dir: no such argument; there are comment, default_hp")


def test_callbacks() -> None:
    """Each switch changes what it names, and nothing else."""
    assert switched() == {}
    assert switched(create_checkpoint_callback=False) == {"checkpoint": None, "last": None}
    assert switched(checkpoint_callback_params={"save_last": False}) == {"last": None}
    assert switched(create_preemption_callback=False) == {"graceful": None}
    assert switched(create_early_stopping_callback=False) == {"early_stopping": None}
    timing = {"step_timing": {"_target_": "callbacks.step_timing.StepTiming", "buffer_size": 3, "sync_cuda": False}}
    assert switched(log_step_timing=True, step_timing_kwargs={"buffer_size": 3}) == timing


def test_early_stopping() -> None:
    """With NeMo's defaults, all of which the class takes."""
    node = switched(create_early_stopping_callback=True, early_stopping_callback_params={"patience": 3})
    (stopping,) = node.values()
    blueprint = Blueprint("callbacks.early_stopping", stopping, pl.Callback)
    assert not blueprint.problems
    built = blueprint.build()
    assert (built.monitor, built.mode, built.patience, built.min_delta) == ("val_loss", "min", 3, -0.001)


def test_ema() -> None:
    node = switched(ema={"enable": True, "decay": 0.9, "every_n_steps": 2, "validate_original_weights": True})
    built = Blueprint("callbacks.ema", node["ema"], pl.Callback).build()
    assert (built.decay, built.every_n_steps, built.validate, built.warmup) == (0.9, 2, False, False)
    config = composed(ema={"enable": True})
    config["callbacks"]["ema"] = {"_target_": "callbacks.ema.EMA"}
    with pytest.raises(ConfigError, match="choose one of them"):
        exp_manager.switch(config, "runs/x")


def test_parameters_of_the_checkpoint_reach_it() -> None:
    """Each key of the section but those that launch itself looks at stands in callbacks.checkpoint."""
    own = {"save_last", "save_best_model", "always_save_nemo", "save_nemo_on_train_end"}
    section = OmegaConf.load(CONFIG_DIR / "callbacks" / "default.yaml").checkpoint
    for key in OmegaConf.load(CONFIG_DIR / "exp_manager" / "default.yaml").checkpoint_callback_params:
        reference = f"${{exp_manager.checkpoint_callback_params.{key}}}"
        assert key in own or section._get_node(key)._value() == reference


def test_unknown_keys_are_named_once() -> None:
    config = composed(wandb_logger_kwargs={"entity": "e"}, plugin=3)
    config["exp_manager"]["checkpoint_callback_params"]["save_first"] = True
    config["exp_manager"]["ema"]["evaluate_ema_weights_instead"] = True
    assert [line.partition(":")[0] for line in exp_manager.problems(config, ConvTasNet)] == [
        "exp_manager.checkpoint_callback_params.save_first",
        "exp_manager.ema.evaluate_ema_weights_instead",
        "exp_manager.plugin",
    ]


NEMO_ALONE: dict[str, Any] = {
    "create_mlflow_logger": (False, True),
    "create_dllogger_logger": (False, True),
    "create_clearml_logger": (False, True),
    "create_neptune_logger": (False, True),
    "create_ipl_epoch_stopper_callback": (False, True),
    "create_straggler_detection_callback": (False, True),
    "create_fault_tolerance_callback": (False, True),
    "log_delta_step_timing": (False, True),
    "log_local_rank_0_only": (False, True),
    "log_global_rank_0_only": (False, True),
    "disable_validation_on_resume": (True, False),
    "ema": ({"cpu_offload": False}, {"cpu_offload": True}),
    "step_timing_kwargs": ({"reduction": "mean"}, {"reduction": "max"}),
    "checkpoint_callback_params": (
        {"prefix": None, "postfix": ".nemo", "dirpath": None, "filepath": None, "train_time_interval": None,
         "model_parallel_size": None, "async_save": False, "save_last_n_optim_states": -1},
        {"prefix": "x", "postfix": ".x", "dirpath": "x", "filepath": "x", "train_time_interval": 3,
         "model_parallel_size": 2, "async_save": True, "save_last_n_optim_states": 1},
    ),
}  # fmt: skip
WITHOUT_EFFECT = {"seconds_to_sleep": 5, "log_tflops_per_sec_per_gpu": True, "mlflow_logger_kwargs": {"a": {"b": 1}},
                  "fault_tolerance": {"a": 1}, "straggler_detection_params": {"a": 1}}  # fmt: skip


def test_keys_of_nemo_alone() -> None:
    """They may stand there with the values that change nothing here; any other is one line that names the key."""
    assert exp_manager.problems(composed(**{k: off for k, (off, _) in NEMO_ALONE.items()}), ConvTasNet) == []
    assert exp_manager.problems(composed(**WITHOUT_EFFECT), ConvTasNet) == []
    told = []
    for key, (_, on) in NEMO_ALONE.items():
        lines = exp_manager.problems(composed(**{key: on}), ConvTasNet)
        asked = {f"{key}.{inner}": value for inner, value in on.items()} if isinstance(on, dict) else {key: on}
        expected = [f"exp_manager.{name}={value}: not supported" for name, value in asked.items()]
        assert [line.partition(";")[0] for line in lines] == expected
        told += lines
    assert any(line.endswith("; use every_n_train_steps") for line in told)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ({"resume_past_end": 1}, "resume_past_end must be true or false, got 1"),
        (
            {"create_early_stopping_callback": "no"},
            "create_early_stopping_callback must be true or false, or null",
        ),
        ({"ema": {"enable": None}}, "ema.enable must be true or false, got None"),
        ({"checkpoint_callback_params": {"save_last": 3}}, "checkpoint_callback_params.save_last must be true or"),
        ({"max_time_per_run": "5 minutes"}, "max_time_per_run: give days, hours, minutes and seconds as DD:HH:MM:SS"),
        ({"max_time_per_run": 300}, "max_time_per_run: give days, hours, minutes and seconds as DD:HH:MM:SS, got 300"),
        ({"max_time_per_run": "00:00:00:00"}, "max_time_per_run: give days"),
        ({"files_to_copy": ["no/such"]}, "files_to_copy: no/such: no such file"),
        ({"files_to_copy": [__file__, "../launch/test_exp_manager.py"]}, "files_to_copy: "),
        ({"on_full_disk": "wait"}, "on_full_disk=wait: choose stop or continue"),
    ],
)
def test_wrong_values(typed: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    (told,) = exp_manager.problems(composed(**typed), ConvTasNet)
    assert told.startswith(f"exp_manager.{line}")


def test_a_time_limit_needs_who_keeps_it() -> None:
    config = composed(max_time_per_run="00:00:05:00", create_preemption_callback=False)
    exp_manager.switch(config, "runs/x")
    (line,) = exp_manager.problems(config, ConvTasNet)
    assert line.endswith("max_time_per_run=00:00:05:00: needs callbacks.graceful, which is switched off")


def test_an_average_needs_whole_checkpoints() -> None:
    config = composed(checkpoint_callback_params={"save_weights_only": True}, ema={"enable": True})
    exp_manager.switch(config, "runs/x")
    (line,) = exp_manager.problems(config, ConvTasNet)
    assert line.endswith("save_weights_only=true: callbacks.ema keeps its average in whole checkpoints only")


def test_one_way_to_continue() -> None:
    config = composed(resume_from_checkpoint="a.ckpt") | {"ckpt_path": "b.ckpt"}
    assert exp_manager.problems(config, ConvTasNet) == [
        "ckpt_path and exp_manager.resume_from_checkpoint: give one of them"
    ]


def test_a_section_stays_one() -> None:
    """Said before values that refer to one are looked up."""
    for given, wrong in (
        ({}, []),
        ({"wandb_logger_kwargs": None, "summary_writer_kwargs": None}, []),  # as in NeMo
        (
            {"checkpoint_callback_params": None, "wandb_logger_kwargs": 5},
            ["checkpoint_callback_params", "wandb_logger"],
        ),
    ):
        section = {name: {} for name in ("ema", "step_timing_kwargs", "wandb_logger_kwargs")}
        section |= {
            f"{name}_callback_params": {"monitor": "${monitor.metric}"} for name in ("checkpoint", "early_stopping")
        }
        section |= given
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


@pytest.mark.parametrize("key", ["always_save_nemo", "save_nemo_on_train_end"])
def test_archives_are_for_systems_that_have_them(key: str) -> None:
    config = composed(checkpoint_callback_params={key: True})
    (line,) = exp_manager.problems(config, ConvTasNet)
    assert line == f"exp_manager.checkpoint_callback_params.{key}=true: ConvTasNet cannot be written as a .nemo archive"
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
    sections = {"checkpoint_callback_params": params, "early_stopping_callback_params": {"monitor": "val_loss"}}
    cfg = OmegaConf.create({"monitor": {}, "exp_manager": sections})
    exp_manager.monitor_training_loss(cfg)
    assert (cfg.monitor.metric, cfg.exp_manager.checkpoint_callback_params) == ("train_loss", params)
    assert cfg.exp_manager.early_stopping_callback_params.monitor == "train_loss"


BASE = ["model=conv_tasnet", *TINY, "debug=fast", "test=false"]
PARAMS = "exp_manager.checkpoint_callback_params"


def test_typed_parameters_reach_the_callback(script, manifests: list[str], in_tmp: Path) -> None:
    """Of any system; without validation the training loss names the file."""
    typed = [f"{PARAMS}.save_top_k=2", f"{PARAMS}.filename='a{{train_loss:.1f}}-{{step}}'",
             f"{PARAMS}.save_weights_only=true", f"{PARAMS}.save_last=false",
             "exp_manager.create_tensorboard_logger=false", "exp_manager.version=v"]  # fmt: skip
    done = script("train", [*BASE, manifests[0], *typed, "trainer.max_epochs=2"])
    assert done.code == 0, done.text
    folder = Path("runs/conv_tasnet/v")
    names = sorted(file.name for file in (folder / "checkpoints").iterdir())
    assert [name.partition("=")[0] for name in names] == ["atrain_loss", "atrain_loss"]
    assert not any(folder.glob("events.*")) and (folder / "metrics.csv").exists()
    done = script("train", [*BASE, manifests[0], "exp_manager.version=v", "exp_manager.resume_if_exists=true"])
    assert done.code == 2, done.text
    assert done.err.endswith(".ckpt: holds weights alone, so it cannot be continued; init_from= takes them\n")


def test_a_run_with_all_that_can_be_asked_for(script, manifests: list[str], in_tmp: Path) -> None:
    """Checkpoints by step, early stopping, an average, timings, files; no last.ckpt; in a directory of one's own."""
    (in_tmp / "notes.txt").write_text("why")
    typed = [
        "exp_manager.explicit_log_dir=here",
        f"{PARAMS}.every_n_train_steps=2", f"{PARAMS}.save_top_k=-1", f"{PARAMS}.auto_insert_metric_name=false",
        f"{PARAMS}.filename='at-{{step}}'", f"{PARAMS}.monitor=null", f"{PARAMS}.save_last=false",
        "exp_manager.create_early_stopping_callback=true", "exp_manager.early_stopping_callback_params.patience=1",
        "exp_manager.early_stopping_callback_params.min_delta=1000",
        "exp_manager.early_stopping_callback_params.check_on_train_epoch_end=false",
        "exp_manager.ema.enable=true", "exp_manager.ema.decay=0.5",
        "exp_manager.log_step_timing=true", "exp_manager.files_to_copy=[notes.txt]",
        "+exp_manager.summary_writer_kwargs.filename_suffix=.x",
        "trainer.max_steps=40", "trainer.limit_train_batches=3", "trainer.val_check_interval=3",
        "trainer.log_every_n_steps=1", "trainer.accumulate_grad_batches=1",
    ]  # fmt: skip
    done = script("train", [*BASE, *manifests, *typed])
    assert done.code == 0, done.text
    folder = Path("here")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6, "the second validation is the first that is not better by so much"
    names = sorted(file.name for file in (folder / "checkpoints").iterdir())
    assert names == ["at-2.ckpt", "at-4.ckpt", "at-6.ckpt"]
    assert (folder / "notes.txt").read_text() == "why"
    header = (folder / "metrics.csv").read_text().partition("\n")[0]
    for name in ("train_step", "train_backward", "validation_step"):
        assert f"{name}_timing in s" in header
    assert any(folder.glob("events.*.x"))
    assert any(name.startswith("EMA") for name in read_checkpoint(folder / "checkpoints" / "at-6.ckpt")["callbacks"])


def test_what_is_resumed(script, manifests: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of time ends a run as a signal would, but with 0 and without a test; then the companions of
    resume_if_exists."""
    base = [*BASE[:-2], *manifests, "trainer.max_steps=3", "exp_manager.name=x"]
    told = iter([0.0])  # asked at the start of the epoch, then after each step
    monkeypatch.setattr(clock, "wall_seconds", lambda: next(told, 1.5))
    done = script("train", [*base, "exp_manager.version=a", "exp_manager.max_time_per_run=00:00:00:01"])
    assert done.code == 0, done.text
    assert "max_time 00:00:00:01: saved checkpoints/last.ckpt at step 1" in done.out
    assert "exp_manager.resume_if_exists=true continues it" in done.out and "test_si_sdr" not in done.out
    assert json.loads(Path("runs/x/a/summary.json").read_text())["status"] == "stopped"

    again = "exp_manager.resume_if_exists=true"
    first = "exp_manager.resume_from_checkpoint=runs/x/a/checkpoints/last.ckpt"
    strict = [again, "exp_manager.resume_ignore_no_checkpoint=false", "exp_manager.resume_past_end=false"]
    done = script("train", [*base, "exp_manager.version=b", *strict, first])
    assert done.code == 0, done.text
    assert done.out.startswith(f"continuing from runs/x/a/checkpoints/last.ckpt in {in_tmp}/runs/x/b\n")
    assert json.loads(Path("runs/x/b/summary.json").read_text())["steps"] == 3

    done = script("train", [*base, "exp_manager.version=b", *strict, first, "trainer.max_steps=4"])
    assert done.code == 2, done.text
    last = in_tmp / "runs/x/b/checkpoints/last.ckpt"
    assert done.err == f"error: exp_manager.resume_past_end=false: the run of {last} is complete\n"
    done = script("train", [*base, "exp_manager.version=b", again, first, "trainer.max_steps=4"])
    assert done.code == 0 and done.out.startswith(f"resuming {last}\n"), "its own goes before"
    done = script("train", [*base, "exp_manager.version=c", first])
    assert done.code == 0 and done.out.startswith("continuing from runs/x/a/"), done.text


def test_nothing_to_resume(script, nest_manifests: list[str], in_tmp: Path) -> None:
    typed = [*TINY_NEST, *nest_manifests, "exp_manager.resume_ignore_no_checkpoint=false"]
    done = script("train", ["--config-name=nest_fast-conformer", *typed])
    assert done.code == 2
    assert "exp_manager.resume_ignore_no_checkpoint=false: no checkpoint in " in done.err
    assert not any(in_tmp.iterdir()), "no directory is left"


def test_complete(tmp_path: Path) -> None:
    """At the last step or epoch, or where early stopping ended it."""
    stopping = {"EarlyStopping{'monitor': 'val_loss'}": {"stopped_epoch": 3}}
    for changed, complete in (
        ({}, False),
        ({"global_step": 8}, True),
        ({"epoch": 2}, True),
        ({"callbacks": stopping}, True),
        ({"config": {}}, False),
    ):
        limits = {"trainer": {"max_steps": 8, "max_epochs": 2}}
        content = {"format_version": 1, "state_dict": {}, "global_step": 7, "epoch": 1, "config": limits, **changed}
        torch.save(content, tmp_path / "x.ckpt")
        assert is_complete(tmp_path / "x.ckpt") == complete, changed


@pytest.mark.parametrize("best", [False, True])
def test_an_archive_at_the_end(best: bool, tmp_path: Path) -> None:
    """Of the last weights, or of the best checkpoint."""
    small = {"num_classes": 8, "encoder": {"d_model": 8, "n_layers": 1, "n_heads": 2, "subsampling_conv_channels": 2}}
    last, other = NEST(**small), NEST(**small)
    content: dict[str, Any] = {"state_dict": other.state_dict()}
    other.on_save_checkpoint(content)
    torch.save(content, tmp_path / "best.ckpt")
    config = composed(name="a/b", checkpoint_callback_params={"save_nemo_on_train_end": True, "save_best_model": best})
    config["packages"] = []
    callback = SimpleNamespace(best_model_path=str(tmp_path / "best.ckpt"))
    trainer: Any = SimpleNamespace(fast_dev_run=False, is_global_zero=True, checkpoint_callback=callback, callbacks=[])
    last._trainer = trainer
    exp_manager.save_archive_at_end(config, trainer, last, tmp_path)
    state = read_nemo(tmp_path / "checkpoints" / "b.nemo")["state_dict"]
    expected = (other if best else last).state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)
