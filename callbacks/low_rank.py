"""Training that becomes cheaper while it runs: layers switch to low rank, now, at an epoch, or when they are ready.

The four schemes of the usual guides, as settings of one callback: low rank from the start (`start: 0`), dense first
(`switch_epoch: 10`, or `auto`), selected layers only (`threshold`, `include`, `exclude`, `ratios`), ratios that fall
with the epoch (`schedule`).

When is a network ready? Weights begin as noise, with a flat spectrum that a low rank would mutilate; training gives
them a spectrum that falls. `auto` waits until the stable ranks of the layers no longer move: the mean over the layers
of the relative slope over the last observations is at most *slope* (Wang et al., "Cuttlefish: Low-Rank Model Training
without All the Tuning", 2023; theirs is an absolute slope, which depends on the width). Layers whose rank does not pay
by then are asked again.

What depends on a clock (up to which rank a layer is faster by enough) is measured once, at the first batch, and kept in
plan.json; all else follows from the weights, so a resumed run switches as the undisturbed one does. What a checkpoint
needs to be loaded is the system's `structure`, not a state of this callback.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from callbacks.graceful import GracefulStop
from callbacks.low_rank_report import LowRankReport
from callbacks.low_rank_watch import LowRankWatch, stable_ranks
from callbacks.plan import Plan, by_the_first
from callbacks.trial_step import trial_step
from modules.checks import choices, numbers, whole_numbers
from modules.layer_switch import switch_layers
from modules.layer_timing import fastest_ranks
from modules.optimizer_state import MOMENTS
from modules.rank_choice import Choice, Rules, candidates, choose_ranks, choose_smaller_ranks

log = logging.getLogger("low_rank")


class LowRank(pl.Callback):
    """Switches layers to low rank. Which, and to what rank: `modules.rank_choice.Rules` with its arguments.

    When, the first that is set: *start* 0: before the first step. *schedule*: pairs of an epoch and a ratio, at whose
    starts the ratio becomes that. *switch_step*: after so many optimiser steps. *switch_epoch*: at the start of that
    epoch, or `auto`: once the stable ranks of *window* observations have a relative slope of at most *slope*, those
    layers that have a rank that pays, and others later, after *window* further observations at the earliest, when they
    have one; observed at the start of every epoch, or every *watch_every_n_steps* optimiser steps.

    *min_speedup*: a layer stays dense where its rank was not measured to be that many times as fast; 0: not measured.
    *moments*: of the optimiser; `project` carries them over, `reset` begins anew. *lr_factor*: by which the learning
    rate, and what its schedule starts from, is multiplied at the first switch.
    """

    refuses_strategy: ClassVar[dict[str, str]] = {"fsdp": "layers whose weights are in pieces cannot be replaced"}

    def __init__(
        self,
        *,
        start: int | None = None,
        schedule: Sequence[Sequence[float]] | None = None,
        switch_step: int | None = None,
        switch_epoch: int | str | None = "auto",
        window: int = 5,
        slope: float = 0.02,
        watch_every_n_steps: int | None = None,
        rank_by: str = "energy",
        energy: float = 0.9,
        ratio: float = 0.25,
        ratios: dict[str, float] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        threshold: int = 0,
        min_elements: int = 0,
        min_energy: float = 0.5,
        min_ratio: float = 0.1,
        min_speedup: float = 1.2,
        moments: str = "project",
        lr_factor: float = 1.0,
    ) -> None:
        if start not in (None, 0):
            raise ValueError(f"start must be 0, low rank from the first step on, or null, got {start!r}")
        for name, value in {"switch_step": switch_step, "switch_epoch": switch_epoch}.items():
            if value is not None and value != "auto":
                numbers(least=0, most=float("inf"), **{name: value})
        if switch_step == "auto":
            raise ValueError("switch_step must be a number of optimiser steps; switch_epoch may be auto")
        numbers(least=2, most=float("inf"), window=window)  # of one point there is no slope
        numbers(least=0, most=float("inf"), slope=slope, min_speedup=min_speedup, lr_factor=lr_factor)
        if watch_every_n_steps is not None:
            whole_numbers(watch_every_n_steps=watch_every_n_steps)
        choices(moments=(moments, MOMENTS))
        self.start = start
        self.schedule = checked_schedule(schedule)
        self.switch_step = switch_step
        self.switch_epoch = switch_epoch
        # Fresh weights have no spectrum to judge by.
        fresh = 0 in (start, switch_epoch, switch_step) or any(epoch == 0 for epoch, _ in self.schedule)
        timed = start == 0 or self.schedule or switch_step is not None
        self._auto = not timed and switch_epoch == "auto"  # each layer when it is ready
        self.rules = Rules(
            rank_by="ratio" if self.schedule or start == 0 else rank_by,
            energy=energy,
            ratio=ratio,
            ratios=_mapping("ratios", ratios),
            include=_patterns("include", include),
            exclude=_patterns("exclude", exclude),
            threshold=threshold,
            min_elements=min_elements,
            min_energy=0.0 if fresh else min_energy,
            min_ratio=min_ratio,
        )
        self.min_speedup = min_speedup
        self.moments = moments
        self.lr_factor = lr_factor
        self._stage = 0  # switches made, or pairs of the schedule that are behind us
        self._fresh: dict[str, float] = {}  # stable ranks before training
        self._watch = LowRankWatch(window=window, slope=slope, every_n_steps=watch_every_n_steps)
        self._report = LowRankReport()
        self._begun = False
        self._resuming = False  # what is loaded is the state of a training that goes on

    # Around a training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            name = type(trainer.strategy).__name__
            raise MisconfigurationException(
                f"callbacks.low_rank works on one device and with DDP, not with {name}: choose trainer.strategy=ddp"
            )
        self._begun, self._resuming = False, stage == "fit"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"callbacks.low_rank works with one optimiser, this system has {len(trainer.optimizers)}"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._begun:
            self._begin(trainer, pl_module, batch)
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients of these weights are waiting
        if (rules := self._due(trainer, pl_module)) is not None:
            self._switch(trainer, pl_module, batch, rules)

    def _begin(self, trainer: pl.Trainer, system: pl.LightningModule, batch: Any) -> None:
        self._begun = True
        layers = candidates(system, self.rules)
        if trainer.global_step == 0 and self.rules.rank_by == "stable_rank":
            self._fresh = by_the_first(trainer, lambda: stable_ranks(layers))
        if not self.min_speedup or self._all_behind() or "low_rank" in Plan.of(trainer).decisions:
            return
        inputs = trial_step(trainer, system, batch, layers).inputs  # outside of what the first process does alone

        def measure() -> dict[str, Any]:
            context = trainer.precision_plugin.forward_context
            found = fastest_ranks(layers, inputs, min_speedup=self.min_speedup, context=context)
            speedups = {
                name: {str(rank): ratio for rank, ratio in worth.speedups.items()} for name, worth in found.items()
            }
            return {"max_ranks": {name: worth.max_rank for name, worth in found.items()}, "speedups": speedups}

        Plan.of(trainer).decide(trainer, "low_rank", measure)

    # When

    def _all_behind(self) -> bool:
        return self._stage >= (len(self.schedule) if self.schedule else 1) and not self._auto

    def _due(self, trainer: pl.Trainer, system: pl.LightningModule) -> Rules | None:
        """The rules of the switch that is due before this batch; None where none is."""
        if self._all_behind():
            return None
        epoch, step = trainer.current_epoch, trainer.global_step
        if self.start == 0:
            return self.rules
        if self.schedule:
            passed = sum(begins <= epoch for begins, _ in self.schedule)
            return replace(self.rules, ratio=self.schedule[passed - 1][1]) if passed > self._stage else None
        if self.switch_step is not None:
            return self.rules if step >= self.switch_step else None
        if self._auto:
            due = self._watch.due(trainer)
            return self.rules if due and self._watch.at_rest(trainer, candidates(system, self.rules)) else None
        return self.rules if self.switch_epoch is not None and epoch >= int(self.switch_epoch) else None

    # The switch

    def _switch(self, trainer: pl.Trainer, system: pl.LightningModule, batch: Any, rules: Rules) -> None:
        chosen = self._choose(trainer, system, rules)
        wanted = {name: choice.rank for name, choice in chosen.items() if choice.rank}
        if not wanted and self._auto:
            log.info("no layer may switch to low rank yet, the nearest: %s", nearest_to_switching(chosen))
            return
        self._stage = sum(begins <= trainer.current_epoch for begins, _ in self.schedule) if self.schedule else 1
        first = not any(switch["layers"] for switch in self._report.content)
        before = trial_step(trainer, system, batch, {})
        self._report.begin(trainer, system, chosen, flops=before.flops)
        if wanted:
            share = trainer.strategy.broadcast if trainer.world_size > 1 else None
            replaced, lost = switch_layers(
                system, wanted, optimizers=trainer.optimizers, moments=self.moments, share=share
            )
            if lost:
                log.info("optimiser state that begins anew: %s", ", ".join(lost))
            self._follow(trainer, system, replaced)
            self._watch.begin_anew()
            if first and self.lr_factor != 1:
                scale_learning_rate(trainer, self.lr_factor)
        self._report.end(trainer, system, flops=trial_step(trainer, system, batch, {}).flops)
        if not wanted:
            log.warning("no layer switches to low rank; the lines above say why of each")

    def _choose(self, trainer: pl.Trainer, system: pl.LightningModule, rules: Rules) -> dict[str, Choice]:
        plan = Plan.of(trainer).decisions.get("low_rank", {}) if self.min_speedup else {}

        def choose() -> dict[str, Choice]:
            chosen = choose_ranks(system, rules, max_ranks=plan.get("max_ranks"), fresh_stable_ranks=self._fresh)
            # With a schedule, what has switched before takes the next ratio of its full rank.
            return chosen | choose_smaller_ranks(system, rules) if self.schedule else chosen

        return by_the_first(trainer, choose)

    def _follow(self, trainer: pl.Trainer, system: pl.LightningModule, replaced: Any) -> None:
        """All that holds parameters or layers, or has judged by them."""
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            for parameter in system.parameters():
                parameter.grad = None  # views into the old buckets
            trainer.strategy.model = trainer.strategy.lightning_module
            trainer.strategy.configure_ddp()  # type: ignore[attr-defined]
        if (recompile := getattr(system, "recompile", None)) is not None:
            recompile()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (follow := getattr(callback, "layers_replaced", None)) is not None:
                follow(trainer, system, replaced)
        for callback in trainer.early_stopping_callbacks:
            callback.wait_count = 0  # the metric may fall back before it goes on

    # Afterwards

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._report.follow_up(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(c, GracefulStop) and c.stopped for c in trainer.callbacks):  # type: ignore[attr-defined]
            return  # by a signal: it goes on, and has no time for all these spectra
        self._report.close(trainer)
        if not self._stage:
            observed = f", {len(self._watch.history)} observations" if self._auto else ""
            log.warning(
                "training ended before layers switched to low rank (epoch %d%s)", trainer.current_epoch, observed
            )
            for name, choice in self._choose(trainer, pl_module, self.rules).items():
                log.info("  %s: %s", name, choice.described())

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {"low_rank": self._report.content}

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self._stage,
            "fresh": dict(self._fresh),
            "watch": self._watch.state_dict(),
            "report": self._report.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._resuming:
            return  # a test that loads the best checkpoint
        self._stage = int(state_dict["stage"])
        self._fresh = dict(state_dict["fresh"])
        self._watch.load_state_dict(state_dict["watch"])
        self._report.load_state_dict(state_dict["report"])


def nearest_to_switching(chosen: dict[str, Choice]) -> str:
    """Of layers that stay dense for now the one whose rank has least to fall, on one line."""
    possible = {name: choice for name, choice in chosen.items() if choice.wanted and choice.max_rank}
    if not possible:
        return "none, no rank of any layer pays"
    name = min(possible, key=lambda name: possible[name].wanted / possible[name].max_rank)  # type: ignore[operator]
    return f"{name}: {possible[name].described()}"


def scale_learning_rate(trainer: pl.Trainer, factor: float) -> None:
    """Multiply the rates and what schedules start from: a rate alone is overwritten by the next step of a schedule."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
            if "initial_lr" in group:
                group["initial_lr"] *= factor
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]


def checked_schedule(schedule: Any) -> list[tuple[int, float]]:
    """Pairs of an epoch and a ratio, from such pairs or a mapping. Raises ValueError for anything else."""
    pairs = list(schedule.items()) if isinstance(schedule, dict) else schedule or []
    form = f"schedule must be epochs with ratios, {{0: 0.2, 10: 0.1}} or [[0, 0.2], [10, 0.1]], got {schedule!r}"
    if not isinstance(pairs, list | tuple) or any(not isinstance(p, list | tuple) or len(p) != 2 for p in pairs):
        raise ValueError(form)
    for epoch, ratio in pairs:
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise ValueError(f"{form}: {epoch!r} is no epoch")
        if not isinstance(ratio, float | int) or isinstance(ratio, bool) or not 0 < ratio <= 1:
            raise ValueError(f"{form}: {ratio!r} is no ratio above 0, at most 1")
    for (epoch, ratio), (later, smaller) in itertools.pairwise(pairs):
        if later <= epoch or smaller >= ratio:
            raise ValueError(f"schedule must have rising epochs and falling ratios, got {schedule!r}")
    return [(epoch, float(ratio)) for epoch, ratio in pairs]


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list of patterns, [{value}], got {value!r}")
    return tuple(value or ())


def _mapping(name: str, value: Any) -> dict[str, float]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be patterns with ratios, {{mask_conv: 0.1}}, got {value!r}")
    return dict(value or {})
