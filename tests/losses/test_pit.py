"""SI-SDR and PIT against torchmetrics, against the definition, and at the edges."""

from itertools import permutations

import pytest
import torch
from torchmetrics.functional.audio import (
    permutation_invariant_training,
    scale_invariant_signal_distortion_ratio,
)

from losses.pit import pairwise_neg_si_sdr, permutation_invariant_loss, pit_neg_si_sdr, reorder, si_sdr


def random_pair(num_sources: int, *, snr_db: float, batch: int = 3, num_samples: int = 4000):
    """Targets, and the targets in another order per item with noise at `snr_db`. Shape: (B, C, T) each."""
    generator = torch.Generator().manual_seed(num_sources)
    targets = 0.1 * torch.randn(batch, num_sources, num_samples, generator=generator) + 0.02
    noise = 0.1 * torch.randn(targets.shape, generator=generator)
    orders = torch.stack([torch.randperm(num_sources, generator=generator) for _ in range(batch)])
    return reorder(targets, orders) + 10 ** (-snr_db / 20) * noise, targets, orders


def broadcast_form(estimates, targets, **options):
    return -si_sdr(estimates.unsqueeze(2), targets.unsqueeze(1), **options)


@pytest.mark.parametrize("zero_mean", [True, False])
def test_si_sdr_equals_torchmetrics(zero_mean):
    estimates, targets, orders = random_pair(2, snr_db=3)
    targets = reorder(targets, orders)  # matching pairs: the two place their eps differently at -60 dB
    expected = scale_invariant_signal_distortion_ratio(estimates, targets, zero_mean=zero_mean)
    torch.testing.assert_close(si_sdr(estimates, targets, zero_mean=zero_mean), expected, atol=1e-3, rtol=0)


def test_si_sdr_does_not_depend_on_gain_and_offset():
    estimates, targets, _ = random_pair(2, snr_db=10)
    value = si_sdr(estimates.double(), targets.double())
    changed = si_sdr(-7 * estimates.double() + 1, 0.5 * targets.double() - 3)
    torch.testing.assert_close(changed, value, atol=1e-6, rtol=0)


def test_si_sdr_of_orthogonal_noise_is_the_ratio():
    time = torch.arange(8000) / 8000
    target, noise = torch.sin(2 * torch.pi * 100 * time), torch.sin(2 * torch.pi * 200 * time)
    value = si_sdr(target + 0.1 * noise, target)
    torch.testing.assert_close(value, torch.tensor(20.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("zero_mean", [True, False])
@pytest.mark.parametrize("snr_db", [0, 20, 40, 60, 80])
def test_pairwise_equals_the_broadcast_form(snr_db, zero_mean):
    """Inner products in float64 lose nothing against differences in float32, nearly perfect estimates included."""
    estimates, targets, _ = random_pair(3, snr_db=snr_db)
    pairwise = pairwise_neg_si_sdr(estimates, targets, zero_mean=zero_mean)
    expected = broadcast_form(estimates, targets, zero_mean=zero_mean)
    assert pairwise.dtype == torch.float32
    torch.testing.assert_close(pairwise, expected, atol=1e-4, rtol=0)
    precise = broadcast_form(estimates.double(), targets.double(), zero_mean=zero_mean).float()
    torch.testing.assert_close(pairwise, precise, atol=2e-5, rtol=0)


def test_pairwise_gradient_equals_that_of_the_broadcast_form():
    for snr_db in (0, 40):
        estimates, targets, _ = random_pair(2, snr_db=snr_db)
        gradients = []
        for form in (pairwise_neg_si_sdr, broadcast_form):
            leaf = estimates.double().requires_grad_()
            form(leaf, targets.double()).square().sum().backward()
            gradients.append(leaf.grad)
        scale = gradients[1].abs().max()
        torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 5])
def test_best_permutation(num_sources):
    pairwise = torch.randn(6, num_sources, num_sources, generator=torch.Generator().manual_seed(0))
    loss, permutation = permutation_invariant_loss(pairwise)
    for item in range(6):
        means = {
            order: sum(pairwise[item, i, j].item() for j, i in enumerate(order)) / num_sources
            for order in permutations(range(num_sources))
        }
        best = min(means, key=means.__getitem__)
        assert tuple(permutation[item].tolist()) == best
        assert loss[item].item() == pytest.approx(means[best], abs=1e-6)


@pytest.mark.parametrize("num_sources", [2, 3, 4])
def test_pit_equals_torchmetrics_and_reorders(num_sources):
    estimates, targets, orders = random_pair(num_sources, snr_db=5)
    loss, permutation = pit_neg_si_sdr(estimates, targets)
    expected, expected_permutation = permutation_invariant_training(
        estimates, targets, lambda e, t: scale_invariant_signal_distortion_ratio(e, t, zero_mean=True)
    )
    torch.testing.assert_close(loss, -expected, atol=1e-3, rtol=0)
    assert torch.equal(permutation, expected_permutation.long())
    # Estimate i was made of target orders[i], so the permutation undoes the order.
    assert torch.equal(orders.gather(1, permutation), torch.arange(num_sources).expand_as(orders))
    in_order = reorder(estimates, permutation)
    torch.testing.assert_close(-si_sdr(in_order, targets).mean(-1), loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_sources", [2, 4])
@pytest.mark.parametrize("case", ["targets", "one target", "estimates", "both", "perfect", "opposite"])
def test_silence_and_perfection_stay_finite(case, num_sources):
    estimates, targets, _ = random_pair(num_sources, snr_db=5)
    if case in ("targets", "both"):
        targets = torch.zeros_like(targets)
    if case == "one target":
        targets[:, 0] = 0
    if case in ("estimates", "both"):
        estimates = torch.zeros_like(estimates)
    if case in ("perfect", "opposite"):
        estimates = targets.clone() if case == "perfect" else -targets
    for form in (lambda e, t: pit_neg_si_sdr(e, t)[0], si_sdr):
        leaf = estimates.clone().requires_grad_()
        value = form(leaf, targets)
        value.sum().backward()
        assert value.isfinite().all()
        assert leaf.grad.isfinite().all()
    if case in ("targets", "estimates", "both"):
        torch.testing.assert_close(pit_neg_si_sdr(estimates, targets)[0], torch.full((3,), 80.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype):
    estimates, targets, _ = random_pair(2, snr_db=10)
    estimates, targets = estimates.to(dtype), targets.to(dtype)
    loss, _ = pit_neg_si_sdr(estimates, targets)
    assert loss.dtype == si_sdr(estimates, targets).dtype == torch.float32
    assert torch.equal(loss, pit_neg_si_sdr(estimates.float(), targets.float())[0])


def test_autocast_changes_nothing():
    estimates, targets, _ = random_pair(2, snr_db=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = pit_neg_si_sdr(estimates, targets)
    assert torch.equal(loss, pit_neg_si_sdr(estimates, targets)[0])


@pytest.mark.parametrize("num_sources", [2, 4])
def test_a_value_that_is_not_a_number_shows(num_sources):
    estimates, targets, _ = random_pair(num_sources, snr_db=5)
    estimates[1, 0, 7] = torch.nan
    loss, _ = pit_neg_si_sdr(estimates, targets)
    assert loss.isnan().tolist() == [False, True, False]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        pairwise_neg_si_sdr(torch.zeros(1, 2, 8), torch.zeros(1, 3, 8))
