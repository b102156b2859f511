"""What did not fit into memory, and what to type so that it does."""

import logging
import resource
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

log = logging.getLogger("out_of_memory")

_ON_A_CPU = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for a tensor, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    texts = ("out of memory", *_ON_A_CPU)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def divided(batch_size: int) -> tuple[int, int]:
    """Half the batch, and how many of them are the whole one: of an odd size the largest part that divides it."""
    parts = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), 1)
    return batch_size // parts, parts


class OutOfMemory(pl.Callback):
    """Tells the shapes of the batch that ran out of memory, the peak, and two overrides that need less.

    *halve_batch*: launch/micro_batch.py then goes on with half the batch and twice the accumulation.

    Attribute `stage`: train or val, what ran out; None: nothing did.
    """

    def __init__(self, *, halve_batch: bool = False) -> None:
        if not isinstance(halve_batch, bool):
            raise ValueError(f"halve_batch={halve_batch}: choose true or false")
        self.halve_batch = halve_batch
        self.stage: str | None = None
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stage = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._keep(batch)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._keep(batch)

    on_test_batch_start = on_validation_batch_start

    def _keep(self, batch: Any) -> None:
        tensors = batch.items() if isinstance(batch, dict) else ()
        self._shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors if isinstance(t, Tensor)}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        self.stage = "train" if trainer.training else "val"
        shapes = ", ".join(f"{name} {shape} {_short(dtype)}" for name, (shape, dtype) in self._shapes.items())
        log.warning(
            "out of memory at step %d, process %d, with a batch of %s; at most %s were in use",
            trainer.global_step,
            trainer.global_rank,
            shapes or "an unknown kind",
            _peak(pl_module.device),
        )
        for line in remedies(trainer, self.stage):
            log.warning("  %s", line)


def remedies(trainer: pl.Trainer, stage: str) -> list[str]:
    """Overrides that need less memory, each with what it does."""
    data: Any = getattr(trainer, "datamodule", None)
    lines = []
    if hasattr(data, "batch_size_key") and (size := data.batch_sizes[stage]) > 1:
        half, parts = divided(size)
        if stage == "train":
            accumulation = trainer.accumulate_grad_batches * parts
            more = f"trainer.accumulate_grad_batches={accumulation}: as many examples to a step"
        else:
            half, more = size // 2, "for validation and test"
        lines.append(f"{data.batch_size_key(stage)}={half} {more}")
    if str(trainer.precision).startswith("32"):
        lines.append("trainer.precision=bf16-mixed: half the memory for what the backward pass keeps")
    if key := getattr(data, "LENGTH_KEY", None):
        lines.append(f"a smaller {data.key('train', key)}: shorter training examples")
    return lines


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
