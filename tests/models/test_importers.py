"""Importers of public Conv-TasNets: torchaudio's real network, asteroid's names and packages, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchaudio.models import ConvTasNet as TorchaudioConvTasNet

from models.checkpoint import read_plain
from models.conv_tasnet import ConvTasNet as System
from models.importers.conv_tasnet import asteroid_arguments, convert, torchaudio_arguments
from modules.conv_tasnet import ConvTasNet

GOLDEN = Path(__file__).parents[1] / "golden" / "conv_tasnet"
SIZES = dict(
    num_sources=3, enc_kernel_size=10, enc_num_feats=12, msk_num_feats=6, msk_num_hidden_feats=8, msk_num_layers=2,
    msk_num_stacks=2,
)  # fmt: skip
TINY = dict(
    num_filters=8, kernel_size=4, bottleneck_channels=5, hidden_channels=6, num_blocks=2, num_repeats=2
)  # fmt: skip


def torchaudio_network(**arguments) -> TorchaudioConvTasNet:
    torch.manual_seed(0)
    network = TorchaudioConvTasNet(**SIZES | arguments).double()
    for parameter in network.parameters():  # a gain of one would hide a norm that went elsewhere
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def asteroid_state(*, skip_channels: int | None, causal: bool) -> dict[str, torch.Tensor]:
    """A state dict under asteroid's names, as its network of TINY's sizes has it."""
    torch.manual_seed(0)
    sizes = {"expand": (6, 5, 1), "depthwise": (6, 1, 3), "residual": (5, 6, 1)}
    if skip_channels:
        sizes["skip"] = (skip_channels, 6, 1)
    names = {"expand": "shared_block.0", "depthwise": "shared_block.3.0" if causal else "shared_block.3"}
    names |= {"residual": "res_conv", "skip": "skip_conv"}
    shapes = {"encoder.filterbank._filters": (8, 1, 4), "decoder.filterbank._filters": (8, 1, 4)}
    shapes |= {"masker.bottleneck.0.gamma": (8,), "masker.bottleneck.0.beta": (8,)}
    shapes |= {"masker.bottleneck.1.weight": (5, 8, 1), "masker.bottleneck.1.bias": (5,)}
    for block in range(4):
        prefix = f"masker.TCN.{block}"
        for role, shape in sizes.items():
            shapes[f"{prefix}.{names[role]}.weight"] = shape
            shapes[f"{prefix}.{names[role]}.bias"] = shape[:1]
        shapes |= {f"{prefix}.shared_block.{index}.weight": (1,) for index in (1, 4)}
        shapes |= {f"{prefix}.shared_block.{index}.{leaf}": (6,) for index in (2, 5) for leaf in ("gamma", "beta")}
    shapes |= {"masker.mask_net.0.weight": (1,)}
    shapes |= {"masker.mask_net.1.weight": (16, skip_channels or 5, 1), "masker.mask_net.1.bias": (16,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("mask", ["relu", "sigmoid"])
def test_torchaudio_gives_the_same_output(mask):
    peer = torchaudio_network(msk_activate=mask)
    state, source = convert(peer.state_dict())
    network = ConvTasNet(**torchaudio_arguments(SIZES | {"msk_activate": mask})).double()
    network.load_state_dict(state)
    assert source == "torchaudio"
    mixture = torch.randn(2, 203, dtype=torch.float64)
    torch.testing.assert_close(network(mixture), peer(mixture[:, None]), atol=1e-9, rtol=0)


def test_torchaudio_defaults_are_those_of_the_peer():
    """An argument that is not given means torchaudio's default (a sigmoid), not ours."""
    with torch.device("meta"):
        peer, network = TorchaudioConvTasNet(), ConvTasNet(**torchaudio_arguments({}))
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in convert(peer.state_dict())[0].items()
    }
    assert torchaudio_arguments({})["mask"] == asteroid_arguments({"n_src": 2})["mask"] == "sigmoid"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("ast_*.safetensors")), ids=lambda path: path.stem)
def test_names_of_a_stored_asteroid_network(path):
    with safe_open(path, "pt") as file:
        arguments = asteroid_arguments(json.loads(file.metadata()["cfg"]))
        names = [name for name in file.keys() if name.startswith("state_dict.")]  # noqa: SIM118 - no mapping
        peer = {name.removeprefix("state_dict."): file.get_tensor(name) for name in names}
    state, source = convert(peer)
    ConvTasNet(**arguments).load_state_dict(state)  # strict: none too many, none missing
    assert source == "asteroid"
    assert len(peer) - len(state) == 2  # weight and bias of the last residual branch


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("skip_channels", [7, None])
def test_asteroid_with_and_without_skip_path(skip_channels, causal):
    peer = asteroid_state(skip_channels=skip_channels, causal=causal)
    state, _ = convert(peer)
    norm = "cumulative" if causal else "global"
    network = ConvTasNet(**TINY, skip_channels=skip_channels, causal=causal, norm=norm)
    network.load_state_dict(state)
    last = "separator.blocks.3.residual.weight"
    assert (last in state) == (skip_channels is None)  # read there by the mask convolution
    assert torch.equal(state["separator.blocks.2.depthwise_norm.bias"], peer["masker.TCN.2.shared_block.5.beta"])
    assert torch.equal(state["separator.blocks.1.residual.weight"], peer["masker.TCN.1.res_conv.weight"])


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model."])
@pytest.mark.parametrize("source", ["torchaudio", "asteroid"])
def test_prefixes_are_taken_off(source, prefix):
    peer = torchaudio_network().state_dict()
    if source == "asteroid":
        peer = asteroid_state(skip_channels=7, causal=False)
    expected, _ = convert(peer)
    state, found = convert({prefix + name: tensor for name, tensor in peer.items()})
    assert found == source
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_package_that_asteroid_serialises(tmp_path):
    """As its `serialize` writes it; read back as plain data."""
    arguments = {
        "fb_name": "FreeFB", "n_filters": 8, "kernel_size": 4, "stride": 2, "sample_rate": 16000, "in_chan": 8,
        "out_chan": 8, "bn_chan": 5, "hid_chan": 6, "skip_chan": 0, "conv_kernel_size": 3, "n_blocks": 2,
        "n_repeats": 2, "n_src": 2, "norm_type": "cLN", "mask_act": "softmax", "causal": True,
        "encoder_activation": "relu",
    }  # fmt: skip
    package = {
        "model_name": "ConvTasNet",
        "state_dict": asteroid_state(skip_channels=None, causal=True),
        "model_args": arguments,
        "infos": {"software_versions": {"torch_version": torch.__version__}},
    }
    torch.save(package, tmp_path / "model.pth")
    content = read_plain(tmp_path / "model.pth")
    state, source = convert(content)
    ours = asteroid_arguments(content["model_args"])
    ConvTasNet(**ours).load_state_dict(state)
    assert source == "asteroid"
    expected = {"skip_channels": None, "norm": "per_frame", "mask": "softmax", "encoder_activation": "relu"}
    assert ours.items() >= (expected | {"causal": True, "padding": "valid"}).items()
    with pytest.raises(ValueError, match="weights of a DPRNNTasNet"):
        convert(content | {"model_name": "DPRNNTasNet"})


def test_axes_of_length_one_are_taken_off():
    peer = asteroid_state(skip_channels=7, causal=False)
    expected, _ = convert(peer)
    peer["masker.bottleneck.0.gamma"] = peer["masker.bottleneck.0.gamma"][None, :, None]
    peer["encoder.filterbank._filters"] = peer["encoder.filterbank._filters"].squeeze(1)
    state, _ = convert(peer)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_ours_passes_through():
    ours = ConvTasNet(**TINY).state_dict()
    for prefix in ("", "network."):
        state = {prefix + name: tensor for name, tensor in ours.items()}
        assert convert(state) == (state, "ours")
        assert convert({"state_dict": state, "epoch": 3}) == (state, "ours")


def test_unknown_names_stay_to_be_reported():
    state, _ = convert(torchaudio_network().state_dict() | {"loss.weight": torch.zeros(1)})
    assert "loss.weight" in state


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"masker.net.0.weight": 0}, {"epoch": 3, 4: None}])
def test_weights_of_something_else(content):
    with pytest.raises(ValueError, match="no weights of a Conv-TasNet.*first names are: ") as caught:
        convert(content)
    assert "\n" not in str(caught.value)


def test_what_is_no_tensor():
    with pytest.raises(ValueError, match="res_conv.bias is a str"):
        convert({"masker.TCN.0.res_conv.bias": "weights"})


def test_arguments_of_asteroid():
    ours = asteroid_arguments({"n_src": 3, "kernel_size": 20, "stride": None, "skip_chan": None, "norm_type": "cgLN"})
    assert ours["stride"] is None  # half a kernel, there as here
    assert (ours["num_sources"], ours["kernel_size"], ours["norm"]) == (3, 20, "cumulative")
    # asteroid replaces a norm that looks ahead, with a warning.
    assert asteroid_arguments({"n_src": 2, "causal": True})["norm"] == "per_frame"
    assert asteroid_arguments({"n_src": 2})["norm"] == "global"


@pytest.mark.parametrize(
    ("mapping", "arguments", "message"),
    [
        (torchaudio_arguments, {"msk_kernel_size": 5}, "msk_kernel_size 5 cannot"),
        (torchaudio_arguments, {"msk_activate": "softmax"}, "msk_activate 'softmax' has no counterpart"),
        (torchaudio_arguments, {"n_src": 2}, "n_src=2; known are num_sources"),
        (asteroid_arguments, {}, "n_src is missing"),
        (asteroid_arguments, {"n_src": 2, "norm_type": "bN"}, "norm_type 'bN' has no counterpart; known are gLN"),
        (asteroid_arguments, {"n_src": 2, "mask_act": "tanh"}, "mask_act 'tanh'"),
        (asteroid_arguments, {"n_src": 2, "fb_name": "stft"}, "fb_name 'stft'"),
        (asteroid_arguments, {"n_src": 2, "out_chan": 3}, "out_chan 3"),
        (asteroid_arguments, {"n_src": 2, "encoder_activation": ["relu"]}, "encoder_activation .'relu'."),
        (asteroid_arguments, {"n_src": 2, "padding": 8}, "padding 8"),
    ],
)
def test_arguments_without_counterpart(mapping, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        mapping(arguments)
    assert "\n" not in str(caught.value)


def test_an_asteroid_package_says_which_network_it_is_of():
    arguments = {
        "n_src": 2, "n_filters": 8, "kernel_size": 4, "stride": 2, "bn_chan": 5, "hid_chan": 6, "skip_chan": 7,
        "n_blocks": 2, "n_repeats": 2, "norm_type": "gLN", "mask_act": "relu",
    }  # fmt: skip
    package = {"model_name": "ConvTasNet", "state_dict": asteroid_state(skip_channels=7, causal=False)}
    sizes = {
        "num_filters": 8, "kernel_size": 4, "bottleneck_channels": 5, "hidden_channels": 6, "skip_channels": 7,
        "num_blocks": 2, "num_repeats": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"weights of another network; set model\.padding=valid$"):
        System(**sizes).import_weights(package | {"model_args": arguments})
    with pytest.raises(ValueError, match=r"set model\.stride=2$"):
        System(**sizes, padding="valid", stride=1).import_weights(package | {"model_args": arguments})
    state = System(**sizes, padding="valid", stride=2).import_weights(package | {"model_args": arguments})
    assert "network.encoder.weight" in state


def test_weights_without_arguments_are_taken_with_a_warning(caplog):
    System().import_weights(torchaudio_network().state_dict())
    assert (
        "torchaudio's weights do not say what they were trained with; taken for mask=relu, norm=global" in caplog.text
    )
