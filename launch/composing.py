"""When a configuration cannot be composed: which errors mean that, and what they say in one line.

Hydra has an error class of its own, but lets pass what its YAML reader raises, and some plain ValueErrors.
"""

import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from launch import foreign
from launch.errors import ConfigError

_OF_OBJECTS = ("object_type", "reference_type")


def is_of_composing(error: Exception) -> bool:
    """Whether the configuration could not be composed. Asked of what no job has answered: of the time before it."""
    if isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError, UnicodeError)):
        return True
    places = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return type(error) is ValueError and places[-1].startswith("hydra.")  # of a defaults list, or a package's name


def words(error: BaseException) -> str:
    """What an error says, or else the one that caused it, without what is said of OmegaConf's own objects."""
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(_OF_OBJECTS) and line != "full_key:")


def unreadable(override: str) -> list[str]:
    """For an override that Hydra's grammar refuses, a line that says how it is typed as text; none for others."""
    if (problem := _refusal(override)) is None:
        return []
    key, _, value = override.partition("=")
    items = value[1:-1].split(",") if value[:1] + value[-1:] == "[]" else None  # of a list, each is a text of its own
    typed = f"{key}={_as_text(value) if items is None else '[' + ','.join(map(_as_text, items)) + ']'}"
    line = f"{override}: {words(problem)}"
    if _refusal(typed) is not None or set(value[1:-1] if items else "") & set("[]{}"):
        return [line]
    typed = f'"{typed}"' if not set(value) & set('"$`!\\') else shlex.quote(typed)
    return [f"{line}; if it is a name, put it into quotes: {typed}"]


def _as_text(value: str) -> str:
    """A value as Hydra's grammar takes it: in quotes, if it has to be."""
    return value if _refusal(f"x={value}") is None else "'" + value.replace("'", "\\'") + "'"


def _refusal(override: str) -> HydraException | None:
    """What Hydra's grammar has against an override."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as problem:
        return problem
    return None


def damaged_file(error: Exception, folders: Sequence[Path]) -> str:
    """What the YAML reader says about a file; where it does not name it, it is looked for in *folders*."""
    if isinstance(error, RecursionError | UnicodeError):
        for file in sorted(file for folder in folders for file in folder.rglob("*.yaml")):
            try:
                foreign.read(file)
            except ConfigError as problem:
                if type(problem.__cause__) is type(error):
                    return str(problem)
    return f"a configuration cannot be read: {words(error)[:500]}"
