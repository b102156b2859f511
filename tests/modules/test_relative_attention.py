"""Attention against the softmax written out, masks against their definition, and the traps of half precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.relative_attention import (
    RelativePositions,
    RelPositionMultiHeadAttention,
    attention_mask,
    relative_positions,
    relative_shift,
)
from modules.subsampling import padding_mask

CONTEXTS = [
    ((-1, -1), "regular"),
    ((2, 1), "regular"),
    ((-1, 0), "regular"),
    ((0, 0), "regular"),
    ((3, -1), "regular"),
    ((4, 1), "chunked_limited"),
    ((0, 2), "chunked_limited"),
    ((-1, 3), "chunked_limited"),
    ((3, 0), "chunked_limited"),
]


def make(d_model: int = 12, n_heads: int = 3, **arguments) -> RelPositionMultiHeadAttention:
    torch.manual_seed(0)
    module = RelPositionMultiHeadAttention(d_model=d_model, n_heads=n_heads, **arguments)
    for bias in (module.pos_bias_u, module.pos_bias_v):
        bias.data.normal_()
    return module


def allowed(context: tuple[int, int], style: str, query: int, key: int) -> bool:
    """By definition, for frames that are no padding."""
    left, right = context
    if style == "chunked_limited":
        chunks = query // (right + 1) - key // (right + 1)
        return chunks >= 0 and (left < 0 or chunks <= left // (right + 1))
    return (left < 0 or query - key <= left) and (right < 0 or key - query <= right)


def literal(module: RelPositionMultiHeadAttention, x: Tensor, allowed: Tensor) -> Tensor:
    """One softmax per head and query over all keys; -10000 for hidden scores, 0 for hidden probabilities."""
    batch, frames, d_model = x.shape
    size = d_model // module.n_heads
    positions = relative_positions(frames, d_model, dtype=x.dtype)
    q, k, v = (layer(x).view(batch, frames, -1, size) for layer in (module.linear_q, module.linear_k, module.linear_v))
    p = module.linear_pos(positions).view(2 * frames - 1, -1, size)
    content = torch.einsum("bihd,bjhd->bhij", q + module.pos_bias_u, k)
    offset = frames - 1 - torch.arange(frames)[:, None] + torch.arange(frames)  # row of the position i - j
    position = torch.einsum("bihd,ijhd->bhij", q + module.pos_bias_v, p[offset])
    scores = ((content + position) / math.sqrt(size)).masked_fill(~allowed[:, None], -10000.0)
    weights = scores.softmax(-1).masked_fill(~allowed[:, None], 0.0)
    return module.linear_out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, frames, d_model))


def run(module: RelPositionMultiHeadAttention, x: Tensor, length: Tensor, context=(-1, -1), style="regular") -> Tensor:
    frames = x.shape[1]
    positions = relative_positions(frames, x.shape[2], x.device, module.pos_bias_u.dtype)
    hidden = attention_mask(length, frames, context, style)
    return module(x, positions, hidden, padding_mask(length, frames))


def test_positions():
    table = relative_positions(5, 6)
    assert table.shape == (1, 9, 6)
    for row, position in enumerate(range(4, -5, -1)):
        for channel in range(6):
            angle = position * 10000 ** (-(channel // 2 * 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[0, row, channel].item() == pytest.approx(expected, abs=1e-6)


def test_position_table_grows_and_is_good_for_training_after_inference():
    cpu = torch.device("cpu")
    positions = RelativePositions(6)
    with torch.inference_mode():
        positions(3, cpu, torch.float32)
    weight = torch.ones(6, requires_grad=True)
    (positions(3, cpu, torch.float32) * weight).sum().backward()
    for num_frames in (7, 2, 1, 7):
        assert torch.equal(positions(num_frames, cpu, torch.float32), relative_positions(num_frames, 6))
    pointer = positions(7, cpu, torch.float32).data_ptr()
    assert positions(7, cpu, torch.float32).data_ptr() == pointer  # not computed again
    assert positions(3, cpu, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_shift_is_padding_and_reading_with_other_rows(num_frames):
    x = torch.randn(2, 3, num_frames, 2 * num_frames - 1, dtype=torch.float64, requires_grad=True)
    rows = F.pad(x, (1, 0)).reshape(2, 3, 2 * num_frames, num_frames)[:, :, 1:]
    expected = rows.reshape(2, 3, num_frames, 2 * num_frames - 1)[..., :num_frames]
    shifted = relative_shift(x)
    assert torch.equal(shifted, expected)
    assert shifted.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()  # no copy
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (shifted, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("context", "style"), CONTEXTS)
def test_mask_is_the_definition(context, style):
    length, frames = torch.tensor([9, 6, 1, 0]), 9
    hidden = attention_mask(length, frames, context, style)
    assert hidden.shape == (4, 1, 1 if context == (-1, -1) else frames, frames)
    hidden = hidden.expand(4, 1, frames, frames)[:, 0]
    for item, valid in enumerate(length.tolist()):
        for query in range(frames):
            seen = [key for key in range(frames) if not hidden[item, query, key]]
            assert seen == [key for key in range(valid) if allowed(context, style, query, key)]
            assert query in seen or query >= valid  # no valid frame without a key


@pytest.mark.parametrize(("context", "style"), CONTEXTS)
def test_value_and_gradient_equal_the_literal_form(context, style):
    """Items of every length, none at all included: their frames of padding see no key and give the output's bias."""
    module = make()
    length, frames = torch.tensor([9, 4, 1, 0]), 9
    torch.manual_seed(1)
    x = torch.randn(4, frames, 12, requires_grad=True)
    valid = ~padding_mask(length, frames)
    table = torch.tensor([[allowed(context, style, i, j) for j in range(frames)] for i in range(frames)])
    outputs = run(module, x, length, context, style), literal(module, x, table & valid[:, None] & valid[:, :, None])
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)
    padded = outputs[0][~valid]
    assert torch.equal(padded, module.linear_out.bias.expand_as(padded))
    weight = torch.randn_like(x)
    variables = [x, *module.parameters()]
    gradients = [torch.autograd.grad((output * weight).sum(), variables) for output in outputs]
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-5)


def test_gradient():
    module = make(4, 2).double()
    length = torch.tensor([3, 2])
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        positions = relative_positions(3, 4, dtype=torch.float64)
        hidden, padding = attention_mask(length, 3, (1, 1)), padding_mask(length, 3)
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, parameters, (x, positions, hidden, padding))

    assert torch.autograd.gradcheck(function, (x, *module.parameters()))


def test_dropout_in_training_only():
    module = make(dropout=0.5)
    x, length = torch.randn(2, 6, 12), torch.tensor([6, 4])
    expected = run(make(), x, length)
    assert not torch.allclose(run(module, x, length), expected)
    assert torch.equal(run(module.eval(), x, length), expected)


def test_shared_position_biases_and_names():
    module = make()
    shared = make(pos_bias=(module.pos_bias_u, module.pos_bias_v), use_bias=False)
    assert shared.pos_bias_u is module.pos_bias_u and shared.pos_bias_v is module.pos_bias_v
    linear = ["linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"]
    assert list(shared.state_dict()) == ["pos_bias_u", "pos_bias_v", *(f"{name}.weight" for name in linear)]
    assert set(module.state_dict()) - set(shared.state_dict()) == {f"{name}.bias" for name in linear[:-1]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Scores of 1e5 are beyond float16, so the block runs in bfloat16; even then no padding is seen."""
    module = make()
    module.linear_q.weight.data *= 100
    module.linear_k.weight.data *= 1000
    length = torch.tensor([9, 4])
    x = torch.randn(2, 9, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = run(module, x.to(dtype), length, (2, 1))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    y.float().square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert x.grad[1, 4:].count_nonzero() == 0

    mild = make()
    with torch.autocast("cpu", dtype=dtype):
        y = run(mild, x, length)
    torch.testing.assert_close(y.float(), run(mild, x, length), atol=0.03, rtol=0.03)


def test_width_must_be_a_multiple_of_the_heads():
    with pytest.raises(ValueError, match="^d_model must be a multiple of n_heads, got 10 and 4$"):
        make(10, 4)
