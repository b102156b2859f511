"""model.restore_from: a network as another run left it - architecture and weights - on data of one's own.

The file is a `.nemo` archive, or a checkpoint or run directory of ours. Unlike a resume it takes no optimiser, no
schedule and no position; unlike init_from it decides what the network is.
"""

import logging
import reprlib
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.checkpoint import locate
from launch.errors import ConfigError
from models.base import System
from models.checkpoint import checked, read_plain, tensors
from models.nest import ARCHITECTURE, NEST, TARGETS

log = logging.getLogger(__name__)

# Keys of the architecture that change how it is trained, not what its weights mean: typed ones win.
_OF_TRAINING = tuple(f"model.{key}" for key in NEST.of_training)
_KEY = "model.restore_from"


class Restored:
    """The content of the file that `model.restore_from` names."""

    def __init__(self, path: str) -> None:
        self.path = path
        content = read_plain(locate(path))
        if "model_config" in content:
            self.model = content["model_config"]
        else:
            self.model = (checked(content, path).get("system") or {}).get("arguments") or {}
        if not isinstance(self.model, Mapping):
            raise ConfigError(f"{_KEY}={path}: model_config in it is a {type(self.model).__name__}, not a section")
        parts = ("preprocessor", "quantizer", "encoder", "decoder")
        if missing := [key for key in parts if self.model.get(key) in (None, {})]:
            kind = str(self.model.get("target", "another system")).rpartition(".")[2]
            raise ConfigError(f"{_KEY}={path}: holds {kind}, not NEST (no {', '.join(missing)} in it)")
        _values(self.model, f"{_KEY}={path}")
        self.state = tensors(content.get("state_dict"), path)

    def load_into(self, system: System) -> None:
        """All weights. Raises ConfigError where they are not exactly the system's."""
        report = system.load_weights(self.state)
        for kind in ("missing", "unexpected", "mismatched"):
            if names := report[kind]:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ConfigError(f"{_KEY}={self.path}: {kind} weights: {', '.join(names[:3])}{more}")
        log.info("%s=%s: %d weights taken", _KEY, self.path, len(report["loaded"]))


def take_architecture(cfg: DictConfig, model: Mapping[str, Any], source: str, typed: set[str]) -> None:
    """Bring `cfg.model` in line with what a network was built from; the values that follow from its keys follow.

    *model*: the model section of it. *source*: what lines about it begin with. *typed*: the keys that were typed.

    Raises ConfigError with a line for each typed key that says otherwise.
    """
    problems, taken = [], []
    for key, value in _values(model, source):
        old = OmegaConf.select(cfg, key)
        own = OmegaConf.to_container(old) if OmegaConf.is_config(old) else old
        if own == value or (key in typed and key.startswith(_OF_TRAINING)):
            continue
        if key in typed:
            problems.append(f"{key}={own}: differs from {source}, whose network has {value}; leave it out")
        OmegaConf.update(cfg, key, value, force_add=True)
        taken.append(f"{key}={value}")
    if problems:
        raise ConfigError("\n".join(problems))
    log.info("%s: its architecture is taken%s", source, f", {', '.join(taken)}" if taken else ", it is the same")


def _values(model: Mapping[str, Any], source: str) -> list[tuple[str, Any]]:
    """What a file says of the architecture, as keys with values. Raises ConfigError for what no configuration says."""
    architecture = {name: model[name] for name in ARCHITECTURE if name in model}
    for name, value in architecture.items():
        if value is not None and isinstance(value, Mapping) != (name in TARGETS):
            needed = "a section" if name in TARGETS else "a plain value"
            raise ConfigError(f"{source}: model.{name} in the file is {_brief(value)}; {needed} is needed")
    return _flat(architecture, "model.", source)


def _flat(node: Mapping[str, Any], prefix: str, source: str) -> list[tuple[str, Any]]:
    """The values of nested mappings with their keys; a list is one value. References in a file are not followed."""
    pairs: list[tuple[str, Any]] = []
    for name, value in node.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise ConfigError(f"{source}: {_brief(name)} in its section {prefix.rstrip('.')} is not the name of a key")
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.", source)
        elif not _is_plain(value):
            raise ConfigError(f"{source}: {prefix}{name} in the file is {_brief(value)}; a plain value is needed")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, str):
        return "${" not in value and value != "???"
    return isinstance(value, (bool, int, float, type(None)))


def _brief(value: Any) -> str:
    """On one line, however long it is."""
    return " ".join(reprlib.repr(value).split())
