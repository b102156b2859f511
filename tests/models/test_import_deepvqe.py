"""Importers of public DeepVQEs: their names, what is folded, flipped and left out, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.importers.deepvqe import arguments_of, convert
from modules.deepvqe import DeepVQE

GOLDEN = Path(__file__).parents[1] / "golden" / "deepvqe"
TINY = dict(
    num_bins=33, mic_channels=(2, 3, 4, 5), far_channels=(3, 2), decoder_channels=(5, 4, 3), gru_hidden=6,
    align_hidden=2, max_delay_frames=3, subpixel="concat", init_identity=False,
)  # fmt: skip
# Ours -> a peer's, of a network of four blocks: {0} counts from the input or the deepest block, {1} from the other end.
PEERS = {
    "rong": {"mic_encoder.": "enblock{0}.", "decoder.": "deblock{1}.", "bottleneck.": "bottle."},
    "cmy": {
        "mic_encoder.": "mic_enc{0}.", "far_encoder.": "ref_enc{0}.", "decoder.": "dec{0}.", "bottleneck.": "bottle.",
        "alignment.": "align_block.",
    },
    "richiejp": {
        "mic_encoder.": "mic_enc{0}.", "far_encoder.": "far_enc{0}.", "decoder.": "dec{1}.",
        "bottleneck.": "bottleneck.", "alignment.": "align.",
    },
}  # fmt: skip
WORDS = {
    "norm": "bn", "residual": "resblock", "skip": "skip_conv", "subpixel": "deconv", "linear": "fc",
    "mic_projection": "pconv_mic", "far_projection": "pconv_ref", "score_conv": "conv.1",
}  # fmt: skip


def network(source: str, **arguments) -> DeepVQE:
    torch.manual_seed(0)
    own = {"far_channels": (), "mask_norm": True} if source == "rong" else {}
    return DeepVQE(**TINY | own | arguments)


def peer_state(source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's weights under a peer's names, and under ours (without the temperature, which no peer stores)."""
    ours = {name: tensor for name, tensor in network(source).state_dict().items() if name != "alignment.temperature"}
    return {peer_name(name, source): as_peer(name, tensor) for name, tensor in ours.items()}, ours


def peer_name(name: str, source: str) -> str:
    block, number, rest = re.fullmatch(r"([a-z_]+\.)(?:(\d)\.)?(.+)", name).groups()
    numbers = (int(number) + 1, 4 - int(number)) if number else ()
    words = [WORDS.get(word, word) for word in rest.split(".")]
    return PEERS[source][block].format(*numbers) + ".".join(words)


def as_peer(name: str, tensor: Tensor) -> Tensor:
    return tensor.flip(-1) if name == "alignment.score_conv.weight" else tensor


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [("", None), ("module.", "state_dict"), ("_orig_mod.", "model_state_dict"), ("module._orig_mod.", "model")],
)
@pytest.mark.parametrize("source", PEERS)
def test_names(source, prefix, wrap):
    peer, ours = peer_state(source)
    content = {prefix + name: tensor for name, tensor in peer.items()}
    state, found = convert({wrap: content, "epoch": 3} if wrap else content)
    assert found == source
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("source", "theirs", "ours"),
    [
        ("rong", "deblock4.deconv.conv.bias", "decoder.0.subpixel.conv.bias"),
        ("rong", "enblock2.resblock.bn.running_var", "mic_encoder.1.residual.norm.running_var"),
        ("cmy", "dec4.skip_conv.weight", "decoder.3.skip.weight"),
        ("cmy", "align_block.pconv_ref.bias", "alignment.far_projection.bias"),
        ("richiejp", "dec1.resblock.conv.weight", "decoder.3.residual.conv.weight"),
        ("richiejp", "bottleneck.fc.bias", "bottleneck.linear.bias"),
    ],
)
def test_some_names_in_full(source, theirs, ours):
    """Written out, so that a slip above and in the importer cannot cancel."""
    peer, _ = peer_state(source)
    peer[theirs] = peer[theirs] + 1
    assert torch.equal(convert(peer)[0][ours], peer[theirs])


@pytest.mark.parametrize("source", PEERS)
def test_arguments_build_a_network_that_takes_the_weights(source):
    state, _ = convert(peer_state(source)[0])
    arguments = arguments_of(state, source)
    other = {name: TINY[name] for name in ("num_bins", "max_delay_frames", "init_identity")}
    built = DeepVQE(**arguments | other)
    report = built.load_state_dict(state, strict=False)
    assert report.missing_keys == ([] if source == "rong" else ["alignment.temperature"])
    assert report.unexpected_keys == []
    assert arguments["subpixel"] == "concat"
    assert arguments.get("align_scale") == {"rong": None, "cmy": False, "richiejp": True}[source]


def test_arguments_of_ours():
    for expected in (
        {"residual": "inner_decoder", "mask_norm": False, "far_channels": [3, 2], "align_hidden": 2},
        {"residual": "all", "mask_norm": True, "far_channels": []},
    ):
        arguments = arguments_of(network("cmy", **expected).state_dict())
        assert arguments == expected | {"mic_channels": [2, 3, 4, 5], "decoder_channels": [5, 4, 3], "gru_hidden": 6}


@pytest.mark.parametrize(("source", "last"), [("cmy", "dec4"), ("richiejp", "dec1"), ("rong", "deblock1")])
def test_norm_of_the_last_block(source, last):
    """cmy stores one that it does not use; Rong's is used."""
    peer, _ = peer_state(source)
    peer |= {f"{last}.bn.{leaf}": torch.ones(27) for leaf in ("weight", "bias", "running_mean", "running_var")}
    state, _ = convert(peer)
    assert ("decoder.3.norm.weight" in state) == arguments_of(state)["mask_norm"] == (source == "rong")
    assert "decoder.2.norm.weight" in state


def test_constants_of_the_mask_are_left_out_and_other_names_stay():
    peer, ours = peer_state("richiejp")
    state, _ = convert(peer | {"ccm.v_real": torch.ones(3), "ccm.v_imag": torch.ones(3), "loss.gain": torch.ones(1)})
    assert state.keys() - ours.keys() == {"loss.gain"}


def test_adapters_of_skip_paths_are_folded():
    """cmy adapts a skip path of other channels by a 1x1 convolution before the one that ours has too."""
    torch.manual_seed(1)
    adapt, skip = torch.nn.Conv2d(7, 4, 1).double(), torch.nn.Conv2d(4, 4, 1).double()
    peer, _ = peer_state("cmy")
    for name, layer in (("skip_adapt3", adapt), ("dec3.skip_conv", skip)):
        peer |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.state_dict().items()}
    state, _ = convert(peer)
    x = torch.randn(2, 7, 5, 3, dtype=torch.float64)
    folded = torch.nn.functional.conv2d(x, state["decoder.2.skip.weight"], state["decoder.2.skip.bias"])
    torch.testing.assert_close(folded, skip(adapt(x)), atol=1e-12, rtol=0)
    assert not any("adapt" in name for name in state)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*aec*.safetensors")), ids=lambda path: path.stem)
def test_names_of_a_stored_network(path):
    with safe_open(path, "pt") as file:
        peer = {name[3:]: file.get_tensor(name) for name in file.keys() if name.startswith("sd.")}  # noqa: SIM118
    state, source = convert(peer)
    built = DeepVQE(num_bins=161 if source == "cmy" else 257, **arguments_of(state, source))
    assert built.load_state_dict(state, strict=False).missing_keys == ["alignment.temperature"]


def test_ours_passes_through():
    ours = network("cmy").state_dict()
    for prefix in ("", "network.", "network._orig_mod."):
        content = {prefix + name: tensor for name, tensor in ours.items()}
        for state, source in (convert(content), convert({"state_dict": content, "epoch": 3})):
            assert source == "ours"
            assert list(state) == list(ours)
            assert all(torch.equal(state[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no weights of a DeepVQE .* first names are: none at all"),
        ({"state_dict": {}}, "none at all"),
        ({"encoder.weight": torch.ones(1), 4: None}, "first names are: encoder.weight, 4"),
        ({"enblock1.conv.weight": "weights"}, "enblock1.conv.weight is a str, not a tensor"),
        ({"align_block.conv.1.weight": torch.ones(3)}, r"score_conv.weight has shape \(3,\), not"),
        (
            {"align_block.conv.1.bias": torch.ones(1), "skip_adapt2.bias": torch.ones(1)},
            "skip_adapt2.weight is missing",
        ),
        (
            {"align_block.conv.1.bias": torch.ones(1)}
            | {
                f"{name}.{leaf}": torch.ones(2, 3)
                for name in ("skip_adapt2", "dec2.skip_conv")
                for leaf in ("weight", "bias")
            },
            "skip_adapt2.weight does not fit dec2.skip_conv.weight",
        ),
    ],
)
def test_weights_of_something_else(content, message):
    with pytest.raises(ValueError, match=message) as caught:
        convert(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bottleneck.gru.weight_hh_l0": None}, "'bottleneck.gru.weight_hh_l0' is missing"),
        ({"bottleneck.gru.weight_hh_l0": torch.ones(2)}, "too few axes"),
        ({"mic_encoder.99999999.conv.weight": torch.ones(2)}, "'mic_encoder.4.conv.weight' is missing"),
        ({f"decoder.{k}.": None for k in range(4)}, "'decoder' is missing"),
    ],
)
def test_arguments_of_what_is_no_whole_network(change, message):
    left_out = tuple(name for name, tensor in change.items() if tensor is None)
    state = {name: tensor for name, tensor in network("cmy").state_dict().items() if not name.startswith(left_out)}
    state |= {name: tensor for name, tensor in change.items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as caught:
        arguments_of(state)
    assert "\n" not in str(caught.value)
