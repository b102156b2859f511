"""A factorised layer in a dense one's place: the same function, the best approximation, nothing that cannot be."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.deepvqe import CausalConv
from modules.low_rank import (
    LowRankConv,
    LowRankLayer,
    LowRankLinear,
    blank,
    break_even_rank,
    decompose,
    dense_state,
    dense_weights,
    factorised,
    layers_with_matrices,
    multiply_adds,
    no_candidate,
    num_parameters,
    ranks,
    replace_layer,
    resized,
    restructure,
    shared_weights,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def full_rank(layer: nn.Module) -> int:
    return min(layer.weight.flatten(1).shape)


def assert_same_function(dense: nn.Module, low: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    """Outputs, and the gradients of the input and of the bias."""
    outputs, gradients = [], []
    for layer in (dense, low):
        layer.zero_grad()
        taken = x.clone().requires_grad_(True)
        outputs.append(layer(taken))
        outputs[-1].sin().sum().backward()
        gradients.append([taken.grad] + ([layer.bias.grad.clone()] if layer.bias is not None else []))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=tolerance)
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


# The same function


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_linear_of_full_rank(shape: tuple[int, int], bias: bool) -> None:
    dense = nn.Linear(*shape, bias=bias).double()
    for size in [(shape[0],), (3, shape[0]), (2, 3, shape[0])]:
        assert_same_function(dense, factorised(dense, 5), torch.randn(size).double())


PADDINGS = [
    ({"stride": 2, "padding": 1, "dilation": 2}, "zeros"),
    ({"padding": "same", "dilation": 2}, "zeros"),
    ({"padding": "valid", "stride": 2}, "zeros"),
    ({"padding": 2, "stride": 2}, "reflect"),
    ({"padding": 1, "dilation": 2}, "replicate"),
    ({"padding": "same"}, "circular"),
]


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize(("options", "mode"), PADDINGS)
def test_convolution_of_full_rank(kind: type[nn.Module], options: dict, mode: str) -> None:
    axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    if axes == 3 and mode == "reflect":
        options = options | {"padding": 1}
    for bias in (True, False):
        dense = kind(3, 4, 3, padding_mode=mode, bias=bias, **options).double()
        x = torch.randn(2, 3, *[7, 6, 5][:axes]).double()
        assert_same_function(dense, factorised(dense, full_rank(dense)), x)


def test_uneven_kernels_strides_and_paddings() -> None:
    dense = nn.Conv2d(3, 5, (4, 3), stride=(1, 2), padding=(2, 1), dilation=(1, 3)).double()
    assert_same_function(dense, factorised(dense, 5), torch.randn(2, 3, 9, 11).double())


def test_channels_last() -> None:
    dense = nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
    low = factorised(dense, 6)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(low(x), dense(x), rtol=0, atol=1e-5)
    assert low.u.is_contiguous() and low.v.is_contiguous()
    torch.testing.assert_close(low.to_dense().weight, dense.weight, rtol=0, atol=1e-6)


def test_causal_convolution_sees_no_later_frame() -> None:
    dense = CausalConv(3, 4, frequency_stride=2).double()
    low = factorised(dense, 2)
    assert_same_function(dense, factorised(dense, 4), torch.randn(2, 3, 6, 8).double())
    x = torch.randn(1, 3, 6, 8).double()
    later = x.clone()
    later[:, :, 4:] = 9
    torch.testing.assert_close(low(x)[:, :, :4], low(later)[:, :, :4], rtol=0, atol=0)
    assert not torch.equal(low(x)[:, :, 4:], low(later)[:, :, 4:])


def test_gradient_of_the_factors_is_that_of_the_weight_projected() -> None:
    dense = nn.Conv1d(4, 6, 3).double()
    low, x = factorised(dense, 3), torch.randn(2, 4, 9).double()
    approximated = low.to_dense()
    for layer in (low, approximated):
        layer(x).sin().sum().backward()
    gradient = approximated.weight.grad.flatten(1)
    torch.testing.assert_close(low.u.grad, gradient @ low.v.detach().mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(low.v.grad, low.u.detach().mT @ gradient, rtol=0, atol=1e-12)


def test_autocast_stays_near() -> None:
    for dense, x in [(nn.Linear(16, 24), torch.randn(4, 16)), (nn.Conv1d(16, 24, 3), torch.randn(2, 16, 9))]:
        low = factorised(dense, full_rank(dense))
        with torch.autocast("cpu", torch.bfloat16):
            y = low(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), dense(x), rtol=0.02, atol=0.02)
        y.float().sum().backward()
        assert low.u.grad.dtype == torch.float32


# The best approximation


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_error_is_the_tail_of_the_singular_values(rank: int) -> None:
    dense = nn.Conv2d(3, 6, 2).double()
    tail = decompose(dense.weight).singular_values[rank:].norm()
    low = factorised(dense, rank)
    assert low.rank == rank
    torch.testing.assert_close((low.to_dense().weight - dense.weight).norm(), tail)
    torch.testing.assert_close(low.u.norm(dim=0), low.v.norm(dim=1))  # the root of the singular values on either side


def test_signs_make_the_factors_unique() -> None:
    dense = nn.Linear(7, 5).double()
    low = factorised(dense, 5)
    flipped = nn.Linear(7, 5).double()
    signs = torch.tensor([1.0, -1, 1, -1, 1]).double()
    with torch.no_grad():  # the same weight, as another algorithm's decomposition could give it
        u, s, v = torch.linalg.svd(dense.weight)
        flipped.weight.copy_((u * signs * s) @ (v[:5] * signs[:, None]))
    torch.testing.assert_close(factorised(flipped, 5).u, low.u)
    largest = low.u.gather(0, low.u.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_resizing_is_the_best_truncation_of_the_product() -> None:
    u = torch.randn(12, 6).double() * torch.tensor([1, 0.01, 0.3, 0.001, 0.1, 3]).double()
    v = torch.randn(6, 9).double()
    s = torch.linalg.svdvals(u @ v)
    for rank in (1, 3, 6):
        found = resized(u, v, rank)
        error = torch.linalg.matrix_norm(u @ v - found.u @ found.v)
        torch.testing.assert_close(error, s[rank:].norm(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.u, u @ found.right)
        torch.testing.assert_close(found.v, found.left @ v)
    sliced = torch.linalg.matrix_norm(u @ v - u[:, :3] @ v[:3])
    assert sliced > 3 * s[3:].norm()  # what leaving out the last columns would cost


def test_resizing_factors_that_lack_rank() -> None:
    u, v = torch.randn(8, 4).double(), torch.randn(4, 6).double()
    u[:, 3] = u[:, 0]  # of rank 3
    for wide_u, wide_v in [(u, v), (torch.zeros(8, 4).double(), v), (torch.randn(3, 4).double(), v)]:
        found = resized(wide_u, wide_v, 3)
        torch.testing.assert_close(found.u @ found.v, wide_u @ wide_v, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.u, wide_u @ found.right, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.v, found.left @ wide_v, rtol=0, atol=1e-10)


# What a layer is beside its function


def test_state_dict_layout_is_frozen() -> None:
    for layer, shapes in [
        (nn.Linear(5, 7), {"u": (7, 3), "v": (3, 5), "bias": (7,)}),
        (nn.Conv1d(5, 7, 2, bias=False), {"u": (7, 3), "v": (3, 10)}),
        (nn.Conv2d(5, 7, (2, 3)), {"u": (7, 3), "v": (3, 30), "bias": (7,)}),
    ]:
        state = factorised(layer, 3).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == shapes
        assert list(state) == list(shapes)
        assert [name for name, _ in factorised(layer, 3).named_parameters()] == list(shapes)


def test_values_in_the_state_dict_mean_what_they_did() -> None:
    low = blank(nn.Conv1d(2, 3, 2, bias=False), 1)
    low.load_state_dict({"u": torch.tensor([[1.0], [2], [3]]), "v": torch.tensor([[1.0, 10, 100, 1000]])})
    x = torch.tensor([[[1.0, 2], [3, 4]]])  # (1, 2, 2): one output of 1 + 20 + 300 + 4000
    assert low(x).tolist() == [[[4321.0], [8642.0], [12963.0]]]


def test_there_and_back() -> None:
    for dense in (nn.Linear(5, 7), nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"), CausalConv(3, 4)):
        dense.eval()
        back = factorised(dense, full_rank(dense)).to_dense()
        assert type(back) is type(dense) and repr(back) == repr(dense) and not back.training
        assert back.bias is dense.bias
        torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=1e-6)
        assert back.weight.shape == dense.weight.shape and back.weight.device == dense.weight.device


def test_bias_is_the_dense_layers_own_and_the_rest_is_not() -> None:
    dense = nn.Linear(5, 7)
    before = dense.weight.clone()
    low = factorised(dense, 3)
    assert low.bias is dense.bias
    assert low.weight_shape() == (7, 5)
    with torch.no_grad():
        low.u.zero_()
    assert torch.equal(dense.weight, before)
    assert sum(parameter.numel() for parameter in low.parameters()) == num_parameters(low) == 3 * (5 + 7) + 7
    assert blank(dense, 3).bias is not dense.bias


def test_training_mode_and_gradients_are_kept() -> None:
    dense = nn.Linear(5, 7)
    assert factorised(dense, 3).training and not factorised(dense.eval(), 3).training
    low = factorised(dense, 3)
    dense.bias.requires_grad_(False)
    assert low.u.requires_grad and low.v.requires_grad and not low.bias.requires_grad
    low.u.requires_grad_(False)
    assert not low.to_dense().weight.requires_grad
    assert not blank(dense.requires_grad_(False), 3).u.requires_grad


def test_copies_and_pickles() -> None:
    network = nn.Sequential(factorised(nn.Linear(5, 7), 3), factorised(nn.Conv1d(7, 4, 1), 2))
    x = torch.randn(2, 5)
    expected = network[0](x)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(copied[0](x), expected)
        assert copied[0].u is not network[0].u and ranks(copied) == ranks(network) == {"0": 3, "1": 2}
        assert repr(copied) == repr(network) and "rank=3, in the place of Linear(in_features=5" in repr(copied)


def test_moves_like_any_layer() -> None:
    low = factorised(nn.Conv1d(3, 4, 3, padding=1), 2).double()
    assert low(torch.randn(1, 3, 5).double()).dtype == torch.float64
    assert low.to_dense().weight.dtype == torch.float64
    assert {parameter.device.type for parameter in low.parameters()} == {"cpu"}


@pytest.mark.slow
def test_exports() -> None:
    """Slow: the exporter's imports. Lengths are left open."""
    import onnxruntime

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = factorised(nn.Conv1d(3, 4, 3, stride=2, padding=2, padding_mode="replicate"), 2)
            self.linear = factorised(nn.Linear(4, 5), 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).mT)

    network, file = Both().eval(), io.BytesIO()
    dynamic = ({2: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(network, (torch.randn(2, 3, 9),), dynamic_shapes=dynamic)
    torch.onnx.export(network, (torch.randn(2, 3, 9),), file, dynamic_shapes=dynamic, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    for length in (9, 14):
        x = torch.randn(2, 3, length)
        expected = network(x).detach()
        torch.testing.assert_close(exported.module()(x), expected)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize("rank", [0, -1, 7, True, 2.0, None])
def test_impossible_ranks_are_refused(layer: nn.Module, rank: object) -> None:
    with pytest.raises(ValueError, match="its rank is"):
        factorised(layer, rank)


# Which layers


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


REFUSED = {
    "recurrent": nn.GRU(4, 4),
    "transposed": nn.ConvTranspose1d(4, 4, 3),
    "2 groups": nn.Conv1d(4, 4, 3, groups=2),
    "embedding": nn.Embedding(9, 4),
    "computed from others": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "weight is computed": nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 4, 3)),
    "forward of its own": Odd(4, 4),
    "NonDynamicallyQuantizableLinear has a forward": nn.MultiheadAttention(4, 2).out_proj,
    "not a linear layer": nn.Bilinear(4, 4, 4),
    "one input or output": nn.Conv1d(1, 4, 3),
    "one input or output channel": nn.Linear(4, 1),
    "frozen": nn.Linear(4, 4).requires_grad_(False),
    "factorised already": factorised(nn.Linear(4, 4), 2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_no_candidates(reason: str) -> None:
    layer = REFUSED[reason]
    assert reason in no_candidate(layer)
    with pytest.raises(ValueError, match=reason):
        factorised(layer, 1)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv3d(2, 3, 1), CausalConv(2, 3)])
def test_candidates(layer: nn.Module) -> None:
    assert no_candidate(layer) is None


def test_every_matrix_is_found_once_under_its_layers_name() -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.GRU(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    )
    model.append(model[0])
    assert list(layers_with_matrices(model)) == ["0", "2", "3"]
    assert layers_with_matrices(nn.Linear(3, 3)) == {}  # itself has no name to be replaced by


def test_shared_weights() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Embedding(4, 4), "d": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["e"] = nn.Sequential(model["d"])  # one layer in two places
    assert shared_weights(model) == {"a": "b", "b": "a", "d": "e.0", "e.0": "d"}


def test_two_names_of_one_place_are_not_shared() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.ModuleDict({"network": inner, "alias": inner})
    assert shared_weights(model) == {}
    replace_layer(model, "network.0", factorised(inner[0], 2))
    assert isinstance(model["alias"][0], LowRankLinear)


def test_replacing_keeps_the_order_of_children() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    replace_layer(model, "2.0", factorised(model[2][0], 2))
    replace_layer(model, "0", factorised(model[0], 2))
    assert [name for name, _ in model.named_parameters()] == ["0.u", "0.v", "0.bias", "2.0.u", "2.0.v", "2.0.bias"]
    assert model(torch.randn(2, 4)).shape == (2, 4)


# Structures from checkpoints


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.PReLU(), nn.Conv1d(6, 5, 1, bias=False), nn.GRU(5, 5))


def test_restructuring_both_ways() -> None:
    structures: list[dict[str, int]] = [{}, {"0": 3}, {"0": 2, "2": 4}, {"2": 4}]
    for before, after in itertools.permutations(structures, 2):
        source, model = network(), network()
        restructure(source, after)
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        restructure(model, before)
        restructure(model, after)
        assert ranks(model) == after
        model.load_state_dict(source.state_dict())
        x = torch.randn(2, 4, 9)
        assert torch.equal(model[:3](x), source[:3](x))
        assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
        assert [name for name, _ in model.named_parameters()] == list(source.state_dict())


def test_restructuring_to_the_same_changes_nothing() -> None:
    model = network()
    restructure(model, {"0": 3})
    layers = list(model.modules())
    restructure(model, {"0": 3})
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))


def test_restructuring_a_frozen_network() -> None:
    model = network().eval().requires_grad_(False)
    restructure(model, {"0": 3})
    assert not model[0].u.requires_grad and not model[0].training
    restructure(model, {"0": 2})
    restructure(model, {})
    assert type(model[0]) is nn.Conv1d and not model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"9": 2}, "'9': no such layer"),
        ({"": 2}, "'': no such layer"),
        ({"1": 2}, "'1': no such layer"),
        ({7: 2}, "7: no such layer"),
        ({"2.dense": 2}, "no such layer"),
        ({"2._template": 2}, "no such layer"),
        ({"__class__": 2}, "no such layer"),
        ({"3": 2}, "3: recurrent"),
        ({"0": 0}, "0: its rank is 0, not from 1 to 6"),
        ({"0": -3}, "its rank is -3"),
        ({"0": 7}, "its rank is 7, not from 1 to 6"),
        ({"0": 10**30}, "its rank is 10000"),
        ({"0": True}, "its rank is True, not a whole number"),
        ({"0": 2.0}, "its rank is 2.0, not a whole number"),
        ({"0": "2"}, "its rank is '2', not a whole number"),
        ({"0": None}, "its rank is None"),
        ({"0": [2]}, "not a whole number"),
    ],
)
def test_impossible_structures_are_refused_and_change_nothing(wanted: dict, message: str) -> None:
    model = network()
    restructure(model, {"2": 3})
    with pytest.raises(ValueError) as error:
        restructure(model, {"2": 2} | wanted)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert ranks(model) == {"2": 3}


def test_structures_that_would_separate_tied_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0: its weight is also that of 1"):
        restructure(model, {"0": 2})


def test_dense_state_multiplies_factors() -> None:
    source, model = network(), network()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    replace_layer(source, "0", factorised(source[0], 3))
    replace_layer(source, "2", factorised(source[2], 2))
    state = source.state_dict()
    taken = dense_state(state, model.state_dict())
    assert "0.u" in state  # as it was
    model.load_state_dict(taken)
    x = torch.randn(2, 4, 9)
    torch.testing.assert_close(model[:3](x), source[:3](x))
    assert {name: value.shape for name, value in dense_weights(source).items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert dense_state(state, state) == state  # a model that has the factors gets them


def test_dense_state_leaves_what_does_not_fit() -> None:
    wanted = {"a.weight": torch.zeros(4, 5), "n.weight": torch.zeros(4)}
    u, v = torch.ones(4, 2), torch.ones(2, 5)
    for state in [
        {"a.u": u},
        {"a.u": u, "a.v": torch.ones(3, 5)},
        {"a.u": torch.ones(4), "a.v": v},
        {"b.u": u, "b.v": v},
        {"n.u": u, "n.v": v},
        {"u": u, "v": v},
    ]:
        assert dense_state(state, wanted) == state
    other = dense_state({"a.u": torch.ones(5, 2), "a.v": torch.ones(2, 4)}, wanted)
    assert other["a.weight"].shape == (5, 4)  # not turned into another matrix: whoever loads it says what is wrong


# What it costs


def test_counts() -> None:
    """Each number of a matrix is multiplied once for each output position."""
    for dense in (nn.Linear(8, 6, bias=False), nn.Conv2d(4, 6, 3, bias=False)):
        assert multiply_adds(dense.weight.shape) == num_parameters(dense)
        assert multiply_adds(dense.weight.shape, 2) == num_parameters(factorised(dense, 2))


@pytest.mark.parametrize("shape", [(8, 8), (6, 4, 3), (100, 3), (2, 2), (1, 9)])
def test_break_even(shape: tuple[int, ...]) -> None:
    rank = break_even_rank(shape)
    assert multiply_adds(shape, rank) < multiply_adds(shape) <= multiply_adds(shape, rank + 1)


def test_kinds() -> None:
    assert isinstance(factorised(nn.Linear(4, 4), 2), LowRankLinear)
    assert isinstance(factorised(nn.Conv2d(4, 4, 1), 2), LowRankConv)
    assert isinstance(blank(nn.Conv2d(4, 4, 1), 2), LowRankLayer)
    assert F.mse_loss(blank(nn.Linear(4, 4, bias=False), 2)(torch.randn(3, 4)), torch.zeros(3, 4)) == 0
