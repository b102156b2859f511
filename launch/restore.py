"""model.restore_from: a network as another run left it - architecture and weights - on data of one's own.

The file is a `.nemo` archive, or a checkpoint or run directory of ours. Unlike a resume it takes no optimiser, no
schedule and no position; unlike init_from it decides what the network is.
"""

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.checkpoint import locate
from launch.errors import ConfigError
from models.base import System
from models.checkpoint import checked, read_plain
from models.nest import ARCHITECTURE

log = logging.getLogger(__name__)

# Keys of the architecture that change how it is trained, not what its weights mean: typed ones win.
_OF_TRAINING = (
    "model.masking.",
    "model.loss.",
    "model.spec_augment.",
    "model.encoder.dropout",
    "model.encoder.stochastic_depth",
    "model.preprocessor.dither",
)
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
        if missing := [key for key in ("preprocessor", "quantizer", "encoder", "decoder") if not self.model.get(key)]:
            kind = str(self.model.get("target", "another system")).rpartition(".")[2]
            raise ConfigError(f"{_KEY}={path}: holds {kind}, not NEST (no {', '.join(missing)} in it)")
        self.state = content["state_dict"]

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
    for key, value in _flat({name: model[name] for name in ARCHITECTURE if name in model}, "model."):
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


def _flat(node: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """The values of nested mappings with their keys; a list is one value. References in a file are not followed."""
    pairs: list[tuple[str, Any]] = []
    for name, value in node.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, (str, bool, int, float, list, type(None))) or "${" in str(value):
            raise ConfigError(f"{_KEY}: {prefix}{name} in the file is {value!r}; a plain value is needed")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs
