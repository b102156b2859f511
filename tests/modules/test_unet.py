"""What must hold for any weights. Parity with public implementations: tests/golden_suite."""

import math

import pytest
import torch
from torch import Tensor, nn

from modules.unet import NORMS, UPS, UNet


def make(**arguments) -> UNet:
    """A tiny network, the same weights each time, with norms that do something and logits of both signs."""
    torch.manual_seed(0)
    network = UNet(**{"base_channels": 4, "depth": 3} | arguments)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def make_image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


EVERY_KIND = pytest.mark.parametrize(("up", "norm"), [(up, norm) for up in UPS for norm in NORMS])


@EVERY_KIND
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_logits_have_the_size_of_the_image(depth, up, norm):
    network = make(depth=depth, up=up, norm=norm, in_channels=2, num_classes=3, base_channels=2).eval()
    for height, width in [(16, 16), (17, 31), (16, 45), (33, 16), (37, 53)]:
        logits = network(make_image(2, 2, height, width))
        assert logits.shape == (2, 3, height, width)
        assert logits.isfinite().all()


@pytest.mark.parametrize("patch", [2, 3])
@pytest.mark.parametrize("size", [(24, 48), (37, 53), (16, 17)])
def test_squares_of_pixels_are_channels_of_one(patch, size):
    network = make(patch=patch, num_classes=2).eval()
    image = make_image(2, 3, *size)
    logits = network(image)
    assert logits.shape == (2, 2, *size)
    least = 8 * patch
    height, width = (-(-max(side, least) // patch) * patch for side in size)
    rows, columns = (torch.arange(full).clamp_max(side - 1) for full, side in zip((height, width), size, strict=True))
    whole = image[:, :, rows][:, :, :, columns]  # the last row and column repeated
    plain = make(in_channels=3 * patch**2, num_classes=2 * patch**2).eval()
    plain.load_state_dict(network.state_dict())
    squares = whole.view(2, 3, height // patch, patch, width // patch, patch).permute(0, 1, 3, 5, 2, 4)
    expected = plain(squares.flatten(1, 3)).view(2, 2, patch, patch, height // patch, width // patch)
    expected = expected.permute(0, 1, 4, 2, 5, 3).reshape(2, 2, height, width)
    assert torch.allclose(logits, expected[:, :, : size[0], : size[1]], atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_features_of_pixels_are_refined_with_the_pixels(norm):
    network = make(patch=2, refine=8, norm=norm, num_classes=2)
    for size in [(16, 16), (37, 53)]:
        logits = network(make_image(2, 3, *size))
        assert logits.shape == (2, 2, *size)
        logits.sum().backward()


def test_a_pixel_changes_what_is_refined_near_it():
    network = make(patch=2, refine=8).eval()
    image = make_image(1, 3, 32, 32)
    brighter = image.clone()
    brighter[..., 5, 7] += 0.5
    before = network._classify(nn.functional.pixel_unshuffle(image, 2))
    with pytest.MonkeyPatch.context() as patched:  # what the pixel itself adds, the features being as they were
        patched.setattr(network, "_classify", lambda squares: before)
        moved = (network(brighter) - network(image)).abs().amax((0, 1)) > 0
    assert moved.any() and set(moved.nonzero()[:, 0].tolist()) <= {4, 5, 6}
    assert set(moved.nonzero()[:, 1].tolist()) <= {6, 7, 8}


@EVERY_KIND
def test_every_parameter_has_a_finite_gradient(up, norm):
    network = make(up=up, norm=norm).double()
    target = (make_image(2, 1, 19, 26, seed=1) > 0.8).double()
    logits = network(make_image(2, 3, 19, 26).double())
    nn.functional.binary_cross_entropy_with_logits(logits, target).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-12, name


@pytest.mark.parametrize("size", [(32, 32), (37, 41)])
@EVERY_KIND
def test_gradient_is_the_slope(up, norm, size):
    """Along a random direction, by central differences."""
    network = make(up=up, norm=norm).double().eval()
    image = make_image(1, 3, *size).double()
    direction = make_image(1, 3, *size, seed=1).double() - 0.5
    weights = make_image(1, 1, *size, seed=2).double()
    image.requires_grad_(True)
    (network(image) * weights).sum().backward()
    assert image.grad is not None
    step = 1e-7
    with torch.no_grad():
        there, back = ((network(image + sign * step * direction) * weights).sum() for sign in (1, -1))
    slope = (there - back) / (2 * step)
    torch.testing.assert_close(slope, (image.grad * direction).sum(), rtol=1e-4, atol=1e-6)


@EVERY_KIND
def test_images_of_a_batch_do_not_see_one_another_in_evaluation(up, norm):
    network = make(up=up, norm=norm).eval()
    image = make_image(3, 3, 24, 37)
    alone = torch.cat([network(item[None]) for item in image])
    torch.testing.assert_close(network(image), alone, atol=1e-5, rtol=1e-5)


def test_images_of_a_batch_do_not_see_one_another_in_training_with_group_norm_only():
    image = make_image(3, 3, 24, 37)
    for norm, alike in (("group", True), ("batch", False)):
        network = make(norm=norm).train()
        difference = (network(image)[:1] - network(image[:1])).abs().max()
        assert (difference < 1e-5) == alike, norm


@EVERY_KIND
def test_channels_last_gives_the_same_and_is_kept(up, norm):
    network = make(up=up, norm=norm).eval()
    image = make_image(2, 3, 37, 53)
    expected = network(image)
    features = []
    network.to(memory_format=torch.channels_last)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and name != "head":
            module.register_forward_hook(lambda _, inputs, output: features.extend([inputs[0], output]))
    logits = network(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert len(features) == 2 * (14 + 3 * (up == "transposed"))
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)


@EVERY_KIND
def test_an_image_too_small_for_the_depth_is_taken_for_one_with_its_edge_repeated(up, norm):
    network = make(depth=5, up=up, norm=norm).eval()
    image = make_image(1, 3, 20, 40)
    repeated = torch.cat([image, image[:, :, -1:].expand(-1, -1, 12, -1)], 2)
    torch.testing.assert_close(network(image), network(repeated)[:, :, :20], atol=1e-6, rtol=0)


def test_reach_is_that_of_the_depth():
    """A pixel changes logits near and far, but not beyond the receptive field (transposed: no size enters)."""
    network = make(up="transposed").eval().double()
    image = make_image(1, 3, 16, 256).double()
    other = image.clone()
    other[..., 128] += 1
    changed = (network(other) - network(image)).abs().amax((0, 1, 2)) > 1e-12
    reached = changed.nonzero().flatten()
    assert 20 < 128 - reached.min() <= 51
    assert 20 < reached.max() - 128 <= 51


def test_a_shift_by_the_coarsest_cell_shifts_the_logits():
    network = make(up="transposed").eval().double()
    image = torch.zeros(1, 3, 16, 256, dtype=torch.double)
    image[..., 100:110] = make_image(1, 3, 16, 10).double()
    shifted = network(image.roll(16, -1))
    torch.testing.assert_close(shifted[..., 64:192], network(image).roll(16, -1)[..., 64:192], atol=1e-10, rtol=0)


@EVERY_KIND
@pytest.mark.parametrize("base_channels", [8, 16])
def test_a_fresh_network_expects_few_marks_and_keeps_the_scale(up, norm, base_channels):
    torch.manual_seed(0)
    network = UNet(base_channels=base_channels, up=up, norm=norm)
    assert network.head.bias is not None
    assert network.head.bias.sigmoid().item() == pytest.approx(0.03)
    probability = network(torch.randn(2, 3, 64, 64)).sigmoid()
    assert 0.01 < probability.mean() < 0.1
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            deviation = math.sqrt(2 / (module.out_channels * 9))
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.15), name
            assert module.bias is None


def test_dropout_is_at_the_bottom_and_in_training_only():
    image = make_image(2, 3, 32, 32)
    network = make(dropout=0.9, norm="group").train()
    bottom = []
    network.get_submodule("dec0").register_forward_hook(lambda _, inputs, output: bottom.append(inputs[0]))
    network(image)
    dropped = (bottom[0] == 0).all(3).all(2)  # whole channels, (N, C)
    assert 0.6 < dropped.double().mean() < 1
    assert (network(image) != network(image)).any()
    network.eval()
    assert torch.equal(network(image), network(image))
    assert torch.equal(network(image), make(norm="group").eval()(image))


def test_names_of_the_weights_stay():
    """Checkpoints depend on them."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = ["conv1.weight", *(f"norm1.{n}" for n in norm), "conv2.weight", *(f"norm2.{n}" for n in norm)]
    for up, extra in (("bilinear", []), ("transposed", ["up.weight", "up.bias"])):
        expected = {f"enc{k}.{name}" for k in range(4) for name in block}
        expected |= {f"dec{k}.{name}" for k in range(3) for name in [*block, *extra]}
        assert set(make(up=up).state_dict()) == expected | {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("arguments", "num_parameters"),
    [
        ({"base_channels": 8, "up": "transposed"}, 486_553),
        ({"base_channels": 8, "up": "bilinear", "norm": "group"}, 270_897),
        ({"base_channels": 16, "up": "transposed", "norm": "group"}, 1_942_577),
        ({"base_channels": 16, "up": "bilinear"}, 1_080_929),
        ({"base_channels": 32, "up": "bilinear"}, 4_318_401),
    ],
)
def test_number_of_parameters(arguments, num_parameters):
    assert sum(parameter.numel() for parameter in UNet(**arguments).parameters()) == num_parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 2}, "depth must be a number from 3 to 5, got 2"),
        ({"depth": 6}, "depth must be a number from 3 to 5, got 6"),
        ({"depth": 3.0}, "depth must be a whole number"),
        ({"base_channels": 0}, "base_channels"),
        ({"in_channels": 0}, "in_channels"),
        ({"num_classes": True}, "num_classes"),
        ({"up": "nearest"}, "up must be one of bilinear, transposed, got 'nearest'"),
        ({"norm": "layer"}, "norm must be one of batch, group"),
        ({"dropout": 1.5}, "dropout"),
        ({"patch": 5}, "patch must be a number from 1 to 4, got 5"),
        ({"refine": 8}, "refine=8 needs a patch above 1"),
        ({"refine": -1, "patch": 2}, "refine must be a whole number"),
        ({"norm": "group", "patch": 2, "refine": 12}, "refine must be 1, 2, 4 or a multiple of 8"),
        ({"norm": "group", "base_channels": 12}, "base_channels must be 1, 2, 4 or a multiple of 8"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"base_channels": 4} | arguments)


@pytest.mark.parametrize("image", [torch.rand(3, 32, 32), torch.rand(1, 4, 32, 32), torch.ones(1, 3, 32, 32).byte()])
def test_inputs_that_do_not_fit(image):
    with pytest.raises(ValueError, match=r"image must be floating point of shape \(batch, 3, height, width\), got"):
        make()(image)
