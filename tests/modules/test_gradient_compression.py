"""What training relies on: a loss scale passes, nothing is hidden, nothing is lost. And the original formulas."""

import pytest
import torch
from torch import Tensor, nn

from modules import gradient_compression as dbc
from modules import gradient_compression_guide as guide
from modules.gradient_compression import Compressed, compress, rank_of

OURS = ("svd", "rsvd", "warm")
every_method = pytest.mark.parametrize("method", OURS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def run(a: Tensor, method: str, **options) -> Compressed:
    options = {"rank": 4, "residual": "none"} | options
    if method == "warm" and "basis" not in options:
        options["basis"] = some(a.shape[0], min(a.shape[1:]), options["rank"], seed=9, dtype=a.dtype)
    return compress(a, method=method, generator=generator(), **options)


@every_method
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("residual", dbc.RESIDUALS)
def test_a_scaled_loss_gives_the_scaled_result(method: str, balance: float, residual: str) -> None:
    a = some(2, 40, 30)
    one = run(a, method, balance=balance, residual=residual, energy=0.5)
    scaled = run(65536 * a, method, balance=balance, residual=residual, energy=0.5)
    assert torch.equal(scaled.gradient, 65536 * one.gradient) or balance == 0.5  # whose roots are rounded
    for factor in (1e-6, 3.0, 1e6):
        other = run(factor * a, method, balance=balance, residual=residual, energy=0.5)
        assert float((other.gradient / factor - one.gradient).norm() / one.gradient.norm()) < 1e-4
        assert torch.allclose(other.relative_error, one.relative_error, rtol=1e-4)


@every_method
def test_numbers_are_those_of_the_result(method: str) -> None:
    a = some(3, 40, 30, dtype=torch.float64)
    for balance in (0.0, 1.0):
        found = run(a, method, balance=balance)
        norms = torch.linalg.matrix_norm(a)
        assert torch.allclose(found.norm, norms)
        assert torch.allclose(found.relative_error, torch.linalg.matrix_norm(a - found.gradient) / norms)
        if not balance:
            assert torch.allclose(found.captured, 1 - found.relative_error.square())


@every_method
@pytest.mark.parametrize("residual", dbc.RESIDUALS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_passes_and_its_neighbours_do_not_notice(method: str, residual: str, bad: float) -> None:
    a, error = some(3, 40, 30), 0.1 * some(3, 40, 30, seed=1)
    carried = {"error": error} if residual == "ef" else {}
    clean = run(a, method, residual=residual, energy=0.6, **carried)
    a[1, 5, 2] = bad
    found = run(a, method, residual=residual, energy=0.6, **carried)
    assert torch.equal(found.gradient[1].nan_to_num(7, 8, 9), a[1].nan_to_num(7, 8, 9))
    assert torch.equal(found.gradient[[0, 2]], clean.gradient[[0, 2]])
    assert found.captured.isnan().tolist() == [False, True, False]
    if residual == "ef":
        assert found.error is not None and torch.equal(found.error[1], error[1])
    if method == "warm":
        assert found.basis is not None and found.basis.isfinite().all()


def test_too_large_to_square_passes_too() -> None:
    a = some(2, 40, 30)
    a[0] *= 1e25
    found = run(a, "rsvd")
    assert torch.equal(found.gradient[0], a[0]) and not torch.equal(found.gradient[1], a[1])


@every_method
@pytest.mark.parametrize("residual", dbc.RESIDUALS)
@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_nothing_stays_nothing(method: str, residual: str, balance: float) -> None:
    found = run(torch.zeros(2, 40, 30), method, residual=residual, balance=balance)
    assert not found.gradient.any()
    assert found.captured.tolist() == [1, 1] and found.relative_error.tolist() == [0, 0]


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_feedback_loses_nothing(method: str, dtype: torch.dtype) -> None:
    """What was applied and what is still carried add up to what came in, rounding to short types included."""
    gradients = [some(2, 40, 30, seed=seed).to(dtype) for seed in range(6)]
    applied, error = torch.zeros(2, 40, 30, dtype=torch.float64), None
    for gradient in gradients:
        found = run(gradient, method, residual="ef", error=error)
        error, applied = found.error, applied + found.gradient.double()
        assert found.gradient.dtype == dtype
    assert error is not None
    total = torch.stack([gradient.double() for gradient in gradients]).sum(0)
    assert float((applied + error.double() - total).norm() / total.norm()) < 3e-7
    assert float((applied - total).norm() / total.norm()) > 0.1  # or there was nothing to carry


@every_method
def test_damp_keeps_a_share_of_what_is_left_out(method: str) -> None:
    a = some(2, 40, 30, dtype=torch.float64)
    low = run(a, method).gradient
    damped = run(a, method, residual="damp", damp=0.3).gradient
    assert torch.allclose(damped, low + 0.3 * (a - low))
    assert torch.allclose(
        run(a, method, residual="damp", damp=0.3, balance=1.0).gradient,
        run(a, method, balance=1.0).gradient * 0.7 + 0.3 * a,
    )


@every_method
def test_a_stack_is_its_matrices(method: str) -> None:
    a, basis = some(3, 40, 30, dtype=torch.float64), some(3, 30, 4, seed=9, dtype=torch.float64)
    together = run(a, method, balance=1.0, energy=0.4, basis=basis)
    for index in range(3):
        alone = run(a[index : index + 1], method, balance=1.0, energy=0.4, basis=basis[index : index + 1])
        assert torch.allclose(alone.gradient[0], together.gradient[index], atol=1e-10)
        assert torch.allclose(alone.captured[0], together.captured[index])


def test_balance_protects_small_rows_and_costs_little_elsewhere() -> None:
    """Half of the rows a thousandth of the others, in columns of their own: without balance they are lost whole."""
    a = torch.zeros(1, 60, 40, dtype=torch.float64)
    a[0, :30, :20] = some(30, 20, seed=1)
    a[0, 30:, 20:] = 1e-3 * some(30, 20, seed=2)

    def error_of_small_rows(balance: float) -> float:
        found = run(a, "svd", rank=20, balance=balance)
        return float((found.gradient - a)[0, 30:].norm() / a[0, 30:].norm())

    assert error_of_small_rows(0.0) == pytest.approx(1.0) and error_of_small_rows(1.0) < 0.6
    even = some(1, 60, 40, dtype=torch.float64)
    plain, balanced = run(even, "svd", rank=10), run(even, "svd", rank=10, balance=1.0)
    assert float(balanced.relative_error / plain.relative_error) < 1.03


def test_the_floor_is_relative() -> None:
    a = some(1, 5, 4)
    a[0, 2] = 0
    norms = dbc.row_norms(a, 0.01)
    assert norms[0, 2] == pytest.approx(0.01 * float(norms.max()))
    assert torch.allclose(dbc.row_norms(1000 * a, 0.01), 1000 * norms)
    assert dbc.row_norms(torch.zeros(1, 5, 4), 0.01).eq(1).all()


def test_energy_left_short_is_flagged() -> None:
    assert run(some(1, 40, 30), "rsvd", energy=0.95).capped.all()
    steep = some(1, 40, 30) * torch.tensor([100.0, 50.0] + [1e-3] * 28)
    found = run(steep, "rsvd", energy=0.95)
    assert not found.capped.any() and found.captured.min() >= 0.95


def test_rank_is_a_share_of_the_shorter_side() -> None:
    assert [rank_of((256, 1000), 0.1), rank_of((1000, 256), 0.1), rank_of((4, 4), 0.1)] == [26, 26, 1]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="method=qr: choose one of svd, rsvd, warm, guide"):
        run(some(1, 4, 4), "qr")
    with pytest.raises(ValueError, match="residual=keep: choose one of none, damp, ef"):
        run(some(1, 4, 4), "svd", residual="keep")


# The original formulas


def decaying(num: int = 100) -> Tensor:
    u, v = (torch.linalg.qr(some(num, num, seed=seed, dtype=torch.float64)).Q for seed in (1, 2))
    return (u / torch.arange(1, num + 1)) @ v.mT


@pytest.mark.parametrize("formula", [guide.first, guide.second])
def test_the_guide_counts_singular_values_twice(formula) -> None:
    a = decaying()
    one, ten = formula(a, 10, generator=generator()), formula(10 * a, 10, generator=generator())
    assert torch.allclose(ten, 100 * one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("formula", [guide.first, guide.second])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_guide_is_several_times_off_the_best(formula, transposed: bool) -> None:
    a = decaying().mT if transposed else decaying()
    best = (1 / torch.arange(11, 101).double()).square().sum().sqrt()
    assert (a - formula(a, 10, generator=generator())).norm() > 3 * best
    ours = run(a[None], "rsvd", rank=10).gradient[0]
    assert (a - ours).norm() < 1.05 * best


def test_row_sums_cancel_behind_a_layer_norm() -> None:
    """Its outputs have no mean, so the rows of the next layer's gradient have no sum: all are at the floor."""
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(64), nn.Linear(64, 48)
    layer(norm(some(500, 64))).square().sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    norms = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    assert float((gradient.sum(-1, keepdim=True).abs() / norms).max()) < 1e-5
    assert float((guide.row_sums(gradient).abs() / norms).max()) < 1e-5
    assert float((dbc.row_norms(gradient, 1e-3) / norms).min()) >= 1


def test_the_guide_hides_an_overflow_and_we_do_not() -> None:
    gradient = some(1, 40, 30)
    gradient[0, 3, 3] = torch.inf
    assert guide.launder(gradient).isfinite().all()
    for method in dbc.METHODS:
        assert not compress(gradient, rank=4, method=method, generator=generator()).gradient.isfinite().all(), method


def test_the_guide_with_energy_and_residual() -> None:
    a = some(2, 40, 30)
    plain = run(a, "guide").gradient
    assert not torch.equal(run(a, "guide", energy=0.95).gradient, plain)
    assert not torch.equal(run(a, "guide", residual="damp").gradient, plain)
    assert torch.equal(run(a, "guide").gradient, plain)
