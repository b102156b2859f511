"""Runs of the segmentation system: interrupted and resumed, on two processes, exported, and on a large photo."""

import logging
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from data.watermark import WatermarkData
from launch.export import largest_difference, of_three_sizes, write_onnx
from models.checkpoint import read_checkpoint
from models.unet import UNet
from modules.smp_encoder import REQUIREMENT
from tests.conftest import TINY_UNET

TINY: dict[str, Any] = {"base_channels": 4, "depth": 3}


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    photos: Path, in_tmp: Path, script: Callable[..., Any]
) -> None:
    """Weights, counts of the validation, the sizes of crops and the position in the data."""
    named = [f"data.{part}_manifest={photos / f'{part}.jsonl'}" for part in ("train", "val")]
    base = ["model=unet", *TINY_UNET, *named, "data.train_examples=12", "data.crop=[[0,32],[1,48]]", "test=false"]
    base += ["model.optim.sched.name=none", "trainer.accumulate_grad_batches=1"]  # the schedule ends with the run
    for name, steps in (("whole", 6), ("parts", 4)):
        done = script("train", [*base, f"trainer.max_steps={steps}", f"exp_manager.version={name}"])
        assert done.code == 0, done.text
    more = ["trainer.max_steps=6", "exp_manager.version=parts", "exp_manager.resume_if_exists=true"]
    done = script("train", [*base, *more])
    assert done.code == 0, done.text
    whole, parts = (read_checkpoint(f"runs/unet/{name}/checkpoints/last.ckpt") for name in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 6
    assert int(whole["state_dict"]["calibration"].sum()) > 0
    assert all(torch.equal(parts["state_dict"][name], value) for name, value in whole["state_dict"].items())


def validated(photos: Path, devices: int) -> Tensor:
    torch.manual_seed(0)
    system = UNet(**TINY, norm="group")
    data = WatermarkData(
        train_manifest=str(photos / "train.jsonl"),
        val_manifest=str(photos / "masked.jsonl"),
        batch_size=2 // devices,
        eval_batch_size=1,
        crop=32,
        loader={"num_workers": 0},
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_steps=1,
        val_check_interval=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(system, datamodule=data)
    return system.calibration


def test_processes_count_the_pixels_of_the_validation_together(photos: Path) -> None:
    sizes = 72 * (88 + 96 + 104)
    assert int(validated(photos, 1).sum()) == sizes
    assert int(validated(photos, 2).sum()) == sizes + 72 * 88  # three photos for two: the first is repeated


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {**TINY, "depth": 5, "up": "transposed", "norm": "group"},
        {**TINY, "patch": 2, "refine": 4},
        {"network": "smp:Unet/mobilenet_v2"},
    ],
    ids=["deep", "patch", "smp"],
)
def test_other_networks_are_exported_too(arguments: dict[str, Any], tmp_path: Path) -> None:
    if "network" in arguments:
        pytest.importorskip("segmentation_models_pytorch", reason=f"needs {REQUIREMENT}")
    torch.manual_seed(0)
    system = UNet(**arguments).eval()
    sizes = of_three_sizes(system.example_input(), system.dynamic_axes)
    write_onnx(system, sizes[-1], tmp_path / "model.onnx", opset=18)
    for inputs in sizes:
        assert largest_difference(system, tmp_path / "model.onnx", inputs) < 1e-4


@pytest.mark.slow
def test_a_photo_of_24_megapixels_in_bounded_memory(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    system = UNet(**TINY).eval()
    photo = torch.randint(0, 256, (3, 4000, 6000), dtype=torch.uint8)
    photo[:, 1000:1100, 1000:3000] = 255
    system.predict(photo[:, :1200, :1200], overlap=0.0)  # imports, and what torch keeps
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = system.predict(photo, overlap=0.25, threshold=0.99, dilate=2)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert results["mask"].shape == (4000, 6000)
    logging.getLogger(__name__).info("grew by %.0f MiB", grown_mb)
    assert grown_mb < 1200  # 50 bytes for each pixel: logits, probabilities, labels, results
