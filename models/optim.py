"""From the plain `optim` section to a torch optimiser and its learning-rate schedule.

Two decisions: names are those of torch.optim in lower case, so there is no list of ours to keep; and both sections
are flat (one key has one meaning whichever optimiser or schedule is chosen), so that a switch is one override:
`model.optim.name=sgd`, `model.optim.sched.name=cosine`.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from models.muon import Muon

log = logging.getLogger(__name__)

SCHEDULES = (None, "none", "halving", "plateau", "cosine")
# Keys that belong to some optimisers only: without effect, not wrong, when another one is chosen.
_FAMILY_KEYS = {"betas", "eps", "momentum", "nesterov", "fused"}
# How a step is computed, which depends on where the parameters are.
_IMPLEMENTATION_KEYS = {"fused", "foreach", "capturable"}
_SCHED_LIMITS = {
    "factor": (0, 0.999),
    "patience": (0, math.inf),
    "min_lr": (0, math.inf),
    "warmup_steps": (0, math.inf),
}
_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")


def check_optim(optim: dict[str, Any]) -> None:
    """Raises ValueError for what `build_optimizer` or `build_schedule` would refuse, before there are parameters."""
    factory, options = _factory_and_options(optim)
    defaults = {name: parameter.default for name, parameter in inspect.signature(factory).parameters.items()}
    for key in (key for key in _NOT_NEGATIVE if key in options and is_number(defaults[key])):
        if not (is_number(options[key]) and options[key] >= 0):
            raise ValueError(f"model.optim.{key} must be a number of at least 0, got {options[key]!r}")
    betas = options.get("betas", (0.0, 0.0))
    pair = isinstance(betas, list | tuple) and len(betas) == 2
    if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"model.optim.betas must be two numbers from 0 to below 1, got {betas!r}")
    try:  # what only the class itself knows, on a parameter that nobody needs
        factory(
            [nn.Parameter(torch.zeros(1))],
            **{key: value for key, value in options.items() if key not in _IMPLEMENTATION_KEYS},
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.optim: {factory.__name__} refuses its values ({error})") from error
    sched = optim.get("sched") or {}
    known = set(inspect.signature(build_schedule).parameters) - {"optimizer", "total_steps"}
    if wrong := sorted(set(sched) - known):
        raise ValueError(f"model.optim.sched has no {', '.join(wrong)}; it has {', '.join(sorted(known))}")
    if sched.get("name") not in SCHEDULES:
        raise ValueError(_no_such_schedule(sched.get("name")))
    for key, (least, most) in _SCHED_LIMITS.items():
        if key in sched and not (is_number(sched[key]) and least <= sched[key] <= most):
            limits = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
            raise ValueError(f"model.optim.sched.{key} must be a number {limits}, got {sched[key]!r}")
    if sched.get("name") == "cosine" and options.get("lr") == 0:
        raise ValueError("model.optim.lr=0 has no cosine schedule; give it a value, or model.optim.sched.name=none")


def build_optimizer(parameters: Iterable[nn.Parameter], optim: dict[str, Any]) -> Optimizer:
    """The optimiser that `optim` names, over the given parameters.

    *optim*: `{name, lr, …, sched}`; keys that are null keep torch's default.

    Raises ValueError for an unknown name and for keys that no optimiser of that name takes, all at once.
    """
    factory, options = _factory_and_options(optim)
    return factory(parameters, **options)


def is_number(value: Any) -> bool:
    """Whether a value that was typed is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _factory_and_options(optim: dict[str, Any]) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    factory = _optimizer_class(str(optim.get("name") or "adam"))
    options = {key: value for key, value in optim.items() if key not in ("name", "sched") and value is not None}
    known = set(inspect.signature(factory).parameters) - {"params"}
    unknown = set(options) - known
    if wrong := sorted(unknown - _FAMILY_KEYS):
        raise ValueError(
            f"model.optim: {factory.__name__} has no {', '.join(wrong)}; it has {', '.join(sorted(known))}"
        )
    if unknown:
        log.debug("model.optim: %s has no %s: without effect", factory.__name__, ", ".join(sorted(unknown)))
    return factory, {key: value for key, value in options.items() if key in known}


def _optimizer_class(name: str) -> Callable[..., Optimizer]:
    if name.lower() == "adam8bit":
        try:
            from bitsandbytes.optim import Adam8bit  # type: ignore[import-not-found]
        except ImportError:
            raise ValueError("model.optim.name=adam8bit needs a package: pip install bitsandbytes") from None
        return Adam8bit
    if name.lower() == "muon":
        return Muon  # not torch's, which takes matrices only
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if name.lower() not in classes:
        choices = ", ".join([*sorted(classes), "adam8bit"])
        raise ValueError(f"model.optim.name={name}: no such optimiser; choose from {choices}")
    return classes[name.lower()]


def build_schedule(
    optimizer: Optimizer,
    total_steps: float,
    *,
    name: str | None = None,
    monitor: str = "val_loss",
    mode: str = "min",
    factor: float = 0.5,
    patience: int = 3,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
) -> dict[str, Any] | None:
    """Lightning's description of a schedule, or None for a constant rate.

    * `none`: constant.
    * `halving` (also `plateau`): the rate times `factor` once `monitor` has not improved for `patience` epochs with
      validation, never below `min_lr`.
    * `cosine`: linear warm-up over `warmup_steps`, then half a cosine down to `min_lr` at `total_steps` (optimiser
      steps of the whole run).

    Raises ValueError for an unknown name and for a cosine over a run without an end.
    """
    if name in (None, "none"):
        return None
    if name in ("halving", "plateau"):
        plateau = ReduceLROnPlateau(optimizer, mode=mode, factor=factor, patience=patience, min_lr=min_lr)  # type: ignore[arg-type]
        # Not strict: epochs that end before the first validation have nothing to compare.
        return {"scheduler": plateau, "monitor": monitor, "interval": "epoch", "strict": False}
    if name == "cosine":
        if not 0 < total_steps < math.inf:
            raise ValueError("model.optim.sched.name=cosine needs an end: set trainer.max_steps or trainer.max_epochs")
        floor = min_lr / optimizer.param_groups[0]["lr"]

        def relative_rate(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

        return {"scheduler": LambdaLR(optimizer, relative_rate), "interval": "step"}
    raise ValueError(_no_such_schedule(name))


def _no_such_schedule(name: str | None) -> str:
    return f"model.optim.sched.name={name}: no such schedule; choose from none, halving, cosine"
