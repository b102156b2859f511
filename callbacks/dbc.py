"""DBC-DAC: gradients of low rank, made from what the optimiser is about to see (modules/gradient_compression.py).

`on_before_optimizer_step` is the one place where gradients are accumulated, reduced over processes, unscaled and not
yet clipped. (One that unscales in its own step gets them scaled in 16-mixed; the compression does not mind.)

Every process computes the same: random sketches depend on the seed, the step and the shape alone.
"""

import logging
import re
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from callbacks import powersgd
from callbacks.hook_clock import HookClock, steps_between
from callbacks.plan import Plan
from modules.gradient_compression import METHODS, RESIDUALS, Compressed, compress, rank_of
from modules.gradient_stacks import Stack, find_stacks, stack_kept

log = logging.getLogger(__name__)

DEFAULTS = {"ratio": 0.1, "residual": "damp", "damp": 0.1, "threshold": 1e-3}
PRESETS: dict[str, dict[str, Any]] = {
    "conservative": {"ratio": 0.15, "residual": "damp", "threshold": 1e-6},
    "balanced": {"ratio": 0.10, "residual": "none", "threshold": 1e-6},
    "aggressive": {"ratio": 0.08, "residual": "none", "threshold": 1e-5},
}
"""The guide's; its one iteration of the residual is `damp` here, none of them `none`."""
WARM_UP, MEASURED = 3, 5  # steps before `every: auto` is decided; the first ones allocate, and start cold


class DBC(pl.Callback):
    """Compresses the gradients of weights with two or more axes.

    Args:
        preset: conservative, balanced or aggressive fill ratio, residual and threshold where these are null; a value
            that is given wins. Without a preset `DEFAULTS` fill them.
        method, energy, balance, threshold, residual, damp: see `modules.gradient_compression.compress`. A *method* of
            null compresses nothing, which is of use with *comm* only.
        ratio: limit of the rank, as a share of the shorter side.
        every: steps of the optimiser from one compression to the next; the gradients between are left as they are.
            `auto`: the least number with which compression takes at most *max_share* of the time of training steps,
            measured over the first ones by the first process and kept in plan.json.
        min_elements: smaller weights are left as they are.
        include, exclude: regular expressions searched in the parameters' names; null includes all, excludes none.
        seed: of the random sketches.
        comm: `powersgd` also compresses what processes exchange, by torch's own hook, from step *powersgd_start_step*
            on, with rank *powersgd_rank*. Its state (each process's error feedback) is not in checkpoints and begins
            anew after a resume, which then is not exact, and after layers were replaced.

    Logs `dbc_energy`, the mean over the matrices of the share of ‖G‖² that their low-rank part holds; `dbc_error`, the
    relative error of that part over all matrices together; `dbc_share`, the share of the time of training steps.

    Raises ValueError for values that cannot be used; when training begins, MisconfigurationException for several
    optimisers, manual optimisation, and strategies that shard parameters.
    """

    refuses_strategy: ClassVar[dict[str, str]] = {"fsdp": "it compresses whole gradients, which no process has"}

    def __init__(
        self,
        *,
        preset: str | None = None,
        method: str | None = "warm",
        ratio: float | None = None,
        energy: float | None = None,
        balance: float = 0.0,
        threshold: float | None = None,
        residual: str | None = None,
        damp: float | None = None,
        every: int | str = "auto",
        max_share: float = 0.05,
        min_elements: int = 4096,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        comm: str | None = None,
        powersgd_rank: int = 4,
        powersgd_start_step: int = 1000,
    ) -> None:
        _choose("preset", preset, (*PRESETS, None))
        _choose("method", method, (*METHODS, None))
        _choose("residual", residual, (*RESIDUALS, None))
        _choose("comm", comm, ("powersgd", None))
        if method is None and comm is None:
            raise ValueError("method=null: nothing to do without comm=powersgd; choose one of " + ", ".join(METHODS))
        given = {"ratio": ratio, "residual": residual, "damp": damp, "threshold": threshold}
        filled = DEFAULTS | PRESETS.get(preset or "", {}) | {k: v for k, v in given.items() if v is not None}
        _within("ratio", filled["ratio"], 0 < filled["ratio"] < 1, "above 0 and below 1")
        _within("energy", energy, energy is None or 0 < energy < 1, "above 0 and below 1, or null")
        _within("balance", balance, 0 <= balance <= 1, "0 to 1")
        _within("threshold", filled["threshold"], 0 < filled["threshold"] <= 1, "above 0, at most 1")
        _within("damp", filled["damp"], 0 <= filled["damp"] <= 1, "0 to 1")
        _within("max_share", max_share, 0 < max_share < 1, "above 0 and below 1")
        _within("every", every, every == "auto" or type(every) is int and every >= 1, "a whole number from 1, or auto")
        _within("powersgd_rank", powersgd_rank, powersgd_rank >= 1, "1 or more")
        _within("powersgd_start_step", powersgd_start_step, powersgd_start_step >= 2, "2 or more, as DDP needs them")
        if threshold is not None and not balance:
            log.warning("dbc: threshold=%s has no effect without a balance", threshold)
        self.method, self.ratio = method, float(filled["ratio"])
        self.options = {
            "energy": energy,
            "balance": balance,
            **{k: filled[k] for k in ("threshold", "residual", "damp")},
        }
        self.every, self.max_share, self.min_elements, self.seed = every, max_share, min_elements, seed
        self.include, self.exclude = _patterns("include", include), _patterns("exclude", exclude)
        self.comm, self.powersgd = comm, {"rank": powersgd_rank, "start_step": powersgd_start_step}
        self._powersgd: Any = None  # its state
        self._trainer: pl.Trainer | None = None
        self._every: int | None = None if every == "auto" else int(every)  # None: still measuring
        self._stacks: list[Stack] | None = None
        self._error: dict[str, Tensor] = {}  # parameter's name -> what residual: ef carries
        self._basis: dict[str, Tensor] = {}  # parameter's name -> where method: warm starts
        self._sums: Tensor | None = None  # energy, error, capped share; number of steps
        self._clock = HookClock()
        self._steps = 0  # of the optimiser since the last look at the clock
        self._stepped = False  # in this batch

    # Beginning

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse(trainer, pl_module)
        self._stacks = None
        if self.method is not None:
            self._say_what(pl_module)
            if self._every is None:
                plan = Plan.of(trainer)
                self._every = plan.decisions.get("dbc_every")
        if self.comm is not None:
            self._powersgd = powersgd.register(trainer, **self.powersgd)
            if trainer.ckpt_path is not None:
                log.info("dbc: the state of powersgd is not in checkpoints, it begins anew: this resume is not exact")

    def _refuse(self, trainer: pl.Trainer, system: pl.LightningModule) -> None:
        if not system.automatic_optimization or len(trainer.optimizers) != 1:
            own = "" if system.automatic_optimization else " and steps by itself"
            raise MisconfigurationException(
                f"callbacks.dbc needs one optimiser and automatic optimisation: {type(system).__name__} has"
                f" {len(trainer.optimizers)}{own}; leave dbc out"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"callbacks.dbc needs whole gradients, which {type(trainer.strategy).__name__} does not keep;"
                " choose trainer.strategy=auto or ddp, or leave it out"
            )
        unscales = getattr(trainer.optimizers[0], "_step_supports_amp_scaling", False)  # of ours none does
        scaled = str(trainer.precision) == "16-mixed" and unscales
        if scaled and self.options["residual"] == "ef" and self.method is not None:
            raise MisconfigurationException(
                "callbacks.dbc.residual=ef: a fused optimiser in 16-mixed gets gradients whose loss scale changes;"
                " choose damp, or model.optim.fused=false"
            )

    def _say_what(self, system: pl.LightningModule) -> None:
        stacks = self._stacks = self._find_stacks(system)
        total = sum(p.numel() for p in system.parameters() if p.requires_grad)
        matrices = sum(len(stack.names) for stack in stacks)
        elements = sum(p.numel() for stack in stacks for p in stack.weights)
        if not stacks:
            log.warning("dbc: no weight has two axes, %d elements and a name that is included", self.min_elements)
        else:
            shapes = len({stack.shape for stack in stacks})
            share = elements / total
            log.info("dbc: %d weights of %d shapes, %.0f %% of the parameters", matrices, shapes, 100 * share)

    def _find_stacks(self, system: pl.LightningModule) -> list[Stack]:
        found = find_stacks(system, min_elements=self.min_elements, include=self.include, exclude=self.exclude)
        return [stack for stack in found if rank_of(stack.shape, self.ratio) < min(stack.shape)]

    # Steps

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._stepped = True
        if self.method is None or trainer.global_step % (self._every or 1):
            return
        hook_ends = self._clock.hook_starts(pl_module.device)
        if self._stacks is None:
            self._stacks = self._find_stacks(pl_module)
        parts = [part for stack in self._stacks if (part := self._compress(stack, trainer.global_step)) is not None]
        if parts:
            self._note(pl_module, parts)
        hook_ends()

    @torch.no_grad()
    def _compress(self, stack: Stack, step: int) -> Compressed | None:
        present = [i for i, p in enumerate(stack.weights) if p.grad is not None and not p.grad.is_sparse]
        if not present:
            return None
        names, rank = [stack.names[i] for i in present], rank_of(stack.shape, self.ratio)
        gradients = [grad for i in present if (grad := stack.weights[i].grad) is not None]
        matrices = torch.stack([grad.reshape(stack.shape) for grad in gradients])  # (B, M, N)
        words = np.random.SeedSequence([self.seed, step, *stack.shape]).generate_state(1, np.uint64)
        generator = torch.Generator(matrices.device).manual_seed(int(words[0] >> 1))
        found = compress(
            matrices,
            rank=rank,
            generator=generator,
            method=str(self.method),
            error=stack_kept(self._error, names, stack.shape, matrices.device),
            basis=stack_kept(self._basis, names, (min(stack.shape), rank), matrices.device),
            **self.options,
        )
        for grad, new in zip(gradients, found.gradient, strict=True):
            grad.copy_(new.view(grad.shape))
        for store, values in ((self._error, found.error), (self._basis, found.basis)):
            if values is not None:
                store.update(zip(names, values, strict=True))
        return found

    def _note(self, system: pl.LightningModule, parts: list[Compressed]) -> None:
        """Log what was captured, without asking the device."""
        captured = torch.cat([part.captured for part in parts]).double()
        norm = torch.cat([part.norm for part in parts]).double()
        error = torch.cat([part.relative_error for part in parts]).double()
        capped = torch.cat([part.capped for part in parts]).double().mean()
        energy = captured.nanmean()  # NaN: came back as they were
        total = norm.square().nansum()
        error = ((error * norm).square().nansum() / total).sqrt().where(total > 0, 0.0)
        for name, value in (("dbc_energy", energy), ("dbc_error", error)):
            system.log(name, value.float(), on_step=True, on_epoch=False, batch_size=1)
        row = torch.stack([energy, error, capped, torch.ones_like(energy)])
        row = torch.where(energy.isfinite(), row, 0.0)
        self._sums = row if self._sums is None else self._sums.to(row) + row

    # Time

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.step_starts()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.step_ends(pl_module.device, measuring=self._every is None)
        if not self._stepped or self.method is None:
            return  # accumulating
        self._stepped = False
        self._steps += 1
        if self._every is None:
            if self._steps == WARM_UP:
                self._clock.take()
            elif self._steps == WARM_UP + MEASURED:
                self._every = Plan.of(trainer).decide(trainer, "dbc_every", self._decide)
                self._steps = 0
        elif self._steps >= (trainer.log_every_n_steps or 50):  # type: ignore[attr-defined]
            self._steps = 0
            pl_module.log("dbc_share", self._clock.take(), on_step=True, on_epoch=False, batch_size=1)

    def _decide(self) -> int:
        share = self._clock.take()
        every = steps_between(share, self.max_share)
        log.info("dbc: every %d step(s): it takes %.1f %% of a step, max_share=%s", every, 100 * share, self.max_share)
        return every

    # What others ask for

    def layers_replaced(
        self, trainer: pl.Trainer, system: pl.LightningModule, replaced: dict[str, tuple[nn.Module, nn.Module]]
    ) -> None:
        """Forget what belongs to the parameters of layers that are no more, and look at the parameters anew."""
        gone = tuple(f"{name}." for name in replaced)
        for store in (self._error, self._basis):
            for name in [name for name in store if name.startswith(gone)]:
                del store[name]
        self._stacks = None
        if self.comm is not None:
            self._powersgd = powersgd.register(trainer, **self.powersgd)

    def step_left_out(self) -> None:
        """By callbacks/not_finite.py. What is remembered here of finite gradients stays."""
        if self._powersgd is not None:
            powersgd.forget(self._powersgd)

    def summary(self) -> dict[str, Any]:
        """For summary.json: means over the steps with a compression, of this run and the ones it resumes."""
        energy, error, capped, steps = self._means()
        stacks = self._stacks or []
        return {
            "dbc": {
                "method": self.method,
                "ratio": self.ratio,
                **self.options,
                "every": self._every,
                "comm": self.comm,
                "matrices": sum(len(stack.names) for stack in stacks),
                "compressed_steps": steps,
                "mean_energy": energy,
                "mean_error": error,
                "capped_share": capped,
                "share": self._clock.total_share(),
            }
        }

    def _means(self) -> tuple[float | None, float | None, float | None, int]:
        if self._sums is None or not self._sums[3]:
            return None, None, None, 0
        energy, error, capped, steps = self._sums.tolist()
        return energy / steps, error / steps, capped / steps, int(steps)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"error": dict(self._error), "basis": dict(self._basis)}
        if self._sums is not None:
            state["sums"] = self._sums.cpu()
        if self._every is None:  # in the middle of measuring
            state["measured"] = {"steps": self._steps, "hook_s": self._clock.hook_s, "step_s": self._clock.step_s}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._trainer is not None and self._trainer.state.fn != "fit":
            return  # a test that loads the best checkpoint does not resume anything
        self._error, self._basis = dict(state_dict["error"]), dict(state_dict["basis"])
        self._sums = state_dict.get("sums")
        if measured := state_dict.get("measured"):
            self._steps = measured["steps"]
            self._clock.hook_s, self._clock.step_s = measured["hook_s"], measured["step_s"]


def _choose(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value}: choose one of {', '.join('null' if c is None else c for c in choices)}")


def _within(name: str, value: Any, right: bool, wanted: str) -> None:
    if not right:
        raise ValueError(f"{name}={value}: give {wanted}")


def _patterns(name: str, texts: list[str] | None) -> list[re.Pattern[str]]:
    if isinstance(texts, str):
        raise ValueError(f"{name}={texts}: give a list of regular expressions, [{texts}]")
    try:
        return [re.compile(text) for text in texts or []]
    except re.error as error:
        raise ValueError(f"{name}={texts}: no regular expression: {error}") from None
