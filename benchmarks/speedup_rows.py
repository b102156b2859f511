"""What benchmarks/speedups.py measures: every speed-up that the guides promise, as it is typed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data.loader import available_cores

FIRST, PLAIN, ALL = "first script", "recipe", "all that paid"
SYSTEMS = ("conv_tasnet", "deepvqe", "nest", "unet")
# What a first script has: no helpers of any kind. What a row types comes after these, and wins.
_BARE = (
    "data.loader.num_workers=0",
    "data.loader.pin_memory=false",
    "trainer.precision=32-true",
    "model.compile=false",
    "trainer.accumulate_grad_batches=1",
)
# Of any measurement: nothing is saved or drawn, every step is logged.
QUIET = (
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=-1",
    *(f"callbacks.{name}=null" for name in ("figures", "images", "checkpoint", "last", "early_stopping")),
    "exp_manager.create_tensorboard_logger=false",
    "test=false",
)
# One short validation at the end, whose batches are timed.
_VALIDATING = (
    "trainer.check_val_every_n_epoch=null",
    "trainer.limit_val_batches=4",
    "exp_manager.log_step_timing=true",
)
_NAIVE = "packages=[benchmarks]"


class Row(NamedTuple):
    """One line of the table.

    *overrides*: what it types beside the recipe. *kind*: of rows of one kind a combination takes the best.
    *needs_cuda*, *why_not*: it cannot be measured here. *measures*: `training` (examples per second), `validation`
    (seconds of one), or `interval` (computed). *losses*: why they say nothing beside the recipe's. *free*: it changes
    no more than the last digits of what is trained, so a combination may take it.
    """

    name: str
    overrides: tuple[str, ...] = ()
    kind: str = ""
    needs_cuda: bool = False
    why_not: str = ""
    measures: str = "training"
    losses: str = ""
    free: bool = True

    def impossible_here(self) -> str | None:
        if self.needs_cuda and not torch.cuda.is_available():
            return "needs a CUDA device"
        return self.why_not or None


def base(system: str, data: Sequence[str], row: Row, steps: int) -> list[str]:
    """What is typed for a row before its own. *data*: where the examples are."""
    typed = [*_BARE, *_SETTINGS[system], *data, *QUIET, *_VALIDATING]
    if row.name == FIRST:
        typed += _NAIVE_TARGETS[system]
    return [*typed, f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]


def rows_of(system: str, copies: Path | None) -> list[Row]:
    """In the order of the table. *copies*: a manifest of the same recordings at the network's rate."""
    workers = f"data.loader.num_workers={max(1, min(8, available_cores() - 1))}"
    batch = _BATCH[system]
    low_rank = ("callbacks=[default,low_rank]", "callbacks.low_rank.start=0", "callbacks.low_rank.rank_by=ratio")
    rows = [
        Row(FIRST, why_not="" if _NAIVE_TARGETS[system] else "its network is the same", losses="other weights"),
        Row(PLAIN),
        Row("workers", (workers,), kind="loader"),
        Row("workers, deeper prefetch", (workers, "data.loader.prefetch_factor=8"), kind="loader"),
        *_caches(system, copies),
        *_layouts(system),
        Row("bf16", ("trainer.precision=bf16-mixed",), kind="precision"),
        Row("compile", ("model.compile=default",), kind="compile"),
        Row("batch x 2", (f"{batch[0]}={2 * batch[1]}",), losses="other batches"),
        Row("batch x 2, accumulated by 2", (f"{batch[0]}={2 * batch[1]}", "trainer.accumulate_grad_batches=2"),
            losses="other batches", free=False),
        Row("fused optimiser", ("model.optim.fused=true",), kind="optimiser"),
        Row("gradient checkpointing", ("model.gradient_checkpointing=true",), free=False),
        Row("validation every 5th epoch", ("trainer.check_val_every_n_epoch=5",), measures="interval", free=False),
        Row("low rank from the start", (*low_rank, "callbacks.low_rank.ratio=0.25"), free=False),
        Row("DBC", ("callbacks=[default,dbc]",), free=False),
        Row("data kept on the device", ("data.loader.keep_on_device=true",), needs_cuda=True, kind="loader"),
        Row("pinned memory", (workers, "data.loader.pin_memory=true"), needs_cuda=True, kind="loader"),
        Row("STFT on the device", why_not=_STFT[system]),
        Row("fp16", ("trainer.precision=16-mixed",), needs_cuda=True, kind="precision"),
        Row("compile, reduce-overhead", ("model.compile=reduce-overhead",), needs_cuda=True, kind="compile"),
        Row("compile, max-autotune", ("model.compile=max-autotune",), needs_cuda=True, kind="compile"),
        Row("8-bit Adam", ("model.optim.name=adam8bit",), needs_cuda=True, kind="optimiser"),
        Row("fewer host syncs", ("callbacks.not_finite=null", "callbacks.graceful.every_n_steps=10"), needs_cuda=True,
            free=False),
    ]  # fmt: skip
    return [row._replace(kind=row.kind or row.name) for row in rows]


def _caches(system: str, copies: Path | None) -> list[Row]:
    memory = Row("16-bit cache in memory", ("data.cache=true",))
    if system == "deepvqe":
        return [
            memory,
            Row("copies at 16 kHz", (f"data.train_manifest={copies}",), why_not="" if copies else "no such copies"),
            Row(
                "STFT cache",
                (f"data.stft_cache={copies.parent / 'stft' if copies else None}",),
                why_not="" if copies else "no such copies",
                measures="validation",
            ),
        ]
    spectra = Row("STFT cache", why_not="no spectra that stay the same: DeepVQE's alone")
    if system == "conv_tasnet":
        return [memory, spectra]
    if system == "unet":
        return [Row("image cache", ("data.cache_limit_mb=1024",)), spectra]
    return [Row("bucketing", ("model.train_ds.use_bucketing=true",), losses="other batches"), spectra]


def _layouts(system: str) -> list[Row]:
    if system == "unet":
        return [Row("channels_last", ("model.channels_last=true",))]
    why_not = "always in training on a CPU" if system == "deepvqe" else "no network of images"
    return [Row("channels_last", why_not=why_not)]


# What the guides' first scripts have, and a plain optimiser, in place of the recipe's.
_ADAM = ("model.optim.name=adamw", "model.optim.lr=1e-3", "model.optim.betas=[0.9,0.999]")
_SETTINGS: dict[str, tuple[str, ...]] = {
    "conv_tasnet": (*_ADAM, "data.cache=false", "data.batch_size=2", "data.segment_s=2.0", "data.pieces=1"),
    "deepvqe": (
        *_ADAM,
        "data.cache=false",
        "data.batch_size=2",
        "data.segment_s=4.0",
        "model.stft=n320",
        "model.align.max_delay_ms=320",  # 32 frames
        "model.residual=all",  # as the literal network has it
        "model.loss.snr_weight=0.0",
        "model.loss.delay_weight=0.0",
    ),
    "nest": (*_ADAM, "model.train_ds.batch_size=2", "model.train_ds.use_bucketing=false"),
    "unet": (*_ADAM, "data.cache_limit_mb=0", "data.batch_size=8", "model.channels_last=false", "model.patch=1",
             "model.refine=0", "model.up=transposed"),
}  # fmt: skip
_NAIVE_TARGETS: dict[str, tuple[str, ...]] = {
    "conv_tasnet": (_NAIVE, "model._target_=benchmarks.naive_systems.NaiveConvTasNet"),
    "deepvqe": (
        _NAIVE,
        "model._target_=benchmarks.naive_systems.NaiveDeepVQE",
        "data._target_=benchmarks.naive_systems.NaiveEchoData",
    ),
    "nest": (),
    "unet": (_NAIVE, "model._target_=benchmarks.naive_systems.NaiveUNet"),
}
_BATCH = {
    "conv_tasnet": ("data.batch_size", 2),
    "deepvqe": ("data.batch_size", 2),
    "nest": ("model.train_ds.batch_size", 2),
    "unet": ("data.batch_size", 8),
}
_STFT = dict.fromkeys(SYSTEMS, "there is none") | dict.fromkeys(
    ("deepvqe", "nest"), "always: loaders give samples, the system transforms them"
)
