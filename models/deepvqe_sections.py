"""DeepVQE's nested sections, `align` and `loss`: their keys, defaults and limits, and how they are typed."""

from typing import Any

from models.optim import is_number

ALIGN = {"hidden_channels": 32, "max_delay_ms": 1000.0, "scale": True, "temperature": 1.0, "mask_start": False}
LOSS = {
    "compression": 0.3,
    "complex_weight": 0.3,
    "si_snr_weight": 0.0,
    "snr_weight": 0.0,
    "delay_weight": 0.0,
    "echo_weight": 0.0,
}
_LIMITS = {"max_delay_ms": (1, 60_000), "temperature": (1e-6, 1e6), "compression": (0.01, 1), "complex_weight": (0, 1)}
_LIMITS |= {key: (0, 1e6) for key in LOSS if key.endswith("_weight") and key != "complex_weight"}
_TYPED = {"align_hidden": "align.hidden_channels"} | {f"align_{key}": f"align.{key}" for key in ALIGN}


def section(name: str, given: dict[str, Any] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """A nested section with its defaults. Raises ValueError for a key that it does not have, or a wrong number."""
    if unknown := sorted(set(given or {}) - set(defaults)):
        raise ValueError(f"model.{name} has no {', '.join(unknown)}; it has {', '.join(defaults)}")
    values = defaults | (given or {})
    for key, (least, most) in _LIMITS.items():
        if key in values and not (is_number(values[key]) and least <= values[key] <= most):
            raise ValueError(f"model.{name}.{key}={values[key]}: give a number from {least:g} to {most:g}")
    return values


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _as_typed(value: Any) -> str:
    """As it is typed on a command line."""
    return str(value).replace(" ", "").lower() if isinstance(value, bool | list) else str(value)


def check_foreign(own: dict[str, Any], align: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What weights of another implementation leave open, as `key=value` of this system's.

    *own*, *align*: this system's arguments. *theirs*: those that the weights tell. Raises ValueError that says what to
    type where they differ.
    """
    own = own | {f"align_{key}": value for key, value in align.items()} | {"align_hidden": align["hidden_channels"]}
    wrong = {key: value for key, value in theirs.items() if key in own and _as_list(own[key]) != value}
    if wrong:
        typed = " ".join(f"model.{_TYPED.get(key, key)}={_as_typed(value)}" for key, value in wrong.items())
        raise ValueError(f"weights of another network; set {typed}")
    unknown = [f"{key}={own[key]}" for key in ("stft", "window", "compression")]
    return unknown + [f"{_TYPED[key]}={own[key]}" for key in ("align_max_delay_ms", "align_temperature")]
