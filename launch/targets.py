"""From a configuration node to an object: allow-listed classes, plain arguments, every mistake in one message.

Instead of hydra.utils.instantiate: that resolves any importable name, nested ones too, and stops at the first wrong
argument. Here a `_target_` names a class of an allowed package and of the expected kind, and constructors get plain
dicts and lists.
"""

import difflib
import inspect
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from launch.errors import ConfigError
from models.checkpoint import find_class
from models.nest import TARGETS

Kind = TypeVar("Kind")

# Sections that say what the system learns from: typed in the model section, as in NeMo, and given to the data.
DATASETS = ("train_ds", "validation_ds", "test_ds")

# Classes of other frameworks whose configurations load unchanged, each at the section that it belongs to: the nested
# `_target_` is checked here and taken out, since the system builds its parts from its own imports.
_AUGMENTOR = "nemo.collections.asr.modules.ssl_modules.MultiSpeakerNoiseAugmentation"
FOREIGN_TARGETS = {f"model.{name}": target for name, target in TARGETS.items()}
FOREIGN_TARGETS |= {f"model.{name}.batch_augmentor": _AUGMENTOR for name in DATASETS}


_NEEDED = ("model", "data", "trainer", "exp_manager", "monitor")
_OPTIONAL = ("model.optim", "model.optim.sched", *(f"model.{name}" for name in DATASETS), "data.loader", "predict")
_OF_NODES = ("callbacks", "logger")


def not_sections(cfg: DictConfig) -> list[str]:
    """A line for each section that is given as a plain value, since its keys are read before any class sees it; and for
    one whose name is nearly that of ours, which nothing would read."""
    nodes = {
        f"{group}.{name}": node
        for group in _OF_NODES
        if isinstance(section := OmegaConf.select(cfg, group), DictConfig)
        for name, node in section.items()
    }
    values = {key: OmegaConf.select(cfg, key) for key in (*_NEEDED, *_OPTIONAL, *_OF_NODES)} | nodes
    known = [key for key in (*_NEEDED, *_OPTIONAL, *_OF_NODES) if "." not in key]
    others = [str(key) for key in cfg if key not in known and isinstance(OmegaConf.select(cfg, str(key)), DictConfig)]
    misspelt = {key: near for key in others if (near := difflib.get_close_matches(key, known, 1, 0.8))}
    return [f"{key}: no such section. Did you mean {near[0]}?" for key, near in misspelt.items()] + [
        f"{key}={'null' if value is None else value}: must be a section of keys with values"
        for key, value in values.items()
        if not isinstance(value, DictConfig) and (value is not None or (key in _NEEDED and key in cfg))
    ]


class Blueprint:
    """A class and the arguments it will be called with, checked but not yet called."""

    def __init__(self, address: str, node: dict[str, Any], kind: type[Any], packages: Sequence[str] = ()) -> None:
        self.address = address
        self.problems: list[str] = []
        self.cls: type[Any] | None = None
        try:
            self.cls = find_class(node["_target_"], kind, packages)
        except ValueError as error:
            self.problems.append(f"{address}._target_={error}")
        except KeyError:
            self.problems.append(f"{address}: no _target_, so nothing says which class to build")
        arguments = {name: value for name, value in node.items() if name != "_target_"}
        self.arguments = {name: self._without_targets(name, value) for name, value in arguments.items()}
        if self.cls is not None:
            self.problems += wrong_arguments(address, self.cls, self.arguments)

    def _without_targets(self, path: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._without_targets(f"{path}[{index}]", item) for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        key = f"{'model' if path.startswith(DATASETS) else self.address}.{path}"
        target, known = value.get("_target_"), FOREIGN_TARGETS.get(key)
        if target is not None and target != known:
            reason = f"only {known} can stand here" if known else "no nested class can be chosen here"
            self.problems.append(f"{key}._target_={target}: {reason}")
        return {k: self._without_targets(f"{path}.{k}", v) for k, v in value.items() if k != "_target_"}

    def build(self) -> Any:
        """The object. Raises ConfigError for what its constructor refuses."""
        assert self.cls is not None
        try:
            return self.cls(**self.arguments)
        except (ValueError, TypeError) as error:
            if type(error) not in (ValueError, TypeError):
                raise  # says more than we could: DataError, MisconfigurationException
            raise ConfigError(self._addressed(str(error).splitlines()[0])) from error

    def _addressed(self, message: str) -> str:
        """A constructor's message with its key as it is typed: `norm must be …` -> `model.norm must be …`."""
        assert self.cls is not None
        message = message.removeprefix(f"{self.cls.__name__}: ")
        if message.startswith(f"{self.address}."):
            return message
        word = re.match(r"\w*", message)
        argument = word is not None and word[0] in inspect.signature(self.cls).parameters
        return f"{self.address}.{message}" if argument else f"{self.address}: {message}"


def wrong_arguments(address: str, callable_: Any, arguments: dict[str, Any]) -> list[str]:
    """A line for each argument that the callable does not take or lacks."""
    parameters = inspect.signature(callable_).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    lines = []
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in arguments:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1, 0.6)
                hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names)}"
                lines.append(f"{address}.{name}: {callable_.__name__} has no such argument; {hint}")
    for parameter in parameters:
        if parameter.name in names and parameter.default is parameter.empty and parameter.name not in arguments:
            lines.append(f"{address}.{parameter.name}: {callable_.__name__} needs it")
    return lines
