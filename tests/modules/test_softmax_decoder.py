import pytest
import torch

from modules.softmax_decoder import MultiSoftmaxDecoder


def make(**options) -> MultiSoftmaxDecoder:
    torch.manual_seed(0)
    return MultiSoftmaxDecoder(**{"feat_in": 6, "num_classes": 5} | options)


@pytest.mark.parametrize("num_decoders", [1, 3])
def test_log_probabilities(num_decoders):
    """Channel c * N + n is class c of book n."""
    decoder, encoded = make(num_decoders=num_decoders), torch.randn(2, 6, 7)
    log_probs = decoder(encoded)
    assert log_probs.shape == (2, 7, 5, num_decoders)
    weight, bias = (parameter.detach() for parameter in decoder.parameters())
    logits = torch.einsum("bdt,cd->btc", encoded, weight[:, :, 0]) + bias
    for book in range(num_decoders):
        expected = logits[..., book::num_decoders].log_softmax(-1)
        torch.testing.assert_close(log_probs[..., book], expected)
    torch.testing.assert_close(log_probs.exp().sum(2), torch.ones(2, 7, num_decoders))


@pytest.mark.parametrize(("num_decoders", "shape"), [(1, (2, 7, 5)), (3, (2, 7, 5, 3))])
def test_squeeze_single(num_decoders, shape):
    assert make(num_decoders=num_decoders, squeeze_single=True)(torch.randn(2, 6, 7)).shape == shape


@pytest.mark.parametrize("use_bias", [True, False])
def test_parameters(use_bias):
    state = make(feat_in=64, num_classes=50, num_decoders=2, use_bias=use_bias).state_dict()
    assert set(state) == {"decoder_layers.0.weight"} | ({"decoder_layers.0.bias"} if use_bias else set())
    weight = state["decoder_layers.0.weight"]
    limit = (6 / 164) ** 0.5  # Xavier's, uniform
    assert weight.shape == (100, 64, 1) and 0.98 * limit < weight.abs().max() <= limit


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_ends_in_float32(half):
    encoded = torch.randn(2, 6, 7)
    expected = make()(encoded)
    log_probs = make().to(half)(encoded.to(half))
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, atol=0.05, rtol=0)
    with torch.autocast("cpu", half):
        log_probs = make()(encoded)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(2), torch.ones(2, 7, 1))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="^num_decoders must be a whole number of at least 1, got 0"):
        make(num_decoders=0)
