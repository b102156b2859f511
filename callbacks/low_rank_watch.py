"""Have the stable ranks of a network's layers come to rest? What `switch_epoch: auto` waits for."""

import logging
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from callbacks.plan import by_the_first
from modules.spectrum import singular_values_of, stable_rank

log = logging.getLogger("low_rank")


class LowRankWatch:
    """The stable ranks at the last *window* observations, one at the start of each epoch, or every *every_n_steps*.

    At rest: `mean_slope` of these is at most *slope*.
    """

    def __init__(self, *, window: int, slope: float, every_n_steps: int | None) -> None:
        self.window, self.slope, self.every_n_steps = window, slope, every_n_steps
        self.history: list[dict[str, float]] = []
        self._observed_at = -1

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether it is time for an observation."""
        return self._now(trainer) != self._observed_at

    def at_rest(self, trainer: pl.Trainer, layers: dict[str, nn.Module]) -> bool:
        """Observe *layers* and say what has come out; False without any."""
        self._observed_at = self._now(trainer)
        if not layers:
            return False
        self.history.append(by_the_first(trainer, lambda: stable_ranks(layers)))
        del self.history[: -self.window]
        if len(self.history) < self.window:
            return False
        found = mean_slope(self.history)
        for logger in trainer.loggers:
            logger.log_metrics({"low_rank_slope": found}, step=trainer.global_step)
        log.info("stable ranks move by %.2f %% per observation (switch at %.2f %%)", 100 * found, 100 * self.slope)
        return found <= self.slope

    def begin_anew(self) -> None:
        """Forget the observations: what has switched moves the others."""
        self.history.clear()

    def _now(self, trainer: pl.Trainer) -> int:
        return trainer.current_epoch if self.every_n_steps is None else trainer.global_step // self.every_n_steps

    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(observed) for observed in self.history], "observed_at": self._observed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._observed_at = list(state_dict["history"]), int(state_dict["observed_at"])


def mean_slope(history: Sequence[dict[str, float]]) -> float:
    """How much the stable ranks move from one observation to the next, relative to themselves, as a mean over layers.

    Of each layer the slope of the straight line through its observations. 0 without layers.
    """
    times = torch.arange(len(history), dtype=torch.float64)
    times -= times.mean()
    slopes = []
    # Sorted, so that sums, and with them decisions, are the same in every process.
    for name in sorted(set.intersection(*(set(observed) for observed in history))):
        values = torch.tensor([observed[name] for observed in history], dtype=torch.float64)
        if float(values.mean()) > 0:
            slopes.append(float((times * values).sum() / times.square().sum()) / float(values.mean()))
    return sum(map(abs, slopes)) / len(slopes) if slopes else 0.0


def stable_ranks(layers: dict[str, Any]) -> dict[str, float]:
    """Of the layers whose weights are finite, by name."""
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
    return {
        name: stable_rank(singular_values_of(weight)) for name, weight in weights.items() if weight.isfinite().all()
    }
