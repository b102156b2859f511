"""How near to the best approximation, what the certificate says, and what never happens to a neighbour."""

import pytest
import torch
from torch import Tensor

from modules import range_finder
from modules.range_finder import Approximation, cholesky_qr, exact, randomised, warm

NUM = 256
INDEX = torch.arange(1, NUM + 1).double()
SPECTRA = {
    "flat": torch.ones(NUM).double(),
    "1/i": 1 / INDEX,
    "1/i²": 1 / INDEX**2,
    "exponential": torch.exp(-INDEX / (0.03 * NUM)),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(num: int, rows: int, columns: int, seed: int) -> Tensor:
    drawn = torch.randn(num, rows, columns, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def with_spectrum(values: Tensor, rows: int, columns: int, seed: int = 0, num: int = 1) -> Tensor:
    """Matrices of these singular values, (num, rows, columns), float64."""
    k = len(values)
    return (orthogonal(num, rows, k, seed) * values) @ orthogonal(num, columns, k, seed + 1000).mT


def product(found: Approximation) -> Tensor:
    return found.left @ found.right


def true_error(a: Tensor, found: Approximation) -> Tensor:
    return torch.linalg.matrix_norm(a.double() - product(found).double())


METHODS = {
    "exact": lambda a, rank, **options: exact(a, rank, **options),
    "randomised": lambda a, rank, **options: randomised(a, rank, generator=generator(), **options),
    "warm": lambda a, rank, **options: warm(
        a, randomised(a, rank, generator=generator()).basis, generator=generator(1), **options
    ),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def test_within_a_twentieth_of_the_best() -> None:
    """Twenty seeds, four spectra: one power iteration, eight columns more than the rank."""
    rank = 26
    u, v = orthogonal(20, NUM, NUM, 0).float(), orthogonal(20, NUM, NUM, 1).float()
    for name, spectrum in SPECTRA.items():
        a = (u * spectrum.float()) @ v.mT
        found = randomised(a, rank, generator=generator(5))
        best = spectrum[rank:].norm()
        # The matrices are of float32 themselves, which shows where the best error is 1e-4 of the norm.
        assert float((true_error(a, found) / best).max()) < 1.05, name


def test_without_power_iterations_it_is_not() -> None:
    """That the bound above can fail."""
    a = with_spectrum(SPECTRA["1/i²"], NUM, NUM).float()
    found = randomised(a, 26, generator=generator(), power_iterations=0)
    assert float(true_error(a, found) / SPECTRA["1/i²"][26:].norm()) > 1.1


def test_warm_passes_approach_the_best_and_follow_a_changing_matrix() -> None:
    a = with_spectrum(SPECTRA["1/i"], NUM, NUM)
    best = SPECTRA["1/i"][26:].norm()
    basis = torch.randn(1, NUM, 26, generator=generator(), dtype=torch.float64)
    errors = []
    for _ in range(4):
        found = warm(a, basis, generator=generator())
        basis = found.basis
        errors.append(float(true_error(a, found) / best))
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.3 and errors[-1] < 1.06
    noise = torch.randn(a.shape, generator=generator(3), dtype=torch.float64)
    changed = a + 0.3 * a.norm() / noise.norm() * noise
    error = true_error(changed, warm(changed, basis, generator=generator()))
    assert float(error / true_error(changed, exact(changed, 26))) < 1.1


@every_method
@pytest.mark.parametrize("shape", [(60, 60), (90, 50), (50, 90), (400, 20), (20, 400), (60, 30)], ids=str)
def test_the_certificate_is_the_error(method, shape: tuple[int, int]) -> None:
    """On either side, and where the Gram matrix of the short side takes over."""
    a = torch.randn(2, *shape, generator=generator(), dtype=torch.float64)
    found = method(a, 5)
    assert torch.allclose(found.error(), true_error(a, found), rtol=1e-12)
    assert torch.allclose(found.total, a.square().sum((-2, -1)), rtol=1e-12)


@every_method
def test_a_matrix_of_lower_rank_comes_back(method) -> None:
    a = with_spectrum(torch.tensor([3.0, 1.0, 0.5]).double(), 80, 60).float()
    assert float(true_error(a, method(a, 8)) / a.norm()) < 1e-5


@every_method
def test_error_does_not_depend_on_the_side(method) -> None:
    a = torch.randn(1, 80, 50, generator=generator(), dtype=torch.float64)
    assert torch.allclose(method(a, 6).error(), method(a.mT, 6).error(), rtol=1e-12)
    assert torch.allclose(product(method(a, 6)), product(method(a.mT, 6)).mT, atol=1e-10)


def test_the_short_side_is_exact() -> None:
    for shape in ((400, 20), (20, 400), (64, 30), (30, 64)):
        a = torch.randn(1, *shape, generator=generator(), dtype=torch.float64)
        assert torch.allclose(randomised(a, 8, generator=generator()).error(), exact(a, 8).error(), rtol=1e-10)


@every_method
def test_a_stack_is_its_matrices(method) -> None:
    a = torch.randn(3, 60, 40, generator=generator(), dtype=torch.float64)
    alone = torch.cat([product(method(matrix[None], 5)) for matrix in a])
    assert torch.allclose(product(method(a, 5)), alone, atol=1e-10)


@every_method
def test_reproducible_without_the_global_generator(method) -> None:
    a = torch.randn(2, 60, 40, generator=generator())
    before = torch.get_rng_state()
    assert torch.equal(product(method(a, 5)), product(method(a, 5)))
    assert torch.equal(torch.get_rng_state(), before)


@every_method
def test_energy_is_of_the_matrix_and_a_shortfall_is_flagged(method) -> None:
    steep, flat = SPECTRA["exponential"], SPECTRA["flat"]
    a = torch.cat([with_spectrum(spectrum, NUM, NUM) for spectrum in (steep, flat)])
    found = method(a, 26, energy=0.95)
    share = found.captured / found.total
    assert 0.95 <= share[0] < 0.97 and not found.capped[0]
    assert share[1] < 0.2 and found.capped[1]
    kept = int((found.right[0].square().sum(-1) > 0).sum())
    assert kept == int((steep.square().cumsum(0) < 0.95 * steep.square().sum()).sum()) + 1
    assert torch.allclose(found.error(), true_error(a, found), rtol=1e-9)


@every_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_is_said_and_disturbs_no_other(method, bad: float) -> None:
    a = torch.randn(3, 60, 40, generator=generator())
    right = product(method(a, 5))
    a[1, 7, 3] = bad
    found = method(a, 5)
    assert found.sound.tolist() == [True, False, True]
    assert torch.equal(product(found)[[0, 2]], right[[0, 2]])


def test_a_basis_of_zeros_is_drawn_anew() -> None:
    a = torch.randn(2, 60, 40, generator=generator())
    nothing = warm(torch.zeros_like(a), torch.zeros(2, 40, 5), generator=generator())
    assert not product(nothing).any() and nothing.sound.all()
    found = warm(a, nothing.basis, generator=generator())
    assert (found.captured > 0.1 * found.total).all()


@pytest.mark.parametrize("rank", [26, 3, 1, 0])
def test_cholesky_qr_is_orthonormal_at_any_rank(rank: int) -> None:
    a = with_spectrum(SPECTRA["1/i"][:rank], 90, NUM).float() if rank else torch.zeros(1, 90, NUM)
    y = a @ torch.randn(NUM, 26, generator=generator())
    q, sound = cholesky_qr(y)
    present = y.any(-2, keepdim=True)
    assert sound.all()
    assert torch.allclose(q.mT @ q, torch.diag_embed(present.squeeze(-2)).float(), atol=2e-5)
    assert torch.allclose(q @ (q.mT @ y), y, atol=1e-5)


def test_cholesky_qr_says_where_it_fails() -> None:
    y = torch.randn(3, 40, 6, generator=generator())
    y[0, 0, 0] = torch.nan
    assert cholesky_qr(y)[1].tolist() == [False, True, True]


def test_with_cholesky_qr_the_same_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    a = torch.randn(2, 120, 90, generator=generator(), dtype=torch.float64)
    expected = {name: product(method(a, 9)) for name, method in METHODS.items()}
    monkeypatch.setattr(range_finder, "orthonormal", cholesky_qr)
    for name, method in METHODS.items():
        assert torch.allclose(product(method(a, 9)), expected[name], atol=1e-8), name
