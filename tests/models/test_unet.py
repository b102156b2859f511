"""The segmentation system: prediction, calibration, what it refuses, and what it keeps in a checkpoint."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.checkpoint import load
from models.unet import UNet, overlay
from modules.regions import decode

TINY: dict[str, Any] = {"base_channels": 4, "depth": 3}


@pytest.fixture
def system() -> UNet:
    torch.manual_seed(0)
    return UNet(**TINY).eval()


@pytest.fixture
def photo() -> Tensor:
    return torch.randint(0, 256, (3, 45, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_prediction_has_the_size_of_the_photo_and_is_what_forward_gives(system: UNet, photo: Tensor) -> None:
    results = system.predict(photo)
    with torch.no_grad():
        expected = system(photo[None] / 255).sigmoid()[0, 0]
    torch.testing.assert_close(results["probability"], expected)
    assert torch.equal(results["mask"], results["probability"] >= 0.5)
    assert results["overlay"].shape == photo.shape and results["overlay"].dtype == torch.uint8
    pixels = sum((decode(region["rle"]) for region in results["regions"]), torch.zeros(45, 70, dtype=torch.bool))
    assert torch.equal(pixels > 0, results["mask"])
    torch.testing.assert_close(system.predict(photo / 255)["probability"], results["probability"])
    assert set(system.predict(photo, outputs=["mask"])) == {"mask", "threshold"} and results["threshold"] == 0.5


def test_tiles_are_blended_and_their_number_at_a_time_changes_nothing(system: UNet, photo: Tensor) -> None:
    options = {"tile": 32, "whole_up_to": 32, "outputs": ["probability"]}
    alone = system.predict(photo, batch_size=1, **options)["probability"]
    together = system.predict(photo, batch_size=8, **options)["probability"]
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
    assert not torch.equal(alone, system.predict(photo)["probability"])


def test_flips_make_prediction_symmetric(system: UNet, photo: Tensor) -> None:
    once = system.predict(photo, flips=True)["probability"]
    mirrored = system.predict(photo.flip(2), flips=True)["probability"]
    torch.testing.assert_close(once, mirrored.flip(1), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(once, system.predict(photo)["probability"])


def test_a_region_is_all_that_is_looked_at(system: UNet, photo: Tensor) -> None:
    found = system.predict(photo, region=[10, 5, 30, 20], threshold=0.001)
    outside = torch.ones(45, 70, dtype=torch.bool)
    outside[5:25, 10:40] = False
    assert not found["mask"][outside].any() and found["mask"].any()
    other = photo.clone()
    other[:, outside] = 0
    assert torch.equal(system.predict(other, region=[10, 5, 30, 20])["probability"], found["probability"])


def test_a_limit_is_one_whatever_the_threshold(system: UNet, photo: Tensor) -> None:
    found = system.predict(photo, region=[10, 5, 30, 20], threshold=0.0, dilate=5)["mask"]
    assert int(found.sum()) == 600 and found[5:25, 10:40].all()


def test_the_batch_that_fits_is_kept_for_the_next_photo(system: UNet, photo: Tensor) -> None:
    sizes: list[int] = []

    def short_of_memory(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("simulated")

    system.network.register_forward_pre_hook(short_of_memory)
    options = {"tile": 32, "whole_up_to": 32, "outputs": ["mask"]}
    for _ in range(2):
        system.predict(photo, **options)
    assert sizes[:3] == [8, 4, 2] and set(sizes[2:]) == {2}


def test_small_regions_go_and_the_mask_is_widened_after_that(system: UNet, photo: Tensor) -> None:
    system.network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1)).requires_grad_(False)
    dots = torch.zeros(3, 30, 30, dtype=torch.uint8)
    dots[:, 5, 5] = 255
    dots[:, 15:18, 15:18] = 255
    torch.nn.init.constant_(system.network[0].weight, 2.0)
    torch.nn.init.constant_(system.network[0].bias, -3.0)
    results = system.predict(dots, min_area=2, dilate=1)
    assert [region["area"] for region in results["regions"]] == [9]
    assert int(results["mask"].sum()) == 9 + 12


def test_regions_that_nowhere_look_like_a_mark_go(system: UNet) -> None:
    system.network = torch.nn.Conv2d(3, 1, 1).requires_grad_(False)
    torch.nn.init.zeros_(system.network.weight)
    system.network.weight[0, 0] = 0.25
    torch.nn.init.constant_(system.network.bias, 0.0)
    photo = torch.zeros(3, 20, 20, dtype=torch.uint8)
    photo[:, 2:4, 2:9] = 200  # probability .54
    photo[:, 10:12, 2:9] = 200
    photo[:, 11, 5] = 255  # one pixel of .59
    system.normalization, system.mean, system.std = "none", torch.zeros(3, 1, 1), torch.full((3, 1, 1), 0.7)
    every = {"threshold": 0.52, "outputs": ("regions",)}
    assert len(system.predict(photo, **every)["regions"]) == 2  # nothing was validated
    system.calibration[1, 53], system.calibration[1, 58] = 40, 60
    assert [region["bbox"][1] for region in system.predict(photo, **every)["regions"]] == [10]
    assert len(system.predict(photo, **every, hysteresis=0.0)["regions"]) == 2


def test_sensitivity_is_the_share_that_was_found_in_validation(system: UNet, photo: Tensor) -> None:
    with pytest.raises(ValueError, match="sensitivity needs a checkpoint that was validated"):
        system.predict(photo, sensitivity=0.9)
    system.calibration[1, 20] = 10  # a tenth of the marked pixels has a probability of .20 only
    system.calibration[1, 70] = 90
    system.calibration[0, 10] = 1000
    system.calibration[0, 40] = 60
    assert system.threshold == 0.5  # .45 to .70 find 90 of 100 without a false alarm
    assert system._limit(0.9, None) == 0.7
    assert system._limit(0.95, None) == 0.2
    assert system._limit(None, 0.33) == 0.33
    for wrong in ({"sensitivity": 1.5}, {"threshold": -0.1}, {"sensitivity": 0.9, "threshold": 0.5}):
        with pytest.raises(ValueError, match="^(sensitivity|threshold)"):
            system.predict(photo, **wrong)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"tile": 0}, "^tile"),
        ({"tile": 16}, "^tile must be a number of at least 32"),
        ({"outputs": []}, "^outputs must be one of"),
        ({"sensitivity": 0}, "^sensitivity"),
        ({"overlap": 1.0, "whole_up_to": 16}, "^overlap"),
        ({"batch_size": 64}, "batch"),
        ({"flips": 1}, "^flips"),
        ({"outputs": ["masks"]}, "^outputs"),
        ({"region": [0, 0, 10]}, "^region"),
        ({"region": [90, 0, 10, 10]}, "^region"),
        ({"precision": "8"}, "^precision"),
        ({"dilate": -1}, "pixels|dilate"),
    ],
)
def test_options_that_cannot_be_used(system: UNet, photo: Tensor, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        system.predict(photo, **options)


@pytest.mark.parametrize("shape", [(4, 20, 20), (20, 20), (1, 3, 20, 20)])
def test_what_is_no_photo(system: UNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image must be RGB of shape"):
        system.predict(torch.zeros(shape))


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"network": "unet2"}, "^network must be unet or smp"),
        ({"normalization": "caffe"}, "^normalization"),
        ({"channels_last": "yes"}, "^channels_last"),
        ({"depth": 7}, "^depth"),
        ({"loss": {"bce": -1}}, r"^loss\.bce"),
        ({"loss": {"bcee": 1}}, r"^loss\.got an unexpected keyword argument 'bcee'"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        UNet(**TINY | arguments)


def test_normalization_and_memory_format() -> None:
    torch.manual_seed(0)
    plain = UNet(**TINY, normalization="none", channels_last=False).eval()
    torch.manual_seed(0)
    usual = UNet(**TINY).eval()
    image = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(usual(image), plain((image - mean) / std), atol=1e-5, rtol=1e-5)
    assert usual.network.enc0.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def batch_of(sizes: list[tuple[int, int]]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    image = torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8)
    mask = torch.full((len(sizes), 1, height, width), 255, dtype=torch.uint8)
    for index, (rows, columns) in enumerate(sizes):
        image[index, :, :rows, :columns] = torch.randint(0, 256, (3, rows, columns), generator=generator)
        mask[index, :, :rows, :columns] = torch.rand(1, rows, columns, generator=generator) < 0.1
    return {"image": image, "mask": mask, "size": torch.tensor(sizes), "name": ["x"] * len(sizes)}


def test_photos_of_several_sizes_are_scored_as_each_alone(system: UNet) -> None:
    sizes = [(32, 48), (40, 20)]
    together = batch_of(sizes)
    output = system.step(together)
    for index, (rows, columns) in enumerate(sizes):
        image = together["image"][index : index + 1, :, :rows, :columns]
        with torch.no_grad():
            alone = system(image / 255)
        torch.testing.assert_close(output["logits"][index : index + 1, :, :rows, :columns], alone)


def test_each_loss_in_use_is_logged(system: UNet) -> None:
    output = system.step(batch_of([(32, 32), (32, 32)]))
    torch.testing.assert_close(output["loss"], 0.5 * output["loss_bce"] + 0.5 * output["loss_dice"])
    only = UNet(**TINY, loss={"bce": 1.0, "dice": 0.0}).step(batch_of([(32, 32)]))
    assert "loss_bce" not in only and float(only["loss_count"]) == 32 * 32 / 512


def test_pictures_worth_seeing(system: UNet) -> None:
    batch = batch_of([(32, 48), (40, 20)])
    figures = system.figures(batch, system.step(batch))
    assert {name: tuple(figure.shape) for name, figure in figures.items()} == dict.fromkeys(figures, (3, 32, 48))
    assert set(figures) == {"image", "found", "marked"}
    large = batch_of([(20, 2048)])
    large["image"], large["mask"] = (torch.zeros_like(large[name]) for name in ("image", "mask"))
    shown = system.figures(large, {"logits": torch.zeros(1, 1, 20, 2048)})
    assert shown["image"].shape == (3, 10, 1024)
    marked = overlay(batch["image"][0, :, :32, :48], batch["mask"][0, 0, :32, :48] == 1)
    assert torch.equal(figures["marked"], marked) and not torch.equal(marked, figures["image"])


def test_the_threshold_travels_in_the_checkpoint(trained_unet: Path) -> None:
    system = load(trained_unet / "checkpoints" / "last.ckpt")
    assert isinstance(system, UNet)
    assert int(system.calibration.sum()) == 4 * 64 * 64  # every pixel of the validation, and of nothing else
    assert 0.05 <= system.threshold <= 0.95
    other = copy.deepcopy(system)
    other.calibration.zero_()
    assert other.threshold == 0.5


def test_steps_in_half_precision_stay_finite() -> None:
    torch.manual_seed(0)
    system = UNet(**TINY, loss={"bce": 0.3, "dice": 0.5, "focal": 0.2, "focal_alpha": 0.25, "focal_gamma": 2.5})
    optimizer = torch.optim.AdamW(system.parameters(), 1e-2)
    batch = batch_of([(32, 32)] * 4)
    batch["mask"][:2] = 0
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = system.step(batch)["loss"]
        assert loss.dtype == torch.float32 and math.isfinite(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
