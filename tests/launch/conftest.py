"""A run of NEST that began with NeMo's own configuration."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_NEST, Finished, run_script
from tests.launch.nemo_config import foreign_flags


@pytest.fixture(scope="session")
def nest_manifests(corpus: Path) -> list[str]:
    splits = {"train_ds": "train", "validation_ds": "val", "test_ds": "test"}
    return [f"model.{section}.manifest_filepath={corpus / split}.jsonl" for section, split in splits.items()]


@pytest.fixture(scope="session")
def _trained_nest(nest_manifests: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    folder = tmp_path_factory.mktemp("trained_nest")
    # Its epochs have two batches.
    sizes = [*TINY_NEST, "trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]
    rates = ["model.optim.lr=1.0", "model.optim.sched.warmup_steps=1"]  # each validation is better than the last
    environment = dict(os.environ)
    try:
        with contextlib.chdir(folder):
            done = run_script("train", [*foreign_flags(folder), *sizes, *rates, *nest_manifests])
    finally:
        if torch.distributed.is_initialized():  # strategy: ddp
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
    return done, folder / "nemo_experiments" / "SSL-NEST-FastConformer"


@pytest.fixture
def nest_run(_trained_nest: tuple[Finished, Path]) -> Finished:
    """What its training said."""
    return _trained_nest[0]


@pytest.fixture
def nest_folder(_trained_nest: tuple[Finished, Path]) -> Path:
    """Its run directory."""
    return _trained_nest[1]
