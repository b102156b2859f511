"""Sub-sampling: the literal form with a mask before every layer, lengths, padding, and what each frame sees."""

import pytest
import torch
from torch import Tensor, nn

from modules.subsampling import DwStridingSubsampling, LinearProjection, padding_mask


def make(factor: int = 8, *, causal: bool = False, feat_in: int = 10) -> DwStridingSubsampling:
    torch.manual_seed(0)
    module = DwStridingSubsampling(
        feat_in=feat_in, feat_out=6, subsampling_factor=factor, conv_channels=4, causal=causal
    )
    return module.double()


def literal(module: DwStridingSubsampling, features: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """A mask before every layer and behind the last; the formula of a convolution's output size for the lengths."""
    padding = 3 if module.causal else 2

    def masked(x: Tensor) -> Tensor:
        return x * ~padding_mask(length, x.shape[2])[:, None, :, None]

    x = features[:, None]
    for layer in module.conv:
        x = layer(masked(x))
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
            length = torch.div(length + padding - 3, 2, rounding_mode="floor") + 1
    x = masked(x)
    batch, channels, frames, bins = x.shape
    return module.out(x.permute(0, 2, 1, 3).reshape(batch, frames, channels * bins)), length


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_value_and_gradient_equal_the_literal_form(factor, causal):
    module = make(factor, causal=causal)
    length = torch.tensor([29, 16, 1, 8, 0])
    features = torch.randn(5, 29, 10, dtype=torch.float64, requires_grad=True)
    (x, frames), (expected, expected_frames) = module(features, length), literal(module, features, length)
    torch.testing.assert_close(x, expected, atol=1e-12, rtol=0)
    assert torch.equal(frames, expected_frames) and frames.dtype == torch.int64
    weight = torch.randn_like(x)
    variables = [features, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((x * weight).sum(), variables), torch.autograd.grad((expected * weight).sum(), variables)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 100])
def test_lengths_are_those_of_the_frames(num_frames, causal):
    x, length = make(causal=causal)(torch.randn(1, num_frames, 10).double(), torch.tensor([num_frames]))
    assert x.shape[1] == length.item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [8, 21, 24])
def test_padding_does_not_matter(length, causal):
    """Not even where it is not a number, and it leaves the bias of the last layer behind it."""
    module = make(causal=causal)
    features = torch.randn(1, length, 10, dtype=torch.float64)
    alone, frames = module(features, torch.tensor([length]))
    padded = torch.cat([features, torch.full((1, 19, 10), torch.nan)], 1)
    batch, batch_frames = module(torch.cat([torch.randn_like(padded), padded]), torch.tensor([length + 19, length]))
    assert batch_frames[1] == frames[0]
    torch.testing.assert_close(batch[1, : frames[0]], alone[0])
    torch.testing.assert_close(batch[1, frames[0] :], module.out.bias.expand_as(batch[1, frames[0] :]))


@pytest.mark.parametrize("causal", [False, True])
def test_what_a_frame_sees(causal):
    """Frame t of a causal one: 8 t and 14 before it. Else as far behind as before it."""
    module = make(causal=causal)
    features = torch.randn(1, 64, 10, dtype=torch.float64, requires_grad=True)
    x, _ = module(features, torch.tensor([64]))
    (gradient,) = torch.autograd.grad(x[0, 4].square().sum(), features)
    seen = gradient[0].abs().sum(-1).nonzero().flatten()
    assert (seen.min().item(), seen.max().item()) == ((18, 32) if causal else (25, 39))


def test_names_and_linear_projection():
    shapes = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    assert shapes == {
        "out.weight": (6, 4 * 2),
        "out.bias": (6,),
        "conv.0.weight": (4, 1, 3, 3),
        "conv.0.bias": (4,),
        "conv.2.weight": (4, 1, 3, 3),
        "conv.2.bias": (4,),
        "conv.3.weight": (4, 4, 1, 1),
        "conv.3.bias": (4,),
        "conv.5.weight": (4, 1, 3, 3),
        "conv.5.bias": (4,),
        "conv.6.weight": (4, 4, 1, 1),
        "conv.6.bias": (4,),
    }
    linear, length = LinearProjection(10, 6), torch.tensor([5])
    features = torch.randn(1, 5, 10)
    x, frames = linear(features, length)
    assert torch.equal(x, nn.functional.linear(features, linear.weight, linear.bias)) and torch.equal(frames, length)
    assert list(linear.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("factor", [0, 1, 3, 6, -2])
def test_factor_must_be_a_power_of_two(factor):
    with pytest.raises(ValueError, match=f"^subsampling_factor must be a power of two, got {factor}$"):
        make(factor)
