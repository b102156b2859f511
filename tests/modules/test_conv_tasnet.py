"""Conv-TasNet against torchaudio's, which has the same weights under other names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchaudio.models import ConvTasNet as PeerConvTasNet

from modules.conv_tasnet import ConvTasNet

GOLDEN = Path(__file__).parents[1] / "golden" / "conv_tasnet"

# torchaudio's argument -> ours; bottleneck and skip path have one width there.
PEER_ARGUMENTS = {
    "num_sources": ["num_sources"],
    "enc_kernel_size": ["kernel_size"],
    "enc_num_feats": ["num_filters"],
    "msk_kernel_size": ["block_kernel_size"],
    "msk_num_feats": ["bottleneck_channels", "skip_channels"],
    "msk_num_hidden_feats": ["hidden_channels"],
    "msk_num_layers": ["num_blocks"],
    "msk_num_stacks": ["num_repeats"],
    "msk_activate": ["mask"],
}
PEER_NAMES = {
    "mask_generator.input_norm": "separator.input_norm",
    "mask_generator.input_conv": "separator.bottleneck",
    "mask_generator.output_prelu": "separator.mask_prelu",
    "mask_generator.output_conv": "separator.mask_conv",
    "mask_generator.conv_layers": "separator.blocks",
    ".conv_layers.0": ".expand",
    ".conv_layers.1": ".expand_prelu",
    ".conv_layers.2": ".expand_norm",
    ".conv_layers.3": ".depthwise",
    ".conv_layers.4": ".depthwise_prelu",
    ".conv_layers.5": ".depthwise_norm",
    ".res_out": ".residual",
    ".skip_out": ".skip",
}
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


def our_arguments(peer_arguments: dict) -> dict:
    return {ours: value for name, value in peer_arguments.items() for ours in PEER_ARGUMENTS[name]}


def our_name(peer_name: str) -> str:
    for theirs, ours in PEER_NAMES.items():
        peer_name = peer_name.replace(theirs, ours)
    return peer_name


def build_pair(peer_arguments: dict, dtype: torch.dtype) -> tuple[PeerConvTasNet, ConvTasNet]:
    torch.manual_seed(0)
    peer = PeerConvTasNet(**peer_arguments)
    for parameter in peer.parameters():  # defaults such as a gain of one would hide a missing multiplication
        parameter.data += 0.1 * torch.randn_like(parameter)
    network = ConvTasNet(**our_arguments(peer_arguments))
    network.load_state_dict({our_name(name): value for name, value in peer.state_dict().items()})
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
    ours = dict(network.named_parameters())
    for name, parameter in peer.named_parameters():
        scale = parameter.grad.abs().max().clamp_min(1)
        difference = (ours.pop(our_name(name)).grad - parameter.grad).abs().max() / scale
        assert difference < tolerance, f"{name}: {difference:.1e}"
    assert not ours


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("ta_*.safetensors")), ids=lambda path: path.stem)
def test_golden_cases(path):
    with safe_open(path, "pt") as file:
        arguments = our_arguments(json.loads(file.metadata()["cfg"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    network = ConvTasNet(**arguments).eval()
    prefix = "state_dict."
    network.load_state_dict(
        {our_name(name.removeprefix(prefix)): tensors[name] for name in tensors if name.startswith(prefix)}
    )
    mixture = tensors["input"][:, 0]
    torch.testing.assert_close(network(mixture), tensors["output_f32"], atol=2e-5, rtol=0)
    torch.testing.assert_close(network.double()(mixture.double()), tensors["output_f64"], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("hidden_channels", "expected"), [(512, 4_984_881), (256, 2_603_057)])
def test_number_of_parameters(hidden_channels, expected):
    with torch.device("meta"):
        network = ConvTasNet(hidden_channels=hidden_channels)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_state_dict_names_are_frozen():
    """Checkpoints hold these names: a change needs a migration of old ones."""
    names = ConvTasNet(**TINY | {"num_blocks": 2, "num_repeats": 1}).state_dict().keys()
    pairs = ["expand", "expand_norm", "depthwise", "depthwise_norm", "residual", "skip"]
    expected = ["encoder.weight", "decoder.weight", "separator.mask_prelu.weight"]
    for name in ["input_norm", "bottleneck", "mask_conv"]:
        expected += [f"separator.{name}.weight", f"separator.{name}.bias"]
    for block in (0, 1):
        expected += [f"separator.blocks.{block}.{name}_prelu.weight" for name in ("expand", "depthwise")]
        for name in pairs:
            if (block, name) != (1, "residual"):  # nothing reads the last block's residual
                expected += [f"separator.blocks.{block}.{name}.{kind}" for kind in ("weight", "bias")]
    assert sorted(names) == sorted(expected)


@pytest.mark.parametrize(("kernel_size", "stride"), [(16, 8), (20, 5), (16, 16), (7, 2), (1, 1), (5, 3)])
def test_every_length_and_stride(kernel_size, stride):
    network = ConvTasNet(**TINY | {"kernel_size": kernel_size, "stride": stride})
    for num_samples in [*range(1, 2 * kernel_size + 2), 100]:
        assert network(torch.randn(1, num_samples)).shape == (1, 2, num_samples)


def test_batch_size_does_not_matter():
    torch.manual_seed(0)
    network = ConvTasNet(**TINY).double()
    mixture = torch.randn(3, 101, dtype=torch.float64)
    alone = torch.cat([network(item[None]) for item in mixture])
    torch.testing.assert_close(network(mixture), alone, atol=1e-12, rtol=0)
    # Trailing zeros, in contrast, do change the output everywhere: the global norm averages over all frames,
    # silent ones included. So recordings of different lengths are not padded to one batch for evaluation.
    padded = network(torch.nn.functional.pad(mixture, (0, 100)))[..., :101]
    assert (padded - network(mixture)).abs().max() > 1e-3


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


def test_autocast_keeps_the_waveform_in_float32():
    torch.manual_seed(0)
    network = ConvTasNet(**TINY)
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
        ({"block_kernel_size": 4}, "block_kernel_size must be odd"),
        ({"mask": "softmax"}, "mask must be one of relu, sigmoid"),
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
