"""launch/batch_size.py measures each system with its own data."""

from collections.abc import Callable

import pytest

from launch.batch_size import Settings, measure

SECTION = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "bf16-mixed"}


@pytest.mark.parametrize("name", ["conv_tasnet", "deepvqe", "nest", "unet"])
def test_every_system(built: Callable, tiny: dict[str, list[str]], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.batch_size._MEASURED_S", 0)
    more = ["model.gradient_checkpointing=true", *(["model.train_ds.use_bucketing=true"] if name == "nest" else [])]
    system, data, _ = built(*tiny[name], *more)
    trials = measure(system, data, SECTION, Settings(enabled=True, max_batch_size=4))
    assert [trial.batch_size for trial in trials] == [1, 2, 4]
    assert all(trial.examples_per_s > 0 and trial.memory_mb > 10 for trial in trials)
