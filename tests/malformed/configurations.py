"""YAML files, and typed values, that cannot be used: exit code 2, and nothing that stands in them is run."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf

from launch import foreign
from launch.build import plain
from launch.errors import ConfigError
from launch.targets import Blueprint, not_sections
from models.base import System
from tests.malformed.cases import Case, Kind, World, refused, typed

HEAD = "# @package _global_\ndefaults:\n  - override /model: conv_tasnet\n"
CANARY = "touch canary"


def recipe(world: World, name: str, content: str | bytes, what: str, names: str, *more: str) -> Case:
    """A recipe of a folder of one's own: --config-dir=<folder> experiment=<name>."""
    file = world.folder / f"config_{name}" / "experiment" / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = [f"--config-dir={file.parent.parent}", f"experiment={name}", "dry_run=true", *more]
    argv.append(f"data.train_manifest={world.corpus / 'train.jsonl'}")
    return Case(what, lambda: typed("train", argv), names)


def recipes(*given: tuple[str, str | bytes], names: str = "") -> Kind:
    """Recipes that Hydra cannot compose. *names*: what their messages hold, by default their file."""

    def kind(world: World) -> Iterator[Case]:
        for what, content in given:
            name = "".join(letter if letter.isalnum() else "_" for letter in what)
            yield recipe(world, name, content, what, names or f"{name}.yaml")

    return kind


def primaries(*given: tuple[str, str | bytes]) -> Kind:
    """Primary configurations of another folder: --config-path=<folder>."""

    def kind(world: World) -> Iterator[Case]:
        for what, content in given:
            name = "".join(letter if letter.isalnum() else "_" for letter in what)
            file = world.folder / f"{name}.yaml"
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
            yield Case(what, lambda file=file: refused(lambda: foreign.read(file)), str(file))

    return kind


def lines_of(lines: Sequence[str]) -> str:
    """What is said of sections that are found to be wrong before anything is made."""

    def use() -> None:
        if lines:
            raise ConfigError("\n".join(lines))

    return refused(use)


def sections(*keys_and_values: tuple[str, Any]) -> Kind:
    """A whole configuration with something else in the place of a section."""

    def kind(world: World) -> Iterator[Case]:
        for key, value in keys_and_values:
            cfg = OmegaConf.create({name: {} for name in ("model", "data", "trainer", "exp_manager", "monitor")})
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
            yield Case(f"{key}={value}", lambda cfg=cfg: lines_of(not_sections(cfg)), key)

    return kind


def targets(world: World) -> Iterator[Case]:
    for target in ("os.system", "builtins.eval", "callbacks.plan.os.system", "models.base.torch.load", 3):
        node = {"_target_": target, "command": CANARY}
        yield Case(
            f"_target_: {target}",
            lambda node=node: lines_of(Blueprint("model", node, System).problems),
            f"model._target_={target}: ",
        )


def nested_targets(world: World) -> Iterator[Case]:
    for inner in ({"_target_": "os.system"}, [{"_target_": "os.system"}], {"x": {"_target_": "os.system"}}):
        node = {"_target_": "callbacks.last.LastCheckpoint", "every_n_steps": inner}
        blueprint = Blueprint("callbacks.last", node, pl.Callback)
        yield Case(str(inner), lambda b=blueprint: lines_of(b.problems), "callbacks.last.every_n_steps")


def targets_of_recipes(world: World) -> Iterator[Case]:
    content = f"{HEAD}callbacks:\n  x:\n    _target_: os.system\n    command: {CANARY}\n"
    yield recipe(world, "target", content, "a callback of os.system", "callbacks.x._target_=os.system")


def unknown_keys(world: World) -> Iterator[Case]:
    """All of them are in the one message of the one run."""
    content = (
        f"{HEAD}model:\n  num_filterz: 3\n  optim:\n    lrr: 3\ndata:\n  snr: 3\n"
        "trainer:\n  max_epoch: 3\ncallbacks:\n  rng:\n    x: 3\n"
    )
    told = functools.cache(recipe(world, "unknown", content, "", "").use)
    for name in ("model.num_filterz", "data.snr", "trainer.max_epoch", "callbacks.rng.x"):
        yield Case(name, told, name)


def interpolations(*given: tuple[str, dict[str, Any], str]) -> Kind:
    def kind(world: World) -> Iterator[Case]:
        for what, content, key in given:
            cfg = OmegaConf.create({"data": {}, **content})
            yield Case(what, lambda cfg=cfg: refused(lambda: plain(cfg)), key)

    return kind


KINDS: dict[str, Kind] = {
    "YAML with a syntax error": recipes(
        ("open bracket", "model: [1, 2\n"),
        ("open quote", "seed: 'abc\n"),
        ("two colons", "seed: 1: 2\n"),
        ("wrong indent", "model:\n    a: 1\n  b: 2\n"),
    ),
    "YAML with tabs": recipes(("tab", "model:\n\tnum_filters: 3\n"), ("tab before a value", "model:\n- a\n\t- b\n")),
    "YAML with a key twice": recipes(("top", "seed: 1\nseed: 2\n"), ("inside", "model:\n  a: 3\n  a: 4\n")),
    "YAML with tags of Python": recipes(
        ("apply", f"seed: !!python/object/apply:os.system ['{CANARY}']\n"),
        ("new", f"seed: !!python/object/new:os.system ['{CANARY}']\n"),
        ("name", "seed: !!python/name:os.system\n"),
        ("module", "seed: !!python/module:os\n"),
        ("own", "seed: !mine 3\n"),
    ),
    "YAML that is no text": recipes(
        ("NUL", "seed: 1\0\n"),
        ("binary", b"\x93NUMPY\x00\xff\xfe"),
        ("latin 1", "seed: 1 # größe\n".encode("latin-1")),
        ("utf 16", "seed: 1\n".encode("utf-16")),
    ),
    "YAML that contains itself": recipes(("alias", "a: &a\n  x: *a\n"), ("list", "a: &a [*a]\n")),
    "YAML of deep nesting": recipes(("lists", "a: " + "[" * 500 + "]" * 500 + "\n")),
    "YAML with an impossible key": recipes(("list as key", "? [1,2]\n: 3\n")),
    "recipe with a wrong defaults list": recipes(
        ("number", "defaults: 3\n"),
        ("nested", "# @package _global_\ndefaults:\n  - [1, 2]\n"),
        ("elsewhere", "# @package _global_\ndefaults:\n  - ../../../etc/passwd\n"),
        names="experiment",
    ),
    "recipe of no system": recipes(
        ("empty", ""),
        ("a list", "- 1\n- 2\n"),
        ("a text", "hello\n"),
        ("another system", "# @package _global_\ndefaults:\n  - override /model: tasnet\n"),
        names="model",
    ),
    "recipe with an open interpolation": recipes(("open", "seed: ${cpu_threads\n"), names="seed"),
    "recipe that includes itself": recipes(("loop", "defaults:\n  - /experiment/loop\n"), names="recursion"),
    "primary configuration that is none": primaries(
        ("empty list", "[]\n"),
        ("number", "3\n"),
        ("bytes", b"\xff\xfe\x00"),
        ("a syntax error", "a: [\n"),
    ),
    "list or value in place of a section": sections(
        ("model", 3), ("data", "x"), ("trainer", False), ("monitor", "val_loss"), ("callbacks", 3)
    ),
    "list or value in place of an inner section": sections(
        ("model.optim", 3),
        ("model.optim.sched", "cosine"),
        ("data.loader", 7),
        ("callbacks.rng", 3),
        ("logger.csv", []),
    ),
    "misspelt section": sections(*((name, {"a": 1}) for name in ("modle", "callback", "exp_manger"))),
    "null in place of a section": sections(*((key, None) for key in ("model", "data", "trainer", "monitor"))),
    "class that is not allowed": targets,
    "class that is not allowed, nested": nested_targets,
    "class that is not allowed, in a recipe": targets_of_recipes,
    "unknown keys in a recipe": unknown_keys,
    "interpolation that leads nowhere": interpolations(
        ("a loop", {"seed": "${threads}", "threads": "${seed}"}, "seed"),
        ("no such key", {"seed": "${nowhere.at.all}"}, "seed"),
        ("no such resolver", {"seed": "${shell:ls}"}, "seed"),
        ("no such variable", {"seed": "${oc.env:NOT_THERE}"}, "seed"),
    ),
}
