"""From a composed configuration to objects: data, system, callbacks, Trainer.

Everything is checked before anything is made: missing keys, classes and constructor arguments of all sections come in
one message. Callbacks may ask for Trainer arguments (`trainer_kwargs`), which has to happen here, since processes are
launched inside the Trainer.
"""

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from pytorch_lightning.loggers import Logger

from callbacks import clock
from callbacks.plan import Plan
from callbacks.resume_override import ResumeOverride
from data.base import SystemData
from data.checks import whole_number
from launch import (
    batch_size,
    checkpoint,
    environment,
    exp_manager,
    foreign,
    micro_batch,
    ranks,
    resume,
    stop_signals,
    warm_start,
)
from launch.command_line import near_misses
from launch.errors import ConfigError
from launch.hardware import join, keep_freed_memory, quieten, resolve_hardware, restart_problems, share_cores
from launch.report import profiler
from launch.restore import Restored, take_architecture
from launch.run_dir import rank
from launch.spawned import SpawnedProcess, together
from launch.targets import DATASETS, Blueprint, not_sections, wrong_arguments
from launch.trainer_section import make_trainer, refused_strategies, wrong_strategy, wrong_values
from models.base import System
from models.bounded import bounded
from models.checkpoint import read_checkpoint

log = logging.getLogger(__name__)

# Keys of the model section that are launch's and the data's.
_NOT_THE_SYSTEMS = (*DATASETS, "restore_from")
_FOLDERS = ("speech_dir", "images_dir")  # of a data section: what stands there takes the place of manifests
_LARGEST_SEED = 2**32 - 1  # that NumPy takes


def attempts(cfg: DictConfig) -> Iterator["Run"]:
    """The run, with the batch size that is to be found; a second one where memory was too small for it, and so on."""

    def make() -> Run:
        run = Run(cfg)
        run.find_batch_size()
        return run

    return micro_batch.attempts(make)


class Run:
    """What one training run is made of.

    Raises ConfigError with a line for every key that is missing and every argument that a constructor does not take,
    before anything is built.
    """

    def __init__(self, cfg: DictConfig) -> None:
        quieten()
        self._job = int(HydraConfig.get().job.num) if HydraConfig.get().mode == RunMode.MULTIRUN else 0
        if HydraConfig.get().mode == RunMode.MULTIRUN and not micro_batch.is_another_attempt():
            clock.restart()  # each job of a sweep accounts for itself
        self.directory = Path(HydraConfig.get().runtime.output_dir)
        self.overrides = [str(override) for override in HydraConfig.get().overrides.task]
        typed = typed_keys(self.overrides)
        exp_manager.check_sections(cfg)
        if lines := not_sections(cfg):
            raise ConfigError("\n".join(lines))
        self.config = plain(cfg, typed)
        self.resume = resume.find(self.config, self.directory)
        self._sources = warm_start.sources(self.config)
        self._restored: Restored | None = None
        if self.config["model"].get("restore_from"):
            self._restore(cfg, typed)
        config = self.config
        config["seed"] = _seed(config["seed"])
        exp_manager.switch(config, str(self.directory))
        if not _validates(cfg.data):
            log.info("there is no data to validate on: no validation, train_loss decides what is best")
        self._forced: dict[str, Any] = {}  # optimiser values that a resumed run does not take from its checkpoint
        content = read_checkpoint(self.resume) if self.resume is not None else {}
        plan = micro_batch.plan_of(self.directory, content.get("plan"))
        self._found: dict[str, Any] | None = plan.get(batch_size.NAME)
        self._decision: micro_batch.Decision = plan.get(micro_batch.NAME) or {}
        if not micro_batch.follow(self._decision, config):
            self._decision = {}
        self.again = False  # after `fit`: it is to be done once more, by another Run
        if self.resume is not None:
            if "optimizer_states" not in content:
                raise ConfigError(
                    f"{self.resume}: holds weights alone, so it cannot be continued; init_from= takes them"
                )
            self._saved_config: dict[str, Any] = content.get("config") or {}
            self._saved_shapes = checkpoint.shapes(content["state_dict"])
            self._saved_structure = content.get("structure") or []
            self._resumed_step = int(content["global_step"])
            self._forced = resume.take_over(self._saved_config, config)
        trainer_section, problems = foreign.supplied(config["trainer"])
        if wrong := wrong_values(trainer_section):
            raise ConfigError("\n".join(problems + wrong))
        self.trainer_section = resolve_hardware(trainer_section)
        problems += wrong_strategy(self.trainer_section)
        problems += restart_problems(resumes=config["exp_manager"]["resume_if_exists"])
        if not _validates(cfg.data):  # then the best checkpoint is decided at the end of each epoch
            self.trainer_section |= {"val_check_interval": None, "check_val_every_n_epoch": 1}
        packages = config["packages"]
        model = {key: value for key, value in config["model"].items() if key not in _NOT_THE_SYSTEMS}
        self._system = Blueprint("model", model, System, packages)
        self._data = Blueprint("data", config["data"], SystemData, packages)
        self._callbacks = _blueprints("callbacks", config["callbacks"], pl.Callback, packages)
        self._loggers = _blueprints("logger", config["logger"], Logger, packages)

        parts = [self._system, self._data, *self._callbacks.values(), *self._loggers.values()]
        problems += [line for part in parts for line in part.problems]
        problems += wrong_arguments("trainer", pl.Trainer, self.trainer_section)
        problems += refused_strategies(
            self.trainer_section, {name: blueprint.cls for name, blueprint in self._callbacks.items()}
        )
        problems += batch_size.problems(config["find_batch_size"], self.trainer_section)
        problems += disagreements(model, config["data"])
        problems += exp_manager.problems(config, self._system.cls)
        if problems:
            raise ConfigError("\n".join(problems))
        added = [override.lstrip("+").partition("=")[0] for override in self.overrides if override[0] == "+"]
        for line in near_misses(added, cfg):
            log.warning(line)

    def _restore(self, cfg: DictConfig, typed: set[str]) -> None:
        """Take the architecture that `model.restore_from` names; of a resumed run that is its checkpoint's."""
        source = f"model.restore_from={self.config['model']['restore_from']}"
        if self.resume is None:
            self._restored = Restored(self.config["model"]["restore_from"])
            take_architecture(cfg, self._restored.model, source, typed)
        else:
            log.info("%s is not read again: the run is resumed", source)
            saved = (read_checkpoint(self.resume).get("config") or {}).get("model") or {}
            take_architecture(cfg, saved, str(self.resume), typed)
        self.config = plain(cfg, typed)

    def find_batch_size(self) -> None:
        """Measure the batch size, where that is asked for, and go on with it. A resumed run has decided already."""
        wanted = batch_size.settings(self.config["find_batch_size"])
        if not wanted.enabled or self._found is not None:
            return
        if self.resume is not None or self.config["dry_run"]:
            log.info("find_batch_size: not measured in a %s", "dry run" if self.resume is None else "resumed run")
            return
        if rank() == 0:
            pl.seed_everything(self.config["seed"], workers=True, verbose=False)
            system, data = self._system.build(), self._data.build()
            with batch_size.unsaid():  # it is all said again where the run is built
                section = self._with_callbacks(system)[0]
            trials = batch_size.measure(system, data, section, wanted)
            decision, self._found = batch_size.decide(trials, self.config, data.batch_size_key("train"))
            micro_batch.write(self.directory, {micro_batch.NAME: decision, batch_size.NAME: self._found})
            del system, data
            micro_batch.free_memory()
        else:
            plan = batch_size.wait_for_plan(self.directory)
            decision, self._found = plan[micro_batch.NAME], plan[batch_size.NAME]
        if micro_batch.follow(decision, self.config):
            self._decision = decision
            section = {key.removeprefix("trainer."): new["is"] for key, new in decision.items()}
            self.trainer_section |= {k: v for k, v in section.items() if k in self.trainer_section}
            self._data = Blueprint("data", self.config["data"], SystemData, self.config["packages"])

    def data(self) -> SystemData:
        """The data module; all manifests are read now, since a mistake in them would show when the run has begun."""
        data = self._data.build()
        data.setup("fit")
        if self.config["test"] and data.has_data("test"):
            data.setup("test")
        return data

    def system(self) -> System:
        """The system, with weights from elsewhere where `model.restore_from`, `init_from` or the like is given."""
        restored, self._restored = self._restored, None  # its weights are not kept for the whole run
        with bounded(restored.state, restored.path) if restored is not None else contextlib.nullcontext():
            system = self._system.build()
        if self.resume is not None:
            checkpoint.restructure(system, self._saved_structure, self.resume)
        if self.resume is not None and checkpoint.shapes(system.state_dict()) != self._saved_shapes:
            resume.refuse_other_network(self.resume, self._saved_config, self.config, system)
        if restored is not None:
            restored.load_into(system)
        for source in self._sources:
            if self.resume is None:
                warm_start.start_from_weights(system, source, strict=self.config["init_strict"])
            else:
                log.info("%s is not read again: the run is resumed", source)
        return system

    def _with_callbacks(self, system: System) -> tuple[dict[str, Any], dict[str, pl.Callback], list[Logger]]:
        """The Trainer's arguments, as the callbacks ask for them, callbacks and loggers."""
        callbacks = {name: blueprint.build() for name, blueprint in self._callbacks.items()}
        loggers = [blueprint.build() for blueprint in self._loggers.values()]
        if not loggers:  # Lightning's monitor of the learning rate refuses to run without one
            callbacks = {name: c for name, c in callbacks.items() if not isinstance(c, LearningRateMonitor)}
        if not self.trainer_section["enable_progress_bar"]:  # Lightning refuses both at once
            callbacks = {name: c for name, c in callbacks.items() if not isinstance(c, ProgressBar)}
        if self._forced:
            callbacks["resume_override"] = ResumeOverride(values=self._forced)
        if "spawn" in self.trainer_section["strategy"] or "fork" in self.trainer_section["strategy"]:
            own = SpawnedProcess(section=self.trainer_section, cpu_threads=self.config["cpu_threads"])
            callbacks = {"spawned": own, **callbacks}
        for callback in callbacks.values():
            if isinstance(callback, Plan):
                given = {micro_batch.NAME: self._decision, batch_size.NAME: self._found}
                callback.given = {name: value for name, value in given.items() if value}
        section = merge_trainer_kwargs(self.trainer_section, callbacks, system, self.overrides)
        share_cores(section, self.config["cpu_threads"])
        return section, callbacks, loggers

    def trainer(self, system: System) -> pl.Trainer:
        section, callbacks, loggers = self._with_callbacks(system)
        keep_freed_memory(section)
        section["profiler"] = profiler(section.get("profiler"), self.directory)
        record = environment.record(self.config, self.overrides)
        if rank() == 0 and not self.config["dry_run"]:
            environment.write_snapshot(self.directory, record["git"])
            exp_manager.copy_files(self.config, self.directory)
            checkpoint.remove_leftovers(self.directory / "checkpoints")
        return make_trainer(
            section,
            callbacks=list(callbacks.values()),
            logger=loggers or False,
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks.values()),
            plugins=[
                checkpoint.RunCheckpointIO(
                    record,
                    exp_manager.archive_writer(self.config, system),
                    system,
                    stop_on_full_disk=self.config["exp_manager"]["on_full_disk"] == "stop",
                )
            ],
            use_distributed_sampler=False,  # our samplers shard; Lightning's would shuffle
        )

    def seed(self) -> None:
        """Fix everything random in this process; ranks get the same weights."""
        pl.seed_everything(self.config["seed"], workers=True, verbose=False)

    def fit(self, trainer: pl.Trainer, system: System, data: SystemData) -> None:
        """Train. Ends the process with 128 + signal when a signal stopped it after saving.

        Afterwards `again` says whether a batch was too large for the memory and another Run is to go on with less.
        """
        if trainer.world_size > 1:
            log.info("rank %d of %d: %s", trainer.global_rank, trainer.world_size, " ".join(self.overrides))
        if micro_batch.is_another_attempt():
            micro_batch.free_memory()
        ranks.watch(trainer)
        join(self.trainer_section, self._job)
        try:
            with together(trainer):
                trainer.fit(system, datamodule=data, ckpt_path=self.resume)
        except SystemExit as stop:  # Lightning's answer to a second signal, or a signal before training
            ranks.kill()
            known = stop.code if isinstance(stop.code, int) and stop.code > 128 else 0
            raise SystemExit(known or 128 + (_signal(trainer) or stop_signals.told or signal.SIGINT)) from stop
        except Exception as error:
            self.again = micro_batch.to_start_again(error, trainer, data, self.config, self._decision, self.directory)
            if not self.again:
                raise
            return
        if number := _signal(trainer):
            ranks.finish()
            raise SystemExit(0 if ranks.started_by_lightning() else 128 + number)  # 0: saved, as the first process says
        if _stopped(trainer):
            log.info("the same command with exp_manager.resume_if_exists=true continues it")
            return
        exp_manager.save_archive_at_end(self.config, trainer, system, self.directory)
        if self.resume is not None and trainer.global_step == self._resumed_step and not trainer.should_stop:
            log.info("nothing left to train: already at trainer.max_steps or max_epochs (step %d)", trainer.global_step)

    def test(self, trainer: pl.Trainer, system: System, data: SystemData) -> dict[str, float] | None:
        """Score the best checkpoint on data that training never saw; None where there is none, or before the end."""
        if not self.config["test"] or not data.has_data("test") or _stopped(trainer):
            return None
        best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
        with together(trainer):
            scores = trainer.test(system, datamodule=data, ckpt_path=best, verbose=False)
        return dict(scores[0]) if scores else None

    def monitored(self, trainer: pl.Trainer) -> float | None:
        """The monitored metric as last logged."""
        value = trainer.callback_metrics.get(self.config["monitor"]["metric"])
        return None if value is None else float(value)


def _seed(value: Any) -> int:
    try:
        seed = whole_number("seed", value, least=0)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if seed > _LARGEST_SEED:
        raise ConfigError(f"seed must be at most {_LARGEST_SEED}, got {seed}")
    return seed


def _signal(trainer: pl.Trainer) -> int:
    """The signal that stopped training, 0 for none."""
    return next((c.signum for c in trainer.callbacks if getattr(c, "signum", 0)), 0)  # type: ignore[attr-defined]


def _stopped(trainer: pl.Trainer) -> bool:
    """Whether training was cut short by a signal, or by the limit of its time."""
    return any(getattr(callback, "stopped", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def plain(cfg: DictConfig, typed: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """The configuration as plain, resolved containers. *typed*: the keys that were typed.

    Raises ConfigError naming all required keys that are not set.
    """
    data = cfg.get("data") or {}
    manifests = ("train_manifest", "val_manifest", "test_manifest")
    if folder := next((key for key in _FOLDERS if data.get(key)), None):
        if f"data.{folder}" not in typed and typed & {f"data.{key}" for key in manifests}:
            data[folder] = None  # typed manifests take the place of a recipe's or a checkpoint's folder
        else:
            for key in manifests:  # the folder takes the place of a recipe's manifests
                if key in list(data) and f"data.{key}" not in typed:  # `in data` is false for one that must be set
                    data[key] = None
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"set {', '.join(f'{key}=…' for key in missing)}")
    if "monitor" in cfg and not _validates(data):
        exp_manager.monitor_training_loss(cfg)
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def _validates(data: Any) -> bool:
    """Whether a data section names examples to validate on."""
    if "validation_ds" in data:
        return bool(OmegaConf.select(data, "validation_ds.manifest_filepath"))
    named = data.get("val_manifest", "") is not None or any(data.get(key) for key in _FOLDERS)
    return bool(named) and not switched_off(data, "val")


def switched_off(data: Any, stage: str) -> str | None:
    """The key of a data section by which a stage has no examples, `data.val_examples=0`; None when it has some."""
    return next((f"data.{key}=0" for kind in ("mixtures", "examples") if data.get(key := f"{stage}_{kind}") == 0), None)


def disagreements(model: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """A line for each key, such as the sample rate, that the system and its data both have and do not agree on."""
    shared = sorted(key for key in model.keys() & data.keys() if key[0] != "_" and model[key] != data[key])
    lines = [
        f"data.{key}={data[key]} differs from the system's {model[key]}: set model.{key}, data follows"
        for key in shared
    ]
    rate = model.get("sample_rate")
    for name in DATASETS:
        section = data.get(name)
        own = section.get("sample_rate") if isinstance(section, dict) else None
        if rate is not None and own not in (None, rate):
            lines.append(f"model.{name}.sample_rate={own} differs from model.sample_rate={rate}; leave it out")
    return lines


def typed_keys(overrides: list[str]) -> set[str]:
    """The keys of a list of overrides."""
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def _blueprints(group: str, section: dict[str, Any], kind: type, packages: list[str]) -> dict[str, Blueprint]:
    """Of a map of named nodes; null switches one off.

    A node without `_target_` holds values that a model file gives to a callback that is not chosen here.
    """
    nodes = {name: node for name, node in (section or {}).items() if node and "_target_" in node}
    return {name: Blueprint(f"{group}.{name}", node, kind, packages) for name, node in nodes.items()}


def merge_trainer_kwargs(
    section: dict[str, Any], callbacks: dict[str, pl.Callback], system: System, overrides: list[str]
) -> dict[str, Any]:
    """Fill Trainer arguments that are still open (null or auto) with what the callbacks ask for.

    A value that is set already wins, and one line says so. Only when both sides were typed and differ is it an error.
    What a callback `completes` is what was set, with options.
    """
    merged = dict(section)
    typed = typed_keys(overrides)
    for name, callback in callbacks.items():
        asks = getattr(callback, "trainer_kwargs", None)
        if asks is None:
            continue
        for key, value in asks(system=system, trainer=dict(section)).items():
            if section.get(key) in (None, "auto") or key in getattr(callback, "completes", ()):
                merged[key] = value
            elif section[key] != value:
                if f"trainer.{key}" in typed and any(t.startswith(f"callbacks.{name}.") for t in typed):
                    raise ConfigError(
                        f"callbacks.{name}.* asks for trainer.{key}={value}, but trainer.{key}={section[key]} is"
                        " typed too: leave one of them out"
                    )
                log.info("callbacks.%s stands back: trainer.%s=%s is set", name, key, section[key])
    return merged
