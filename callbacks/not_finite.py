"""Steps whose gradient is NaN or infinite: left out, counted, and after too many in a row the end of the run.

One such step would make every weight NaN, and a run of days goes on with nothing to show for it. DDP averages the
gradients first, so a NaN of one process is one of all: all leave the step out, without asking one another.

With fp16 it is the loss scaler that leaves steps out, and its growth makes a few overflows normal; there only steps
whose loss itself is not finite count.
"""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from callbacks.failures import RunFailure, listed

log = logging.getLogger("not_finite")

_NAMED = 8  # examples named in the log


class NotFinite(RunFailure):
    """Training has come to nothing but NaN or infinity; the message says where to look."""


class SkipNotFinite(pl.Callback):
    """Leaves out steps of the optimiser whose gradient is not finite.

    Such a step changes nothing: weights, what the optimiser remembers and batch norm's running statistics stay as they
    were; schedules and the number of steps go on. Other callbacks with a method `step_left_out` are told.
    *max_in_a_row*: so many in a row end the run with NotFinite, which names the examples.
    """

    def __init__(self, *, max_in_a_row: int = 10) -> None:
        if type(max_in_a_row) is not int or max_in_a_row < 1:
            raise ValueError(f"max_in_a_row={max_in_a_row}: give a whole number of at least 1")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self._in_a_row: list[dict[str, list[str]]] = []  # of each, the examples: suspects, and all
        self._examples: list[list[str]] = []  # of each batch since the last step of the optimiser
        self._losses: list[Tensor] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []  # now, and before the step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # First, so that no other callback works on such gradients. A new list: Lightning is iterating over the old one.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._examples, self._losses = [], []
        # Here, when all layers are there and on their device.
        self._statistics = [(now, now.clone()) for now in _statistics(pl_module)]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        names = batch.get("name", ()) if isinstance(batch, dict) else ()
        self._examples.append([str(name) for name in names])

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = all_finite(self._losses if scaled else gradients)
        if scaled or not isinstance(trainer.strategy, DDPStrategy):  # then each process sees its own part
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        examples, losses = self._examples, self._losses
        self._examples, self._losses = [], []
        if finite:
            self._in_a_row.clear()
            for now, before in self._statistics:
                before.copy_(now)
            return
        if not scaled:  # a scaler has seen it, and needs these to lower its scale
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        for now, before in self._statistics:
            now.copy_(before)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "step_left_out"):
                callback.step_left_out()
        self._count(trainer, examples, losses)

    def _count(self, trainer: pl.Trainer, examples: list[list[str]], losses: list[Tensor]) -> None:
        self.skipped += 1
        step = trainer.global_step + 1
        wrong = [not all_finite([loss]) for loss in losses]
        suspects = [name for names, bad in zip(examples, wrong, strict=True) if bad for name in names]
        everyone = [name for names in examples for name in names]
        self._in_a_row.append({"suspects": suspects, "all": everyone})
        if trainer.is_global_zero or any(wrong):
            what = "loss" if any(wrong) else "gradient"
            log.warning("step %d is left out, its %s is not finite (%s)", step, what, _listed(suspects or everyone))
        if len(self._in_a_row) < self.max_in_a_row:
            return
        names = gathered([name for skipped in self._in_a_row for name in skipped["suspects"]])
        names = names or gathered([name for skipped in self._in_a_row for name in skipped["all"]])
        raise NotFinite(
            f"loss or gradient was not finite in {self.max_in_a_row} steps in a row, the last is {step};"
            f" lower model.optim.lr, set trainer.gradient_clip_val, or look at these examples: {_listed(names)}",
            told_elsewhere=not trainer.is_global_zero,
        )

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {"skipped_steps": self.skipped}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": [dict(step) for step in self._in_a_row]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = int(state_dict["skipped"]), list(state_dict["in_a_row"])


@torch.no_grad()
def all_finite(tensors: list[Tensor]) -> bool:
    """Whether there is neither NaN nor infinity, with one question to the device."""
    if not tensors:
        return True
    dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    norms = torch._foreach_norm([tensor.float() if tensor.dtype == torch.float16 else tensor for tensor in dense])
    return bool(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().all())


def gathered(names: list[str]) -> list[str]:
    """Those of all processes, each once, in their order."""
    lists = [names]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        lists = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(lists, names)
    return list(dict.fromkeys(name for part in lists for name in part))


def _statistics(system: pl.LightningModule) -> list[Tensor]:
    """Batch norm's running means and variances: a forward pass over NaN leaves NaN in them."""
    layers = [module for module in system.modules() if isinstance(module, _BatchNorm)]
    kept = [part for layer in layers for part in (layer.running_mean, layer.running_var) if part is not None]
    return [part for part in kept if part.is_floating_point()]


def _listed(names: list[str]) -> str:
    return listed(names, most=_NAMED, none="examples without names")
