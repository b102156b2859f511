"""NeMo's `.nemo` archives, in memory: nothing in an archive is ever extracted to a path that it names.

An archive is a tar file (in old versions through gzip) with `./model_config.yaml`, the `model:` section of a
configuration, and `./model_weights.ckpt`, the state dict. Other members, such as a tokenizer, are passed over.
"""

import gzip
import io
import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from models.plain import CheckpointError, load_plain

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_GZIP_HEAD = b"\x1f\x8b"
_TAR_HEAD, _TAR_HEAD_AT = b"ustar", 257
_MAX_CONFIG_BYTES = 1 << 20  # NeMo's largest are a hundredth of it
# Weights are as good as incompressible: an archive that unpacks to much more than its size is a bomb.
_MAX_GZIP_RATIO, _ALWAYS_UNPACKED_BYTES = 20, 64 << 20


class _ConfigLoader(yaml.SafeLoader):
    """Without aliases, by which a page of YAML can stand for more values than there is memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which NeMo does not write")
        return super().compose_node(parent, index)


class _ConfigDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def is_nemo(path: Path) -> bool:
    """Whether a file begins as a tar or gzip file does."""
    with path.open("rb") as file:
        head = file.read(_TAR_HEAD_AT + len(_TAR_HEAD))
    return head.startswith(_GZIP_HEAD) or head[_TAR_HEAD_AT:] == _TAR_HEAD


def read_nemo(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """The `state_dict` and the `model_config`, as NeMo wrote it, of an archive.

    Raises CheckpointError, in one line that names the file, for one that is missing or damaged, that unpacks to far
    more than it holds, without one of the two members, or with anything but plain data in them; nothing is run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_unpacked(file, path), mode="r:") as archive:
            members = _members(archive, path)
            # An open member reads from the archive as it goes: no second copy of the weights.
            state = load_plain(members[WEIGHTS], f"{path}: {WEIGHTS}", map_location=map_location)
            return {"state_dict": state, "model_config": _config(members[CONFIG], path)}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint file") from None
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged archive, tarfile and gzip raise all kinds
        raise CheckpointError(f"{path}: damaged or not a .nemo archive ({_one_line(error)})") from error


def _unpacked(file: IO[bytes], path: Path) -> IO[bytes]:
    """The tar file itself, or what a gzip file holds, in memory."""
    head = file.read(len(_GZIP_HEAD))
    file.seek(0)
    if head != _GZIP_HEAD:
        return file
    limit = max(_MAX_GZIP_RATIO * path.stat().st_size, _ALWAYS_UNPACKED_BYTES)
    with gzip.open(file) as packed:
        content = packed.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path}: refused, it unpacks to more than {limit} bytes")
    return io.BytesIO(content)


def _members(archive: tarfile.TarFile, path: Path) -> dict[str, IO[bytes]]:
    """The two members that count, open; under any other name, such as one that leads elsewhere, nothing is read."""
    members: dict[str, IO[bytes]] = {}
    for member in archive:
        name = member.name.removeprefix("./")
        if name not in (CONFIG, WEIGHTS):
            continue
        if name in members:
            raise CheckpointError(f"{path}: holds {name} twice")
        opened = archive.extractfile(member) if member.isreg() and not member.issparse() else None
        if opened is None:
            raise CheckpointError(f"{path}: {name} in it is not an ordinary file")
        members[name] = opened
    if missing := [name for name in (CONFIG, WEIGHTS) if name not in members]:
        raise CheckpointError(f"{path}: not a .nemo archive (no {' and no '.join(missing)} in it)")
    return members


def _config(member: IO[bytes], path: Path) -> dict[str, Any]:
    text = member.read(_MAX_CONFIG_BYTES + 1)
    if len(text) > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path}: {CONFIG} in it is longer than {_MAX_CONFIG_BYTES} bytes")
    try:
        config = yaml.load(text, Loader=_ConfigLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, among others
        raise CheckpointError(f"{path}: {CONFIG} in it is no YAML of plain values ({_one_line(error)})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: {CONFIG} in it holds no mapping of keys to values")
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def write_nemo(path: str | Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write an archive that NeMo reads, whole or not at all; the same content gives the same bytes.

    *config*: the `model:` section, of plain values; NeMo wants its `target` and `nemo_version` in it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = io.BytesIO()
    torch.save(OrderedDict((name, tensor.detach().cpu()) for name, tensor in state.items()), weights)
    text = yaml.dump(config, Dumper=_ConfigDumper, sort_keys=False, allow_unicode=True).encode()
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, content in ((CONFIG, io.BytesIO(text)), (WEIGHTS, weights)):
                member = tarfile.TarInfo(f"./{name}")  # of no user and no time
                member.size = content.seek(0, io.SEEK_END)
                content.seek(0)
                archive.addfile(member, content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
