"""Values of the command line that cannot be used: exit code 2, a line that names the key."""

from collections.abc import Iterator
from typing import Any

from data.aec import EchoData
from data.base import SystemData
from data.mixtures import SeparationData
from data.watermark import WatermarkData
from launch.build import _seed
from launch.errors import ConfigError
from launch.targets import Blueprint
from launch.trainer_section import wrong_values
from models.base import System
from models.conv_tasnet import ConvTasNet
from models.deepvqe import DeepVQE
from models.unet import UNet
from tests.malformed.cases import Case, Kind, World, refused, typed

_DATA = {"data": SystemData, "model": System}


def trainer(*given: tuple[str, Any]) -> Kind:
    def kind(world: World) -> Iterator[Case]:
        for key, value in given:

            def use(key: str = key, value: Any = value) -> None:
                if lines := wrong_values({key: value}):
                    raise ConfigError("\n".join(lines))

            yield Case(f"trainer.{key}={value!r}", lambda use=use: refused(use), f"trainer.{key}=")

    return kind


def arguments(group: str, *given: tuple[type, str, Any]) -> Kind:
    """Of the constructor that a section is for."""

    def kind(world: World) -> Iterator[Case]:
        for cls, key, value in given:
            node = {"_target_": f"{cls.__module__}.{cls.__name__}", key: value}
            blueprint = Blueprint(group, node, _DATA[group])
            yield Case(f"{group}.{key}={value!r}", lambda b=blueprint: refused(b.build), f"{group}.{key}")

    return kind


def seeds(world: World) -> Iterator[Case]:
    for value in (-1, 2**32, 1.5, "abc", None):
        yield Case(f"seed={value}", lambda value=value: refused(lambda: _seed(value)), "seed")


def overrides(*given: tuple[str, str]) -> Kind:
    """Command lines that are refused as they stand, and what is told."""

    def kind(world: World) -> Iterator[Case]:
        for override, told in given:
            argv = ["model=conv_tasnet", override]
            yield Case(override[:60], lambda argv=argv: typed("train", argv), told)

    return kind


KINDS: dict[str, Kind] = {
    "seed that is none": seeds,
    "trainer value of a wrong type": trainer(
        ("max_steps", "many"),
        ("max_epochs", 1.5),
        ("accumulate_grad_batches", None),
        ("devices", "two"),
        ("max_time", 3),
    ),
    "negative trainer value": trainer(
        ("max_steps", -2), ("limit_val_batches", -1), ("gradient_clip_val", -0.5), ("devices", 0), ("num_nodes", 0)
    ),
    "trainer value that is not finite": trainer(
        ("max_steps", float("inf")), ("max_epochs", float("nan")), ("limit_train_batches", float("nan"))
    ),
    "data value of a wrong type": arguments(
        "data",
        (SeparationData, "batch_size", "eight"),
        (SeparationData, "snr_db", 3),
        (EchoData, "noise_manifest", 3),
        (WatermarkData, "crop", "big"),
        (SeparationData, "loader", {"num_workers": "some"}),
    ),
    "negative data value": arguments(
        "data",
        (SeparationData, "batch_size", -8),
        (SeparationData, "segment_s", -1.0),
        (EchoData, "train_examples", -3),
        (WatermarkData, "max_pixels", -1),
        (SeparationData, "max_bad_fraction", -0.1),
    ),
    "data value beyond all bounds": arguments(
        "data",
        (SeparationData, "num_sources", 10**9),
        (SeparationData, "max_bad_fraction", float("inf")),
        (SeparationData, "segment_s", float("nan")),
        (EchoData, "delay_ms", [0, 1e9]),
        (WatermarkData, "scale", [0.0, 1e9]),
    ),
    "model value of a wrong type": arguments(
        "model",
        (ConvTasNet, "num_filters", "many"),
        (ConvTasNet, "mask", 3),
        (DeepVQE, "mic_channels", "wide"),
        (UNet, "depth", [1, 2]),
        (ConvTasNet, "optim", {"name": 7, "lr": 1e-3}),
    ),
    "model value beyond all bounds": arguments(
        "model",
        (ConvTasNet, "num_blocks", -1),
        (ConvTasNet, "num_repeats", 0),
        (DeepVQE, "gru_hidden", -5),
        (UNet, "base_channels", 0),
        (ConvTasNet, "sample_rate", -8000),
    ),
    "name that has to be quoted": overrides(
        ("data.train_manifest=my file(1).jsonl", "\"data.train_manifest='my file(1).jsonl'\""),
        ("data.train_manifest=x[1].jsonl", "\"data.train_manifest='x[1].jsonl'\""),
        ("data.train_manifest=a=b(1).jsonl", "\"data.train_manifest='a=b(1).jsonl'\""),
        ("data.train_manifest=it's.jsonl", "data.train_manifest='it\\'s.jsonl'"),
        ("data.train_manifest=a,b.jsonl", "data.train_manifest=a,b.jsonl"),
    ),
    "override that is none": overrides(
        ("model.optim.lr=[1", "model.optim.lr=[1"),
        ("seed", "seed"),
        ("=3", "=3"),
        ("model..optim=3", "model..optim=3"),
        ("größe=3", "größe=3"),
    ),
    "empty name of a manifest": arguments(
        "data", (SeparationData, "train_manifest", ""), (EchoData, "val_manifest", "")
    ),
    "unknown key": overrides(
        ("modle.num_filters=3", "modle.num_filters=3"),
    ),
}
