"""NEST as a user trains it: what is logged, stopped in the middle of an epoch and gone on with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.checkpoint import locate
from models.checkpoint import read_checkpoint
from tests.conftest import OF_THE_MACHINE, TINY_NEST

OFTEN = ["trainer.log_every_n_steps=1", "callbacks.last.every_n_steps=1", "trainer.accumulate_grad_batches=2"]


@pytest.fixture(scope="module")
def named(corpus: Path) -> list[str]:
    parts = {"train": "train", "val": "validation", "test": "test"}
    found = [f"model.{ds}_ds.manifest_filepath={corpus / f'{part}.jsonl'}" for part, ds in parts.items()]
    return [*found, *(f"model.{ds}_ds.noise_manifest={corpus / 'noise_train.jsonl'}" for ds in parts.values())]


def test_a_run_that_was_stopped_equals_one_that_was_not(script, named: list[str], in_tmp: Path) -> None:
    base = ["model=nest", *TINY_NEST, *named, *OFTEN, "trainer.val_check_interval=2", "test=false"]
    base += ["model.train_ds.use_bucketing=true"]
    for version, steps in (("whole", 4), ("parts", 3), ("parts", 4)):
        done = script(
            "train",
            [
                *base,
                f"exp_manager.version={version}",
                f"trainer.max_steps={steps}",
                "exp_manager.resume_if_exists=true",
            ],
        )
        assert done.code == 0, done.text
    whole, parts = (read_checkpoint(f"runs/nest/{version}/checkpoints/last.ckpt") for version in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 4
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    tables = [Path(f"runs/nest/{version}/metrics.csv").read_text() for version in ("whole", "parts")]
    header = tables[0].splitlines()[0].split(",")
    assert {"train_loss", "train_accuracy", "train_empty_batches", "val_loss", "val_accuracy"} <= set(header)
    clocks = [header.index(name) for name in header if name in OF_THE_MACHINE]
    rows = [[[v for i, v in enumerate(line.split(",")) if i not in clocks] for line in t.splitlines()] for t in tables]
    assert rows[0] == rows[1]


def test_scores_of_a_test_and_of_evaluate(script, corpus: Path, trained_nest: Path, in_tmp: Path) -> None:
    metrics = json.loads((trained_nest / "summary.json").read_text())["metrics"]
    names = ("loss", "accuracy", "constant_accuracy", "codebook_usage", "codebook_perplexity", "masked_share")
    assert {f"test_{name}" for name in names} <= set(metrics)
    done = script(
        "evaluate", [f"ckpt_path={trained_nest}", f"data.test_manifest={corpus / 'test.jsonl'}", "output=e.json"]
    )
    assert done.code == 0, done.text
    again = json.loads(Path("e.json").read_text())
    again = again.get("metrics", again)
    assert again["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-6)


def test_features_of_a_run(script, trained_nest: Path, corpus: Path, in_tmp: Path) -> None:
    """Also of one whose configuration does not have the options yet."""
    content = torch.load(locate(trained_nest), weights_only=True)
    assert content["config"].pop("predict") == {"layers": [-1], "format": "npy", "dtype": "float32"}
    torch.save(content, "old.ckpt")
    for path in (trained_nest, "old.ckpt"):
        done = script("predict", [f"ckpt_path={path}", f"input={corpus / 'val.jsonl'}", "output=out", "layers=1"])
        assert done.code == 0 and "4 of 4 done" in done.out, done.text
    assert np.load("out/talker5/0_features.npy").shape == (13, 16), "1 s at 12.5 frames"


def test_a_validation_without_a_masked_frame_is_told(script, named: list[str], in_tmp: Path) -> None:
    typed = [
        "model.masking.mask_prob=0",
        "trainer.max_steps=3",
        "test=false",
        "model.optim_param_groups={encoder:{lr:1}}",
    ]
    done = script("train", ["model=nest", *TINY_NEST, *named, *typed, "trainer.val_check_interval=2"])
    assert done.code == 0, done.text
    assert "nothing was masked in this validation" in done.text and "mask_prob=0" in done.text


def test_a_run_that_ends_before_its_first_validation_is_told(script, named: list[str], in_tmp: Path) -> None:
    done = script("train", ["model=nest", *TINY_NEST, *named, "trainer.max_steps=1", "test=false"])
    assert done.code == 0, done.text
    assert "its first validation is due after trainer.val_check_interval=2500: there will be none" in done.text


def test_processes_that_hand_their_weights_back(script, named: list[str], in_tmp: Path) -> None:
    """In a file that is no training checkpoint, as with ddp_spawn, whose processes start ten times slower."""
    if torch.cuda.is_initialized():
        pytest.skip("an earlier test used CUDA in this process: Lightning refuses to fork it")
    typed = ["trainer.strategy=ddp_fork", "trainer.devices=2", "trainer.max_steps=2", "exp_manager.version=one"]
    done = script("train", ["model=nest", *TINY_NEST, named[0], *typed])
    assert done.code == 0, done.text
    files = sorted(file.name for file in Path("runs/nest/one/checkpoints").iterdir())
    assert read_checkpoint("runs/nest/one/checkpoints/last.ckpt")["global_step"] == 2
    assert len(files) == 2 and files[1] == "last.ckpt", files


@pytest.mark.parametrize("chosen", ["model=nest", "--config-name=nest_fast-conformer"])
def test_without_validation_the_best_is_kept_at_the_end_of_an_epoch(
    script, named: list[str], in_tmp: Path, chosen: str
) -> None:
    typed = ["trainer.max_epochs=2", "exp_manager.version=one", "exp_manager.exp_dir=runs", "exp_manager.name=x"]
    archives = chosen != "model=nest"
    done = script("train", [chosen, *TINY_NEST, named[0], *typed])
    assert done.code == 0, done.text
    (best,) = (file for file in Path("runs/x/one/checkpoints").glob("*.ckpt") if file.name != "last.ckpt")
    assert ("--train_loss=" if archives else "best-step=") in best.name
    assert best.with_suffix(".nemo").exists() == archives
