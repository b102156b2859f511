"""What a constructor refuses is said with the key as it is typed."""

from typing import Any

import pytest

from data.base import SystemData
from launch.errors import ConfigError
from launch.targets import Blueprint
from models.base import System

MODEL = {"_target_": "models.conv_tasnet.ConvTasNet"}
DATA = {"_target_": "data.mixtures.SeparationData", "train_manifest": "x.jsonl"}


SPEECH = {"_target_": "data.ssl.SelfSupervisedData", "train_ds": {"manifest_filepath": "x"}, "validation_ds": None}
SPEECH |= {"test_ds": None}
AUGMENTOR = "nemo.collections.asr.modules.ssl_modules.MultiSpeakerNoiseAugmentation"


def refused(section: str, typed: dict[str, Any]) -> str:
    blueprint = {
        "model": lambda: Blueprint("model", MODEL | typed, System),
        "data": lambda: Blueprint("data", DATA | typed, SystemData),
    }[section]()
    assert not blueprint.problems
    with pytest.raises(ConfigError) as raised:
        blueprint.build()
    return str(raised.value)


@pytest.mark.parametrize(
    ("section", "typed", "expected"),
    [
        ("model", {"mask": "tanh"}, "model.mask must be one of"),
        ("model", {"causal": True}, "model.causal: true needs norm"),
        ("model", {"optim": {"name": "adamm"}}, "model.optim.name=adamm: no such optimiser"),
        ("model", {"optim": {"lr": -1}}, "model.optim.lr must be a number of at least 0, got -1"),
        ("data", {"seed": "abc"}, "data.seed must be a whole number of at least 0, got 'abc'"),
        ("data", {"max_bad_files": None}, "data.max_bad_files must be a whole number"),
        ("data", {"loader": {"num_workers": None}}, "data.loader.num_workers must be a whole number"),
        ("data", {"speech_dir": "x"}, "data: give either speech_dir or manifests"),
    ],
)
def test_the_key_as_it_is_typed(section: str, typed: dict[str, Any], expected: str) -> None:
    assert refused(section, typed).startswith(expected)


def test_a_foreign_class_at_its_place_only() -> None:
    right = SPEECH | {"train_ds": {"batch_augmentor": {"_target_": AUGMENTOR, "prob": 0.5}}}
    blueprint = Blueprint("data", right, SystemData)
    assert not blueprint.problems
    assert blueprint.arguments["train_ds"] == {"batch_augmentor": {"prob": 0.5}}
    wrong = SPEECH | {"train_ds": {"batch_augmentor": {"_target_": "nemo.X"}, "augmentor": {"_target_": AUGMENTOR}}}
    assert Blueprint("data", wrong, SystemData).problems == [
        f"model.train_ds.batch_augmentor._target_=nemo.X: only {AUGMENTOR} can stand here",
        f"model.train_ds.augmentor._target_={AUGMENTOR}: no nested class can be chosen here",
    ]
