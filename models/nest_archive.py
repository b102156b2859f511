"""What a file says of a NEST's architecture: whether it is one, and in values that can be believed.

Shared by `models.load`, which builds the network that a `.nemo` archive holds, and by launch/restore.py, which brings a
configuration in line with it.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.nest import ARCHITECTURE, NEMO_MODEL, NEST, TARGETS
from models.plain import CheckpointError

# The class that NeMo trains NEST with, and the one it is derived from: the same network.
_MODELS = (NEMO_MODEL.rpartition(".")[2], "EncDecMaskedTokenPredModel")
_NEEDED = ("preprocessor", "quantizer", "encoder", "decoder")


def as_checkpoint(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """What `read_nemo` made of the archive *path*, in the form of a checkpoint, but without a training.

    Raises CheckpointError, in one line that names the file, when it holds another model or values that are not plain.
    """
    arguments: dict[str, Any] = {}
    for key, value in architecture(content["model_config"], str(path)).items():
        is_section = isinstance(value, Mapping)
        arguments[key] = {k: v for k, v in value.items() if k != "_target_"} if is_section else value
    return {
        "format_version": NEST.FORMAT_VERSION,
        "system": {"name": f"{NEST.__module__}.{NEST.__qualname__}", "arguments": arguments},
        "structure": [],
        "state_dict": content["state_dict"],
        "config": {"data": {}},
    }


def architecture(model: Any, source: str) -> dict[str, Any]:
    """Of a model section, the keys that say what the network is. *source*: what errors begin with.

    Raises CheckpointError for a section of another model, and as `values` does.
    """
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{source}: model_config in it is a {type(model).__name__}, not a section")
    kind = " ".join(str(model.get("target", "another system")).rpartition(".")[2].split())[:60]
    if missing := [key for key in _NEEDED if model.get(key) in (None, {})]:
        raise CheckpointError(f"{source}: holds {kind}, not NEST (no {', '.join(missing)} in it)")
    if "target" in model and kind not in _MODELS:
        raise CheckpointError(f"{source}: holds {kind}, not NEST ({' or '.join(_MODELS)})")
    values(model, source)
    for name, target in TARGETS.items():
        known, given = target.rpartition(".")[2], (model.get(name) or {}).get("_target_", target)
        if str(given).rpartition(".")[2] != known:
            raise CheckpointError(f"{source}: model.{name} in the file is of {_brief(given)}; only {known} is known")
    return {key: model[key] for key in ARCHITECTURE if key in model}


def values(model: Mapping[str, Any], source: str) -> list[tuple[str, Any]]:
    """What a model section says of the architecture, as keys with values. Raises CheckpointError for what no
    configuration says.
    """
    given = {name: model[name] for name in ARCHITECTURE if name in model}
    for name, value in given.items():
        if value is not None and isinstance(value, Mapping) != (name in TARGETS):
            needed = "a section" if name in TARGETS else "a plain value"
            raise CheckpointError(f"{source}: model.{name} in the file is {_brief(value)}; {needed} is needed")
    return _flat(given, "model.", source)


def _flat(node: Mapping[str, Any], prefix: str, source: str) -> list[tuple[str, Any]]:
    """The values of nested mappings with their keys; a list is one value. References in a file are not followed."""
    pairs: list[tuple[str, Any]] = []
    for name, value in node.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise CheckpointError(
                f"{source}: {_brief(name)} in its section {prefix.rstrip('.')} is not the name of a key"
            )
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.", source)
        elif not _is_plain(value):
            raise CheckpointError(f"{source}: {prefix}{name} in the file is {_brief(value)}; a plain value is needed")
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
