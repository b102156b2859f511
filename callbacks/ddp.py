"""Distributed data parallel that switches itself on when there is more than one device."""

import logging
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.modules.batchnorm import _BatchNorm

log = logging.getLogger(__name__)

DDP_NAMES: dict[str, dict[str, Any]] = {
    name + suffix: {"start_method": start_method, **unused}
    for name, start_method in (("ddp", "popen"), ("ddp_spawn", "spawn"), ("ddp_fork", "fork"))
    for suffix, unused in (
        ("", {}),
        ("_find_unused_parameters_true", {"find_unused_parameters": True}),
        ("_find_unused_parameters_false", {"find_unused_parameters": False}),
    )
}
"""What `trainer.strategy` may be for DDP, and the arguments of DDPStrategy that each name stands for."""


class AutoDDP(pl.Callback):
    """Asks for `trainer.strategy` and `trainer.sync_batchnorm`, which win when they are set.

    A strategy that is set to one of DDP's names is given with the options of this callback.

    *enabled*: `auto` (with more than one process) or false. *static_graph*: `auto` takes the system's own attribute
    `static_graph`. *sync_batchnorm*: `auto` means on GPUs, where the system has batch norm.
    """

    completes = ("strategy",)
    """Of the Trainer's arguments, those that this callback answers with what is set, in full."""

    def __init__(
        self,
        *,
        enabled: bool | str = "auto",
        gradient_as_bucket_view: bool = True,
        static_graph: bool | str = "auto",
        sync_batchnorm: bool | str = "auto",
    ) -> None:
        for name, value in (
            ("enabled", enabled),
            ("static_graph", static_graph),
            ("sync_batchnorm", sync_batchnorm),
        ):
            if value not in ("auto", True, False):
                raise ValueError(f"{name}={value}: choose auto, true or false")
        self.enabled = enabled
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.static_graph = static_graph
        self.sync_batchnorm = sync_batchnorm

    def trainer_kwargs(self, *, system: pl.LightningModule, trainer: dict[str, Any]) -> dict[str, Any]:
        """The Trainer arguments this callback asks for, given the resolved `trainer` section."""
        devices = trainer["devices"]
        processes = (len(devices) if isinstance(devices, list) else int(devices)) * int(trainer["num_nodes"])
        chosen = trainer.get("strategy") or "auto"
        if self.enabled is False or (processes < 2 and chosen == "auto"):
            return {}
        asked: dict[str, Any] = {}
        if (options := DDP_NAMES.get("ddp" if chosen == "auto" else chosen)) is None:
            log.info("callbacks.ddp stands back: trainer.strategy=%s is set", chosen)
        else:
            static = getattr(system, "static_graph", False) if self.static_graph == "auto" else self.static_graph
            static = bool(static) and not options.get("find_unused_parameters")
            asked["strategy"] = DDPStrategy(
                gradient_as_bucket_view=self.gradient_as_bucket_view, static_graph=static, **options
            )
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in system.modules())
        wanted = has_batch_norm if self.sync_batchnorm == "auto" else self.sync_batchnorm
        if wanted and trainer["accelerator"] == "cuda" and processes > 1:
            asked["sync_batchnorm"] = True
        return asked
