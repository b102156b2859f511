"""Parameters that no gradient reaches: named once, in training on one device and in the error that DDP ends with.

Such a parameter stays as it was drawn, which is hardly ever meant. Several processes wait for its gradient, and torch
ends the run at the second step with a list of numbers.
"""

import logging
import re

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer

from callbacks.failures import listed

log = logging.getLogger("unused_parameters")

_NAMED = 20  # parameters named in a line
_NOT_REDUCED = "Expected to have finished reduction in the prior iteration"  # torch's words
_INDICES = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")


class UnusedParameters(pl.Callback):
    """Warns at the first optimiser step of trainable parameters without a gradient; again after layers were replaced.

    With several processes and a strategy that does not allow for such parameters, torch's error gets their names.
    """

    def __init__(self) -> None:
        self._found: list[str] = []
        self._told = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._found, self._told = [], False

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._told:  # here, since other callbacks may take gradients away before the step
            self._found = without_gradient(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._found and not self._told:
            level = logging.WARNING if trainer.is_global_zero else logging.INFO
            log.log(level, "no gradient reaches %s", _listed(self._found))
        self._told = True

    def layers_replaced(self, trainer: pl.Trainer, system: nn.Module, replaced: object) -> None:
        """The new layers have parameters of their own."""
        self._told = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if _NOT_REDUCED not in str(exception):
            return
        trainable = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        numbers = _INDICES.search(str(exception))
        names = [trainable[int(number)] for number in numbers[1].split()] if numbers else self._found
        exception.args = (
            f"no gradient reaches {_listed(names)}: freeze them (requires_grad_(False)),"
            " or set trainer.strategy=ddp_find_unused_parameters_true",
        )


def without_gradient(system: nn.Module) -> list[str]:
    """Names of the trainable parameters without a gradient, of those that this process holds anything of."""
    parameters = system.named_parameters()
    return [name for name, p in parameters if p.requires_grad and p.grad is None and p.numel()]


def _listed(names: list[str]) -> str:
    return listed(names, most=_NAMED, none="some parameters", kind="parameters")
