"""An end to training after a fixed amount of work, which is what comparisons are made at."""

from typing import Any

import pytorch_lightning as pl

from callbacks import clock


class Budget(pl.Callback):
    """Ends training once the process tree has used *cpu_minutes* of CPU time; null: no limit.

    User plus system time, children included (callbacks/clock.py), of this run and the ones it resumes. Rank 0 decides.
    Lightning then validates once more, unless the step was validated already.
    """

    def __init__(self, *, cpu_minutes: float | None = None) -> None:
        if cpu_minutes is not None and not cpu_minutes > 0:
            raise ValueError(f"cpu_minutes={cpu_minutes}: give more than 0, or null for no limit")
        self.cpu_minutes = cpu_minutes
        self._earlier_s = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.cpu_minutes is None or trainer.should_stop:
            return
        used = self._used_s() / 60 if trainer.is_global_zero else 0.0
        if trainer.strategy.reduce_boolean_decision(used >= self.cpu_minutes, all=False):
            trainer.should_stop = True
            if trainer.is_global_zero:
                wall = clock.wall_seconds() / 60
                print(
                    f"budget: {used:.2f} of {self.cpu_minutes:g} CPU-minutes used ({wall:.2f} min wall clock),"
                    f" training ends at step {trainer.global_step}",
                    flush=True,
                )

    def state_dict(self) -> dict[str, Any]:
        return {"cpu_s": self._used_s()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier_s = state_dict["cpu_s"]

    def _used_s(self) -> float:
        return self._earlier_s + clock.cpu_seconds()
