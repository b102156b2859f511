"""What a run prints beside its progress: the dry run's summary and the closing lines."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.profilers import AdvancedProfiler, SimpleProfiler
from torch import Tensor, nn

from data.base import SystemData
from launch.cost import cost_of_training
from models.base import System

log = logging.getLogger(__name__)


def dry_run(system: System, data: SystemData, trainer: pl.Trainer) -> None:
    """Parameters per part, multiply-adds, the first batch's shapes, what memory it needs, what the Trainer would do."""
    count = sum(p.numel() for p in system.parameters())
    trainable = sum(p.numel() for p in system.parameters() if p.requires_grad)
    log.info("%s: %s parameters, %s trainable", type(system).__name__, f"{count:,}", f"{trainable:,}")
    for name, module in _largest_parts(system):
        log.info("  %-32s %12s", name, f"{sum(p.numel() for p in module.parameters()):,}")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    log.info("first batch:")
    for name, value in batch.items():
        described = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        log.info("  %-32s %s", name, described)
    system.recompute_activations()
    system.to(trainer.strategy.root_device)  # where autocast does what it will do in training
    needed = cost_of_training(system, batch, context=trainer.precision_plugin.forward_context)
    log.info("%.3g G multiply-adds per %s, forward", needed.macs / 1e9, needed.unit)
    total = sum(needed.memory) / 2**20
    log.info("memory of each process for this batch, at least (an estimate): %s MiB", f"{total:,.0f}")
    for name, size in needed.memory._asdict().items():
        log.info("  %-32s %12s", name, f"{size / 2**20:,.1f}")
    log.info(
        "trainer: %s x %s, strategy %s, precision %s",
        trainer.num_devices,
        type(trainer.accelerator).__name__,
        type(trainer.strategy).__name__,
        trainer.precision,
    )
    log.info("dry run: nothing was trained")


def _largest_parts(system: System) -> list[tuple[str, nn.Module]]:
    """Children, opened one level where one child holds everything."""
    parts = [(name, module) for name, module in system.named_children() if any(True for _ in module.parameters())]
    if len(parts) == 1:
        name, module = parts[0]
        inner = [(f"{name}.{n}", m) for n, m in module.named_children() if any(True for _ in m.parameters())]
        parts = inner or parts
    return parts


def profiler(kind: Any, directory: Path) -> Any:
    """The profiler that `trainer.profiler` names, made to write its table into the run directory; others as given."""
    if kind in ("simple", "advanced"):
        return (SimpleProfiler if kind == "simple" else AdvancedProfiler)(dirpath=directory, filename="profile")
    return kind


def closing(directory: Path, trainer: pl.Trainer, tested: dict[str, float] | None) -> None:
    """Where the results of a finished run lie, and what to type next."""
    if tested:
        log.info("%s", table(tested))
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or directory / "checkpoints" / "last.ckpt"
    shown = relative(Path(best))
    log.info("best checkpoint  %s", shown)
    for name, folder in (("listen", "listen"), ("images", "look")):
        if (directory / folder).is_dir():
            log.info("%-16s %s", name, relative(directory / folder))
    for file in sorted(directory.glob("fit-profile*.txt")):
        log.info("profile          %s", relative(file))
    log.info("look             tensorboard --logdir %s", relative(directory))
    system = trainer.lightning_module
    if getattr(type(system), "predict", None) is System.predict:  # which only refuses
        log.info("next             python evaluate.py ckpt_path=%s data.test_manifest=<manifest>", shown)
        return
    further = "".join(f" {name}=<files>" for name in list(getattr(system, "inputs", {}))[1:])
    log.info("next             python predict.py ckpt_path=%s input=<files>%s output=<folder>", shown, further)


def relative(path: Path) -> Path:
    """As a user would type it: from the working directory, where it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def table(values: dict[str, Any]) -> str:
    """Name and value, one per line; a standard error stands beside its mean."""
    width = max((len(name) for name in values), default=0)
    lines = []
    for name, value in values.items():
        error = values.get(f"{name}_stderr")
        if not name.endswith("_stderr"):
            lines.append(f"{name:<{width}}  {value:.4g}" + ("" if error is None else f" +- {error:.2g}"))
    return "\n".join(lines)
