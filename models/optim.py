"""From the plain `optim` section to a torch optimiser and its learning-rate schedule.

Two decisions: names are those of torch.optim in lower case, so there is no list of ours to keep; and both sections
are flat (one key has one meaning whichever optimiser or schedule is chosen), so that a switch is one override:
`model.optim.name=sgd`, `model.optim.sched.name=cosine`. NeMo's spellings of schedules are taken too.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from models.muon import Muon

log = logging.getLogger(__name__)

_SCHEDULES = {
    None: None,
    "none": None,
    "halving": "halving",
    "plateau": "halving",
    "cosine": "cosine",
    "CosineAnnealing": "cosine",
    "noam": "noam",
    "NoamAnnealing": "noam",
}
ADAM8BIT_REQUIREMENT = "bitsandbytes==0.50.2"
# Keys of the section that no optimiser takes.
SECTION_KEYS = ("name", "sched", "scale_lr_with_batch", "scale_lr_rule")
RULES = {"linear": 1.0, "sqrt": 0.5}  # exponent of the ratio of two batches
# Keys that belong to some optimisers only: without effect, not wrong, when another one is chosen.
_FAMILY_KEYS = {"betas", "eps", "momentum", "nesterov", "fused", "foreach"}
# How a step is computed, which depends on where the parameters are.
_IMPLEMENTATION_KEYS = {"fused", "foreach", "capturable"}
_SCHED_LIMITS = {
    "factor": (0, 0.999),
    "patience": (0, math.inf),
    "min_lr": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "warmup_ratio": (0, 1),
    "d_model": (1, math.inf),
}
_MAY_BE_NULL = {"warmup_steps", "warmup_ratio", "d_model"}
_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")


def check_optim(optim: dict[str, Any]) -> None:
    """Raises ValueError for what `build_optimizer` or `build_schedule` would refuse, before there are parameters."""
    factory, options = _factory_and_options(optim)
    lr_scale(optim, 1)
    defaults = {name: parameter.default for name, parameter in inspect.signature(factory).parameters.items()}
    for key in (key for key in _NOT_NEGATIVE if key in options and is_number(defaults[key])):
        if not (is_number(options[key]) and options[key] >= 0):
            raise ValueError(f"model.optim.{key} must be a number of at least 0, got {options[key]!r}")
    betas = options.get("betas", (0.0, 0.0))
    pair = isinstance(betas, list | tuple) and len(betas) == 2
    if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"model.optim.betas must be two numbers from 0 to below 1, got {betas!r}")
    for key in ("fused", "foreach"):
        if not isinstance(optim.get(key), bool | None):
            raise ValueError(f"model.optim.{key} must be true, false or null, got {optim[key]!r}")
    if optim.get("fused") and optim.get("foreach"):
        raise ValueError("model.optim.fused=true beside model.optim.foreach=true: leave one of them out")
    try:  # what only the class itself knows, on a parameter that nobody needs
        factory(
            [nn.Parameter(torch.zeros(1))],
            **{key: value for key, value in options.items() if key not in _IMPLEMENTATION_KEYS},
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.optim: {factory.__name__} refuses its values ({error})") from error
    _check_schedule(optim.get("sched") or {}, options.get("lr", defaults.get("lr")))


def _check_schedule(sched: dict[str, Any], lr: Any) -> None:
    known = set(inspect.signature(build_schedule).parameters) - {"optimizer", "total_steps"}
    if wrong := sorted(set(sched) - known):
        raise ValueError(f"model.optim.sched has no {', '.join(wrong)}; it has {', '.join(sorted(known))}")
    family = _family(sched.get("name"))
    for key, (least, most) in _SCHED_LIMITS.items():
        if key not in sched or (sched[key] is None and key in _MAY_BE_NULL):
            continue
        if not (is_number(sched[key]) and least <= sched[key] <= most):
            limits = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
            raise ValueError(f"model.optim.sched.{key} must be a number {limits}, got {sched[key]!r}")
    if family == "cosine" and lr == 0:
        raise ValueError("model.optim.lr=0 has no cosine schedule; give it a value, or model.optim.sched.name=none")
    if family in ("cosine", "noam"):
        _check_warmup(sched.get("warmup_steps"), sched.get("warmup_ratio"))
        _lowest_share(lr, sched.get("min_lr", 0.0))
    if family == "noam":
        _check_width(sched.get("d_model"))


def build_optimizer(parameters: Iterable[nn.Parameter] | list[dict[str, Any]], optim: dict[str, Any]) -> Optimizer:
    """The optimiser that `optim` names, over the given parameters, or over groups of them (`parameter_groups`).

    *optim*: `{name, lr, …, sched}`; keys that are null keep torch's default.

    Raises ValueError for an unknown name and for keys that no optimiser of that name takes, all at once.
    """
    factory, options = _factory_and_options(optim)
    optimizer = factory(parameters, **options)
    # A fused one would take fp16's scale off the gradients within its step, and nothing could clip them before.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def parameter_groups(
    module: nn.Module, groups: dict[str, dict[str, Any]], optim: dict[str, Any]
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """What *module* trains, for `build_optimizer`: the children that *groups* names with values of their own.

    *groups*: child -> values that take the place of those in *optim*, such as `{encoder: {lr: 1.0}}`; NeMo's
    `optim_param_groups`. All else is the first group; without any the answer is a list of parameters.

    Raises ValueError for a child that is not there or has nothing to train, and for values that `optim` may not have.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not groups:
        return trained
    key = "model.optim_param_groups"
    if _optimizer_class(str(optim.get("name") or "adam")) is Muon:
        raise ValueError(f"{key}: muon makes groups of its own; choose another model.optim.name, or none of these")
    children, rest, found = dict(module.named_children()), {id(p): p for p in trained}, []
    for name, values in groups.items():
        if name not in children:
            raise ValueError(f"{key}.{name}: no such part of the model; choose from {', '.join(children)}")
        if not isinstance(values, dict) or set(SECTION_KEYS) & set(values):
            raise ValueError(f"{key}.{name} must be values for its parameters, such as {{lr: 0.1}}, got {values!r}")
        try:
            check_optim({**optim, **values})
            options = _factory_and_options({"name": optim.get("name"), **values})[1]
        except ValueError as error:
            raise ValueError(f"{key}.{name}: {error}") from error
        own = [rest.pop(id(p)) for p in children[name].parameters() if id(p) in rest]
        if not own:
            raise ValueError(f"{key}.{name} has no parameters to train that are not in another group")
        found.append({"params": own, **options})
    return [{"params": list(rest.values())}, *found] if rest else found


def lr_scale(optim: dict[str, Any], batch_size: int) -> float:
    """What rates are multiplied by for *batch_size* examples a step, where `scale_lr_with_batch` says for how many they
    are meant; 1 where it is null.

    `scale_lr_rule`: `linear` is the ratio of the two, of Goyal et al., "Accurate, large minibatch SGD", 2017,
    arXiv:1706.02677; `sqrt` its root, which keeps the variance of Adam's steps.

    Raises ValueError for what is no number of examples, and for another rule.
    """
    meant, rule = optim.get("scale_lr_with_batch"), optim.get("scale_lr_rule") or "linear"
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"model.optim.scale_lr_rule must be one of {', '.join(RULES)}, got {rule!r}")
    if meant is None:
        return 1.0
    if not isinstance(meant, int) or isinstance(meant, bool) or meant < 1:
        raise ValueError(f"model.optim.scale_lr_with_batch must be null or a whole number of examples, got {meant!r}")
    return (batch_size / meant) ** RULES[rule]


def is_number(value: Any) -> bool:
    """Whether a value that was typed is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _factory_and_options(optim: dict[str, Any]) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    factory = _optimizer_class(str(optim.get("name") or "adam"))
    options = {key: value for key, value in optim.items() if key not in SECTION_KEYS and value is not None}
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
            line = f"model.optim.name=adam8bit needs a package: pip install {ADAM8BIT_REQUIREMENT}"
            raise ValueError(line) from None
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
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    d_model: int | None = None,
) -> dict[str, Any] | None:
    """Lightning's description of a schedule, or None for a constant rate.

    * `none`: constant.
    * `halving` (also `plateau`): the rate times `factor` once `monitor` has not improved for `patience` epochs with
      validation, never below `min_lr`.
    * `cosine` (also `CosineAnnealing`): linear warm-up over `warmup_steps`, then half a cosine down to `min_lr` at
      `total_steps` (optimiser steps of the whole run).
    * `noam` (also `NoamAnnealing`): see `noam_share`; after the warm-up never below `min_lr`.

    `warmup_ratio` gives the warm-up as a share of `total_steps` instead.

    Raises ValueError for an unknown name, for what needs an end over a run without one, and for values that do not go
    together.
    """
    family = _family(name)
    if family is None:
        return None
    if family == "halving":
        plateau = ReduceLROnPlateau(optimizer, mode=mode, factor=factor, patience=patience, min_lr=min_lr)  # type: ignore[arg-type]
        # Not strict: epochs that end before the first validation have nothing to compare.
        return {"scheduler": plateau, "monitor": monitor, "interval": "epoch", "strict": False}
    _check_warmup(warmup_steps, warmup_ratio)
    needy = f"name={name}" if family == "cosine" else "warmup_ratio" if warmup_ratio is not None else None
    if needy and not 0 < total_steps < math.inf:
        raise ValueError(f"model.optim.sched.{needy} needs an end: set trainer.max_steps or trainer.max_epochs")
    warmup = warmup_steps or 0 if warmup_ratio is None else int(warmup_ratio * total_steps)

    def share(step: int, floor: float) -> float:
        if family == "noam":
            value = noam_share(step, d_model=_check_width(d_model), warmup_steps=warmup)
            return value if step <= warmup else max(value, floor)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    floors = [_lowest_share(group["lr"], min_lr) for group in optimizer.param_groups]
    scheduler = LambdaLR(optimizer, [partial(share, floor=floor) for floor in floors])
    return {"scheduler": scheduler, "interval": "step"}


def noam_share(step: int, *, d_model: int, warmup_steps: int) -> float:
    """The share of the rate at a step, d_model^-0.5 min(s^-0.5, s warmup^-1.5) with s the step, at least 1.

    Vaswani et al., "Attention is all you need", 2017, equation 3, with steps counted as NeMo does: from 0, so that the
    first two have one rate. Without a warm-up it falls from the start.
    """
    s = max(1, step)
    rise = s * warmup_steps**-1.5 if warmup_steps > 0 else math.inf
    return d_model**-0.5 * min(s**-0.5, rise)


def _family(name: str | None) -> str | None:
    if not (name is None or isinstance(name, str)) or name not in _SCHEDULES:
        choices = "none, halving, cosine, noam (NeMo's CosineAnnealing, NoamAnnealing)"
        raise ValueError(f"model.optim.sched.name={name}: no such schedule; choose from {choices}")
    return _SCHEDULES[name]


def _check_warmup(warmup_steps: float | None, warmup_ratio: float | None) -> None:
    if warmup_steps is not None and warmup_ratio is not None:
        both = f"warmup_steps={warmup_steps} and warmup_ratio={warmup_ratio}"
        raise ValueError(f"model.optim.sched has {both}: set one of them to null")


def _check_width(d_model: int | None) -> int:
    if d_model is None:
        raise ValueError("model.optim.sched.d_model is missing: NoamAnnealing needs the width of the encoder")
    return d_model


def _lowest_share(lr: float, min_lr: float) -> float:
    if lr < min_lr:
        raise ValueError(f"model.optim.lr={lr} is below model.optim.sched.min_lr={min_lr}")
    return min_lr / lr if min_lr else 0.0
