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
from models.checkpoint import checked, read_plain, tensors
from models.nest import NEST
from models.nest_archive import architecture, values

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
        architecture(self.model, f"{_KEY}={path}")
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
    for key, value in values(model, source):
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
