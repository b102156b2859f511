"""Faults of the tool that this system takes the place of, each as a test that it would fail."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from data.blending import mask_of
from data.errors import DataError, ImageError
from data.image_folders import scan_images
from data.loader import choose_loader_settings
from data.manifest import write_manifest
from data.watermark import WatermarkData
from data.watermark_synthesis import WatermarkSynthesis
from launch import report
from metrics.segmentation import SegmentationMetrics
from models.optim import build_optimizer
from models.unet import UNet
from modules.adaptive_batch import AdaptiveBatch, next_size


class Given(torch.nn.Module):
    """A network that gives the logits that are drawn in the photo's red channel: 0 … 255 stand for -4 … 4."""

    def forward(self, image: Tensor) -> Tensor:
        return 8 * image[:, :1] - 4


def system_of_given_logits(**arguments: Any) -> UNet:
    system = UNet(base_channels=4, depth=3, normalization="none", **arguments).eval()
    system.network = Given()
    return system


def photo_of_logits(logits: Tensor) -> Tensor:
    """Shape: (H, W) -> (3, H, W)"""
    return ((logits + 4) / 8).expand(3, *logits.shape).clone()


def test_1_probabilities_are_compared_with_the_threshold_not_logits() -> None:
    system = system_of_given_logits()
    mask = system.predict(photo_of_logits(torch.full((16, 16), 0.3)), outputs=["mask"])["mask"]
    assert mask.all()  # sigmoid(0.3) = 0.57
    assert not system.predict(photo_of_logits(torch.full((16, 16), -0.3)), outputs=["mask"])["mask"].any()


def test_2_every_setting_of_training_arrives(
    photos: Path, in_tmp: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = UNet(optim={"name": "adamw", "lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.3})
    decayed, others = build_optimizer(system.groups_to_train(), system.optim).param_groups
    assert list(decayed["betas"]) == [0.8, 0.9]
    assert (decayed["lr"], decayed["eps"], decayed["weight_decay"], others["weight_decay"]) == (0.1, 1e-7, 0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {4} and {p.ndim for p in others["params"]} == {1}
    settings = choose_loader_settings(num_workers=3, prefetch_factor=5, cores=8)
    assert (settings["num_workers"], settings["prefetch_factor"]) == (3, 5)
    typed = "trainer.gradient_clip_val=0.7 trainer.accumulate_grad_batches=3 trainer.precision=bf16-mixed"
    made: dict[str, Any] = {}
    monkeypatch.setattr(report, "dry_run", lambda system, data, trainer: made.update(trainer=trainer))
    done = script(
        "train", f"model=unet data.train_manifest={photos}/train.jsonl dry_run=true {typed} data.batch_size=2"
    )
    assert done.code == 0, done.text
    trainer = made["trainer"]
    assert (trainer.gradient_clip_val, trainer.accumulate_grad_batches, trainer.precision) == (0.7, 3, "bf16-mixed")


def test_3_a_name_that_does_not_exist_is_refused() -> None:
    for loss in ({"combined": 1.0}, {"empty": "zero"}):
        with pytest.raises(ValueError, match="^loss"):
            UNet(loss=loss)
    with pytest.raises(ValueError, match="no such"):
        UNet(optim={"name": "adamw", "lr": 1e-3, "sched": {"name": "CosineAnnealingWarmRestarts"}})


def test_4_scores_do_not_depend_on_the_batch_size() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(6, 1, 16, 16, generator=generator)
    target = (
        torch.rand(6, 1, 16, 16, generator=generator) < torch.tensor([0, 0.01, 0.2, 0.5, 0.9, 0]).view(6, 1, 1, 1)
    ).byte()
    results = []
    for size in (1, 4, 6):
        metric = SegmentationMetrics(threshold=0.5, boundary=True)
        for start in range(0, 6, size):
            metric.update(probability=probability[start : start + size], target=target[start : start + size])
        results.append(metric.compute())
    for other in results[1:]:
        assert all(torch.allclose(other[name], value, atol=1e-6) for name, value in results[0].items())


def test_5_a_faint_mark_has_the_mask_of_an_opaque_one() -> None:
    photo = np.full((64, 96, 3), 90, np.uint8)
    masks = []
    for opacity in (0.1, 0.5, 0.9):
        synthesis = WatermarkSynthesis(scripts=["latin"], opacity=[opacity, opacity], clean_p=0, blend_p=0)
        masks.append(synthesis(photo, np.random.default_rng(3)).mask)
    assert masks[0].any()
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    assert mask_of(np.full((2, 2), 0.6, np.float32)).all()  # of coverage, whatever alpha is


def test_6_what_cannot_be_read_is_never_an_empty_mask(tmp_path: Path, photos: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{number}.png")
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(DataError, match=r"1\.png"):
        scan_images(tmp_path)
    (tmp_path / "masks" / "1.png").write_bytes(b"")
    write_manifest(
        tmp_path / "bad.jsonl",
        [{"image_filepath": str(tmp_path / "images/1.png"), "mask_filepath": str(tmp_path / "masks/1.png")}],
    )
    data = WatermarkData(val_manifest=str(tmp_path / "bad.jsonl"))
    data.setup("validate")
    with pytest.raises(ImageError, match=r"masks/1\.png"):
        data._datasets["val"].dataset[0, 0]  # type: ignore[union-attr, index]


class Keep(pl.Callback):
    """What the weights were at each validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, dict[str, Tensor]]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.seen.append((float(trainer.callback_metrics["val_iou"]), weights))


def test_7_the_best_weights_do_not_train_on(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    keep = Keep()
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_iou", mode="max")
    data = WatermarkData(
        train_manifest=str(photos / "train.jsonl"),
        val_manifest=str(photos / "val.jsonl"),
        batch_size=2,
        crop=32,
        synthesis_size=32,
        loader={"num_workers": 0},
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=5,
        callbacks=[keep, best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(UNet(base_channels=4, depth=3, optim={"name": "adam", "lr": 0.05}), datamodule=data)
    scores = [score for score, _ in keep.seen]
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert len(set(scores)) > 1 and scores.index(max(scores)) < len(scores) - 1, "the best must not be the last"
    expected = keep.seen[scores.index(max(scores))][1]
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], value) for name, value in expected.items())


def test_8_all_components_stay_and_none_is_fattened() -> None:
    logits = torch.full((40, 40), -4.0)
    logits[2:4, 2:30] = 4.0
    logits[20, 20] = 4.0
    logits[30:36, 5:9] = 4.0
    results = system_of_given_logits().predict(photo_of_logits(logits), outputs=["mask", "regions"])
    assert torch.equal(results["mask"], logits > 0)
    assert [region["area"] for region in results["regions"]] == [56, 1, 24]


def test_9_out_of_memory_repeats_the_failed_slice_only() -> None:
    seen: list[list[float]] = []

    def function(items: Tensor) -> Tensor:
        seen.append(items.tolist())
        if len(items) > 2:
            raise torch.OutOfMemoryError("simulated")
        return 10 * items

    batch = AdaptiveBatch(size=4, adapt=False)
    assert [float(result) for result in batch.run(function, torch.arange(6.0))] == [0, 10, 20, 30, 40, 50]
    assert seen == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5]]

    def never(items: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("simulated")

    with pytest.raises(torch.OutOfMemoryError):
        list(AdaptiveBatch(size=4, adapt=False).run(never, torch.arange(3.0)))


def test_10_a_photo_is_looked_at_in_its_own_size() -> None:
    logits = torch.full((40, 2100), -4.0)
    logits[20] = 4.0  # a line of one pixel in a photo 50 times as wide as high
    system = system_of_given_logits()
    seen: list[tuple[int, ...]] = []
    system.network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    mask = system.predict(photo_of_logits(logits), outputs=["mask"])["mask"]
    assert torch.equal(mask, logits > 0)
    assert seen == [(8, 3, 40, 512)]  # of tiles as high as the photo


def test_11_the_batch_grows_and_shrinks_as_the_guide_says() -> None:
    limits = {"least": 1, "most": 32}
    assert next_size(8, **limits, success_rate=0.96, memory_share=0.69) == 16
    assert next_size(8, **limits, success_rate=0.95, memory_share=0.1) == 8
    assert next_size(8, **limits, memory_share=0.91) == 4
    assert next_size(8, **limits, out_of_memory=True) == 4


def test_validation_leaves_no_example_out(photos: Path) -> None:
    """Its loaders dropped the last incomplete batch there as in training."""
    data = WatermarkData(
        train_manifest=str(photos / "train.jsonl"),
        val_manifest=str(photos / "val.jsonl"),
        val_examples=5,
        batch_size=4,
        crop=32,
        synthesis_size=32,
        loader={"num_workers": 0},
    )
    data.setup("fit")
    assert [len(batch["name"]) for batch in data.val_dataloader()] == [4, 1]
    assert [len(batch["name"]) for batch in data.train_dataloader()] == [4]
