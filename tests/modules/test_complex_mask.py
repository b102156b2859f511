"""The complex convolving mask against its definition in complex numbers."""

import cmath

import pytest
import torch

from modules.complex_mask import IDENTITY_CHANNEL, NUM_MASK_CHANNELS, complex_convolving_mask


def literal(mask: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    batch, num_bins, num_frames, _ = spectrum.shape
    x = torch.view_as_complex(spectrum)  # (B, F, frames)
    output = torch.zeros_like(x)
    for t in range(num_frames):
        for f in range(num_bins):
            for m in range(3):
                for n in range(3):
                    if t - 2 + m >= 0 and 0 <= f - 1 + n < num_bins:
                        weight = sum(
                            cmath.exp(2j * cmath.pi * r / 3) * mask[:, r * 9 + m * 3 + n, t, f] for r in range(3)
                        )
                        output[:, f, t] += weight * x[:, f - 1 + n, t - 2 + m]
    return torch.view_as_real(output)


def make_input(batch: int = 2, num_bins: int = 5, num_frames: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.randn(batch, NUM_MASK_CHANNELS, num_frames, num_bins, dtype=torch.float64, requires_grad=True)
    return mask, torch.randn(batch, num_bins, num_frames, 2, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("num_frames", [1, 2, 6])
def test_value_and_gradient_equal_the_definition(num_frames):
    inputs = make_input(num_frames=num_frames)
    outputs = complex_convolving_mask(*inputs), literal(*inputs)
    torch.testing.assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in outputs]
    torch.testing.assert_close(*gradients)


def test_single_channels():
    mask, spectrum = make_input()
    one = torch.zeros_like(mask)
    one[:, IDENTITY_CHANNEL] = 1
    assert torch.equal(complex_convolving_mask(one, spectrum), spectrum)
    oldest_and_lower = torch.zeros_like(mask)
    oldest_and_lower[:, 0] = 1
    shifted = torch.zeros_like(spectrum)
    shifted[:, 1:, 2:] = spectrum[:, :-1, :-2]
    assert torch.equal(complex_convolving_mask(oldest_and_lower, spectrum), shifted)


def test_equal_channels_are_silence():
    _, spectrum = make_input()
    output = complex_convolving_mask(torch.ones(2, NUM_MASK_CHANNELS, 6, 5, dtype=torch.float64), spectrum)
    torch.testing.assert_close(output, torch.zeros_like(output), atol=1e-12, rtol=0)


def test_float32_under_autocast():
    mask, spectrum = (x.detach().float() for x in make_input())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = complex_convolving_mask(mask.bfloat16(), spectrum)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, complex_convolving_mask(mask.bfloat16().float(), spectrum))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"mask of shape \(2, 27, 6, 4\) where the spectrum asks for \(2, 27, 6, 5\)"):
        complex_convolving_mask(torch.zeros(2, 27, 6, 4), torch.zeros(2, 5, 6, 2))
