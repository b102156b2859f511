"""How much later the far end is heard in the microphone: the bulk delay of a recording, for files that do not state it.

Generalised cross-correlation with phase transform (GCC-PHAT; Knapp and Carter 1976, "The generalized correlation
method for estimation of time delay"), over the whole recording: where near-end speech lies over half of it, one
transform of everything still finds the echo.

Only bins in which both signals have energy are counted, and none below 100 Hz. In the others the phase is that of
rounding or of a coder's noise, or of hum and a constant offset, which many recordings have in common; whitened, they
would outweigh the speech.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

_LOWEST_HZ = 100.0
_FLOOR = 1e-4  # of a signal's strongest band (-40 dB), under which a bin is not counted
_BAND_HZ = 50.0  # over which a bin's power is averaged for that
# Least confidence of an answer. Real recordings gave 10 to 1700 with their own far end, at most 8.7 with another's.
_MIN_CONFIDENCE = 9.0
_MEDIAN_OF_NORMAL = 0.6745  # of the magnitude of normal noise, by its deviation


def estimate_delay(mic: Tensor, far: Tensor, *, sample_rate: int, max_s: float) -> tuple[float | None, float]:
    """The delay of the strongest echo path in seconds, and how sure that is.

    Args:
        mic: microphone.
        far: far-end reference, from the same moment on.
        sample_rate: of both, in Hz.
        max_s: delays from -max_s to max_s are tried; a negative one means that the echo precedes the reference.

    Returns:
        The delay, None where no echo stands out (silence, or near-end speech alone), and the confidence: the peak of
        the correlation in standard deviations of the rest. Chance gives 4 to 9, an answer has at least 9.

    Shape: mic (T,), far (T',), which may differ in length.

    Raises ValueError for other shapes, no samples, or *max_s* that is not positive.
    """
    if mic.ndim != 1 or far.ndim != 1 or not mic.numel() or not far.numel():
        raise ValueError(f"mic and far must be (T,) with T > 0, got {tuple(mic.shape)} and {tuple(far.shape)}")
    longest = max(mic.numel(), far.numel())
    most = min(round(max_s * sample_rate), longest - 1) if max_s > 0 else -1
    if most < 0:
        raise ValueError(f"max_s must be positive, got {max_s}")
    strength = gcc_phat(mic, far, most=most, sample_rate=sample_rate).abs()  # a loudspeaker may be wired either way
    peak = int(strength.argmax())
    # By the median, which the echo itself and its reverberation do not raise.
    deviation = strength.median() / _MEDIAN_OF_NORMAL
    confidence = float(strength[peak] / deviation.clamp(min=torch.finfo(strength.dtype).tiny))
    return ((peak - most) / sample_rate if confidence >= _MIN_CONFIDENCE else None), confidence


def gcc_phat(mic: Tensor, far: Tensor, *, most: int, sample_rate: int) -> Tensor:
    """Whitened cross-correlation at the delays -most … most (samples); zeros where no bin has energy in both.

    Shape: (T,), (T',) -> (2 * most + 1,).
    """
    size = 1 << (max(mic.numel(), far.numel()) + most).bit_length()  # no delay wraps around onto another
    padded = torch.stack([pad(signal.detach().float(), (0, size - signal.numel())) for signal in (mic, far)])
    spectra = torch.fft.rfft(padded)  # (2, F)
    spectra[:, : math.ceil(_LOWEST_HZ / sample_rate * size)] = 0
    power = _smoothed(spectra.abs().square(), round(_BAND_HZ / sample_rate * size / 2))  # (2, F)
    heard = ((power > _FLOOR * power.amax(-1, keepdim=True)) & (spectra != 0)).all(0)  # (F,)
    phase = (spectra[0] * spectra[1].conj()).angle()
    correlation = torch.fft.irfft(torch.where(heard, torch.exp(1j * phase), 0), size)
    return torch.cat([correlation[size - most :], correlation[: most + 1]])


def _smoothed(power: Tensor, half: int) -> Tensor:
    """The mean over the 2 * half + 1 bins around each, zeros outside, by running sums. Shape: (2, F) -> (2, F)."""
    count, total = power.shape[-1], pad(power.double().cumsum(-1), (1, 0))
    index = torch.arange(count, device=power.device)
    sums = total[:, (index + half + 1).clamp_max(count)] - total[:, (index - half).clamp_min(0)]
    return (sums / (2 * half + 1)).to(power.dtype)
