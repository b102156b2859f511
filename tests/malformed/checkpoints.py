"""Checkpoints that cannot be used: one line that names the file, and nothing that stands in them is run."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.checkpoint import locate, run_configuration
from launch.restore import Restored
from launch.resume import to_continue
from models.checkpoint import load, read_checkpoint
from tests.malformed.cases import Case, Kind, World, refused

Content = dict[str, Any]


class Malicious:
    """Whoever unpickles it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def content(world: World, system: str = "conv_tasnet") -> Content:
    return torch.load(world.checkpoints[system], weights_only=True)


def case(world: World, write: Callable[[Path], Any], what: str, use: Callable[[Path], Any], *, name: str = "") -> Case:
    file = world.folder / f"checkpoint{len(os.listdir(world.folder))}" / (name or "x.ckpt")
    file.parent.mkdir()
    write(file)
    return Case(what, lambda: refused(lambda: use(file)), str(file))


def files(*given: tuple[str, Callable[[bytes], bytes]]) -> Kind:
    """A good checkpoint's bytes, changed."""

    def kind(world: World) -> Iterator[Case]:
        whole = world.checkpoints["conv_tasnet"].read_bytes()
        for what, change in given:
            yield case(world, lambda file, c=change: file.write_bytes(c(whole)), what, load)

    return kind


def contents(*given: tuple[str, Callable[[Content], Any]], use: Callable[[Path], Any] = load) -> Kind:
    """A good checkpoint's content, changed: in place, or to what the change returns."""

    def kind(world: World) -> Iterator[Case]:
        for what, change in given:
            changed = content(world)
            result = change(changed)
            yield case(world, lambda file, c=changed if result is None else result: torch.save(c, file), what, use)

    return kind


def archives(*given: tuple[str, Callable[[tarfile.TarFile], Any]]) -> Kind:
    """`.nemo` archives, written member by member."""

    def kind(world: World) -> Iterator[Case]:
        for what, fill in given:

            def write(file: Path, fill: Callable[[tarfile.TarFile], Any] = fill) -> None:
                with tarfile.open(file, "w") as archive:
                    fill(archive)

            yield case(world, write, what, lambda file: Restored(str(file)), name="x.nemo")

    return kind


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zipped(records: dict[str, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


def bomb(world: World) -> Iterator[Case]:
    """Small files that would become large ones in memory."""
    zeros = zipped({"x/data.pkl": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    yield case(world, lambda file: file.write_bytes(zeros), "a packed record of 50 MB", load)
    packed = gzip.compress(bytes(200_000_000), 1)
    yield case(world, lambda file: file.write_bytes(packed), "an archive that unpacks to 200 MB", load, name="x.nemo")
    laughs = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )

    def write(file: Path) -> None:
        with tarfile.open(file, "w") as archive:
            add(archive, "model_config.yaml", laughs.encode())
            add(archive, "model_weights.ckpt", saved({}))

    yield case(world, write, "a configuration of 9**10 values", lambda f: Restored(str(f)), name="x.nemo")


def huge_tensor(world: World) -> Iterator[Case]:
    """A tensor that declares more numbers than the file holds."""
    whole = saved({"state_dict": {"w": torch.zeros(7)}})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    data = next(name for name in records if name.endswith("data.pkl"))
    for size in (b"\x08", b"\xff"):
        changed = {**records, data: records[data].replace(b"K\x07\x85", b"K" + size + b"\x85")}
        assert changed != records
        yield case(world, lambda f, c=changed: f.write_bytes(zipped(c)), f"{size!r} numbers of 7", load)


def elsewhere(world: World) -> Iterator[Case]:
    none, folder = world.folder / "none.ckpt", world.folder / "a folder"
    folder.mkdir()
    uses = (("no file", load, none), ("a folder", locate, folder), ("a folder to continue from", to_continue, folder))
    for what, use, path in uses:
        yield Case(what, lambda use=use, path=path: refused(lambda: use(path)), str(path))


def of_another_system(world: World) -> Iterator[Case]:
    """The weights of one system under the name of another."""
    for changed in ("state_dict", "system"):
        mixed = content(world) | {changed: content(world, "deepvqe")[changed]}
        yield case(world, lambda file, c=mixed: torch.save(c, file), f"DeepVQE's {changed}", load)


def first(state: Content, value: Callable[[torch.Tensor], Any]) -> None:
    name = next(iter(state["state_dict"]))
    state["state_dict"][name] = value(state["state_dict"][name])


def without(key: str) -> Callable[[Content], None]:
    return lambda state: state.pop(key) and None


def replaced(key: str, value: Any) -> Callable[[Content], None]:
    return lambda state: state.update({key: value})


def argument(key: str, value: Any) -> Callable[[Content], None]:
    return lambda state: state["system"]["arguments"].update({key: value})


CONFIG = ("model_config.yaml", b"preprocessor: {a: 1}\nquantizer: {a: 1}\nencoder: {a: 1}\ndecoder: {a: 1}\n")
WEIGHTS = ("model_weights.ckpt", saved({"w": torch.zeros(3)}))

KINDS: dict[str, Kind] = {
    "truncated checkpoint": files(
        *((f"{share:.0%}", lambda whole, s=share: whole[: int(s * len(whole))]) for share in (0.001, 0.1, 0.5, 0.99)),
        ("all but a byte", lambda whole: whole[:-1]),
    ),
    "checkpoint of 0 bytes": files(("0 bytes", lambda whole: b""), ("1 byte", lambda whole: b"P")),
    "no checkpoint in the file": files(
        ("text", lambda whole: b"not weights\n"),
        ("random bytes", lambda whole: np.random.default_rng(0).bytes(999)),
        ("a Git-LFS pointer", lambda whole: b"version https://git-lfs.github.com/spec/v1\n"),
        ("safetensors", lambda whole: (20).to_bytes(8, "little") + b'{"a": {"shape": []}}'),
        ("JSON", lambda whole: b'{"state_dict": {}}'),
    ),
    "checkpoint damaged inside": files(
        ("zeros in the middle", lambda w: w[: len(w) // 2] + bytes(300) + w[len(w) // 2 + 300 :]),
        ("zeros at the start", lambda w: bytes(300) + w[300:]),
        ("zeros at the end", lambda w: w[:-300] + bytes(300)),
    ),
    "checkpoint that would run a command": files(
        ("a pickle", lambda whole: pickle.dumps(Malicious())),
        ("torch.save", lambda whole: saved(Malicious())),
        ("inside the weights", lambda whole: saved({"state_dict": {"w": Malicious()}})),
        ("protocol 4", lambda whole: pickle.dumps({"state_dict": Malicious()}, protocol=4)),
        ("a class", lambda whole: saved({"state_dict": {}, "system": Path("x")})),
    ),
    "zip without torch's records": files(
        ("empty", lambda whole: zipped({})),
        ("another file", lambda whole: zipped({"readme.txt": b"hello"})),
        ("data.pkl of text", lambda whole: zipped({"x/data.pkl": b"hello", "x/version": b"3\n"})),
        ("climbing out", lambda whole: zipped({"../../canary": b"x"})),
    ),
    "checkpoint that unpacks to too much": bomb,
    "tensor that declares too much": huge_tensor,
    "network that its weights do not explain": contents(
        ("a billion layers", argument("num_blocks", 10**9)),
        ("a matrix of 10 ** 17 numbers", argument("hidden_channels", 10**16)),
        ("a matrix of gigabytes", argument("num_filters", 10**9)),
    ),
    "checkpoint of another version": contents(
        *((repr(version), replaced("format_version", version)) for version in (2, 10**9, "1", [1])),
        use=read_checkpoint,
    ),
    "checkpoint without a key": contents(
        *((key, without(key)) for key in ("state_dict", "system", "format_version")),
        ("the name", lambda state: state["system"].pop("name") and None),
        ("the arguments", lambda state: state["system"].pop("arguments") and None),
    ),
    "checkpoint with a wrong type": contents(
        ("weights in a list", lambda state: replaced("state_dict", list(state["state_dict"].items()))(state)),
        ("a weight that is a number", lambda state: first(state, lambda tensor: 3)),
        ("a system that is a text", replaced("system", "models.conv_tasnet.ConvTasNet")),
        ("arguments in a list", lambda state: state["system"].update(arguments=[1])),
        ("a list", lambda state: [1, 2]),
    ),
    "checkpoint of a class that is not allowed": contents(
        *(
            (name, lambda state, name=name: state["system"].update(name=name))
            for name in ("os.system", "torch.nn.Linear", "models.base.torch.load", "no_package.System", 3)
        ),
    ),
    "checkpoint with wrong arguments": contents(
        ("an unknown one", argument("num_filterz", 3)),
        ("a text", argument("num_filters", "many")),
        ("negative", argument("num_blocks", -3)),
        ("null", argument("kernel_size", None)),
        ("a list", argument("mask", ["relu"])),
    ),
    "checkpoint with other weights": contents(
        ("a weight less", lambda state: state["state_dict"].popitem() and None),
        ("a weight more", lambda state: state["state_dict"].update(more=torch.zeros(3))),
        ("another shape", lambda state: first(state, lambda tensor: tensor[:1])),
        ("no weights", replaced("state_dict", {})),
    ),
    "checkpoint with weights that are no numbers": contents(
        ("complex", lambda state: first(state, lambda tensor: tensor.to(torch.complex64))),
        ("sparse", lambda state: first(state, lambda tensor: tensor.to_sparse())),
        ("NaN", lambda state: first(state, lambda tensor: tensor * float("nan"))),
        ("infinite", lambda state: first(state, lambda tensor: tensor / 0)),
    ),
    "checkpoint with a wrong structure": contents(
        ("an unknown change", replaced("structure", [{"change": "explode"}])),
        ("a text", replaced("structure", "low_rank")),
        ("a layer that is not there", replaced("structure", [{"change": "low_rank", "ranks": {"nowhere": 3}}])),
        ("rank -1", replaced("structure", [{"change": "low_rank", "ranks": {"separator": -1}}])),
    ),
    "checkpoint with a wrong configuration": contents(
        ("none", without("config")),
        ("a list", replaced("config", [1])),
        ("no data", lambda state: state["config"].pop("data") and None),
        ("a text", replaced("config", "x")),
        use=lambda path: run_configuration(path, "evaluate", []),
    ),
    "checkpoint of another system": of_another_system,
    "checkpoint that is not there": elsewhere,
    ".nemo archive that climbs out": archives(
        ("a path with ..", lambda tar: (add(tar, *CONFIG), add(tar, *WEIGHTS), add(tar, "../canary", b"x"))),
        ("an absolute path", lambda tar: (add(tar, "/tmp/canary", b"x"), add(tar, *CONFIG), add(tar, *WEIGHTS))),
        (
            "a link as weights",
            lambda tar: (add(tar, *CONFIG), add(tar, WEIGHTS[0], type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        ),
        (
            "a hard link as configuration",
            lambda tar: (add(tar, *WEIGHTS), add(tar, CONFIG[0], type=tarfile.LNKTYPE, linkname="../../x")),
        ),
        ("a device as weights", lambda tar: (add(tar, *CONFIG), add(tar, WEIGHTS[0], type=tarfile.CHRTYPE))),
    ),
    ".nemo archive without its members": archives(
        ("no member", lambda tar: None),
        ("no weights", lambda tar: add(tar, *CONFIG)),
        ("no configuration", lambda tar: add(tar, *WEIGHTS)),
        ("weights twice", lambda tar: (add(tar, *CONFIG), add(tar, *WEIGHTS), add(tar, *WEIGHTS))),
    ),
    ".nemo archive with a wrong configuration": archives(
        *(
            (what, lambda tar, text=text: (add(tar, CONFIG[0], text), add(tar, *WEIGHTS)))
            for what, text in (
                ("a tag of Python", b"a: !!python/object/apply:os.system ['touch canary']\n"),
                ("a list", b"- 1\n"),
                ("a syntax error", b"a: [\n"),
                ("bytes", b"\xff\xfe\x00"),
                ("another system", b"target: nemo.collections.asr.models.EncDecCTCModel\nencoder: {}\n"),
            )
        ),
    ),
    ".nemo archive with wrong weights": archives(
        *(
            (what, lambda tar, data=data: (add(tar, *CONFIG), add(tar, WEIGHTS[0], data)))
            for what, data in (
                ("0 bytes", b""),
                ("a command", pickle.dumps(Malicious())),
                ("a list", saved([1])),
                ("no tensors", saved({"w": 3})),
                ("truncated", WEIGHTS[1][:200]),
            )
        ),
    ),
}
