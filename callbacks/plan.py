"""Decisions that depend on this machine's clock or memory: taken once, kept in plan.json and in every checkpoint.

A resumed run reads them and never measures again; otherwise two runs of one configuration could differ.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from callbacks.saving import write_text


def by_the_first(trainer: pl.Trainer, compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, for all ranks; the others only wait, and leave it the cores that they share."""
    return trainer.strategy.broadcast(compute() if trainer.is_global_zero else None, src=0)


class Plan(pl.Callback):
    """Holds the decisions of a run: name -> plain value.

    Other callbacks use `Plan.of(trainer).decide(trainer, name, measure)`.
    """

    def __init__(self) -> None:
        self.decisions: dict[str, Any] = {}
        self.given: dict[str, Any] = {}  # taken before there was a Trainer; they stand in no checkpoint yet

    @staticmethod
    def of(trainer: pl.Trainer) -> "Plan":
        """The run's plan. Raises MisconfigurationException when the run has none."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Plan):
                return callback
        raise MisconfigurationException("callbacks.plan is needed by another callback: leave it on")

    def decide(self, trainer: pl.Trainer, name: str, measure: Callable[[], Any]) -> Any:
        """The decision of this name; rank 0 takes it with `measure()` when there is none yet, all ranks get it."""
        if name not in self.decisions:
            self.decisions[name] = by_the_first(trainer, measure)
            self._write(trainer)
        return self.decisions[name]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not measured, but part of what makes a run on another machine differ.
        self.decisions |= self.given
        self.decisions["machine"] = {
            "accelerator": type(trainer.accelerator).__name__,
            "devices": trainer.num_devices,
            "nodes": trainer.num_nodes,
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }
        self._write(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["plan"] = dict(self.decisions)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":  # a test that loads the best checkpoint resumes nothing
            self.decisions = dict(checkpoint.get("plan") or {})

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "plan.json"
        write_text(path, json.dumps(self.decisions, indent=2, sort_keys=True) + "\n")
