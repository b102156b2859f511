"""data.loader.keep_on_device: no system changes the batches that it validates on, so each validation is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

SYSTEMS = ("conv_tasnet", "deepvqe", "nest", "unet")


class Validations(pl.Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")})


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_validations(
    built: Callable, tiny: dict[str, list[str]], corpus: Path, photos: Path, name: str
) -> None:
    folder = photos if name == "unet" else corpus
    key = "model.validation_ds.manifest_filepath" if name == "nest" else "data.val_manifest"
    typed = [*tiny[name], f"{key}={folder / 'val.jsonl'}"]
    found = []
    for more in ([], ["data.loader.keep_on_device=true"]):
        watch = Validations()
        built(*typed, *more).fit(max_epochs=2, limit_train_batches=1, callbacks=[watch], num_sanity_val_steps=0)
        found.append(watch.metrics)
    assert len(found[0]) == 2 and "val_loss" in found[0][1]
    assert found[0] == found[1]
