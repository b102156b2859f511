"""debug=overfit|profile|limit: what each is for, with the keys that it sets open to be typed."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from models.base import System
from tests.conftest import TINY, TINY_ECHO, TINY_NEST, TINY_UNET

SIZES = {"conv_tasnet": TINY, "deepvqe": TINY_ECHO, "nest": TINY_NEST, "unet": TINY_UNET}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the training steps are given."""
    seen: list[dict] = []
    step = System.training_step

    def watched(self: System, batch: dict, *rest: int) -> Tensor:
        seen.append({name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)})
        return step(self, batch, *rest)

    monkeypatch.setattr(System, "training_step", watched)
    return seen


def typed(system: str, corpus: Path, photos: Path) -> list[str]:
    """A tiny system with its data."""
    folder, splits = photos if system == "unet" else corpus, ("train", "val", "test")
    keys = [f"data.{split}_manifest" for split in splits]
    if system == "nest":
        keys = [f"model.{name}_ds.manifest_filepath" for name in ("train", "validation", "test")]
    files = [f"{key}={folder / split}.jsonl" for key, split in zip(keys, splits, strict=True)]
    return [f"model={system}", "exp_manager.version=one", *SIZES[system], *files]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("system", SIZES)
def test_overfit_repeats_its_batches(
    system: str, script: Callable, corpus: Path, photos: Path, in_tmp: Path, batches: list[dict]
) -> None:
    steps = 20 if system == "conv_tasnet" else 4
    more = [f"trainer.max_steps={steps}", "trainer.profiler=simple", "logger.tensorboard=null"]
    done = script("train", ["debug=overfit", *typed(system, corpus, photos), *more])
    assert done.code == 0, done.text
    assert len(batches) == steps
    for later, batch in enumerate(batches[2:]):
        assert all(value.equal(batches[later % 2][name]) for name, value in batch.items())
    assert any(not value.equal(batches[1][name]) for name, value in batches[0].items())
    table = in_tmp / "runs" / system / "one" / "fit-profile.txt"
    assert "training_step" in table.read_text() and f"profile          {table.relative_to(in_tmp)}" in done.text
    if system == "conv_tasnet":
        losses = [float(row["train_loss"]) for row in rows(table.parent)]
        assert max(losses[-4:]) < min(losses[:4]), "it learns them by heart"


def test_profile_and_limit_are_short_trainings(script: Callable, corpus: Path, photos: Path, in_tmp: Path) -> None:
    sizes = [*typed("conv_tasnet", corpus, photos), "data.batch_size=8", "logger.tensorboard=null"]
    done = script("train", ["debug=profile", *sizes, "trainer.limit_train_batches=3", "exp_manager.version=p"])
    assert done.code == 0, done.text
    runs = in_tmp / "runs" / "conv_tasnet"
    assert "run_training_batch" in (runs / "p" / "fit-profile.txt").read_text()
    assert (runs / "p" / "checkpoints" / "last.ckpt").is_file()
    limited = ["debug=limit", *sizes, "trainer.limit_train_batches=0.25", "trainer.accumulate_grad_batches=1"]
    done = script("train", [*limited, "callbacks.last.every_n_steps=1"])
    assert done.code == 0, done.text
    assert "test_si_sdri" in done.text, "the test too"
    steps = [int(row["step"]) for row in rows(runs / "one") if row["val_loss"]]
    assert steps == [1, 3], "two of eight batches in each of two epochs, a validation after each"
    assert (runs / "one" / "checkpoints" / "last.ckpt").is_file()
