"""Configurations that were written for NeMo: recognised by what is in them, and told by which of our files they go on.

Their nested `_target_`s are the table in launch/targets.py.
"""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.errors import ConfigError

CHOICES = ("model=nest", "exp_manager=nemo")
"""The overrides under which one is composed."""
# Of the Trainer, what launch supplies, and the values that say no more than that.
_SUPPLIED = {"logger": (True, False), "enable_checkpointing": (True, False), "use_distributed_sampler": (False,)}


def read(file: Path) -> DictConfig:
    """A primary configuration. Raises ConfigError for a file that is none."""
    try:
        content = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not a configuration ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file}: not a configuration (no mapping of keys to values)")
    return content


def written_for_nemo(content: DictConfig) -> bool:
    """Whether its sections name NeMo's classes, or are those of a masked prediction of tokens."""
    model = OmegaConf.to_container(content).get("model")  # type: ignore[union-attr]
    if not isinstance(model, dict):
        return False
    return any(target.startswith("nemo.") for target in _targets(model)) or {"masking", "quantizer"} <= set(model)


def _targets(node: Any) -> list[str]:
    if not isinstance(node, dict):
        return []
    inner = [target for value in node.values() for target in _targets(value)]
    return inner + ([str(node["_target_"])] if "_target_" in node else [])


def supplied(trainer: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The trainer section without what launch supplies, and a line for each such key that asks for something else."""
    problems = [
        f"trainer.{key}={trainer[key]}: exp_manager supplies it; take it out"
        for key, values in _SUPPLIED.items()
        if key in trainer and trainer[key] not in values
    ]
    return {key: value for key, value in trainer.items() if key not in _SUPPLIED}, problems
