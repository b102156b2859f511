import pytest
import torch
from torch import Tensor

from modules.norms import NORMS, cumulative_layer_norm, initial_totals, make_norm


def formula(name: str, norm: torch.nn.Module, x: Tensor) -> Tensor:
    """Frame by frame, as one would write it down."""
    gain, bias = (parameter.detach()[:, None] for parameter in norm.parameters())
    frames = []
    for k in range(x.shape[-1]):
        seen = {"global": x, "cumulative": x[..., : k + 1], "per_frame": x[..., k : k + 1]}[name]
        mean = seen.mean((1, 2), keepdim=True)
        variance = (seen - mean).square().mean((1, 2), keepdim=True)
        frames.append(gain * (x[..., k : k + 1] - mean) / (variance + 1e-8).sqrt() + bias)
    return torch.cat(frames, -1)


def make_random(name: str, channels: int) -> torch.nn.Module:
    torch.manual_seed(0)
    norm = make_norm(name, channels).double()
    for parameter in norm.parameters():
        parameter.data.normal_()
    return norm


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("spread", "tolerance"), [(1.0, 1e-9), (1e-3, 1e-7)])  # around 5: running sums lose digits
def test_norm_is_the_formula(name, spread, tolerance):
    norm = make_random(name, 3)
    x = spread * torch.randn(2, 3, 11, dtype=torch.float64) + 5
    torch.testing.assert_close(norm(x), formula(name, norm, x), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", NORMS)
def test_parameters(name):
    parameters = make_norm(name, 3).state_dict()
    assert {key: value.tolist() for key, value in parameters.items()} == {"weight": [1.0] * 3, "bias": [0.0] * 3}


@pytest.mark.parametrize("name", ["cumulative", "per_frame"])
def test_gradient(name):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(make_random(name, 3), (x,))


@pytest.mark.parametrize("name", NORMS)
def test_silence_has_finite_values_and_gradients(name):
    norm = make_norm(name, 3)
    x = torch.zeros(1, 3, 4, requires_grad=True)
    norm(x).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in norm.parameters())]
    assert all(value is not None and value.isfinite().all() for value in gradients)


@pytest.mark.parametrize("name", ["cumulative", "per_frame"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    """Squares of 300 are beyond float16. Half weights under autocast's half features and in a half network."""
    torch.manual_seed(0)
    x = (300 * torch.randn(2, 8, 50)).to(dtype)
    expected = make_norm(name, 8)(x.float()).to(dtype)
    for norm in (make_norm(name, 8), make_norm(name, 8).to(dtype)):
        output = norm(x)
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected)


def test_cumulative_norm_keeps_its_digits():
    """Far from zero, and after hours of frames, float32 features are normalised as float64 ones would be."""
    torch.manual_seed(0)
    x = 1000 + torch.randn(1, 4, 2000)
    norm = make_norm("cumulative", 4)
    torch.testing.assert_close(norm(x), norm.double()(x.double()).float(), atol=3e-3, rtol=0)
    assert (norm(x) - norm(x.double() - 1000)).abs().max() < 3e-3

    earlier = torch.tensor([[4e6, 4e6 * 0.5, 4e6 * 1.25]], dtype=torch.float64)  # mean 0.5, mean square 1.25
    y, totals = cumulative_layer_norm(x - 1000, torch.ones(4), torch.zeros(4), earlier)
    torch.testing.assert_close(y, x - 1000 - 0.5, atol=2e-3, rtol=0)
    assert totals[0, 0] == 4e6 + 2000


def test_cumulative_norm_in_pieces_equals_the_whole():
    torch.manual_seed(0)
    x, gain, bias = torch.randn(2, 3, 20), torch.randn(3), torch.randn(3)
    whole, expected_totals = cumulative_layer_norm(x, gain, bias, initial_totals(2))
    pieces, totals = [], initial_totals(2)
    for piece in x.split([1, 12, 7], -1):
        y, totals = cumulative_layer_norm(piece, gain, bias, totals)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, -1), whole)
    torch.testing.assert_close(totals, expected_totals)


def test_unknown_norm_lists_what_there_is():
    with pytest.raises(ValueError, match="norm must be one of cumulative, global, per_frame, got 'batch'"):
        make_norm("batch", 3)
