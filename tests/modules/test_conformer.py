"""The encoder: NeMo's names and sizes, padding and batch invariance, what a frame sees, dropped layers, precision."""

import copy
import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from modules.conformer import ConformerConvolution, ConformerEncoder, ConformerFeedForward, layer_drop_probs
from modules.conformer_layer import make_conv_norm
from modules.subsampling import padding_mask
from tests.modules.device_waits import NoValueIsAsked

TINY = {
    "feat_in": 10,
    "n_layers": 2,
    "d_model": 12,
    "n_heads": 3,
    "subsampling_conv_channels": 4,
    "ff_expansion_factor": 2,
    "conv_kernel_size": 5,
    "dropout": 0.0,
    "dropout_pre_encoder": 0.0,
    "dropout_att": 0.0,
}
CAUSAL = {"causal_downsampling": True, "conv_context_size": "causal"}
CHUNKED = {"att_context_style": "chunked_limited"}
VARIANTS = {
    "default": {},
    "limited": {"att_context_size": [2, 1]},
    "chunked": CHUNKED | {"att_context_size": [4, 1]},
    "causal": CAUSAL | {"att_context_size": [3, 0]},
    "asymmetric convolution": {"conv_context_size": [1, 3]},
    "layer_norm": {"conv_norm_type": "layer_norm"},
    "fused_batch_norm": {"conv_norm_type": "fused_batch_norm"},
    "tied, no bias, no scaling": {"untie_biases": False, "use_bias": False, "xscaling": False},
    "factor 4, projected": {"subsampling_factor": 4, "feat_out": 7},
    "factor 2, channels as wide as the model": {"subsampling_factor": 2, "subsampling_conv_channels": -1},
    "factor 1": {"subsampling_factor": 1, "att_context_size": None},
}
LAYER = """
norm_feed_forward1.weight norm_feed_forward1.bias
feed_forward1.linear1.weight feed_forward1.linear1.bias feed_forward1.linear2.weight feed_forward1.linear2.bias
norm_conv.weight norm_conv.bias conv.pointwise_conv1.weight conv.pointwise_conv1.bias
conv.depthwise_conv.weight conv.depthwise_conv.bias conv.batch_norm.weight conv.batch_norm.bias
conv.batch_norm.running_mean conv.batch_norm.running_var conv.batch_norm.num_batches_tracked
conv.pointwise_conv2.weight conv.pointwise_conv2.bias
norm_self_att.weight norm_self_att.bias self_attn.pos_bias_u self_attn.pos_bias_v
self_attn.linear_q.weight self_attn.linear_q.bias self_attn.linear_k.weight self_attn.linear_k.bias
self_attn.linear_v.weight self_attn.linear_v.bias self_attn.linear_out.weight self_attn.linear_out.bias
self_attn.linear_pos.weight norm_feed_forward2.weight norm_feed_forward2.bias
feed_forward2.linear1.weight feed_forward2.linear1.bias feed_forward2.linear2.weight feed_forward2.linear2.bias
norm_out.weight norm_out.bias
"""


def make(**arguments) -> ConformerEncoder:
    """In evaluation mode, and with no statistics, gain or bias at its trivial initial value."""
    torch.manual_seed(0)
    encoder = ConformerEncoder(**TINY | arguments).eval()
    for name, value in encoder.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.dtype.is_floating_point and ("norm" in name or "pos_bias" in name):
            value.add_(0.3 * torch.randn_like(value))
    return encoder


def batch(lengths: list[int], feat_in: int = 10) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(len(lengths), feat_in, max(lengths)), torch.tensor(lengths)  # what is behind an end is not zero


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_padding_and_batch_size_do_not_matter(arguments):
    encoder = make(**arguments)
    features, lengths = batch([67, 40, 9, 1])
    with torch.no_grad():
        encoded, frames = encoder(features, lengths)
        assert encoded.shape == (4, arguments.get("feat_out", 12), int(frames.max()))
        assert encoded.isfinite().all() and frames.dtype == torch.int64
        for item, length in enumerate(lengths.tolist()):
            alone, count = encoder(features[item : item + 1, :, :length], lengths[item : item + 1])
            assert count == frames[item] == alone.shape[2]
            torch.testing.assert_close(encoded[item : item + 1, :, :count], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["instance_norm", "group_norm3"])
def test_norms_over_time_count_padding(norm):
    """As NeMo's do: alike in any batch of the same number of frames, but not padded further."""
    encoder = make(conv_norm_type=norm)
    features, lengths = batch([64, 40])
    with torch.no_grad():
        encoded, frames = encoder(features, lengths)
        alone, _ = encoder(features[1:], lengths[1:])
        further, _ = encoder(nn.functional.pad(features, (0, 32)), lengths)
    torch.testing.assert_close(encoded[1:], alone, atol=1e-5, rtol=0)
    assert (further - nn.functional.pad(encoded, (0, 4)))[1, :, : frames[1]].abs().max() > 1e-3


@pytest.mark.parametrize(("norm", "groups"), [("instance_norm", 12), ("group_norm4", 4), ("layer_norm", None)])
def test_convolution_norms_are_their_formulas(norm, groups):
    module = make_conv_norm(norm, 12)
    x = torch.randn(2, 12, 7)
    over = x.unflatten(1, (groups, -1)) if groups else x[:, None]  # (B, groups, C / groups, T)
    axes = (2, 3) if groups else 2
    expected = (over - over.mean(axes, keepdim=True)) / (over.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(module(x), expected.flatten(1, 2), atol=1e-5, rtol=0)


def test_fused_batch_norm_is_a_gain_and_a_bias():
    module = make_conv_norm("fused_batch_norm", 3)
    module.load_state_dict({"weight": torch.tensor([1.0, 2.0, 3.0]), "bias": torch.tensor([0.0, 1.0, -1.0])})
    expected = torch.tensor([1.0, 3.0, 2.0])[:, None].expand(1, 3, 4)
    assert torch.equal(module(torch.ones(1, 3, 4)), expected)


@pytest.mark.parametrize("context", [(2, 2), (4, 0), (1, 3)])
def test_convolution_sees_its_context_and_no_padding(context):
    module = ConformerConvolution(d_model=4, kernel_size=5, context=context).eval()
    x = torch.randn(1, 12, 4, requires_grad=True)
    padding = padding_mask(torch.tensor([9]), 12)
    (gradient,) = torch.autograd.grad(module(x, padding)[0, 6].square().sum(), x)
    seen = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == list(range(6 - context[0], min(6 + context[1] + 1, 9)))


def test_feed_forward_formula():
    module = ConformerFeedForward(d_model=3, d_ff=5)
    x = torch.randn(2, 3)
    inner = x @ module.linear1.weight.T + module.linear1.bias
    expected = (inner * inner.sigmoid()) @ module.linear2.weight.T + module.linear2.bias
    torch.testing.assert_close(module(x), expected)


def test_layer_computes_attention_before_the_convolution():
    layer, (x, length) = make().layers[0], (torch.randn(2, 6, 12), torch.tensor([6, 4]))
    positions, padding = torch.randn(1, 11, 12), padding_mask(length, 6)
    hidden = padding[:, None, None]
    y = x + layer.feed_forward1(layer.norm_feed_forward1(x)) / 2
    y = y + layer.self_attn(layer.norm_self_att(y), positions, hidden, padding)
    y = y + layer.conv(layer.norm_conv(y), padding)
    y = layer.norm_out(y + layer.feed_forward2(layer.norm_feed_forward2(y)) / 2)
    torch.testing.assert_close(layer(x, positions, hidden, padding), y)


def seen_frames(encoder: ConformerEncoder, frame: int, num_frames: int = 96) -> list[int]:
    """Mel frames on which an output frame depends, by gradient; those without one also change no value."""
    features = torch.randn(1, 10, num_frames, dtype=torch.float64, requires_grad=True)
    length = torch.tensor([num_frames])
    encoded = encoder(features, length)[0][0, :, frame]
    (gradient,) = torch.autograd.grad(encoded.square().sum(), features)
    seen = gradient[0].abs().sum(0) > 0
    other = torch.where(seen, features, torch.randn_like(features))
    torch.testing.assert_close(encoder(other, length)[0][0, :, frame], encoded, atol=1e-12, rtol=0)
    return seen.nonzero().flatten().tolist()


@pytest.mark.parametrize("left", [-1, 3])
def test_causal_encoder_sees_no_later_frame(left):
    encoder = make(**CAUSAL, att_context_size=[left, 0]).double()
    for frame in (0, 5, 9):
        assert max(seen_frames(encoder, frame)) == 8 * frame


def test_chunks_see_to_their_end_and_no_further():
    """Chunks of 3 with one chunk before it: two layers of attention reach two chunks back, the convolution 4 frames."""
    encoder = make(**CAUSAL, **CHUNKED, att_context_size=[3, 2]).double()
    for frame in (0, 2, 3, 7, 8):
        seen = seen_frames(encoder, frame)
        assert max(seen) == 8 * (frame // 3 * 3 + 2)
    no_convolution = make(causal_downsampling=True, conv_kernel_size=1, **CHUNKED, att_context_size=[3, 2]).double()
    assert min(seen_frames(no_convolution, 11)) == 8 * 3 - 14  # 14: what a frame of the sub-sampling looks back


def test_look_ahead_of_each_layer_adds_up():
    encoder = make(causal_downsampling=True, conv_context_size=[3, 1], att_context_size=[-1, 2]).double()
    assert max(seen_frames(encoder, 2)) == 8 * (2 + 2 * (2 + 1))


@pytest.mark.parametrize(
    ("arguments", "n_layers", "encoder_size", "pre_encode_size", "layer_size"),
    [
        ({"d_model": 176, "n_heads": 4}, 16, 12_600_240, 590_000, 750_640),
        ({"d_model": 256, "n_heads": 4}, 16, 26_128_640, 794_880, 1_583_360),
        ({}, 17, 108_762_112, 1_450_496, 6_312_448),
        ({"d_model": 1024, "use_bias": False}, 24, 607_306_752, 2_761_728, 25_189_376),
    ],
    ids=["small", "medium", "large", "xlarge"],
)
def test_sizes_are_those_of_nemo(arguments, n_layers, encoder_size, pre_encode_size, layer_size):
    with torch.device("meta"):
        encoder = ConformerEncoder(feat_in=80, n_layers=1, **arguments)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (encoder, encoder.pre_encode, encoder.layers[0])]
    assert sizes == [pre_encode_size + layer_size, pre_encode_size, layer_size]
    assert pre_encode_size + n_layers * layer_size == encoder_size
    assert inspect.signature(ConformerEncoder).parameters["n_layers"].default == 17


def test_names_are_those_of_nemo_and_in_its_order():
    names = list(make(n_layers=2, feat_out=7).state_dict())
    pre_encode = [name for name in names if name.startswith("pre_encode.")]
    layers = [f"layers.{layer}.{name}" for layer in range(2) for name in LAYER.split()]
    assert names == [*pre_encode, *layers, "out_proj.weight", "out_proj.bias"]
    assert [name.split(".")[1:-1] for name in pre_encode[::2]] == [["out"], *(["conv", i] for i in "02356")]
    assert list(make(subsampling_factor=1).pre_encode.state_dict()) == ["weight", "bias"]


def test_tied_biases_are_one_parameter():
    tied, untied = make(untie_biases=False), make()
    first, second = (layer.self_attn for layer in copy.deepcopy(tied).layers)
    assert first.pos_bias_u is second.pos_bias_u and first.pos_bias_v is second.pos_bias_v
    assert list(tied.state_dict()) == list(untied.state_dict())
    assert untied.layers[0].self_attn.pos_bias_u is not untied.layers[1].self_attn.pos_bias_u
    features, lengths = batch([24])
    tied(features, lengths)[0].square().sum().backward()
    assert tied.layers[0].self_attn.pos_bias_u.grad.abs().sum() > 0
    fresh = ConformerEncoder(**TINY, untie_biases=False).layers[1].self_attn
    assert fresh.pos_bias_u.count_nonzero() == fresh.pos_bias_v.count_nonzero() == 0


def test_scaling_is_by_the_root_of_the_width():
    encoder = make(xscaling=False)
    x, length = torch.randn(1, 4, 12), torch.tensor([4])
    scaled = make()
    torch.testing.assert_close(scaled.contextualise(x, length), encoder.contextualise(x * math.sqrt(12), length))


@pytest.mark.parametrize("name", ["dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att"])
def test_each_dropout_acts_in_training_only(name):
    encoder = make(conv_norm_type="layer_norm", **{name: 0.5})
    inputs = batch([40])
    evaluated = encoder(*inputs)[0]
    assert torch.equal(encoder(*inputs)[0], evaluated)
    assert not torch.allclose(encoder.train()(*inputs)[0], evaluated, atol=1e-3)


def test_layer_drop_probs():
    assert layer_drop_probs(4, 0.5, "uniform", 1) == [0, 0.5, 0.5, 0.5]
    assert layer_drop_probs(4, 0.75, "linear", 1) == [0, 0.25, 0.5, 0.75]
    assert layer_drop_probs(5, 0.6, "linear", 3) == [0, 0, 0, 0.3, 0.6]
    assert layer_drop_probs(3, 0.5, "linear", 3) == [0, 0, 0]


def test_stochastic_depth():
    """A layer is left out as often as it should, else scaled so that the mean stays; never in evaluation."""
    torch.manual_seed(0)
    share = 0.3
    encoder = make(conv_norm_type="layer_norm", stochastic_depth_drop_prob=share)
    x, length = torch.randn(1, 2, 12), torch.tensor([2])
    with torch.no_grad():
        evaluated = encoder.contextualise(x, length)[0]
        before = ConformerEncoder(**TINY | {"conv_norm_type": "layer_norm", "n_layers": 1}).eval()
        before.load_state_dict({k: v for k, v in encoder.state_dict().items() if not k.startswith("layers.1.")})
        without = before.contextualise(x, length)[0]
        encoder.train()
        outputs = torch.stack([encoder.contextualise(x, length)[0] for _ in range(150)])
    dropped = (outputs - without).flatten(1).abs().amax(1) < 1e-5
    kept = ((outputs - without) * (1 - share) - (evaluated - without)).flatten(1).abs().amax(1) < 1e-5
    assert torch.all(dropped ^ kept)
    assert abs(dropped.double().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / 150)


def test_every_weight_has_a_gradient_though_layers_are_dropped():
    torch.manual_seed(0)
    encoder = make(stochastic_depth_drop_prob=0.99, stochastic_depth_mode="uniform").train()
    encoder(*batch([40, 30]))[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())
    assert encoder.layers[1].norm_out.weight.grad.count_nonzero() == 0
    assert encoder.layers[0].norm_out.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_nothing_waits_for_the_device(arguments):
    encoder, inputs = make(**arguments).train(), batch([40, 24])
    with NoValueIsAsked():
        encoder(*inputs)[0].square().sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoValueIsAsked():
        inputs[1].max().item()


def test_masks_and_positions_are_made_once():
    encoder = make(n_layers=3, att_context_size=[2, 2])
    given = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1:]))
    encoder(*batch([40, 24]))
    assert all(x is y for inputs in given[1:] for x, y in zip(inputs, given[0], strict=True))
    assert encoder.positions(5, torch.device("cpu"), torch.float32).data_ptr() == given[0][0].data_ptr()


def test_trains_after_inference_mode():
    """Validation comes first in a run with a sanity check; what it cached must be good for a backward pass."""
    encoder, inputs = make(), batch([40, 24])
    with torch.inference_mode():
        expected = encoder(*inputs)[0]
    encoded = encoder(*inputs)[0]
    encoded.square().sum().backward()
    torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "arguments", [{}, VARIANTS["chunked"], VARIANTS["causal"]], ids=["default", "chunked", "causal"]
)
def test_half_precision(dtype, arguments):
    """Autocast in training, with an item that is all padding, and a network of half weights."""
    features, lengths = batch([67, 40, 0])
    expected = make(**arguments)(features, lengths)[0]
    encoder = make(**arguments)
    with torch.autocast("cpu", dtype=dtype):
        encoded, frames = encoder(features, lengths)
        trained = encoder.train()(features, lengths)[0]
    valid = ~padding_mask(frames, encoded.shape[2])[:, None]
    torch.testing.assert_close(encoded.float() * valid, expected * valid, atol=0.2, rtol=0.05)
    trained.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())
    half = make(**arguments).to(dtype)(features.to(dtype), lengths)[0]
    assert half.dtype == dtype
    torch.testing.assert_close(half.float() * valid, expected * valid, atol=0.2, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subsampling": "vggnet"}, "subsampling must be dw_striding, the only one there is, got 'vggnet'"),
        ({"subsampling_factor": 6}, "subsampling_factor must be a power of two, got 6"),
        ({"subsampling_factor": 0}, "subsampling_factor must be a whole number of at least 1, got 0"),
        ({"self_attention_model": "abs_pos"}, "self_attention_model must be rel_pos, the only one there is, got 'abs"),
        ({"n_heads": 5}, "d_model must be a multiple of n_heads, got 12 and 5"),
        ({"n_heads": 3, "d_model": 9}, "d_model must be even, half sines and half cosines, got 9"),
        ({"n_layers": True}, "n_layers must be a whole number of at least 1, got True"),
        ({"dropout_att": 1.0}, r"dropout_att must be in \[0, 1\), got 1.0"),
        ({"att_context_style": "local"}, "att_context_style must be one of regular, chunked_limited, got 'local'"),
        ({"att_context_size": [1, 2, 3]}, r"att_context_size must be \[left, right\], .* at least -1, got \[1, 2, 3\]"),
        ({"att_context_size": [[4, 1], [8, 1]]}, r"att_context_size must be \[left, right\]"),
        ({"att_context_size": 7}, r"att_context_size must be \[left, right\]"),
        ({"att_context_size": [-2, 0]}, r"att_context_size must be \[left, right\]"),
        (CHUNKED | {"att_context_size": [3, 1]}, "att_context_size must have right >= 0 and left a multiple of right"),
        (CHUNKED | {"att_context_size": [4, -1]}, "att_context_size must have right >= 0 and left a multiple of right"),
        ({"conv_kernel_size": 4}, "conv_kernel_size must be odd, got 4"),
        ({"conv_context_size": [2, 1]}, r"conv_context_size must sum to conv_kernel_size - 1 \(4\), got \[2, 1\]"),
        ({"conv_context_size": "right"}, r"conv_context_size must be \[left, right\], .* at least 0, got 'right'"),
        ({"conv_norm_type": "rms"}, "conv_norm_type must be one of batch_norm, .*, group_normN, got 'rms'"),
        ({"conv_norm_type": "group_norm5"}, "conv_norm_type must have groups that divide the 12 channels, got 'group"),
        ({"stochastic_depth_mode": "cosine"}, "stochastic_depth_mode must be linear or uniform, got 'cosine'"),
        ({"stochastic_depth_drop_prob": 1}, r"stochastic_depth_drop_prob must be in \[0, 1\), got 1"),
        ({"stochastic_depth_start_layer": 3}, r"stochastic_depth_start_layer must be from 1 to n_layers \(2\), got 3"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**arguments)


def test_features_of_another_width_are_named():
    with pytest.raises(ValueError, match=r"^features must have shape \(batch, 10, frames\), got \(1, 40, 10\)$"):
        make()(torch.zeros(1, 40, 10), torch.tensor([40]))
