"""The complex convolving mask: each bin of the output is a weighted sum of nine bins around it, none of them later.

Paper: Indenbom et al., "DeepVQE: Real Time Deep Voice Quality Enhancement for Joint Acoustic Echo Cancellation, Noise
Suppression and Dereverberation", Interspeech 2023, arXiv:2306.03177, "complex convolving mask".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.autocast import without_autocast

# 3 real numbers for a complex weight, of 3 frames and 3 bins.
NUM_MASK_CHANNELS = 27
# Channel of the real part (basis 0) of the weight of the present frame (m = 2) and of the bin itself (n = 1).
IDENTITY_CHANNEL = 7


def complex_convolving_mask(mask: Tensor, spectrum: Tensor, before: Tensor | None = None) -> Tensor:
    """Applies a mask of 27 real channels, never below float32.

    Channel r * 9 + m * 3 + n is the share of the r-th cube root of one in the complex weight of frame t - 2 + m and
    bin f - 1 + n:

        H_mn(t, f) = sum_r exp(2 pi i r / 3) mask_rmn(t, f)
        output(t, f) = sum_mn H_mn(t, f) spectrum(t - 2 + m, f - 1 + n)

    with zeros around the spectrum, or the two frames *before* it. The roots add up to zero, so equal channels are
    silence. Complex tensors would give the same numbers, but do not export.

    Shape: mask (B, 27, frames, F), spectrum (B, F, frames, 2), before (B, F, 2, 2) -> (B, F, frames, 2).

    Raises ValueError when the two do not fit.
    """
    batch, num_bins, num_frames, _ = spectrum.shape
    if mask.shape != (batch, NUM_MASK_CHANNELS, num_frames, num_bins):
        expected = (batch, NUM_MASK_CHANNELS, num_frames, num_bins)
        raise ValueError(f"mask of shape {tuple(mask.shape)} where the spectrum asks for {expected}")
    with without_autocast(mask.device.type):
        mask = mask.to(torch.promote_types(mask.dtype, torch.float32)).contiguous()  # bins last, as the spectrum's
        first, second, third = mask.unflatten(1, (3, 3, 3)).unbind(1)  # each (B, m, n, frames, F)
        weight_re = first - 0.5 * (second + third)
        weight_im = math.sqrt(0.75) * (second - third)
        whole = F.pad(spectrum, (0, 0, 2, 0)) if before is None else torch.cat([before, spectrum], 2)
        padded = F.pad(whole.to(mask.dtype).permute(3, 0, 2, 1), (1, 1))  # (2, B, frames + 2, F + 2)
        neighbours = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # a view: (2, B, frames, F, m, n)
        re, im = neighbours.permute(0, 1, 4, 5, 2, 3)  # each (B, m, n, frames, F)
        output_re = (weight_re * re - weight_im * im).sum((1, 2))  # (B, frames, F)
        output_im = (weight_re * im + weight_im * re).sum((1, 2))
        return torch.stack([output_re, output_im], -1).transpose(1, 2)  # (B, F, frames, 2)
