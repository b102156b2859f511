"""NeMo's `.nemo` archives, in memory: nothing in an archive is ever extracted to a path that it names.

An archive is a tar file (in old versions through gzip) with `./model_config.yaml`, the `model:` section of a
configuration, and `./model_weights.ckpt`, the state dict. Other members, such as a tokenizer, are passed over; one with
a path that leads out of a folder, or that is a link or a device, was put there to do harm, so the archive is refused.
"""

import gzip
import io
import os
import tarfile
from collections import OrderedDict
from pathlib import Path, PureWindowsPath
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
    more than it holds, with a member that leads elsewhere, without one of the two members, or with anything but plain
    data in them; nothing is run.
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
    """The two members that count, open."""
    members: dict[str, IO[bytes]] = {}
    for member in archive.getmembers():
        if reason := _leads_elsewhere(member):
            raise CheckpointError(f"{path}: refused, its member {_one_line(member.name)} {reason}")
        name = member.name.removeprefix("./")
        if name not in (CONFIG, WEIGHTS):
            continue
        if name in members:
            raise CheckpointError(f"{path}: holds {name} twice")
        opened = archive.extractfile(member) if member.isreg() else None
        if opened is None:
            raise CheckpointError(f"{path}: {name} in it is not an ordinary file")
        members[name] = opened
    if missing := [name for name in (CONFIG, WEIGHTS) if name not in members]:
        raise CheckpointError(f"{path}: not a .nemo archive (no {' and no '.join(missing)} in it)")
    return members


def _leads_elsewhere(member: tarfile.TarInfo) -> str | None:
    """Why a member is none that NeMo writes, which are files and folders inside of the archive; None: it may be."""
    if member.issym() or member.islnk():
        return f"is a link to {_one_line(member.linkname)}"
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "is neither a file nor a folder"
    # As Windows would read it too: there a name may begin with a drive, and \\ separates as well.
    parts = PureWindowsPath(member.name)
    if parts.drive or parts.root:
        return "has an absolute path"
    return "climbs out of the archive" if ".." in parts.parts else None


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


def _one_line(error: Exception | str) -> str:
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
