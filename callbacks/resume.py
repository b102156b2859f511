"""A resumed run goes on exactly where its checkpoint was written.

Lightning 2.6.6 does not, in these places (found by saving in every hook and comparing with the run that went on):

* saved at the end of a step at which a validation or the epoch ends: that validation and the epoch's end never happen;
* saved at the end of an epoch with `max_steps` set: the next epoch is taken for the one after it, in another order;
* saved in a validation: the validation is left out;
* any resume: plateau schedules do not step at the end of the resumed epoch, and the metrics they read are gone;
* saved at the end of training that early stopping ended: training goes on;
* saved after layers were replaced: an optimiser's state goes by position, and where a parameter came into a group later
  than the others, or into another than it would come now, it is another one's.

So a checkpoint also says at which place it was written, and before Lightning reads its loop counters back, they are
put into the form from which it does the right thing. The counters: `ready`, `started`, `processed`, `completed` of the
epochs and of the batches, each as a total and for the current run of the loop.
"""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from callbacks.metrics_csv import MetricsCsv
from modules.optimizer_state import arrange, names_in_groups

log = logging.getLogger(__name__)

_STEP, _VALIDATION, _VALIDATED, _EPOCH_END, _ENDED, _EPOCH_START = (
    "step",  # at the end of a training step
    "validation",  # in a validation that has not ended
    "validated",  # at the end of a validation
    "epoch_end",
    "ended",  # after the last epoch of the run
    "epoch_start",
)


class ExactResume(pl.Callback):
    """Stores the place at which each checkpoint is written, and continues a run from there.

    Checkpoints of runs without this callback resume as Lightning does it. The data position is the data module's
    affair, random states are callbacks/rng.py's.
    """

    def __init__(self) -> None:
        self._place: str | None = None  # None: no hook was called yet
        self._resumed: dict[str, Any] | None = None
        self._restored: list[str] = []  # metrics of the validation before the checkpoint
        self._groups: list[list[list[str]]] = []  # names of the parameters of each optimiser in the checkpoint

    # Where are we

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # First, so that the place is known to every callback that saves in the same hook. A new list: Lightning is
        # iterating over the old one.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]
        if stage == "fit":
            self._place, self._resumed, self._restored, self._groups = None, None, [], []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._place = _EPOCH_START

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._place = _STEP

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._place = _VALIDATION
            for name in self._restored:  # one that this validation has no value for is gone, not as it was
                trainer.callback_metrics.pop(name, None)
            self._restored = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._place = _VALIDATED

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._place != _VALIDATION:  # one that was cut short is still to be done
            self._place = _EPOCH_END
        if self._resumed is not None:
            self._leave_resumed_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._place != _VALIDATION:
            self._place = _ENDED

    # Checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._place is None:
            return
        checkpoint.setdefault("callbacks", {})[self.state_key] = {
            "place": self._place,
            "epoch": trainer.current_epoch,
            "should_stop": trainer.should_stop,
            "validation_due": _validation_due(trainer),
            "epoch_complete": _epoch_complete(trainer),
            "metrics": {k: v.detach().cpu() for k, v in trainer.callback_metrics.items()},
            "row": _row_to_come(trainer) if self._place == _STEP else {},
            "parameters": [names_in_groups(o, dict(pl_module.named_parameters())) for o in trainer.optimizers],
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        states = checkpoint["callbacks"]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (state := states.get(callback.state_key)) is None:
                continue
            if isinstance(callback, EarlyStopping):
                state["patience"] = callback.patience  # as configured; Lightning takes the old one
            elif isinstance(callback, ModelCheckpoint):
                _find_best(state, Path(callback.dirpath or ""), Path(str(trainer.ckpt_path)))
                # Disks may differ, and what follows is decided by all processes together.
                state.update(trainer.strategy.broadcast(dict(state)))
        if (state := states.get(self.state_key)) is not None:
            self._groups = state.get("parameters", [])
            self._resumed = {"step": checkpoint["global_step"], "should_stop": False, "row": {}, **state}
            before, now = getattr(trainer.datamodule, "examples_per_batch", (1, 1))  # type: ignore[attr-defined]
            loops = _recounted(_corrected(checkpoint, state), before, now, complete=state["epoch_complete"])
            checkpoint["loops"] = dict(checkpoint["loops"], fit_loop=loops)

    # Continuing

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=False):
            arrange(optimizer, dict(pl_module.named_parameters()), groups)  # before Lightning restores their states
        # Here, since a run with nothing left to train comes no further, and its summary shows these metrics.
        step = 0
        if (state := self._resumed) is not None:
            step = state["step"]
            trainer.callback_metrics.update(state["metrics"])
            self._restored = [name for name in state["metrics"] if name.startswith("val_")]
            if state["place"] == _ENDED and state["should_stop"] and _stopped_early(trainer):
                trainer.should_stop = True
                log.info("early stopping ended this run; callbacks.early_stopping=null or a higher patience trains on")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                # From here on TensorBoard hides what a killed run wrote for this step and later ones.
                session = SessionLog(status=SessionLog.START)
                logger.experiment.file_writer.add_event(Event(session_log=session), step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state, fit_loop = self._resumed, trainer.fit_loop
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                if logger.path.exists():
                    logger.continue_from(trainer.global_step)
                if state is not None and (row := state["row"]):
                    logger.log_metrics(row, step=row["step"])
        if state is None:
            return
        # Lightning sets this back at the end of the epoch only, and until then steps no plateau schedule, since the
        # metrics were lost. Ours were not.
        fit_loop._restarting = False
        if _epoch_is_over(state):
            fit_loop.epoch_loop.restarting = False
            fit_loop.epoch_loop.reset_restart_stage()
        elif _only_epoch_end_left(state):
            fit_loop.epoch_loop.val_loop._has_run = True  # nothing left to do in the loop over batches
        if state["place"] == _EPOCH_END and state["epoch_complete"]:
            _step_plateau_schedules(trainer, state["epoch"])

    def _leave_resumed_epoch(self, trainer: pl.Trainer) -> None:
        """Lightning does this at the end of the first step, which a resumed epoch without any does not have."""
        trainer.fit_loop.epoch_loop.restarting = False
        trainer.fit_loop.epoch_loop.reset_restart_stage()
        self._resumed = None


def _validation_due(trainer: pl.Trainer) -> bool:
    """Does a validation follow the current batch by its number, not because training is to stop?"""
    fit_loop = trainer.fit_loop
    by_the_clock = getattr(trainer, "_val_check_time_interval", None) is not None
    if fit_loop._data_fetcher is None or by_the_clock or _batch_in_hand(trainer):
        return False
    should_stop, trainer.should_stop = trainer.should_stop, False
    try:
        return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
    finally:
        trainer.should_stop = should_stop


def _row_to_come(trainer: pl.Trainer) -> dict[str, Any]:
    """What Lightning gives to the loggers after the hook at the end of a step; a kill may come before."""
    if not trainer._logger_connector.should_update_logs:
        return {}
    values = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}
    return {"epoch": trainer.current_epoch, "step": trainer.fit_loop.epoch_loop._batches_that_stepped, **values}


def _epoch_complete(trainer: pl.Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop
    return not _batch_in_hand(trainer) and loop._num_ready_batches_reached()


def _batch_in_hand(trainer: pl.Trainer) -> bool:
    """Was a batch fetched that is not trained on? Lightning's counters then speak of that one."""
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    return current.ready != current.processed


def _find_best(state: dict[str, Any], folder: Path, resumed: Path) -> None:
    """Bring a ModelCheckpoint's state in line with the files that are there.

    A run directory may have been moved; Lightning would start to compare anew. And the killed run may have deleted the
    best file for a better one, which this run will find again.
    """
    if resumed.resolve().parent == folder.resolve():
        state["dirpath"] = str(folder)
        state["best_k_models"] = {str(folder / Path(p).name): score for p, score in state["best_k_models"].items()}
        for name in ("best_model_path", "kth_best_model_path"):
            state[name] = state[name] and str(folder / Path(state[name]).name)
    state["best_k_models"] = {path: score for path, score in state["best_k_models"].items() if Path(path).exists()}
    if not Path(state["best_model_path"]).is_file():
        state.update(best_model_path="", best_model_score=None)


def _stopped_early(trainer: pl.Trainer) -> bool:
    """Does an EarlyStopping callback, as now configured, have a reason to stop?"""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            exhausted = callback.wait_count >= callback.patience
            reason = callback.stopping_reason
            if exhausted or reason not in (EarlyStoppingReason.NOT_STOPPED, EarlyStoppingReason.PATIENCE_EXHAUSTED):
                return True
    return False


def _epoch_is_over(state: dict[str, Any]) -> bool:
    return state["place"] == _EPOCH_START or (state["place"] in (_EPOCH_END, _ENDED) and state["epoch_complete"])


def _only_epoch_end_left(state: dict[str, Any]) -> bool:
    return state["place"] == _STEP and state["epoch_complete"] and not state["validation_due"]


def _corrected(checkpoint: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Loop counters from which Lightning goes on at the place where the checkpoint was written."""
    loops = dict(checkpoint["loops"]["fit_loop"])
    place, due, complete = state["place"], state["validation_due"], state["epoch_complete"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    begun = epochs["total"]["ready"]
    logged = 0  # steps by which Lightning's count for the loggers is behind
    if _epoch_is_over(state):
        done = begun - 1 if place == _EPOCH_START else begun
        epochs = _counters(epochs, ready=done, started=done, processed=done, completed=done)
    elif begun:
        epochs = _counters(epochs, ready=begun, started=begun, processed=begun - 1, completed=begun - 1)

    if place != _STEP or due or complete:
        batches = _all_completed(batches)
    # The batch too many, see below, stays in the totals of a validation that was repeated.
    val = _all_completed(loops["epoch_loop.val_loop.batch_progress"])
    if place in (_STEP, _VALIDATION) and due:
        # Lightning reads this as a validation that stopped in its first batch, and runs it again.
        before = val["total"]["ready"]
        val = {
            **val,
            "total": {"ready": before + 1, "started": before + 1, "processed": before, "completed": before},
            "current": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
            "is_last_batch": False,
        }
    elif _only_epoch_end_left(state) or (place in (_VALIDATION, _VALIDATED) and not due):
        logged = 1  # counted after the validation, or with the next step, which Lightning will not do here
    elif place in (_EPOCH_END, _ENDED) and not complete and due:
        logged = -1  # Lightning counts it when it passes over the validation
    counted = loops["epoch_loop.state_dict"]["_batches_that_stepped"]
    loops["epoch_loop.state_dict"] = {
        **loops["epoch_loop.state_dict"],
        "_batches_that_stepped": counted + logged,
    }
    loops["epoch_loop.val_loop.batch_progress"] = val
    loops["epoch_progress"], loops["epoch_loop.batch_progress"] = epochs, batches
    return loops


def _recounted(loops: dict[str, Any], before: int, now: int, *, complete: bool) -> dict[str, Any]:
    """The counters of batches, in batches of another size; windows of accumulation then begin where they did.

    A complete epoch stays complete: it counts as many as it can have had, what is left out at its end included.
    """
    if before == now:
        return loops
    progress = loops["epoch_loop.batch_progress"]
    total = {name: count * before // now for name, count in progress["total"].items()}
    rest = before - 1 if complete else 0
    current = {name: count and (count * before + rest) // now for name, count in progress["current"].items()}
    return {**loops, "epoch_loop.batch_progress": {**progress, "total": total, "current": current}}


def _counters(progress: dict[str, Any], **values: int) -> dict[str, Any]:
    return {**progress, "total": dict(values), "current": dict(values)}


def _all_completed(progress: dict[str, Any]) -> dict[str, Any]:
    """Nothing is under way; a batch that was fetched but not trained on does not count."""
    total, current = progress["total"]["processed"], progress["current"]["processed"]
    return {
        "total": dict.fromkeys(progress["total"], total),
        "current": dict.fromkeys(progress["current"], current),
        "is_last_batch": progress["is_last_batch"] and progress["current"]["ready"] == current,
    }


def _step_plateau_schedules(trainer: pl.Trainer, epoch: int) -> None:
    """What Lightning does last in an epoch, after the hook in which the checkpoint was written."""
    metrics: dict[str, Tensor] = dict(trainer.callback_metrics)
    for config in trainer.lr_scheduler_configs:
        due = config.reduce_on_plateau and config.interval == "epoch" and (epoch + 1) % config.frequency == 0
        if due and config.monitor in metrics:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, metrics[config.monitor])
