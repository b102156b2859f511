"""Losses of an echo canceller: against their definitions, at the edges, and what their gradients do."""

import math

import pytest
import torch
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as tm_si_sdr

from losses.echo import (
    compressed_spectral_loss,
    delay_likelihood,
    delay_nll,
    echo_weight,
    far_active_frames,
    level_gain,
    near_end_active,
    neg_si_snr,
    neg_snr,
)

SHAPE = (3, 9, 7, 2)  # (B, F, frames, 2)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edge_case(case: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An estimate and a target."""
    estimate, target = noise(*shape), noise(*shape, seed=1)
    if case in ("silent target", "both silent"):
        target = torch.zeros_like(target)
    if case in ("silent estimate", "both silent"):
        estimate = torch.zeros_like(estimate)
    if case == "tiny estimate":
        estimate = 1e-20 * estimate
    if case == "perfect":
        estimate = target.clone()
    if case == "opposite":
        estimate = -target
    return estimate, target


CASES = ["silent target", "silent estimate", "both silent", "tiny estimate", "perfect", "opposite"]


@pytest.mark.parametrize(("compression", "complex_weight"), [(0.3, 0.3), (0.5, 0.8), (1.0, 0.0), (0.3, 1.0)])
def test_spectral_loss_is_the_formula(compression, complex_weight):
    estimate, target = noise(*SHAPE).double(), noise(*SHAPE, seed=1).double()
    e, t = torch.view_as_complex(estimate), torch.view_as_complex(target)
    magnitude = (e.abs() ** compression - t.abs() ** compression) ** 2
    compressed = [torch.polar(s.abs() ** compression, s.angle()) for s in (e, t)]
    expected = (1 - complex_weight) * magnitude + complex_weight * (compressed[0] - compressed[1]).abs() ** 2
    options = {"compression": compression, "complex_weight": complex_weight}
    value = compressed_spectral_loss(estimate, target, **options, eps=1e-14)
    torch.testing.assert_close(value, expected.mean((1, 2)), rtol=1e-6, atol=0)
    coarse = compressed_spectral_loss(estimate, target, **options)
    torch.testing.assert_close(coarse, value, rtol=1e-3, atol=0)  # eps is far below sound


def test_public_form_is_ours_with_other_weights():
    """Mean over real and imaginary parts as well: a * complex + (1 - a) * magnitude."""
    estimate, target = noise(*SHAPE).double(), noise(*SHAPE, seed=1).double()
    a = 0.7
    sizes = [s.square().sum(-1).sqrt() for s in (estimate, target)]
    complex_parts = [s * size.pow(-0.7).unsqueeze(-1) for s, size in zip((estimate, target), sizes, strict=True)]
    public = (
        a * (complex_parts[0] - complex_parts[1]).square().mean()
        + (1 - a) * (sizes[0] ** 0.3 - sizes[1] ** 0.3).square().mean()
    )
    ours = (1 - a / 2) * compressed_spectral_loss(estimate, target, complex_weight=a / (2 - a), eps=1e-14).mean()
    torch.testing.assert_close(ours, public, rtol=1e-6, atol=0)


def test_magnitude_term_is_blind_to_phase_and_complex_term_is_not():
    target = noise(*SHAPE)
    turned = torch.stack([-target[..., 1], target[..., 0]], -1)  # times j
    assert compressed_spectral_loss(turned, target, complex_weight=0.0).max() < 1e-12
    assert compressed_spectral_loss(turned, target, complex_weight=1.0).min() > 0.5


def test_error_weights_multiply_bins():
    estimate, target = noise(*SHAPE), noise(*SHAPE, seed=1)
    weight = torch.ones(SHAPE[:3])
    plain = compressed_spectral_loss(estimate, target)
    assert torch.equal(compressed_spectral_loss(estimate, target, weight=weight), plain)
    torch.testing.assert_close(compressed_spectral_loss(estimate, target, weight=3 * weight), 3 * plain)
    weight[:, 4:] = 0
    upper = compressed_spectral_loss(estimate[:, :4], target[:, :4]) * 4 / 9
    torch.testing.assert_close(compressed_spectral_loss(estimate, target, weight=weight), upper)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_silence_and_perfection_stay_finite(case, autocast):
    waveforms = (3, 4000)
    for loss, shape, steepest in (
        (compressed_spectral_loss, SHAPE, 120 / (9 * 7)),
        (neg_si_snr, waveforms, 1e3),
        (neg_snr, waveforms, 1e4),
    ):
        estimate, target = edge_case(case, *shape)
        estimate.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(estimate, target)
        value.sum().backward()
        assert value.shape == (3,) and value.dtype == torch.float32
        assert value.isfinite().all()
        assert estimate.grad.isfinite().all()
        assert estimate.grad.norm(dim=-1).max() < steepest
        if case == "perfect":
            assert value.max() < 1e-9
        if case == "silent estimate" and loss is neg_snr:
            assert value.abs().max() < 0.01  # as good as the microphone's own level at an SNR of 0 dB


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype):
    estimate, target = noise(*SHAPE).to(dtype), noise(*SHAPE, seed=1).to(dtype)
    value = compressed_spectral_loss(estimate, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, compressed_spectral_loss(estimate.float(), target.float()))
    estimate, target = estimate.flatten(1), target.flatten(1)
    assert torch.equal(neg_si_snr(estimate, target), neg_si_snr(estimate.float(), target.float()))


def test_gradients_are_those_of_finite_differences():
    estimate, target = noise(2, 3, 2, 2).double().requires_grad_(), noise(2, 3, 2, 2, seed=1).double()
    target[0] = 0
    assert torch.autograd.gradcheck(lambda e: compressed_spectral_loss(e, target), estimate)
    assert torch.autograd.gradcheck(lambda e: neg_si_snr(e.flatten(1), target.flatten(1) + 0.1), estimate)


def test_si_snr_equals_torchmetrics_and_saturates():
    target = 0.1 * noise(5, 4000)
    snr_db = torch.tensor([-20.0, 0.0, 20.0, 60.0, 100.0])
    estimate = target + 0.1 * 10 ** (-snr_db[:, None] / 20) * noise(5, 4000, seed=1) + 0.3
    expected = -tm_si_sdr(estimate.double(), target.double(), zero_mean=True).float()
    torch.testing.assert_close(neg_si_snr(estimate, target, eps=1e-9)[:3], expected[:3], atol=1e-3, rtol=0)
    value = neg_si_snr(estimate, target)
    torch.testing.assert_close(value[:3], expected[:3], atol=0.1, rtol=0)
    assert (value[3:] > -40.01).all() and value[4] < -39.9
    assert neg_si_snr(torch.zeros(1, 4000), target[:1]).item() == pytest.approx(40)


def test_snr_counts_a_wrong_level_and_saturates():
    target = noise(2, 4000)
    for gain in (0.5, 2.0):
        expected = 20 * math.log10(abs(gain - 1))
        torch.testing.assert_close(neg_snr(gain * target, target), torch.full((2,), expected), atol=0.05, rtol=0)
    assert neg_snr(target, target)[0].item() == pytest.approx(-30, abs=1e-3)
    assert (neg_snr(target + 0.1 * noise(2, 4000, seed=1), target) < -19).all()


def test_silence_is_not_a_way_out_of_si_snr():
    target = 0.1 * noise(1, 4000)
    assert neg_si_snr(0 * target, target) > neg_si_snr(target + noise(1, 4000, seed=1), target) + 10


def test_level_gain_brings_speech_to_one_level():
    speech = noise(1, 16000) * (torch.arange(16000) % 4000 < 2000)  # half of it pauses
    gains = torch.cat([level_gain(scale * speech) * scale for scale in (0.01, 0.1, 1.0)])
    torch.testing.assert_close(gains, gains[:1].expand(3, 1))
    active_rms = 0.1 / gains[0].item()
    assert active_rms == pytest.approx(1, abs=0.1)
    padded = torch.cat([speech, torch.zeros(1, 32000)], 1)
    assert level_gain(padded).item() == pytest.approx(level_gain(speech).item(), rel=0.02)


def test_level_gain_leaves_silence_quiet():
    silence = torch.stack([torch.zeros(1000), 1e-5 * noise(1000)])
    gain = level_gain(silence)
    assert gain.shape == (2, 1)
    torch.testing.assert_close(gain, torch.full((2, 1), 100.0))  # no more than 40 dB


def test_near_end_is_active_above_60_db():
    signals = torch.stack([torch.zeros(8000), 5e-4 * noise(8000), 2e-3 * noise(8000), 0.1 * noise(8000)])
    assert near_end_active(signals).tolist() == [False, False, True, True]


@pytest.mark.parametrize(("num_samples", "hop"), [(4000, 160), (4001, 256), (150, 160)])
def test_far_end_frames_are_where_the_stft_has_them(num_samples, hop):
    far = torch.zeros(3, num_samples)
    far[0] = 0.1
    far[1, num_samples // 2 :] = 0.1
    num_frames = 1 + num_samples // hop
    active = far_active_frames(far, hop_samples=hop, num_frames=num_frames)
    assert active.shape == (3, num_frames)
    assert active[0].all() and not active[2].any()
    centres = torch.arange(num_frames) * hop
    assert torch.equal(active[1], centres + hop > num_samples // 2)


def test_far_end_floor_is_relative_and_absolute():
    far = 0.1 * torch.ones(2, 4000)
    far[0, 2000:] *= 1e-3  # 60 dB below what came before
    far[1] *= 1e-3  # 80 dB below full scale
    active = far_active_frames(far, hop_samples=160, num_frames=26)
    assert active[0, :12].all() and not active[0, 14:].any()
    assert not active[1].any()


def test_delay_likelihood_is_linear_between_frames():
    distribution = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(7, 5, 4)
    delays = torch.tensor([0.0, 1.0, 1.25, 2.5, 3.0, 3.1, -1.0])
    expected = torch.tensor([0.1, 0.2, 0.225, 0.35, 0.4, 0.0, 0.0])
    torch.testing.assert_close(delay_likelihood(distribution, delays), expected[:, None].expand(7, 5))


def test_delay_nll_of_certain_and_of_uniform_distributions():
    certain = torch.zeros(1, 20, 10)
    certain[..., 4] = 1
    active = torch.ones(1, 20, dtype=torch.bool)
    four, five = torch.tensor([4.0]), torch.tensor([5.0])
    assert delay_nll(certain, four, active)[0].item() == 0
    assert delay_nll(certain, torch.tensor([4.5]), active)[0].item() == pytest.approx(math.log(2))
    assert delay_nll(certain, five, active)[0].item() == pytest.approx(-math.log(1e-12))
    assert delay_nll(torch.full((1, 20, 10), 0.1), five, active)[0].item() == pytest.approx(math.log(10))


def test_frames_that_cannot_know_the_delay_do_not_count():
    """The far end plays in frames 5 to 9, so its echo with a delay of 4 is in frames 9 to 13."""
    active = torch.zeros(1, 20, dtype=torch.bool)
    active[:, 5:10] = True
    logits = noise(1, 20, 10).requires_grad_()
    value = delay_nll(logits.softmax(-1), torch.tensor([4.0]), active)[0]
    value.sum().backward()
    counted = logits.grad.abs().sum(-1)[0] > 0
    assert counted.nonzero().flatten().tolist() == list(range(9, 14))
    expected = -logits.log_softmax(-1)[0, 9:14, 4].mean()
    torch.testing.assert_close(value[0], expected)


@pytest.mark.parametrize("case", ["unknown", "beyond", "far end silent", "echo after the end"])
def test_delay_nll_without_an_answer_is_zero_without_gradient(case):
    active = torch.full((1, 6), case != "far end silent")
    delay = {"unknown": -1.0, "beyond": 9.5, "far end silent": 2.0, "echo after the end": 7.0}[case]
    logits = noise(1, 6, 10).requires_grad_()
    value = delay_nll(logits.softmax(-1), torch.tensor([delay]), active)[0]
    value.sum().backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_saturated_distribution_still_learns_its_delay():
    logits = torch.zeros(1, 6, 10)
    logits[..., 0] = 25.0  # certain, and wrong
    logits.requires_grad_()
    active = torch.ones(1, 6, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delay_nll(logits.softmax(-1), torch.tensor([3.25]), active)[0].sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 4:, 3] < -0.1).all() and (logits.grad[0, 4:, 0] > 0.1).all()
    assert logits.grad[0, 4:, 3].min() < logits.grad[0, 4:, 4].min() < 0  # the nearer one more


def test_echo_weight_marks_bins_that_the_echo_dominates():
    near, echo = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    near[0, 0, :, 0] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    echo[0, 0, :, 1] = torch.tensor([0.5, -2.0, 0.1, 0.0])
    assert echo_weight(near, echo, weight=1.5).flatten().tolist() == [1.0, 2.5, 2.5, 1.0]


def test_shapes_must_agree():
    for loss in (compressed_spectral_loss, neg_si_snr):
        with pytest.raises(ValueError, match="one shape"):
            loss(torch.zeros(1, 5, 3, 2), torch.zeros(1, 5, 1, 2))
