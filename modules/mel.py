"""Log-mel features, number for number those of NeMo's AudioToMelSpectrogramPreprocessor.

Decisions that are not obvious:
* An item of S samples has S // hop frames although the transform gives one more: frames behind that count as padding.
* Magnitudes are squared again after the root: two more roundings, without which the last bits differ from NeMo.
* Each item is normalised by its own valid frames, so a longer neighbour in the batch changes nothing.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast
from modules.checks import choices, numbers, switches, whole_numbers

WINDOWS: dict[str, Callable[..., Tensor]] = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "bartlett": torch.bartlett_window,
    "ones": lambda num_samples, periodic: torch.ones(num_samples),
}
WINDOWS["none"] = WINDOWS["ones"]
MAX_PAD_S = 16.7  # what pad_to "max" fills up to
EPS = 1e-5  # added to standard deviations


def mel_frequencies(num: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Frequencies in Hz, equally far from each other on Slaney's mel scale: linear up to 1 kHz, logarithmic above.

    Slaney, "Auditory Toolbox", Technical Report 1998-010, Interval Research, 1998.
    """
    hz_per_mel, log_step, mels_at_1khz = 200 / 3, math.log(6.4) / 27, 15

    def mel(hz: float) -> float:
        return hz / hz_per_mel if hz < 1000 else mels_at_1khz + math.log(hz / 1000) / log_step

    mels = np.linspace(mel(low_hz), mel(high_hz), num)
    return np.where(mels < mels_at_1khz, mels * hz_per_mel, 1000 * np.exp(log_step * (mels - mels_at_1khz)))


def mel_filterbank(sample_rate: int, n_fft: int, num_mels: int, low_hz: float, high_hz: float) -> Tensor:
    """Triangular filters of equal area (Slaney's), each from the centre of its neighbour below to that above.

    Shape: (num_mels, n_fft // 2 + 1) float32.
    """
    bins = np.fft.rfftfreq(n_fft, 1 / sample_rate)
    edges = mel_frequencies(num_mels + 2, low_hz, high_hz)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(0)  # (F, bins)
    return torch.from_numpy((triangles.astype(np.float32) * (2 / (high - low))).astype(np.float32))  # twice: as librosa


def pre_emphasis(signal: Tensor, coefficient: float) -> Tensor:
    """y[n] = x[n] - coefficient * x[n - 1], the first sample as it is. Shape: (B, S) -> (B, S)."""
    return torch.cat([signal[:, :1], signal[:, 1:] - coefficient * signal[:, :-1]], 1)


def feature_statistics(mel: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each mel over the valid frames; the deviation of one number counts as 0.

    Shape: mel (B, F, T), valid (B, 1, T) bool -> twice (B, F, 1).
    """
    count = valid.sum(2, keepdim=True)
    mean = mel.where(valid, 0).sum(2, keepdim=True) / count
    squares = (mel - mean).where(valid, 0).square().sum(2, keepdim=True)
    deviation = (squares / (count - 1)).sqrt()
    return mean, deviation.masked_fill(deviation.isnan(), 0)


def item_statistics(mel: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
    """The same over all mels of an item together.

    Item by item, for which the host waits: a masked sum rounds otherwise, and so many numbers magnify that beyond 1e-6.

    Shape: mel (B, F, T), num_frames (B,) -> twice (B, 1, 1).
    """
    items = [item[:, :count] for item, count in zip(mel, num_frames.tolist(), strict=True)]
    mean = torch.stack([item.mean() for item in items])
    deviation = torch.stack([item.std() if item.numel() > 1 else torch.zeros_like(item.sum()) for item in items])
    return mean[:, None, None], deviation[:, None, None]


class _Featurizer(nn.Module):
    """The place where NeMo's checkpoints have the window (n_window,) and the filters (1, num_mels, bins)."""

    window: Tensor
    fb: Tensor
    fixed: Tensor | None  # mean and deviation of each mel (2, num_mels, 1)


class MelPreprocessor(nn.Module):
    """Waveforms to normalised log-mel features; no gradient.

    Computed and, inside autocast, returned in the type of the buffers, and at least in float32; in a half network the
    result is rounded to the network's type.

    Arguments
        sample_rate: of the waveforms in Hz.
        normalize: per_feature, all_features, null, or {fixed_mean, fixed_std} with a number for each mel.
        window_size, window_stride: of a frame, and from one frame to the next, in seconds.
        window: a name of `WINDOWS`, symmetric.
        features: mels.
        n_fft: of the transform, in which the window stands centred; null: the next power of two.
        log: whether the natural logarithm is taken.
        frame_splicing: 1.
        dither: standard deviation of the noise that is added to the waveform in training.
        pad_to: frames are padded to a multiple of it, 0: not at all, max: to 16.7 s.
        pad_value: of the features behind an item's end.
        preemph: coefficient of the pre-emphasis, null: none.
        lowfreq, highfreq: outer edges of the lowest and highest mel in Hz; null: half of sample_rate.
        log_zero_guard_type: add, or clamp to, log_zero_guard_value before the logarithm.
        log_zero_guard_value: a number, or tiny or eps of the floating-point type.
        exact_pad: frames cover the waveform without being centred: half a frame less a hop is padded on both sides.
        mag_power: to which magnitudes are raised.
        nb_augmentation_prob: probability that an item loses the frequencies from nb_max_freq (Hz) up, in training.

    Shape: signal (B, S), length (B,) in samples -> (B, features, T), and lengths (B,) in frames.

    Raises ValueError for values that do not fit, and for signals of another shape.
    """

    kernels: Tensor | None  # cosines and sines under the window (2 bins, 1, n_fft), of `for_export`

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        normalize: str | dict[str, Any] | None = "per_feature",
        window_size: float = 0.025,
        window_stride: float = 0.01,
        window: str | None = "hann",
        features: int = 80,
        n_fft: int | None = 512,
        log: bool = True,
        frame_splicing: int = 1,
        dither: float = 1e-5,
        pad_to: int | str = 16,
        pad_value: float = 0.0,
        preemph: float | None = 0.97,
        lowfreq: float = 0,
        highfreq: float | None = None,
        log_zero_guard_type: str = "add",
        log_zero_guard_value: float | str = 2**-24,
        exact_pad: bool = False,
        mag_power: float = 2.0,
        nb_augmentation_prob: float = 0.0,
        nb_max_freq: float = 4000,
    ) -> None:
        super().__init__()
        window = window or "none"
        whole_numbers(sample_rate=sample_rate, features=features, n_fft=n_fft or 1)
        numbers(
            least=0,
            most=math.inf,
            window_size=window_size,
            window_stride=window_stride,
            dither=dither,
            preemph=preemph or 0,
            lowfreq=lowfreq,
            highfreq=highfreq or 0,
            log_zero_guard_value=0 if log_zero_guard_value in ("tiny", "eps") else log_zero_guard_value,
            mag_power=mag_power,
            nb_augmentation_prob=nb_augmentation_prob,
            nb_max_freq=nb_max_freq,
        )
        numbers(least=-math.inf, most=math.inf, pad_value=pad_value)
        switches(log=log, exact_pad=exact_pad)
        choices(window=(window, WINDOWS), log_zero_guard_type=(log_zero_guard_type, ("add", "clamp")))
        if frame_splicing != 1:
            raise ValueError(f"frame_splicing must be 1 (NeMo's splicing only repeats frames), got {frame_splicing!r}")
        if pad_to != "max" and (not isinstance(pad_to, int) or pad_to < 0):
            raise ValueError(f"pad_to must be a number of frames, 0 (no padding) or max, got {pad_to!r}")
        nyquist_hz = sample_rate / 2
        highfreq = highfreq or nyquist_hz
        if not lowfreq < highfreq <= nyquist_hz:
            raise ValueError(f"highfreq must be above lowfreq and at most {nyquist_hz:g} Hz, got {highfreq!r}")
        if nb_augmentation_prob > 0 and nb_max_freq >= nyquist_hz:
            raise ValueError(f"nb_max_freq must be below {nyquist_hz:g} Hz, got {nb_max_freq!r}")
        self.num_features = features
        self.normalize = normalize
        self.log = log
        self.dither = dither
        self.pad_to = pad_to
        self.pad_value = pad_value
        self.preemph = preemph
        self.guard_type = log_zero_guard_type
        self.guard_value = log_zero_guard_value
        self.exact_pad = exact_pad
        self.mag_power = mag_power
        self.nb_augmentation_prob = nb_augmentation_prob
        num_window, self.hop_samples = int(window_size * sample_rate), int(window_stride * sample_rate)
        if min(num_window, self.hop_samples) < 1:
            raise ValueError(f"window_size and window_stride must be at least {1 / sample_rate:g} s, one sample")
        self.n_fft = n_fft or 2 ** math.ceil(math.log2(num_window))
        if num_window > self.n_fft:
            raise ValueError(f"window_size of {window_size} s, {num_window} samples, must fit into n_fft={self.n_fft}")
        if self.n_fft > 2 * sample_rate:  # the next power of two above a second fits
            raise ValueError(f"n_fft must be at most {2 * sample_rate}, two seconds, got {self.n_fft}")
        if exact_pad and self.hop_samples % 2:
            raise ValueError(f"exact_pad needs a window_stride of an even number of samples, got {self.hop_samples}")
        self.pad_samples = (self.n_fft - self.hop_samples) // 2 if exact_pad else self.n_fft // 2
        self.nb_first_bin = int(nb_max_freq / sample_rate * self.n_fft)
        self.max_frames = (round(MAX_PAD_S * sample_rate) + 2 * self.pad_samples - self.n_fft) // self.hop_samples

        self.featurizer = _Featurizer()
        persistent = window not in ("none", "ones")  # NeMo has no such window
        self.featurizer.register_buffer("window", WINDOWS[window](num_window, periodic=False), persistent=persistent)
        filters = mel_filterbank(sample_rate, self.n_fft, features, lowfreq, highfreq)
        self.featurizer.register_buffer("fb", filters[None])
        self.featurizer.register_buffer("fixed", _fixed_statistics(normalize, features), persistent=False)
        self.register_buffer("kernels", None, persistent=False)

    @torch.no_grad()
    def forward(self, signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        if signal.ndim != 2:
            raise ValueError(f"signal must have shape (batch, samples), got {tuple(signal.shape)}")
        window, filters = self.featurizer.window, self.featurizer.fb
        wide = torch.promote_types(filters.dtype, torch.float32)
        with without_autocast(signal.device.type):
            magnitude = self._magnitude(signal.to(wide), length, window.to(wide))
            mel = filters.to(wide) @ magnitude**self.mag_power  # (B, F, T)
            mel = self._log(mel) if self.log else mel
            num_frames = self.frames(length)
            valid = (torch.arange(mel.shape[2], device=mel.device) < num_frames[:, None])[:, None]  # (B, 1, T)
            mel = self._normalise(mel, valid, num_frames).masked_fill(~valid, self.pad_value)
            return self._pad(mel).to(filters.dtype), num_frames

    def frames(self, length: Tensor) -> Tensor:
        """Valid frames of items of *length* samples. Shape: (B,) -> (B,) int64."""
        frames = torch.div(length + 2 * self.pad_samples - self.n_fft, self.hop_samples, rounding_mode="floor")
        return frames.clamp_min(0).long()

    def _magnitude(self, signal: Tensor, length: Tensor, window: Tensor) -> Tensor:
        """Shape: (B, S) -> (B, bins, T)."""
        if self.exact_pad:
            missing = self.n_fft - signal.shape[1] - 2 * self.pad_samples  # of a first frame
            signal = F.pad(signal, (self.pad_samples, self.pad_samples + max(0, missing)))
        if self.training and self.dither > 0:
            signal = signal + self.dither * torch.randn_like(signal)
        if self.preemph is not None:
            # With exact_pad, as in NeMo, this counts from the start of the padding and silences the last samples too.
            behind = torch.arange(signal.shape[1], device=signal.device) >= length[:, None]  # (B, S)
            signal = pre_emphasis(signal, self.preemph).masked_fill(behind, 0)
        real, imaginary = self._spectrum(signal, window)
        # Two strided products instead of a sum over an axis of two, which is slow on a CPU; the same to the last bit.
        magnitude = (real.square() + imaginary.square()).sqrt_()
        if self.training and self.nb_augmentation_prob > 0:
            narrow = torch.rand(len(signal), 1, 1, device=signal.device) < self.nb_augmentation_prob
            above = torch.arange(magnitude.shape[1], device=signal.device)[:, None] >= self.nb_first_bin
            magnitude.masked_fill_(narrow & above, 0)
        return magnitude

    def _spectrum(self, signal: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Real and imaginary part. Shape: (B, S) -> twice (B, bins, T)."""
        if self.kernels is not None:
            padding = 0 if self.exact_pad else self.n_fft // 2
            both = F.conv1d(signal[:, None], self.kernels, stride=self.hop_samples, padding=padding)
            real, imaginary = both.chunk(2, 1)
            return real, imaginary
        spectrum = torch.stft(
            signal,
            self.n_fft,
            self.hop_samples,
            win_length=len(window),
            window=window,
            center=not self.exact_pad,
            pad_mode="constant",
            return_complex=True,
        )
        return spectrum.real, spectrum.imag

    def for_export(self) -> "MelPreprocessor":
        """A copy in evaluation that an exported graph can hold: its transform is a convolution, and no size follows
        from a value. The last digits differ.
        """
        copied = copy.deepcopy(self).eval()
        window = self.featurizer.window.double()
        before = (self.n_fft - len(window)) // 2
        window = F.pad(window, (before, self.n_fft - len(window) - before))
        bins = torch.fft.rfft(window.diag()).T  # (bins, n_fft)
        copied.kernels = torch.cat([bins.real, bins.imag])[:, None].to(self.featurizer.window)
        return copied

    def _log(self, mel: Tensor) -> Tensor:
        guard = self.guard_value
        if isinstance(guard, str):
            guard = getattr(torch.finfo(mel.dtype), guard)
        return (mel + guard if self.guard_type == "add" else mel.clamp_min(guard)).log()

    def _normalise(self, mel: Tensor, valid: Tensor, num_frames: Tensor) -> Tensor:
        if self.featurizer.fixed is not None:
            mean, deviation = self.featurizer.fixed.to(mel.dtype)
            return (mel - mean) / deviation
        if not self.normalize:
            return mel
        if self.normalize == "all_features":
            mean, deviation = self._item_statistics(mel, valid, num_frames)
        else:
            mean, deviation = feature_statistics(mel, valid)
        return (mel - mean) / (deviation + EPS)

    def _item_statistics(self, mel: Tensor, valid: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Shape: mel (B, F, T), valid (B, 1, T), num_frames (B,) -> twice (B, 1, 1)."""
        if self.kernels is None:
            return item_statistics(mel, num_frames)
        return feature_statistics(mel.flatten(1)[:, None], valid.expand_as(mel).flatten(1)[:, None])

    def _pad(self, mel: Tensor) -> Tensor:
        num_frames = mel.shape[2]
        if self.pad_to == "max":
            missing = self.max_frames - num_frames
            if missing < -1:  # the last frame of all is always behind the items' ends
                raise ValueError(
                    f"pad_to=max holds {self.max_frames} frames, {MAX_PAD_S} s; a batch has {num_frames - 1}"
                )
        else:
            missing = -num_frames % int(self.pad_to) if self.pad_to else 0
        return F.pad(mel, (0, missing), value=self.pad_value)


def _fixed_statistics(normalize: str | dict[str, Any] | None, num_mels: int) -> Tensor | None:
    """Mean and deviation (2, num_mels, 1) where *normalize* gives them."""
    if not normalize or normalize in ("per_feature", "all_features"):
        return None
    if not isinstance(normalize, dict) or set(normalize) != {"fixed_mean", "fixed_std"}:
        choices = "per_feature, all_features, null or {fixed_mean: [...], fixed_std: [...]}"
        raise ValueError(f"normalize must be {choices}, got {normalize!r}")
    fixed = torch.tensor([normalize["fixed_mean"], normalize["fixed_std"]], dtype=torch.float32)
    if fixed.shape != (2, num_mels):
        raise ValueError(f"normalize must have {num_mels} numbers in fixed_mean and in fixed_std, one for each mel")
    return fixed[:, :, None]
