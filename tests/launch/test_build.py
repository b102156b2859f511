"""From a composed configuration to objects: what must agree, what is said first, what is not kept."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.build import Run, disagreements
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("model", "data", "lines"),
    [
        ({"sample_rate": 8000}, {"sample_rate": 16000}, ["data.sample_rate=16000 differs from the system's 8000"]),
        (
            {"sample_rate": 16000},
            {
                "train_ds": {"sample_rate": 8000},
                "validation_ds": {"sample_rate": 16000},
                "test_ds": {"sample_rate": 4000},
            },
            [
                "model.train_ds.sample_rate=8000 differs from model.sample_rate=16000",
                "model.test_ds.sample_rate=4000 differs from model.sample_rate=16000",
            ],
        ),
        ({"sample_rate": 16000}, {"train_ds": {"sample_rate": None}, "validation_ds": {}, "test_ds": None}, []),
        ({}, {"train_ds": {"sample_rate": 8000}}, []),
    ],
)
def test_system_and_data_agree(model: dict[str, Any], data: dict[str, Any], lines: list[str]) -> None:
    found = disagreements(model, data)
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_a_typed_metric_is_no_lack_of_data(script, manifests: list[str], in_tmp: Path) -> None:
    base = ["model=conv_tasnet", *TINY, "dry_run=true"]
    for typed, said in (([*manifests, "monitor.metric=train_loss"], False), (manifests[:1], True)):
        done = script("train", [*base, *typed])
        assert done.code == 0, done.text
        assert ("there is no data to validate on" in done.out) == said


def test_a_restored_file_is_not_kept() -> None:
    """Its weights would be in memory as long as the run lasts."""

    class Archive:
        loaded_into: Any = None
        path, state = "x.nemo", {"w": torch.ones(1)}

        def load_into(self, system: object) -> None:
            type(self).loaded_into = system

    run = Run.__new__(Run)
    run.resume, run._sources = None, []
    run._system = SimpleNamespace(build=lambda: "system")  # type: ignore[assignment]
    run._restored = archive = Archive()  # type: ignore[assignment]
    kept = weakref.ref(archive)
    del archive
    assert run.system() == Archive.loaded_into == "system"
    gc.collect()
    assert kept() is None
