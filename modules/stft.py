"""Short-time Fourier transform and its inverse, as the echo canceller sees a waveform.

Frames are centred (torch.stft with center=True, reflected ends), so frame k stands around sample k * hop_samples. The
window is periodic; "sqrt_hann" at half overlap, used on both sides, adds up to one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast


def _sqrt_hann(num_samples: int) -> Tensor:
    return torch.hann_window(num_samples, periodic=True).sqrt()


WINDOWS: dict[str, Callable[[int], Tensor]] = {"sqrt_hann": _sqrt_hann, "hann": torch.hann_window}


# name -> sample rate in Hz, window and hop in samples. n320 and n480 are DeepVQE's 20 ms and 10 ms.
PRESETS = {"n320": (16000, 320, 160), "n512": (16000, 512, 256), "n480": (24000, 480, 240)}


class STFT(nn.Module):
    """Waveform to complex spectrum and back, never below float32, under autocast too.

    Arguments
        n_fft: samples of a frame, n_fft // 2 + 1 bins come out.
        hop_samples: samples from one frame to the next, at most half a frame: else the inverse would have gaps.
        window: a name of `WINDOWS`, for analysis and synthesis.

    A signal that is not a whole number of hops is covered by half a window only behind its last frame; `inverse` gives
    an unchanged spectrum back exactly, but amplifies there what was changed. `whole_hops` avoids it.

    Raises ValueError for arguments that do not fit and for inputs of another shape.
    """

    window: Tensor

    def __init__(self, *, n_fft: int, hop_samples: int, window: str = "sqrt_hann") -> None:
        super().__init__()
        if window not in WINDOWS:
            raise ValueError(f"STFT: window must be one of {', '.join(sorted(WINDOWS))}, got {window!r}")
        if n_fft < 2 or n_fft % 2:
            raise ValueError(f"STFT: n_fft must be even and at least 2, got {n_fft!r}")
        if not 1 <= hop_samples <= n_fft // 2:
            raise ValueError(f"STFT: hop_samples must be 1 to n_fft // 2 = {n_fft // 2}, got {hop_samples!r}")
        self.n_fft = n_fft
        self.hop_samples = hop_samples
        self.register_buffer("window", WINDOWS[window](n_fft), persistent=False)

    def forward(self, signal: Tensor) -> Tensor:
        """Shape: (B, T) -> (B, n_fft // 2 + 1, frames, 2), frames = T // hop_samples + 1.

        Signals of less than n_fft // 2 + 1 samples, too short to reflect, get zeros at their end first.
        """
        if signal.ndim != 2 or signal.shape[-1] < 1:
            raise ValueError(f"signal must have shape (batch, samples >= 1), got {tuple(signal.shape)}")
        missing = self.n_fft // 2 + 1 - signal.shape[-1]
        if missing > 0:
            signal = F.pad(signal, (0, missing))
        with without_autocast(signal.device.type):
            wide = signal.to(torch.promote_types(signal.dtype, torch.float32))
            spectrum = torch.stft(
                wide, self.n_fft, self.hop_samples, window=self.window.to(wide.dtype), return_complex=True
            )
            return torch.view_as_real(spectrum)  # (B, F, frames, 2)

    def whole_hops(self, signal: Tensor) -> Tensor:
        """Zeros behind the signal, up to a whole number of hops. Shape: (..., T) -> (..., T')."""
        return F.pad(signal, (0, -signal.shape[-1] % self.hop_samples))

    def inverse(self, spectrum: Tensor, num_samples: int) -> Tensor:
        """Shape: (B, n_fft // 2 + 1, frames, 2) -> (B, num_samples)."""
        if spectrum.ndim != 4 or spectrum.shape[1] != self.n_fft // 2 + 1 or spectrum.shape[3] != 2:
            expected = f"(batch, {self.n_fft // 2 + 1}, frames, 2)"
            raise ValueError(f"spectrum must have shape {expected}, got {tuple(spectrum.shape)}")
        with without_autocast(spectrum.device.type):
            wide = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
            return torch.istft(
                torch.view_as_complex(wide.contiguous()),
                self.n_fft,
                self.hop_samples,
                window=self.window.to(wide.dtype),
                length=num_samples,
            )
