"""Conv-TasNet against torchaudio's, which has the same weights under other names, and against what must hold."""

import math

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torchaudio.models import ConvTasNet as PeerConvTasNet

from models.importers.conv_tasnet import convert, torchaudio_arguments
from modules.conv_tasnet import ENCODER_ACTIVATIONS, PADDINGS, ConvTasNet
from modules.norms import NORMS

SLOW = pytest.mark.slow
SIZES = {
    "relu": dict(
        num_sources=2, enc_kernel_size=16, enc_num_feats=24, msk_kernel_size=3, msk_num_feats=12,
        msk_num_hidden_feats=20, msk_num_layers=4, msk_num_stacks=2, msk_activate="relu",
    ),
    "sigmoid, kernel 20": dict(
        num_sources=3, enc_kernel_size=20, enc_num_feats=10, msk_kernel_size=3, msk_num_feats=6,
        msk_num_hidden_feats=8, msk_num_layers=2, msk_num_stacks=1, msk_activate="sigmoid",
    ),
    "odd kernel, one block": dict(
        num_sources=1, enc_kernel_size=7, enc_num_feats=5, msk_kernel_size=3, msk_num_feats=4,
        msk_num_hidden_feats=6, msk_num_layers=1, msk_num_stacks=1, msk_activate="relu",
    ),
}  # fmt: skip
TINY = dict(
    num_filters=8, kernel_size=4, bottleneck_channels=6, hidden_channels=10, skip_channels=5, num_blocks=3,
    num_repeats=2,
)  # fmt: skip


def make_double(**arguments) -> ConvTasNet:
    """A tiny network in float64, the same weights each time, no default left that would hide a missing operation."""
    torch.manual_seed(0)
    network = ConvTasNet(**TINY | {"mask": "sigmoid"} | arguments).double()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def build_pair(peer_arguments: dict, dtype: torch.dtype) -> tuple[PeerConvTasNet, ConvTasNet]:
    torch.manual_seed(0)
    peer = PeerConvTasNet(**peer_arguments)
    for parameter in peer.parameters():  # defaults such as a gain of one would hide a missing multiplication
        parameter.data += 0.1 * torch.randn_like(parameter)
    network = ConvTasNet(**torchaudio_arguments(peer_arguments))
    network.load_state_dict(convert(peer.state_dict())[0])
    return peer.to(dtype), network.to(dtype)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 160, 643])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("training", [True, False])
def test_output_equals_torchaudio(size, num_samples, dtype, tolerance, training):
    peer, network = build_pair(SIZES[size], dtype)
    mixture = torch.randn(2, num_samples, dtype=dtype)
    network.train(training)
    torch.testing.assert_close(network(mixture), peer(mixture[:, None]), atol=tolerance, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_gradients_equal_torchaudio(dtype, tolerance, training):
    peer, network = build_pair(SIZES["relu"], dtype)
    network.train(training)
    mixture = torch.randn(2, 643, dtype=dtype)
    weights = torch.randn(2, 2, 643, dtype=dtype)
    (peer(mixture[:, None]) * weights).sum().backward()
    (network(mixture) * weights).sum().backward()
    expected, _ = convert({name: parameter.grad for name, parameter in peer.named_parameters()})
    for name, parameter in network.named_parameters():
        gradient = expected.pop(name)
        difference = (parameter.grad - gradient).abs().max() / gradient.abs().max().clamp_min(1)
        assert difference < tolerance, f"{name}: {difference:.1e}"
    assert not expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 4_984_881),  # torchaudio
        ({"causal": True, "norm": "cumulative", "padding": "valid"}, 4_984_881),
        ({"hidden_channels": 256}, 2_603_057),  # torchaudio
        ({"num_sources": 3}, 5_050_929),  # torchaudio
        ({"skip_channels": None}, 3_474_609),  # asteroid
        ({"kernel_size": 32}, 5_066_929 - 65_664),  # naplab, less the last residual convolution that it never uses
    ],
)
def test_number_of_parameters(arguments, expected):
    with torch.device("meta"):
        network = ConvTasNet(**arguments)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("skip_channels", [5, None])
def test_state_dict_names_are_frozen(norm, skip_channels):
    """Checkpoints hold these names: a change needs a migration of old ones."""
    sizes = {"num_blocks": 2, "num_repeats": 1, "norm": norm, "skip_channels": skip_channels}
    names = ConvTasNet(**TINY | sizes).state_dict().keys()
    expected = ["encoder.weight", "decoder.weight", "separator.mask_prelu.weight"]
    for name in ["input_norm", "bottleneck", "mask_conv"]:
        expected += [f"separator.{name}.weight", f"separator.{name}.bias"]
    for block in (0, 1):
        expected += [f"separator.blocks.{block}.{name}_prelu.weight" for name in ("expand", "depthwise")]
        layers = ["expand", "expand_norm", "depthwise", "depthwise_norm"]
        # With a skip path nothing reads the last block's residual, without one the masks do.
        layers += ["residual"] if skip_channels is None else [["residual", "skip"], ["skip"]][block]
        expected += [f"separator.blocks.{block}.{name}.{kind}" for name in layers for kind in ("weight", "bias")]
    assert sorted(names) == sorted(expected)


@pytest.mark.parametrize(("kernel_size", "stride"), [(16, 8), (20, 5), (16, 16), (7, 2), (1, 1), (5, 3)])
@pytest.mark.parametrize("padding", PADDINGS)
def test_every_length_and_stride(kernel_size, stride, padding):
    framing = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    network = ConvTasNet(**TINY | framing | {"num_blocks": 1, "num_repeats": 1})
    for num_samples in [*range(1, 2 * kernel_size + 2), 100]:
        assert network(torch.randn(1, num_samples)).shape == (1, 2, num_samples)


@pytest.mark.parametrize("kernel_size", [4, 7])
@pytest.mark.parametrize("norm", NORMS)
def test_centered_is_valid_between_zeros(norm, kernel_size):
    centered = make_double(norm=norm, kernel_size=kernel_size, stride=2)
    valid = make_double(norm=norm, kernel_size=kernel_size, stride=2, padding="valid")
    mixture = torch.randn(2, 100 + kernel_size % 2, dtype=torch.float64)
    half = kernel_size // 2
    expected = valid(F.pad(mixture, (half, half)))[..., half:-half]
    torch.testing.assert_close(centered(mixture), expected, atol=1e-12, rtol=0)


def test_valid_leaves_out_an_incomplete_last_frame():
    network = make_double(padding="valid")  # frames of 4 samples, 2 apart
    mixture = torch.randn(1, 103, dtype=torch.float64)
    assert network(mixture)[..., 102:].eq(0).all()
    torch.testing.assert_close(network(mixture)[..., :102], network(mixture[:, :102]))
    torch.testing.assert_close(network(mixture[:, :3]), network(F.pad(mixture[:, :3], (0, 1)))[..., :3])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "arguments", [{"norm": "global"}, {"norm": "cumulative", "causal": True}, {"norm": "per_frame", "padding": "valid"}]
)
def test_batch_size_does_not_matter(arguments, training):
    network = make_double(**arguments).train(training)
    mixture = torch.randn(3, 101, dtype=torch.float64)
    alone = torch.cat([network(item[None]) for item in mixture])
    torch.testing.assert_close(network(mixture), alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_samples", [1, 100, 101])
@pytest.mark.parametrize("norm", ["cumulative", "per_frame"])
def test_what_follows_a_recording_does_not_matter_to_a_causal_network(norm, num_samples, training):
    network = make_double(norm=norm, causal=True).train(training)
    mixture = torch.randn(2, num_samples, dtype=torch.float64)
    padded = network(F.pad(mixture, (0, 57)))[..., :num_samples]
    torch.testing.assert_close(padded, network(mixture), atol=1e-12, rtol=0)


def test_trailing_zeros_matter_to_the_global_norm():
    """It averages over all frames, silent ones included: so recordings of different lengths are not padded to one
    batch for evaluation."""
    network = make_double()
    mixture = torch.randn(2, 101, dtype=torch.float64)
    padded = network(F.pad(mixture, (0, 100)))[..., :101]
    assert (padded - network(mixture)).abs().max() > 1e-3


CAUSAL = {
    "cumulative": {"norm": "cumulative"},
    "per frame, even kernel": {"norm": "per_frame", "block_kernel_size": 2},
    "no skip": {"norm": "per_frame", "skip_channels": None, "mask": "softmax"},
    "valid": {"norm": "cumulative", "padding": "valid"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_latency_of_a_causal_network_is_the_kernel_size(name, training):
    """An output sample t depends on the inputs before t + kernel_size, and on the last of these."""
    network = make_double(**CAUSAL[name], causal=True).train(training)  # frames of 4 samples, 2 apart
    mixture = torch.randn(1, 120, dtype=torch.float64)
    changed = mixture.clone()
    changed[:, 79:] = torch.randn(41)
    difference = (network(changed) - network(mixture)).abs().amax((0, 1))
    assert difference[:76].max() == 0
    assert difference[76] > 1e-6

    mixture.requires_grad_()
    (gradient,) = torch.autograd.grad(network(mixture)[..., 76].square().sum(), mixture)
    assert gradient[:, 80:].eq(0).all()
    assert (gradient[:, 79] != 0).all()


@pytest.mark.parametrize("arguments", [{"norm": "per_frame"}, {"norm": "global", "causal": True}])
def test_other_networks_do_look_ahead(arguments):
    network = make_double(**arguments)
    mixture = torch.randn(1, 120, dtype=torch.float64)
    changed = mixture.clone()
    changed[:, 79:] = torch.randn(41)
    assert (network(changed) - network(mixture))[..., 70:76].abs().max() > 1e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_kernel_size", [1, 2, 3, 4])
def test_receptive_field(block_kernel_size, causal, training):
    """1 + R (P - 1) (2^X - 1) frames; the norm of single frames adds none."""
    network = make_double(norm="per_frame", causal=causal, block_kernel_size=block_kernel_size, mask="linear")
    before, total = (2 * size * (2**3 - 1) for size in ((block_kernel_size - 1) // 2, block_kernel_size - 1))
    features = torch.randn(1, 8, 120, dtype=torch.float64, requires_grad=True)
    masks = network.train(training).separator(features)
    (gradient,) = torch.autograd.grad(masks[..., 60].square().sum(), features)
    seen = gradient.abs().sum((0, 1)).nonzero().flatten().tolist()
    first = 60 - (total if causal else before)
    assert (seen[0], seen[-1]) == (first, first + total)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_silence(norm, causal):
    network = ConvTasNet(**TINY, norm=norm, causal=causal)
    output = network(torch.zeros(1, 50))
    assert output.eq(0).all()
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("mask", "gain"), [("relu", 0.0), ("sigmoid", 1 / (1 + math.exp(0.5))), ("softmax", 1 / 3), ("linear", -0.5)]
)
@pytest.mark.parametrize("encoder_activation", ENCODER_ACTIVATIONS)
def test_masks_multiply_the_features(mask, gain, encoder_activation):
    """A mask convolution that gives -0.5 everywhere leaves of the network: filter bank, gain, synthesis."""
    network = make_double(mask=mask, encoder_activation=encoder_activation, num_sources=3)
    network.separator.mask_conv.weight.data.fill_(0)
    network.separator.mask_conv.bias.data.fill_(-0.5)
    mixture = torch.randn(2, 100, dtype=torch.float64)
    features = network.encoder(mixture[:, None])
    features = features.relu() if encoder_activation == "relu" else features
    expected = gain * network.decoder(features).expand(-1, 3, -1)
    torch.testing.assert_close(network(mixture), expected, atol=1e-12, rtol=0)


def test_output_follows_the_level_of_the_input():
    """The input norm takes the level out of what the masks see, and the masks are multiplied with it again."""
    torch.manual_seed(0)
    network = ConvTasNet(**TINY).double()
    mixture = torch.randn(1, 200, dtype=torch.float64)
    torch.testing.assert_close(network(100 * mixture), 100 * network(mixture), atol=1e-6, rtol=1e-6)


def test_sources_are_not_mixed_up_in_the_decoder():
    """A source whose masks are zero is silent, and only that one, in every item of the batch."""
    torch.manual_seed(0)
    network = ConvTasNet(**TINY | {"num_sources": 3})
    convolution = network.separator.mask_conv
    convolution.weight.data[8:16] = 0  # rows of source 1: (C, N) in this order
    convolution.bias.data[8:16] = 0
    energy = network(torch.randn(2, 50)).square().sum(-1)  # (B, C)
    assert (energy > 0).tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_keeps_the_waveform_in_float32(norm):
    torch.manual_seed(0)
    network = ConvTasNet(**TINY, norm=norm)
    mixture = torch.randn(2, 203)
    expected = network(mixture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(mixture)
    assert output.dtype == torch.float32
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_wrong_arguments_are_named_together():
    with pytest.raises(ValueError, match="num_filters .* 0.*; num_repeats .* 1.5.*; norm .*global.* 'layer'"):
        ConvTasNet(num_filters=0, num_repeats=1.5, norm="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": "16"}, "kernel_size must be a whole number"),
        ({"stride": 0}, "stride must be a whole number"),
        ({"stride": 17}, "stride must not exceed kernel_size 16"),
        ({"skip_channels": 0}, "skip_channels must be a whole number"),
        ({"mask": "tanh"}, "mask must be one of linear, relu, sigmoid, softmax, got 'tanh'"),
        ({"padding": "same"}, "padding must be one of centered, valid, got 'same'"),
        ({"encoder_activation": "prelu"}, "encoder_activation must be one of linear, relu, got 'prelu'"),
        ({"causal": "yes"}, "causal must be true or false, got 'yes'"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        ConvTasNet(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(5,), (1, 1, 5), (1, 0)])
def test_wrong_input(shape):
    with pytest.raises(ValueError, match="mixture must have shape"):
        ConvTasNet(**TINY)(torch.zeros(shape))


ONNX_CASES = {
    "tiny": {"norm": "per_frame", "causal": True, "num_blocks": 1, "num_repeats": 1},
    "global": {"norm": "global", "mask": "relu"},
    "causal": {"norm": "cumulative", "causal": True, "mask": "sigmoid", "kernel_size": 7, "stride": 2},
    "per frame": {"norm": "per_frame", "padding": "valid", "mask": "softmax", "skip_channels": None,
                  "encoder_activation": "relu"},
    "causal, valid": {"norm": "cumulative", "padding": "valid", "causal": True, "mask": "linear",
                      "block_kernel_size": 2},
}  # fmt: skip


@SLOW
@pytest.mark.parametrize("name", ONNX_CASES)
@pytest.mark.filterwarnings("ignore")
def test_onnx_at_any_length(name):
    """Silence too: the exporter's optimiser drops small constants, an epsilon under a root for one."""
    network = make_double(**ONNX_CASES[name]).float().eval()
    shapes = ({1: torch.export.Dim.DYNAMIC},)
    options = {"input_names": ["mixture"], "opset_version": 18, "dynamo": True, "verbose": False}
    program = torch.onnx.export(network, (torch.randn(1, 100),), dynamic_shapes=shapes, **options)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for num_samples in (3, 57, 100, 203):
        for mixture in (torch.randn(1, num_samples), torch.zeros(1, num_samples)):
            (output,) = session.run(None, {"mixture": mixture.numpy()})
            torch.testing.assert_close(torch.from_numpy(output), network(mixture), atol=1e-5, rtol=0)
