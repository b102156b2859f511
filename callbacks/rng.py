"""The random states that training draws from travel in the checkpoint.

Training steps own one random stream per rank. Whatever draws between two steps - validation, a new data iterator,
figures - does not move it: each step, and each validation, starts from where the last step left the stream. So a run
that resumes in the middle of an epoch, at its end or in a validation sees the same dropout masks as one that went on,
also where the two do not create the same iterators. Random data does not come from here: an item is a function of
(seed, epoch, index).
"""

import logging
import os
import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

log = logging.getLogger(__name__)


class RngState(pl.Callback):
    """Saves and restores the states of Python, NumPy, torch and the rank's CUDA device.

    A checkpoint is written by rank 0, so the states of all ranks are gathered into it. With another number of ranks
    than it was written with, each is seeded from (seed, rank, step), and a line says so: such a run cannot be the
    same anyway.
    """

    def __init__(self) -> None:
        self._stream: dict[str, Any] | None = None  # where the last training step left the random states
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded is None:
            return
        states, seed = self._loaded["ranks"], self._loaded["seed"]
        if len(states) == trainer.world_size:
            self._stream = _unpacked(states[trainer.global_rank])
        else:
            _seed_all([seed, trainer.global_rank, trainer.global_step])
            self._stream = _capture()
            if trainer.is_global_zero:
                log.info(
                    "random states: the checkpoint has those of %d process(es), this run has %d; seeded anew",
                    len(states),
                    trainer.world_size,
                )
        self._loaded = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._continue()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stream = _capture()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._continue()

    def _continue(self) -> None:
        if self._stream is not None:
            _restore(self._stream)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = _packed(self._stream or _capture())
        ranks: list[Any] = [own]
        if trainer.world_size > 1:  # all ranks come here, rank 0 writes
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # set by seed_everything
        checkpoint.setdefault("callbacks", {})[self.state_key] = {"ranks": ranks, "seed": seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


def _capture() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _packed(state: dict[str, Any]) -> dict[str, Any]:
    """As numbers, tuples and tensors, which `torch.load(weights_only=True)` reads."""
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *rest)}


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": (kind, keys.numpy().astype(np.uint32), *rest)}


def _seed_all(entropy: list[int]) -> None:
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))  # of CUDA too
