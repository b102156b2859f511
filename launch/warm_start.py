"""Weights from elsewhere, by name: `init_from`, and NeMo's `init_from_nemo_model` and `init_from_ptl_ckpt`.

What does not fit is left as it is and told, unless `init_strict` says that nothing may. A run that is resumed takes
its own weights, and reads none of these files.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from callbacks.failures import listed
from launch.checkpoint import flat, is_of_training, locate
from launch.errors import ConfigError
from models.base import System, is_chosen
from models.checkpoint import CheckpointError, checked, read_plain, tensors

log = logging.getLogger(__name__)

_NEMO_KEYS = ("init_from_nemo_model", "init_from_ptl_ckpt")
_PARTS = ("path", "include", "exclude")
_MAX_SHOWN = 10


class Source(NamedTuple):
    """A file to take weights from. *include*, *exclude*: regular expressions, see `System.load_weights`."""

    key: str
    path: str
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.key}={self.path}"


def sources(config: Mapping[str, Any]) -> list[Source]:
    """The files that a configuration names, in the order in which they are read.

    As in NeMo a value is a path, a section `{path, include, exclude}`, or several such sections by any names; there
    *include* and *exclude* are parts of weights' names.

    Raises ConfigError with a line for each wrong value, and where more than one way to start is named.
    """
    ways = [key for key in ("init_from", *_NEMO_KEYS) if config.get(key) is not None]
    if restored := config["model"].get("restore_from"):
        ways.insert(0, f"model.restore_from={restored}")
    problems = [f"{' and '.join(ways)}: give one of them"] if len(ways) > 1 else []
    if config.get("init_from_pretrained_model") is not None:
        problems.append(
            "init_from_pretrained_model: nothing is downloaded here; download the archive, then"
            " init_from_nemo_model=<file>"
        )
    if not isinstance(config["init_strict"], bool):
        problems.append(f"init_strict must be true or false, got {config['init_strict']!r}")
    found: list[Source] = []
    if config["init_from"] is not None:
        chosen = {key: config[f"init_{key}"] for key in ("include", "exclude")}
        problems += [f"init_{key}: {line}" for key, value in chosen.items() for line in _wrong_patterns(value)]
        found.append(Source("init_from", str(config["init_from"]), chosen["include"] or (), chosen["exclude"] or ()))
    for key in _NEMO_KEYS:
        for name, section in _sections(key, config[key]):
            wrong = _wrong_section(section)
            problems += [f"{name}{line}" for line in wrong]
            if not wrong:
                parts = {part: tuple(map(re.escape, section.get(part) or ())) for part in _PARTS[1:]}
                found.append(Source(name, section["path"], **parts))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _sections(key: str, value: Any) -> list[tuple[str, Any]]:
    """The sections that one of NeMo's keys holds, with their names."""
    if value is None:
        return []
    if isinstance(value, str):
        return [(key, {"path": value})]
    if isinstance(value, Mapping) and value and not set(value) & set(_PARTS):
        return [(f"{key}.{name}", section) for name, section in value.items()]
    return [(key, value)]


def _wrong_section(section: Any) -> list[str]:
    if not isinstance(section, Mapping):
        return [f": give a path, or a section {{{', '.join(_PARTS)}}}, got {section!r}"]
    lines = [f".{key}: no such key, there are {', '.join(_PARTS)}" for key in section if key not in _PARTS]
    if not (isinstance(section.get("path"), str) and section["path"]):
        lines.append(f".path: give a file, got {section.get('path')!r}")
    for part in _PARTS[1:]:
        texts = section.get(part)
        if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            lines.append(f".{part}: give a list of parts of names, got {texts!r}")
    return lines


def _wrong_patterns(patterns: Any) -> list[str]:
    if patterns is not None and not (isinstance(patterns, list) and all(isinstance(p, str) for p in patterns)):
        return [f"give a list of regular expressions, got {patterns!r}"]
    lines = []
    for pattern in patterns or []:
        try:
            re.compile(pattern)
        except re.error as error:
            lines.append(f"{pattern!r} is no regular expression ({error})")
    return lines


def start_from_weights(system: System, source: Source, *, strict: bool = False) -> None:
    """Copy the weights that fit by name and shape; say what did not, and what they were trained for.

    The file is a checkpoint or an archive of ours or NeMo's, or weights of another implementation that the system can
    import. *strict*: of the names that `source` chooses all must be in both, of one shape.

    Raises ConfigError where nothing fits, or strictly not all.
    """
    content = read_plain(locate(source.path))
    own = "format_version" in content
    report = system.load_weights(_state(system, content, source), include=source.include, exclude=source.exclude)
    if not report["loaded"]:
        chosen = " that include and exclude choose" if source.include or source.exclude else ""
        number = len(report["unexpected"]) + len(report["mismatched"])
        raise ConfigError(f"{source}: none of its {number} weights{chosen} fits this system")
    others = {kind: names for kind in ("missing", "unexpected", "mismatched") if (names := report[kind])}
    wanted = [name for name in report["missing"] if is_chosen(name, source.include, source.exclude)]
    if strict and (wrong := {k: names for k, names in (others | {"missing": wanted}).items() if names}):
        told = "; ".join(f"{kind}: {listed(names, most=3, none='')}" for kind, names in wrong.items())
        raise ConfigError(f"{source}: init_strict=true, but not all weights fit; {told}")
    log.info("%s: %d weights taken", source, len(report["loaded"]))
    for kind, names in others.items():
        log.info("  %s: %s", kind, listed(names, most=_MAX_SHOWN, none=""))
    for line in _other_meaning(content, system) if own else ():
        log.warning("%s: %s", source.key, line)


def _state(system: System, content: dict[str, Any], source: Source) -> dict[str, Tensor]:
    try:
        if "format_version" in content:
            return checked(content, source.path)["state_dict"]
        return tensors(system.import_weights(content), source.path)
    except CheckpointError:  # names the file itself
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _other_meaning(content: dict[str, Any], system: System) -> list[str]:
    """A line for each argument that the weights of a checkpoint were trained with and that is another one here."""
    described = content.get("system")
    own_name = f"{type(system).__module__}.{type(system).__qualname__}"
    if not isinstance(described, dict) or described.get("name") != own_name:
        return []
    old, new = flat(described.get("arguments") or {}), flat(dict(system.hparams))
    return [
        f"trained with model.{key}={old[key]}; here it is {new[key]}"
        for key in sorted(old.keys() & new.keys())
        if _plain(old[key]) != _plain(new[key]) and not is_of_training(key, system)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
