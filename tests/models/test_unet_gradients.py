"""The gradient of a step is that of all its photos, however they are spread over processes and micro-batches."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from data.manifest import write_manifest
from data.watermark import WatermarkData
from models.unet import UNet

RATIOS = {"bce": 0.5, "dice": 0.3, "jaccard": 0.1, "tversky": 0.1, "focal": 0.2}


def build(loss: dict[str, Any]) -> UNet:
    torch.manual_seed(0)
    return UNet(
        base_channels=2,
        depth=3,
        norm="group",
        loss=loss,
        optim={"name": "sgd", "lr": 1.0, "weight_decay": 0.0},
    ).double()  # here too, or the weights that come back from processes are rounded


def gradient(
    manifest: Path, loss: dict[str, Any], *, batch_size: int, devices: int = 1, accumulate: int = 1
) -> dict[str, Tensor]:
    """What one step of plain descent changes in each weight."""
    system = build(loss)
    before = {name: weight.detach().clone() for name, weight in system.named_parameters()}
    data = WatermarkData(
        train_manifest=str(manifest), crop=32, batch_size=batch_size, mask_ignore_value=128, loader={"num_workers": 0}
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        precision="64-true",
        max_steps=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(system, datamodule=data)
    return {name: before[name] - weight.detach() for name, weight in system.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos with marks of very different sizes, one with none, and with other shares of pixels not known."""
    folder = tmp_path_factory.mktemp("uneven")
    rng = np.random.default_rng(0)
    rows = []
    for number, (marked, unknown) in enumerate([(0, 0), (2, 20), (20, 2), (6, 0)]):
        photo = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        mask[:, :marked] = 255
        mask[:, 32 - unknown // 2 :] = 128
        files = {"image_filepath": folder / f"{number}.png", "mask_filepath": folder / f"{number}_mask.png"}
        for file, pixels in zip(files.values(), (photo, mask), strict=True):
            Image.fromarray(pixels).save(file)
        rows.append({key: str(file) for key, file in files.items()})
    write_manifest(folder / "train.jsonl", rows)
    return folder / "train.jsonl"


TWO_PROCESSES, TWO_MICRO_BATCHES = {"devices": 2}, {"accumulate": 2}


@pytest.mark.parametrize(
    "loss, spread",
    [
        (RATIOS, TWO_PROCESSES),
        (RATIOS | {"per_image": True}, TWO_PROCESSES),
        (RATIOS | {"per_image": True}, TWO_MICRO_BATCHES),
        ({"bce": 1.0, "dice": 0.0, "focal": 0.5}, TWO_PROCESSES),
        ({"bce": 1.0, "dice": 0.0, "focal": 0.5}, TWO_MICRO_BATCHES),
    ],
    ids=["ratios", "ratios of images", "ratios of images, micro-batches", "pixels", "pixels, micro-batches"],
)
def test_gradient_does_not_depend_on_how_photos_are_spread(
    uneven: Path, loss: dict[str, Any], spread: dict[str, int]
) -> None:
    whole = gradient(uneven, loss, batch_size=4)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3
    assert distance(gradient(uneven, loss, batch_size=2, **spread), whole) < 1e-9


def test_that_of_ratios_of_a_batch_does(uneven: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = gradient(uneven, RATIOS, batch_size=4)
    with caplog.at_level(logging.INFO, logger="models.unet"):
        assert distance(gradient(uneven, RATIOS, batch_size=2, accumulate=2), whole) > 1e-6
    assert caplog.text.count("ratios such as Dice are those of each of the 2 batches of a step") == 1
    local = RATIOS | {"reduce": "local"}
    assert distance(gradient(uneven, local, batch_size=2, devices=2), whole) > 1e-6
