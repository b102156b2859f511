"""The adapter of segmentation_models_pytorch; without that package only what a user is told then."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from modules.smp_encoder import SmpNetwork

INSTALLED = importlib.util.find_spec("segmentation_models_pytorch") is not None
NEEDS_PACKAGE = pytest.mark.skipif(not INSTALLED, reason="segmentation_models_pytorch, an extra, is not installed")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ValueError, match="pip install segmentation-models-pytorch==0.6.0"):
        SmpNetwork(name="Unet/resnet18")


@pytest.fixture(scope="module")
def network() -> SmpNetwork:
    """FPN, unlike the package's Unet, refuses sizes that are no multiples of its stride."""
    torch.manual_seed(0)
    return SmpNetwork(name="FPN/mobilenet_v2").eval().requires_grad_(False)


@NEEDS_PACKAGE
@pytest.mark.parametrize("size", [(16, 16), (33, 40), (64, 96), (70, 31)])
def test_logits_have_the_size_of_the_image(network, size):
    assert network(torch.rand(2, 3, *size)).shape == (2, 1, *size)


@NEEDS_PACKAGE
def test_padding_is_on_the_right_and_at_the_bottom(network):
    torch.manual_seed(1)
    image = torch.rand(1, 3, 50, 64)
    padded = F.pad(image, (0, 0, 0, 14), mode="replicate")
    torch.testing.assert_close(network(image), network.network(padded)[:, :, :50])
    small = F.pad(image[..., :20], (0, 12, 0, 14), mode="replicate")
    torch.testing.assert_close(network(image[..., :20]), network.network(small)[:, :, :50, :20])


@NEEDS_PACKAGE
def test_whole_multiples_of_the_stride_are_untouched(network):
    image = torch.rand(1, 3, 32, 64)
    assert torch.equal(network(image), network.network(image))


@NEEDS_PACKAGE
def test_an_architecture_with_an_encoder_trains():
    torch.manual_seed(0)
    network = SmpNetwork(name="Unet/resnet18", in_channels=1, num_classes=2)
    network(torch.rand(2, 1, 32, 40)).square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(parameter.numel() for parameter in network.parameters()) == 14_328_209 - 2 * 64 * 49 + 9 * 16 + 1


@NEEDS_PACKAGE
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unet", "<architecture>/<encoder>, the architecture one of Unet, UnetPlusPlus"),
        ("resnet34/Unet", "the architecture one of Unet, UnetPlusPlus"),
        ("Unet/resnet35", "the encoder must be one of .*resnet34"),
        ("UnetPlusPlus/mit_b0", "cannot be built: .*mit_b0"),
        ("Unet/tu-nothing_of_that_name", "cannot be built: .*nothing_of_that_name"),
    ],
)
def test_names_that_the_package_does_not_know(name, message):
    with pytest.raises(ValueError, match=message) as raised:
        SmpNetwork(name=name)
    assert "\n" not in str(raised.value)
