"""Systems and their data as a command line makes them, without a run directory and Trainer."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import train
from data.base import SystemData
from launch.targets import DATASETS, Blueprint
from models.base import System
from tests.conftest import TINY, TINY_ECHO, TINY_NEST, TINY_UNET


class Built(NamedTuple):
    """What a command line describes."""

    system: System
    data: SystemData
    gradient_clip_val: float | None

    def fit(self, **options: Any) -> None:
        """Train with a bare Trainer: no files, no output."""
        bare = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        options = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, **bare, **options}
        pl.Trainer(**options).fit(self.system, datamodule=self.data)


@functools.cache
def composed(*typed: str) -> DictConfig:
    """The configuration of a list of overrides."""
    folder = Path(train.__file__).parent / "config"
    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        return compose("train", list(typed))


@pytest.fixture(scope="session")
def built() -> Callable[..., Built]:
    """What a list of overrides describes, with the same weights each time. *batch_size*: in training."""

    def build(*typed: str, batch_size: int | None = None) -> Built:
        cfg = composed(*typed)
        model, data = (OmegaConf.to_container(cfg[name], resolve=True) for name in ("model", "data"))
        if batch_size is not None:
            data.get("train_ds", data)["batch_size"] = batch_size
        torch.manual_seed(0)
        node = {key: value for key, value in model.items() if key not in (*DATASETS, "restore_from")}
        parts = Blueprint("model", node, System), Blueprint("data", data, SystemData)
        assert not any(part.problems for part in parts), [part.problems for part in parts]
        return Built(*(part.build() for part in parts), cfg.trainer.gradient_clip_val)

    return build


@pytest.fixture(scope="session")
def tiny(corpus: Path, photos: Path) -> dict[str, list[str]]:
    """For each system, a tiny one and what it is trained on."""
    speech = [f"data.train_manifest={corpus}/train.jsonl", f"data.noise_manifest={corpus}/noise_train.jsonl"]
    nest = [f"model.train_ds.manifest_filepath={corpus}/train.jsonl"]
    nest += [f"model.train_ds.noise_manifest={corpus}/noise_train.jsonl"]
    return {
        "conv_tasnet": ["model=conv_tasnet", *TINY, *speech],
        "deepvqe": ["model=deepvqe", *TINY_ECHO, *speech, f"data.rir_manifest={corpus}/rir_train.jsonl"],
        "nest": ["model=nest", *TINY_NEST, *nest],
        "unet": ["model=unet", *TINY_UNET, f"data.train_manifest={photos}/train.jsonl"],
    }
