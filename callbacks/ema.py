"""An exponential moving average of the trained weights, which is what validation looks at and what checkpoints hold.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim. 30, 1992.

Decisions that are not obvious
* A checkpoint's `state_dict` is the average, so that whatever reads weights needs to know nothing of it; the live
  weights are in the callback's state, and only a resumed training puts them back.
* Weights go by name, since a switch to low rank changes how many there are. Buffers, such as batch norm's statistics,
  are not averaged.
* Values are exchanged in place: optimisers, DDP and compiled code keep their parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from modules.low_rank import LowRankLayer


def in_row_basis(weight: Tensor, v: Tensor) -> Tensor:
    """The u for which u @ v comes nearest to a weight: weight vᵀ (v vᵀ)⁻¹, by least squares.

    Shape: (outputs, inputs), (rank, inputs) -> (outputs, rank).
    """
    return torch.linalg.lstsq(v.mT, weight.mT, driver="gelsd").solution.mT


class EMA(pl.Callback):
    """average <- decay * average + (1 - decay) * weight, in float32 or wider.

    The best checkpoint is chosen by, and a test looks at, the average. After training the system holds it too.

    *decay*: in [0, 1). *every_n_steps*: optimiser steps between two updates. *start_step*: the optimiser step whose
    weights the average begins with; until then there is none. *warmup*: the n-th update, from 0, uses the decay
    (1 + n) / (10 + n) where that is smaller, so that the first weights are soon forgotten. *validate*: whether
    validations during training look at the average; if not, at the live weights. Checkpoints hold the average anyway.

    Raises ValueError for values out of range.
    """

    refuses_strategy: ClassVar[dict[str, str]] = {"fsdp": "it averages whole weights, which no process has"}

    def __init__(
        self,
        *,
        decay: float = 0.999,
        every_n_steps: int = 1,
        start_step: int = 0,
        warmup: bool = True,
        validate: bool = True,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: give at least 0 and less than 1")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give at least 1")
        if start_step < 0:
            raise ValueError(f"start_step={start_step}: give at least 0")
        self.decay, self.every_n_steps, self.start_step = decay, every_n_steps, start_step
        self.warmup, self.validate = warmup, validate
        self._reset()

    def _reset(self) -> None:
        self.num_updates = 0
        self._average: dict[str, Tensor] = {}  # empty: not begun
        self._live: dict[str, Tensor] = {}  # while the system holds the average: what it held before
        self._seen_step = 0
        self._left_out = False

    # The average

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._begin_if_due(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:  # gradients are being accumulated
            return
        self._seen_step = trainer.global_step
        left_out, self._left_out = self._left_out, False
        if not self._average:
            self._begin_if_due(pl_module)
        elif left_out:
            return
        elif (self._seen_step - self.start_step) % self.every_n_steps == 0:
            self._update(pl_module)

    def step_left_out(self) -> None:
        """By callbacks/not_finite.py: the weights are still those of the step before, which has been counted."""
        self._left_out = True

    def _begin_if_due(self, system: nn.Module) -> None:
        if not self._average and self._seen_step >= self.start_step:
            # With every name of a weight that has several, as in a state dict.
            trained = {name: w for name, w in system.named_parameters(remove_duplicate=False) if w.requires_grad}
            self._average = {name: w.detach().to(_wide(w), copy=True) for name, w in trained.items()}

    @torch.no_grad()
    def _update(self, system: nn.Module) -> None:
        n, weights = self.num_updates, self._weights(system)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(
            list(self._average.values()), [weights[name].to(a.dtype) for name, a in self._average.items()], 1 - decay
        )
        self.num_updates += 1

    def _weights(self, system: nn.Module) -> dict[str, nn.Parameter]:
        weights = dict(system.named_parameters(remove_duplicate=False))
        return {name: weights[name] for name in self._average}

    # In the place of the live weights

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.validate and trainer.state.fn == "fit":
            self._put_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.validate and trainer.state.fn == "fit":
            self._put_back(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_in(pl_module)

    @contextmanager
    def weights_in(self, system: nn.Module) -> Iterator[None]:
        """Inside, the system holds the average, once it has begun."""
        held = bool(self._live)
        self._put_in(system)
        try:
            yield
        finally:
            if not held:
                self._put_back(system)

    @torch.no_grad()
    def _put_in(self, system: nn.Module) -> None:
        if self._live:  # in already: a stop in a validation leaves it there
            return
        weights = self._weights(system)
        self._live = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self._average[name])

    @torch.no_grad()
    def _put_back(self, system: nn.Module) -> None:
        if self._live:
            for name, weight in self._weights(system).items():
                weight.copy_(self._live[name])
        self._live = {}

    # Checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._average:
            return
        weights = checkpoint["state_dict"]
        live = self._live or {name: weights[name] for name in self._average}
        weights.update(self._average)
        checkpoint["callbacks"][self.state_key] = {"num_updates": self.num_updates, "live": live}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":  # a test: the system holds what it is to hold
            self._reset()
        elif (state := checkpoint["callbacks"].get(self.state_key)) is not None:
            weights = checkpoint["state_dict"]
            if wrong := [n for n, w in state["live"].items() if n not in weights or w.shape != weights[n].shape]:
                raise ValueError(f"the checkpoint has no average of {wrong[0]}, or one of another shape: it is damaged")
            self.num_updates, self._live = state["num_updates"], state["live"]
            self._average = {name: weights[name].to(_wide(weights[name])) for name in self._live}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._average = {name: average.to(pl_module.device) for name, average in self._average.items()}
        self._put_back(pl_module)  # of a resumed run

    # Layers that switch to low rank

    @torch.no_grad()
    def layers_replaced(
        self, trainer: pl.Trainer, system: nn.Module, replaced: dict[str, tuple[nn.Module, nn.Module]]
    ) -> None:
        """Let the average follow. *replaced*: name -> the layer that was there, and the factorised one that is now.

        The average v is the live one, and u such that their product comes nearest to the average weight.
        """
        new_layers = {new for _, new in replaced.values()}
        for name, layer in system.named_modules(remove_duplicate=False):
            if layer not in new_layers or (weight := self._take_out(name)) is None:
                continue
            assert isinstance(layer, LowRankLayer)
            v = layer.v.detach()
            u = in_row_basis(weight, v.double().cpu())
            u = trainer.strategy.broadcast(u)  # the processes' libraries may differ in the last bit
            self._average[f"{name}.u"] = u.to(v.device, _wide(v))
            self._average[f"{name}.v"] = v.to(_wide(v), copy=True)

    def _take_out(self, name: str) -> Tensor | None:
        """The average weight (outputs, inputs * kernel) of a layer, in float64; None: there is none."""
        if (dense := self._average.pop(f"{name}.weight", None)) is not None:
            return dense.flatten(1).double().cpu()
        if (u := self._average.pop(f"{name}.u", None)) is not None:
            return u.double().cpu() @ self._average.pop(f"{name}.v").double().cpu()
        return None


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
