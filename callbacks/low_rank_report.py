"""What a switch to low rank changed: in the log, in TensorBoard, and for summary.json."""

import logging
from typing import Any

import pytorch_lightning as pl
from torch import nn

from modules.rank_choice import Choice

log = logging.getLogger("low_rank")

_WHEN = ("before", "after")


class LowRankReport:
    """Before and after each switch. `content`: a list of plain values, one dict for each.

    Keys: `epoch`, `step`, `layers` (name -> rank, full, energy, stable_rank), `dense` (name -> reason), and each with
    `_before` and `_after`: `parameters` of the system, `flops` of one batch's forward pass, `step_s` (seconds of a
    training step, over the monitor's last window), `metric` (of `monitor`, the best checkpoint's; the next validation's
    after the switch).
    """

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []

    def begin(self, trainer: pl.Trainer, system: nn.Module, chosen: dict[str, Choice], *, flops: int) -> None:
        """Right before a switch."""
        for name, choice in chosen.items():
            log.info("  %s: %s", name, choice.described())
        numbers = ("rank", "full", "energy", "stable_rank")
        switched = {name: choice for name, choice in chosen.items() if choice.rank}
        self.content.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "layers": {name: {key: getattr(choice, key) for key in numbers} for name, choice in switched.items()},
                "dense": {name: choice.reason for name, choice in chosen.items() if not choice.rank},
                "parameters_before": _num_parameters(system),
                "flops_before": flops,
                "step_s_before": _metric(trainer, "step_s"),
                "monitor": _monitored(trainer),
                "metric_before": _metric(trainer, _monitored(trainer)),
            }
        )

    def end(self, trainer: pl.Trainer, system: nn.Module, *, flops: int) -> None:
        """Right after it."""
        switch = self.content[-1]
        switch |= {"parameters_after": _num_parameters(system), "flops_after": flops}
        log.info(
            "epoch %d, step %d: %d layers switched to low rank, %d stay dense; parameters %s -> %s, forward FLOPs of a"
            " batch %.3g -> %.3g",
            switch["epoch"],
            switch["step"],
            len(switch["layers"]),
            len(switch["dense"]),
            f"{switch['parameters_before']:,}",
            f"{switch['parameters_after']:,}",
            switch["flops_before"],
            switch["flops_after"],
        )
        self._to_loggers(trainer, "parameters", "flops", step=trainer.global_step, layers=len(switch["layers"]))

    def follow_up(self, trainer: pl.Trainer) -> None:
        """At the end of a validation, and of training: what the last switch led to."""
        if not self.content or trainer.global_step <= self.content[-1]["step"]:
            return
        switch = self.content[-1]
        switch["step_s_after"] = _metric(trainer, "step_s")
        if "metric_after" not in switch:
            switch["metric_after"] = _metric(trainer, switch["monitor"])
            before, after = (_written(switch[f"metric_{when}"]) for when in _WHEN)
            log.info("%s before the switch %s, after it %s", switch["monitor"], before, after)
            self._to_loggers(trainer, "metric", step=trainer.global_step - 1)

    def close(self, trainer: pl.Trainer) -> None:
        """At the end of training."""
        self.follow_up(trainer)
        if self.content and self.content[-1].get("step_s_after") is not None:
            before, after = (_written(self.content[-1][f"step_s_{when}"]) for when in _WHEN)
            log.info("seconds of a step before the switch %s, after it %s", before, after)
            self._to_loggers(trainer, "step_s", step=trainer.global_step - 1)

    def _to_loggers(self, trainer: pl.Trainer, *names: str, step: int, **more: float) -> None:
        """What is known of the last switch, as `low_rank_<name>_before` and `_after`."""
        keys = [f"{name}_{when}" for name in names for when in _WHEN]
        values = {key: value for key in keys if (value := self.content[-1].get(key)) is not None} | more
        for logger in trainer.loggers:
            logger.log_metrics({f"low_rank_{key}": float(value) for key, value in values.items()}, step=step)

    def state_dict(self) -> dict[str, Any]:
        return {"content": [dict(switch) for switch in self.content]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.content = [dict(switch) for switch in state_dict["content"]]


def _num_parameters(system: nn.Module) -> int:
    return sum(parameter.numel() for parameter in system.parameters())


def _monitored(trainer: pl.Trainer) -> str:
    """The metric by which the best checkpoint is chosen; the training loss where none is."""
    names = [getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks]
    return next((name for name in names if name), "train_loss")


def _metric(trainer: pl.Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def _written(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"
