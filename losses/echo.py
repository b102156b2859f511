"""Losses of an echo canceller: compressed spectra, SI-SNR, and the likelihood of the true delay.

One number per item, `(B,)`: which of them count, and how much, is the caller's business. Everything is computed in
float32 at least, also inside autocast, and value and gradient are finite for silent targets, silent estimates and both.

The constants below are absolute, so signals are to be brought to one level first; `level_gain` says how.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

_LEVEL_RMS = 0.1  # -20 dB of full scale: what an active microphone is brought to
_LEVEL_FRAME_SAMPLES = 512
_ACTIVE_MARGIN = 10 ** (-15.9 / 10)  # energy; the margin of ITU-T P.56 between active level and threshold
_MAX_GAIN = 100.0  # 40 dB: what is quieter is noise, which should stay quiet
_NEAR_END_RMS = 1e-3  # -60 dB
_TINY_POWER = 1e-10  # -100 dB: keeps silence divided by silence from being NaN, and its gradient small
_FAR_END_RMS = 10 ** (-70 / 20)  # a far end below this plays nothing,
_FAR_END_RANGE = 10 ** (-40 / 20)  # and neither does one that is this much below its own loudest frame
_MIN_PROBABILITY = 1e-12  # a softmax in float32 gives such values still and can learn from them


@torch.no_grad()
def level_gain(mic: Tensor) -> Tensor:
    """The gain that brings each microphone signal to an active level of -20 dB (RMS, of full scale), at most 40 dB.

    The same gain belongs on the target and on the estimate. The reference is the microphone, not the target, because
    a target may be silent. The active level is the RMS over the pieces of 512 samples that are not more than 15.9 dB
    below the mean of all, so that pauses (and zeros after the end) hardly count. After Braun and Tashev, "A
    consolidated view of loss functions for supervised deep learning-based speech enhancement", 2021.

    Shape: (B, T) -> (B, 1).
    """
    mic = mic.to(_at_least_float32(mic))
    energy = avg_pool1d(_padded_to_pieces(mic).square(), _LEVEL_FRAME_SAMPLES)  # (B, pieces)
    active = energy >= _ACTIVE_MARGIN * energy.mean(-1, keepdim=True)
    level = ((energy * active).sum(-1, keepdim=True) / active.sum(-1, keepdim=True)).sqrt()
    return _LEVEL_RMS / level.clamp_min(_LEVEL_RMS / _MAX_GAIN)


def compressed_spectral_loss(
    estimate: Tensor,
    target: Tensor,
    *,
    compression: float = 0.3,
    complex_weight: float = 0.3,
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Squared error of compressed magnitudes and of compressed complex spectra (Braun and Tashev 2021).

    With c the compression and S^c = |S|^(c-1) S, the mean over bins of

        (1 - complex_weight) (|S| ^ c - |S'| ^ c)^2 + complex_weight |S^c - S'^c|^2

    where |S| is sqrt(re^2 + im^2 + eps). The slope of |S|^c has a pole at 0; eps bounds it, by eps^((c-1)/2), which is
    56 for the defaults. Bins below sqrt(eps), 50 dB below speech at the level of `level_gain`, count as silent.

    *weight* multiplies the error of each bin; the mean is not divided by it.

    Public implementations often take the mean over real and imaginary parts as well, which halves the complex term:
    their a * complex + (1 - a) * magnitude is (1 - a/2) times this loss with complex_weight = a / (2 - a).

    Shape: estimate, target (B, F, frames, 2), weight (B, F, frames) -> (B,).
    """
    _check_same_shape(estimate, target)
    estimate_magnitude, estimate = _compress(estimate, compression, eps)
    target_magnitude, target = _compress(target, compression, eps)
    magnitude_error = (estimate_magnitude - target_magnitude).square()
    complex_error = (estimate - target).square().sum(-1)
    error = (1 - complex_weight) * magnitude_error + complex_weight * complex_error  # (B, F, frames)
    if weight is not None:
        error = error * weight
    return error.mean((-2, -1))


def neg_si_snr(estimate: Tensor, target: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Negative scale-invariant SNR in dB, means removed (Le Roux et al., "SDR - half-baked or well done?", 2019).

    With s the projection of the estimate e on the target t: -10 log10(|s|^2 / (|e - s|^2 + eps |t|^2) + eps). Being
    relative to the target, eps keeps the value within about +-10 log10(eps), 40 dB by default, and the gradient
    within 4.3 / (eps |t|): nothing is gained by chasing the last bits of clean speech. A silent estimate has the worst
    value. So has, without gradient, any estimate of a silent target, of which no ratio can be taken: leave those out
    with `near_end_active`.

    Shape: (B, T), (B, T) -> (B,).
    """
    _check_same_shape(estimate, target)
    dtype = _at_least_float32(estimate, target)
    estimate, target = (x.to(dtype) - x.to(dtype).mean(-1, keepdim=True) for x in (estimate, target))
    tiny = 1e-12  # keeps silence divided by silence from being NaN
    energy = target.square().sum(-1)
    scale = (estimate * target).sum(-1) / (energy + tiny)
    signal = scale.square() * energy
    distortion = (estimate - scale.unsqueeze(-1) * target).square().sum(-1)
    return -10 * torch.log10(signal / (distortion + eps * energy + tiny) + eps)


def neg_snr(estimate: Tensor, target: Tensor, *, eps: float = 1e-3) -> Tensor:
    """Negative SNR in dB, to which a wrong level is an error like any other.

    -10 log10(|t|^2 / (|e - t|^2 + eps |t|^2)), after Wisdom et al., "What's all the fuss about free universal sound
    separation data?", 2021, equation 2: eps bounds it at 10 log10(eps), -30 dB by default, and the gradient too. 0 for
    a silent estimate; of a silent target no ratio can be taken: leave those out with `near_end_active`.

    Shape: (B, T), (B, T) -> (B,).
    """
    _check_same_shape(estimate, target)
    dtype = _at_least_float32(estimate, target)
    estimate, target = estimate.to(dtype), target.to(dtype)
    energy = target.square().mean(-1)
    error = (estimate - target).square().mean(-1)
    return 10 * torch.log10((error + eps * energy + _TINY_POWER) / (energy + _TINY_POWER))


def near_end_active(target: Tensor) -> Tensor:
    """Whether there is near-end speech to speak of: an RMS above -60 dB of full scale.

    Shape: (B, T) -> (B,) bool.
    """
    return target.to(_at_least_float32(target)).square().mean(-1).sqrt() > _NEAR_END_RMS


def far_active_frames(far: Tensor, *, hop_samples: int, num_frames: int) -> Tensor:
    """Which STFT frames of the far end carry sound: those not more than 40 dB below the loudest, and above -70 dB.

    Frame k is the two hops around sample k * hop_samples, where torch.stft with center=True has its frame k.

    Shape: (B, T) -> (B, frames) bool.
    """
    far = far.to(_at_least_float32(far))
    missing = (num_frames + 1) * hop_samples - (far.shape[-1] + hop_samples)
    power = pad(far, (hop_samples, max(0, missing))).square()
    power = avg_pool1d(power, 2 * hop_samples, stride=hop_samples)[:, :num_frames]
    rms = power.sqrt()
    return (rms > _FAR_END_RMS) & (rms >= _FAR_END_RANGE * rms.amax(-1, keepdim=True))


def delay_likelihood(delay_distribution: Tensor, delay_frames: Tensor) -> Tensor:
    """The probability that each frame's distribution gives to the true delay, linear between whole frames.

    Index d of the distribution is a delay of d frames. A delay that it does not reach is answered by 0.

    Shape: (B, frames, D), (B,) -> (B, frames).
    """
    delay_distribution = delay_distribution.to(_at_least_float32(delay_distribution))
    num_delays = delay_distribution.shape[-1]
    lower = delay_frames.floor()
    upper_share = (delay_frames - lower).to(delay_distribution).unsqueeze(-1)  # (B, 1)
    known = _is_within(delay_frames, num_delays)

    def at(index: Tensor) -> Tensor:
        index = index.long().clamp(0, num_delays - 1)[:, None, None]  # (B, 1, 1)
        return torch.take_along_dim(delay_distribution, index, dim=-1).squeeze(-1)  # (B, frames)

    likelihood = (1 - upper_share) * at(lower) + upper_share * at(lower + 1)
    return likelihood * known.unsqueeze(-1)


def delay_nll(delay_distribution: Tensor, delay_frames: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the true delay, the mean over the frames that can know it; and whether there are any.

    Those are the frames whose echo was played while the far end was active: `delay_frames` earlier, so frames before
    the first echo do not count. 0, without gradient, where no frame counts or where the delay is unknown (negative)
    or beyond the distribution.

    Between whole frames the likelihood is linear (`delay_likelihood`), and then at best the larger of the two shares:
    there the least value is not 0 but up to log 2.

    Shape: delay_distribution (B, frames, D), delay_frames (B,) in frames, active (B, frames) bool: frames in which
    the far end is active -> (B,), (B,) bool.
    """
    likelihood = delay_likelihood(delay_distribution, delay_frames)
    known = _is_within(delay_frames, delay_distribution.shape[-1])
    played = _delayed(active, delay_frames.ceil().long().clamp_min(0)) & known.unsqueeze(-1)  # (B, frames)
    nll = -likelihood.clamp_min(_MIN_PROBABILITY).log()
    # where, not a product: frames that do not count must not even pass on a gradient.
    return torch.where(played, nll, 0.0).sum(-1) / played.sum(-1).clamp_min(1), played.any(-1)


def echo_weight(near_spectrum: Tensor, echo_spectrum: Tensor, *, weight: float) -> Tensor:
    """Weights for `compressed_spectral_loss` that stress what an echo canceller is for: 1 + weight in the bins where
    the echo is louder than the near end, 1 elsewhere.

    After the echo-aware loss of Zhang et al., "Multi-task deep residual echo suppression with echo-aware loss", 2022,
    which weighs bins by their signal-to-echo ratio.

    Shape: (B, F, frames, 2), (B, F, frames, 2) -> (B, F, frames).
    """
    _check_same_shape(near_spectrum, echo_spectrum)
    near, echo = (x.to(_at_least_float32(x)).square().sum(-1) for x in (near_spectrum, echo_spectrum))
    return 1 + weight * (echo > near).to(near.dtype)


def _compress(spectrum: Tensor, compression: float, eps: float) -> tuple[Tensor, Tensor]:
    """|S|^c and |S|^(c-1) S. Shape: (B, F, frames, 2) -> (B, F, frames), (B, F, frames, 2)."""
    spectrum = spectrum.to(_at_least_float32(spectrum))
    power = spectrum.square().sum(-1) + eps
    return power.pow(compression / 2), power.pow((compression - 1) / 2).unsqueeze(-1) * spectrum


def _delayed(active: Tensor, delay_frames: Tensor) -> Tensor:
    """What was true so many frames ago. Shape: (B, frames) bool, (B,) int64 -> (B, frames) bool."""
    source = torch.arange(active.shape[-1], device=active.device) - delay_frames.unsqueeze(-1)  # (B, frames)
    return active.gather(-1, source.clamp_min(0)) & (source >= 0)


def _is_within(delay_frames: Tensor, num_delays: int) -> Tensor:
    return (delay_frames >= 0) & (delay_frames <= num_delays - 1)


def _padded_to_pieces(signal: Tensor) -> Tensor:
    missing = math.ceil(signal.shape[-1] / _LEVEL_FRAME_SAMPLES) * _LEVEL_FRAME_SAMPLES - signal.shape[-1]
    return pad(signal, (0, missing))


def _at_least_float32(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"both must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
