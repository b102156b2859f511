"""A checkpoint -> metrics: the system as trained, on test data that is typed or the run's own."""

import json
import logging
import os
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from callbacks.progress import Progress
from data.base import SystemData
from launch import checkpoint, report
from launch.build import plain, typed_keys
from launch.errors import ConfigError
from launch.hardware import quieten, resolve_hardware, share_cores
from launch.targets import Blueprint, wrong_arguments
from models.checkpoint import build_system, read_checkpoint

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Print the test metrics and, with `output`, write them as JSON."""
    quieten()
    config = plain(cfg, typed_keys(list(HydraConfig.get().overrides.task)))
    path = checkpoint.locate(config["ckpt_path"])
    system = build_system(read_checkpoint(path), path, config["packages"])
    section = resolve_hardware(config["trainer"])
    data = Blueprint("data", config["data"], SystemData, config["packages"])
    if problems := [*data.problems, *wrong_arguments("trainer", pl.Trainer, section)]:
        raise ConfigError("\n".join(problems))
    datamodule = data.build()
    if not datamodule.has_data("test"):
        raise ConfigError("set data.test_manifest=…: the checkpoint's run had no test data")
    share_cores(section, config["cpu_threads"])
    trainer = pl.Trainer(
        **section,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Progress()] if section["enable_progress_bar"] else [],
        use_distributed_sampler=False,
    )
    scores = dict(trainer.test(system, datamodule=datamodule, verbose=False)[0])
    if trainer.is_global_zero:
        log.info("%s", report.table(scores))
        if config["output"]:
            write_json(Path(config["output"]), {"checkpoint": str(path), "metrics": scores})


def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(beside, path)
