"""Options of predict.py: are those that were typed options of the system, and of the kind that it declares?"""

import inspect
import math
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from launch.errors import ConfigError
from models.base import System


class _Kind(NamedTuple):
    """What a value has to be, in words for one and for several, and whether one is."""

    one: str
    several: str
    fits: Callable[[Any], bool]


def checked_options(system: System, options: dict[str, Any]) -> dict[str, Any]:
    """The options as `System.predict` takes them; numbers where it wants text, such as precision=16, become text.

    Raises ConfigError naming each that it does not have, or whose value is of another kind than its parameter declares
    (where nothing is declared: than its default; null then stands for a number).
    """
    parameters = inspect.signature(system.predict, eval_str=True).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    known = {name: p for name, p in parameters.items() if name not in (*system.inputs, "sample_rate")}
    problems, taken = [], dict(options)
    for name, value in options.items():
        if name not in known:
            problems.append(f"{name}: {type(system).__name__} has no such option; it has {', '.join(known) or 'none'}")
            continue
        kind = _kind(_declared(known[name]))
        if kind is _TEXT and _WHOLE.fits(value):
            taken[name] = str(value)
        elif not kind.fits(value):
            problems.append(f"{name} must be {kind.one}, got {value!r}")
    if problems:
        raise ConfigError("\n".join(problems))
    return taken


def default_options(system: type[System]) -> dict[str, Any]:
    """What `System.predict` does when nothing is typed, of those values that can be typed: for a checkpoint whose
    configuration does not have the option yet, and for an archive, which has none.
    """
    parameters = inspect.signature(system.predict).parameters.values()
    own = {p.name: _default(p) for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "sample_rate"}
    return {name: value for name, value in own.items() if _is_plain(value)}


def described(system: System, options: dict[str, Any]) -> str:
    """The options that differ from their defaults, as typed: `chunk_s=2, overlap_s=3`."""
    parameters = inspect.signature(system.predict).parameters
    own = {
        name: value for name, value in options.items() if name not in parameters or value != _default(parameters[name])
    }
    return ", ".join(f"{name}={_typed(value)}" for name, value in own.items())


def _default(parameter: inspect.Parameter) -> Any:
    return list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if value is None or isinstance(value, bool):  # 1 == True
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _declared(parameter: inspect.Parameter) -> Any:
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    return float | None if parameter.default is None else type(parameter.default)


def _kind(hint: Any) -> _Kind:
    """Of the values that a type hint stands for."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [_kind(part) for part in inner]
        one, several = (" or ".join(words) for words in zip(*((k.one, k.several) for k in kinds), strict=True))
        return _Kind(one, several, lambda value: any(kind.fits(value) for kind in kinds))
    if origin is Literal:
        words = f"one of {', '.join(map(str, inner))}"
        return _Kind(words, words, lambda value: value in inner)
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        item = _kind(inner[0]) if inner else _ANY
        words = f"a list of {item.several}"
        return _Kind(words, words, lambda value: isinstance(value, list | tuple) and all(map(item.fits, value)))
    return _KINDS.get(hint, _ANY)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_ANY = _Kind("anything", "things", lambda value: True)
_TEXT = _Kind("text", "names", lambda value: isinstance(value, str))
_WHOLE = _Kind("a whole number", "whole numbers", lambda v: isinstance(v, int) and not isinstance(v, bool))
_KINDS = {
    NoneType: _Kind("null", "null", lambda value: value is None),
    bool: _Kind("true or false", "true or false", lambda value: isinstance(value, bool)),
    int: _WHOLE,
    float: _Kind("a number", "numbers", _is_number),
    str: _TEXT,
}
