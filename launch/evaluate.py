"""A checkpoint -> metrics: the system as trained, on test data that is typed or the run's own."""

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from callbacks.bad_files import CountBadFiles
from callbacks.progress import Progress
from data.audio import atomic_path
from data.base import SystemData
from launch import checkpoint, ranks, report
from launch.build import disagreements, plain, switched_off, typed_keys
from launch.errors import ConfigError
from launch.hardware import quieten, resolve_hardware, share_cores
from launch.targets import Blueprint, wrong_arguments
from launch.trainer_section import make_trainer, wrong_values
from models.base import System
from models.checkpoint import build_system, read_checkpoint

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Print the test metrics; write them as JSON with `output`, and a row for each example as CSV with `per_file`."""
    quieten()
    config = plain(cfg, typed_keys(list(HydraConfig.get().overrides.task)))
    path = checkpoint.locate(config["ckpt_path"])
    content = read_checkpoint(path)
    chosen = config.get("model") or {}
    allowed = checkpoint.system_class(content, path, config["packages"]).chosen_in_evaluation
    if wrong := [f"model.{key}: belongs to the checkpoint" for key in chosen if key not in allowed]:
        raise ConfigError("\n".join(wrong))
    content["system"]["arguments"] |= chosen
    system = build_system(content, path, config["packages"])
    if wrong := wrong_values(config["trainer"]):
        raise ConfigError("\n".join(wrong))
    section = resolve_hardware(config["trainer"])
    data = Blueprint("data", config["data"], SystemData, config["packages"])
    problems = [*data.problems, *wrong_arguments("trainer", pl.Trainer, section)]
    problems += disagreements(content["system"]["arguments"], config["data"])
    if config["per_file"] and type(system).example_scores is System.example_scores:
        problems.append(f"per_file={config['per_file']}: {type(system).__name__} has no values for single examples")
    for key in ("output", "per_file"):
        if config[key] and Path(config[key]).is_dir():
            problems.append(f"{key}={config[key]}: is a folder, the name of a file is needed")
    if problems:
        raise ConfigError("\n".join(problems))
    datamodule = data.build()
    if not datamodule.has_data("test"):
        none = switched_off(config["data"], "test") or "data.test_manifest is not set"
        raise ConfigError(f"{none}: set data.test_manifest=… (the checkpoint's run had no test data)")
    share_cores(section, config["cpu_threads"])
    examples = Examples()
    trainer = make_trainer(
        section,
        logger=False,
        enable_checkpointing=False,
        callbacks=[CountBadFiles(), examples, *([Progress()] if section["enable_progress_bar"] else [])],
        use_distributed_sampler=False,
    )
    ranks.watch(trainer)
    scores = dict(trainer.test(system, datamodule=datamodule, verbose=False)[0])
    if trainer.is_global_zero:
        log.info("%s", report.table(scores))
        bad_files = dict(getattr(datamodule, "bad_files", {}))
        if bad_files:
            log.warning("%d files could not be used: other examples stand in for theirs", len(bad_files))
        if config["output"]:
            write_scores(Path(config["output"]), path, scores, bad_files)
        if config["per_file"]:
            write_rows(Path(config["per_file"]), examples.rows)


def write_scores(path: Path, checkpoint_path: Path, scores: dict[str, float], bad_files: dict[str, str]) -> None:
    """As JSON. A value that is not finite is null."""
    content = {
        "checkpoint": str(checkpoint_path),
        "metrics": {name: value if math.isfinite(value) else None for name, value in scores.items()},
        "num_bad_files": len(bad_files),
        "bad_files": bad_files,
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """As CSV with a header. A value that is not known, or not finite, is left empty."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.6g}" if math.isfinite(value) else None


class Examples(pl.Callback):
    """Collects what a test says about single examples: `rows` in the order of the test data, over all processes.

    A row is the example's name (its number where the batch has none), what the system's `example_scores` says, and
    its length in seconds where that is known.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._own: list[dict[str, Any]] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows, self._own = [], []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, System)
        scores = outputs.get("example_scores", [])
        for position, row in enumerate(scores):
            # Our samplers deal test items out to the processes in turn.
            index = len(self._own) * trainer.world_size + trainer.global_rank
            named = {"name": batch["name"][position] if "name" in batch else f"{index:06d}", **row}
            if "length" in batch and pl_module.sample_rate:
                named["seconds"] = float(batch["length"][position]) / pl_module.sample_rate
            self._own.append(named)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parts: list[Any] = [self._own]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, self._own)
        self.rows = in_turn(parts, _num_examples(trainer))


def in_turn(parts: list[list[Any]], limit: int) -> list[Any]:
    """One item of each part in turn, at most `limit`: processes that come short at the end repeat an item."""
    longest = max(map(len, parts))
    return [part[position] for position in range(longest) for part in parts if position < len(part)][:limit]


def _num_examples(trainer: pl.Trainer) -> int:
    loaders = trainer.test_dataloaders
    return len((loaders[0] if isinstance(loaders, list) else loaders).dataset)  # type: ignore[union-attr]
