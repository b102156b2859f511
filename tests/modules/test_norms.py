import pytest
import torch

from modules.norms import make_norm


def test_global_norm_is_the_formula():
    torch.manual_seed(0)
    norm = make_norm("global", 3).double()
    for parameter in norm.parameters():
        parameter.data.normal_()
    gain, bias = (parameter[:, None] for parameter in norm.parameters())
    x = 1e-3 * torch.randn(2, 3, 11, dtype=torch.float64) + 5
    mean = x.mean((1, 2), keepdim=True)
    variance = (x - mean).square().mean((1, 2), keepdim=True)
    expected = gain * (x - mean) / (variance + 1e-8).sqrt() + bias
    torch.testing.assert_close(norm(x), expected, atol=1e-9, rtol=0)


def test_unknown_norm_lists_what_there_is():
    with pytest.raises(ValueError, match="norm must be one of global, got 'batch'"):
        make_norm("batch", 3)
