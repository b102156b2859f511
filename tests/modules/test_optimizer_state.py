"""State carried over is that of an optimiser which had seen the projected gradients all along."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from models.muon import Muon
from modules.low_rank import factorised, resized
from modules.optimizer_state import arrange, names_in_groups, of_factorising, of_resizing, replace_parameters

ROWS, COLUMNS, RANK = 12, 8, 3
Make = Callable[[list[nn.Parameter]], Optimizer]

STEPPING: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.5, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "muon": lambda p: Muon(p, lr=0.1),
    "torch's muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.1),
    # State that is no mean and no mean of squares:
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
}
LOST = {
    "adadelta": ["acc_delta"],
    "adamax": ["exp_inf"],
    "rprop": ["prev", "step_size"],
    "adafactor": ["col_var", "row_var"],
    "asgd": ["ax"],
}
every_optimizer = pytest.mark.parametrize("make", STEPPING.values(), ids=STEPPING)


def gradients(num: int, *, mean: float = 0.3) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        yield torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64) + mean


def dense_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(COLUMNS, ROWS).double()


def step(optimizer: Optimizer, given: dict[nn.Parameter, Tensor]) -> None:
    for parameter, gradient in given.items():
        parameter.grad = gradient.clone()
    optimizer.step()
    optimizer.zero_grad()


def after_steps(make: Make, num: int, *, mean: float = 0.3) -> tuple[nn.Linear, Optimizer]:
    dense = dense_layer()
    optimizer = make(list(dense.parameters()))
    for gradient in gradients(num, mean=mean):
        step(optimizer, {dense.weight: gradient, dense.bias: gradient.sum(1)})
    return dense, optimizer


def of_projected(make: Make, u: Tensor, v: Tensor, num: int, *, mean: float = 0.3) -> list[dict[str, Tensor]]:
    """The states of u and v had their gradients been those all along, while they stood still."""
    own = [nn.Parameter(u.detach().clone()), nn.Parameter(v.detach().clone())]
    optimizer = make(own)
    for gradient in gradients(num, mean=mean):
        step(optimizer, {own[0]: gradient @ v.detach().mT, own[1]: u.detach().mT @ gradient})
    return [optimizer.state[parameter] for parameter in own]


@pytest.mark.parametrize(
    ("name", "mean"),
    [("momentum", "momentum_buffer"), ("adam", "exp_avg"), ("amsgrad", "exp_avg"), ("nadam", "exp_avg")]
    + [("radam", "exp_avg"), ("rmsprop", "grad_avg"), ("muon", "momentum")],
)
def test_means_are_carried_over_exactly(name: str, mean: str) -> None:
    dense, optimizer = after_steps(STEPPING[name], 7)
    low = factorised(dense, RANK)
    assert replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)]) == []
    for factor, expected in zip((low.u, low.v), of_projected(STEPPING[name], low.u, low.v, 7), strict=True):
        carried = optimizer.state[factor]
        torch.testing.assert_close(carried[mean], expected[mean], rtol=0, atol=1e-12)
        assert carried.keys() == expected.keys()
        assert all(carried[key] == expected[key] for key in carried.keys() & {"step", "mu_product"})


def test_means_follow_factors_of_another_rank_exactly() -> None:
    torch.manual_seed(0)
    old = [nn.Parameter(torch.randn(ROWS, 5).double()), nn.Parameter(torch.randn(5, COLUMNS).double())]
    old[0].data[:, 4] = old[0].data[:, 0]  # factors that lack rank too
    found = resized(*old, 3)
    new = (nn.Parameter(found.u), nn.Parameter(found.v))
    optimizer = torch.optim.Adam(old, lr=0)
    for gradient in gradients(7):
        step(optimizer, {old[0]: gradient @ old[1].detach().mT, old[1]: old[0].detach().mT @ gradient})
    replacement = of_resizing((old[0], old[1]), new, right=found.right, left=found.left)
    assert replace_parameters(optimizer, [replacement]) == []
    for factor, expected in zip(new, of_projected(STEPPING["adam"], *new, 7), strict=True):
        torch.testing.assert_close(optimizer.state[factor]["exp_avg"], expected["exp_avg"], rtol=0, atol=1e-10)
        assert optimizer.state[factor]["exp_avg_sq"].shape == factor.shape
    assert optimizer.param_groups[0]["params"] == list(new)


def test_means_of_squares_are_right_for_white_noise() -> None:
    dense, optimizer = after_steps(STEPPING["adam"], 400, mean=0.0)
    low = factorised(dense, RANK)
    replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)])
    for factor, expected in zip(
        (low.u, low.v), of_projected(STEPPING["adam"], low.u, low.v, 400, mean=0.0), strict=True
    ):
        ratio = optimizer.state[factor]["exp_avg_sq"] / expected["exp_avg_sq"]
        assert abs(float(ratio.median()) - 1) < 0.1


@pytest.mark.parametrize("num", [1, 20])
def test_means_of_squares_of_a_constant_gradient_are_exact(num: int) -> None:
    """The other end: entries that move together. Early in training too, when means are still near their start."""
    low = factorised(dense_layer(), 1)
    low.u.data.abs_(), low.v.data.abs_()
    gradient, weight = next(gradients(1)).abs(), nn.Parameter(low.to_dense().weight.detach())
    optimizer = torch.optim.Adam([weight], lr=0.01, amsgrad=True)
    for _ in range(num):
        step(optimizer, {weight: gradient})
    replace_parameters(optimizer, [of_factorising(weight, low.u, low.v)])
    reference = torch.optim.Adam([seen := nn.Parameter(low.u.detach().clone())], lr=0.01, amsgrad=True)
    for _ in range(num):
        step(reference, {seen: gradient @ low.v.detach().mT})
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[low.u][name], reference.state[seen][name])


@pytest.mark.parametrize("name", ["adam", "amsgrad", "nadam", "radam", "rmsprop"])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_means_of_squares_are_never_below_the_square_of_the_mean(name: str, mean: float) -> None:
    dense, optimizer = after_steps(STEPPING[name], 5, mean=mean)
    low = factorised(dense, RANK)
    replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)])
    for factor in (low.u, low.v):
        state = optimizer.state[factor]
        if name == "rmsprop":
            assert (state["square_avg"] >= state["grad_avg"].square() * (1 - 1e-12)).all()
        else:
            unbiased = state["exp_avg"] / (1 - 0.9**5), state["exp_avg_sq"] / (1 - 0.999**5)
            assert (unbiased[1] >= unbiased[0].square() * (1 - 1e-12)).all()


@every_optimizer
@pytest.mark.parametrize("moments", ["project", "reset"])
def test_every_optimizer_goes_on(make: Make, moments: str, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id.removesuffix(f"-{moments}").removeprefix(f"{moments}-")
    dense, optimizer = after_steps(make, 3)
    low = factorised(dense, RANK)
    lost = replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)], moments=moments)
    assert lost == (LOST.get(name, []) if moments == "project" else [])
    assert dense.weight not in optimizer.state
    before = [low.u.detach().clone(), low.v.detach().clone()]
    for gradient in gradients(2):
        step(optimizer, {low.u: gradient @ low.v.detach().mT, low.v: low.u.detach().mT @ gradient})
    for factor, was in zip((low.u, low.v), before, strict=True):
        assert factor.isfinite().all() and not torch.equal(factor, was)


@every_optimizer
def test_reset_is_as_a_fresh_optimizer(make: Make) -> None:
    dense, optimizer = after_steps(make, 3)
    low = factorised(dense, RANK)
    fresh = [nn.Parameter(low.u.detach().clone()), nn.Parameter(low.v.detach().clone())]
    reference = make(fresh)
    replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)], moments="reset")
    for gradient in gradients(3):
        both = gradient @ low.v.detach().mT, low.u.detach().mT @ gradient
        step(optimizer, dict(zip((low.u, low.v), both, strict=True)))
        step(reference, dict(zip(fresh, both, strict=True)))
    assert torch.equal(low.u, fresh[0]) and torch.equal(low.v, fresh[1])


def test_nothing_is_carried_over_before_the_first_step() -> None:
    dense = dense_layer()
    optimizer = torch.optim.Adam(dense.parameters())
    low = factorised(dense, RANK)
    assert replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)]) == []
    assert len(optimizer.state) == 0
    assert optimizer.param_groups[0]["params"] == [low.u, low.v, low.bias]


def test_unknown_state_begins_anew_as_a_whole() -> None:
    """Such as that of 8-bit optimisers: blocks of another shape, tables for all."""
    dense, optimizer = after_steps(STEPPING["adam"], 3)
    optimizer.state[dense.weight]["absmax1"] = torch.zeros(7)
    low = factorised(dense, RANK)
    assert replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)]) == ["absmax1"]
    assert low.u not in optimizer.state and low.v not in optimizer.state
    assert low.bias in optimizer.state


def test_groups_schedules_and_neighbours_stay() -> None:
    dense, other = dense_layer(), nn.Linear(3, 3).double()
    groups = [{"params": [other.weight, dense.weight], "weight_decay": 0.1}, {"params": [dense.bias], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    step(optimizer, {dense.weight: next(gradients(1)), dense.bias: torch.ones(ROWS).double()})
    schedule.step()
    bias_state, lists = optimizer.state[dense.bias], [group["params"] for group in optimizer.param_groups]
    low = factorised(dense, RANK)
    replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)])
    assert lists[0] is optimizer.param_groups[0]["params"]
    assert [id(p) for p in lists[0]] == [id(p) for p in (other.weight, low.u, low.v)]
    assert lists[1][0] is dense.bias is low.bias and optimizer.state[dense.bias] is bias_state
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.125]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.01]


def test_state_is_saved_and_loaded_by_a_new_optimizer_over_the_new_layers() -> None:
    dense, optimizer = after_steps(STEPPING["adam"], 3)
    low = factorised(dense, RANK)
    replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)])
    copied = copy.deepcopy(low)
    restored = STEPPING["adam"](list(copied.parameters()))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients(2):
        both = gradient @ low.v.detach().mT, low.u.detach().mT @ gradient
        step(optimizer, dict(zip((low.u, low.v), both, strict=True)))
        step(restored, dict(zip((copied.u, copied.v), both, strict=True)))
    assert torch.equal(low.u, copied.u) and torch.equal(low.v, copied.v)


def test_types_of_state_are_kept() -> None:
    dense = nn.Linear(COLUMNS, ROWS).to(torch.bfloat16)
    optimizer = torch.optim.Adam(dense.parameters())
    dense(torch.ones(2, COLUMNS, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    low = factorised(dense, RANK)
    replace_parameters(optimizer, [of_factorising(dense.weight, low.u, low.v)])
    state = optimizer.state[low.u]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert state["step"] is not optimizer.state[low.v]["step"]  # each counts for itself


def test_unknown_moments_are_refused() -> None:
    with pytest.raises(ValueError, match="moments=keep: choose from project, reset"):
        replace_parameters(torch.optim.SGD(dense_layer().parameters()), [], moments="keep")


# The order of a checkpoint


def test_arranging_restores_groups_and_order() -> None:
    names = {name: nn.Parameter(torch.zeros(1)) for name in "abcd"}
    p = list(names.values())
    saved = torch.optim.SGD([{"params": [p[3], p[1]]}, {"params": [p[0], p[2]], "lr": 0.5}], lr=0.1)
    order = names_in_groups(saved, names)
    assert order == [["d", "b"], ["a", "c"]]
    fresh = torch.optim.SGD([{"params": p[:3]}, {"params": p[3:], "lr": 0.5}], lr=0.1)
    arrange(fresh, names, order)
    assert names_in_groups(fresh, names) == order
    assert [group["lr"] for group in fresh.param_groups] == [0.1, 0.5]


@pytest.mark.parametrize(
    "groups",
    [
        [["a"], ["c"]],
        [["a", "b"]],
        [["a", "b"], [], []],
        [["a", "b", "b"], []],
        None,
        7,
        "ab",
        ["ab", ""],
        [[1, 2], []],
    ],
)
def test_arranging_refuses_other_parameters(groups: object) -> None:
    names = {name: nn.Parameter(torch.zeros(1)) for name in "ab"}
    optimizer = torch.optim.SGD([{"params": [names["a"]]}, {"params": [names["b"]]}], lr=0.1)
    with pytest.raises(ValueError, match="other parameters than this run's"):
        arrange(optimizer, names, groups)
    assert names_in_groups(optimizer, names) == [["a"], ["b"]]
