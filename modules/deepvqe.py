"""DeepVQE: echo, noise and reverberation are taken out of a microphone's spectrum, with the far end's as reference.

Paper: Indenbom et al., "DeepVQE: Real Time Deep Voice Quality Enhancement for Joint Acoustic Echo Cancellation, Noise
Suppression and Dereverberation", Interspeech 2023, arXiv:2306.03177.

    mic -> encoder blocks -> [join] -> encoder blocks -> GRU -> decoder blocks -> mask -> applied to mic
    far -> encoder blocks -> alignment ^                        ^ skip connections

Features are (B, C, T, F): channels, frames, bins. No frame sees a later one, of the microphone or of the far end.

Decisions that are not obvious:
* subpixel "interleave" is the paper's: the two values that a decoder block makes of a bin are neighbours. "concat", as
  most public implementations have it, puts all first ones below all second ones and takes bins far from where they
  were; weights that were trained so need it.
* The mask comes from a convolution alone, so it has any sign and size. mask_norm, a norm and an ELU behind it, keeps
  it above -1; public weights with it exist.
* A mask near zero is what a fresh network gives: near silence. init_identity begins with the microphone instead.
* A block's norm sees the bin that is cut off afterwards where the number of bins is odd, as in public implementations.
* In training on a CPU channels stand last in memory, from the features to the mask: norms and convolutions are faster
  so, and the paper's sub-pixels are where they belong without a copy. One operation that answers in another layout,
  also with its gradient, costs all that was gained, so the few that would are written with care.
"""

import warnings
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.alignment import SoftAlignment
from modules.autocast import without_autocast
from modules.complex_mask import IDENTITY_CHANNEL, NUM_MASK_CHANNELS, complex_convolving_mask
from modules.cpu_layers import GRU, Linear, trains_on_cpu

SUBPIXELS = ("interleave", "concat")
RESIDUALS = ("all", "inner_decoder")


def compress_spectrum(spectrum: Tensor, compression: float = 0.3) -> Tensor:
    """The network's features: each bin keeps its phase, and its magnitude to the power of *compression*.

    Never below float32. The gradient at silence is finite, 1.6e4 for 0.3.

    Shape: (B, F, frames, 2) -> (B, 2, frames, F).
    """
    with without_autocast(spectrum.device.type):
        spectrum = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
        magnitude = (spectrum.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        return (spectrum / (magnitude ** (1 - compression) + 1e-12)).permute(0, 3, 2, 1)


class CausalConv(nn.Conv2d):
    """Convolution over 4 frames, the last of them the present one, and 3 bins.

    Shape: (B, in_channels, T, F) -> (B, out_channels, T, ceil(F / frequency_stride)).
    """

    front_padding = (0, 0, 3, 0)  # modules/low_rank.py reads it too

    def __init__(self, in_channels: int, out_channels: int, *, frequency_stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, (4, 3), stride=(1, frequency_stride), padding=(0, 1))

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve_padded(F.pad(input, self.front_padding))

    def convolve_padded(self, padded: Tensor) -> Tensor:
        """(B, in_channels, 3 + T, F), the frames before in front -> as forward"""
        return super().forward(padded)


class ResidualBlock(nn.Module):
    """x + ELU(norm(convolution(x))). Shape: (B, channels, T, F) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv(channels, channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.elu(self.norm(self.conv(x)), inplace=True)


class EncoderBlock(nn.Module):
    """Halves the bins: convolution, norm, ELU, and a residual block unless *residual* is false.

    Shape: (B, in_channels, T, F) -> (B, out_channels, T, ceil(F / 2)).
    """

    def __init__(self, in_channels: int, out_channels: int, *, residual: bool = True) -> None:
        super().__init__()
        self.conv = CausalConv(in_channels, out_channels, frequency_stride=2)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = ResidualBlock(out_channels) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.norm(self.conv(x)), inplace=True)
        return x if self.residual is None else self.residual(x)


class Bottleneck(nn.Module):
    """A GRU over frames of num_features = C * F numbers, channels first, and a linear layer back.

    Shape: (B, C, T, F) -> same.
    """

    def __init__(self, num_features: int, hidden_size: int) -> None:
        super().__init__()
        self.gru = GRU(num_features, hidden_size)
        self.linear = Linear(hidden_size, num_features)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(2)  # (B, T, C * F)
        hidden, _ = self.gru(frames)
        return self.linear(hidden).unflatten(2, (x.shape[1], -1)).transpose(1, 2)  # (B, C, T, F)


class SubpixelConv(nn.Module):
    """Doubles the bins: a convolution gives two values for each, output channel r * out_channels + c the r-th.

    They stand in bins 2 f + r ("interleave") or r F + f ("concat").

    Shape: (B, in_channels, T, F) -> (B, out_channels, T, 2 F).
    """

    def __init__(self, in_channels: int, out_channels: int, *, subpixel: str = "interleave") -> None:
        super().__init__()
        if subpixel not in SUBPIXELS:
            raise ValueError(f"subpixel must be one of {', '.join(SUBPIXELS)}, got {subpixel!r}")
        self.subpixel = subpixel
        self.conv = CausalConv(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(self.conv(x))

    def spread(self, values: Tensor) -> Tensor:
        """Two values of each bin to their places: (B, 2 * out_channels, T, F) -> (B, out_channels, T, 2 F)"""
        if values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1).unflatten(3, (2, -1))  # (B, T, F, r, C): neighbours are neighbours
            values = values if self.subpixel == "interleave" else values.transpose(2, 3)
            return values.flatten(2, 3).permute(0, 3, 1, 2)
        values = values.unflatten(1, (2, -1))  # (B, r, C, T, F)
        order = (0, 2, 3, 4, 1) if self.subpixel == "interleave" else (0, 2, 3, 1, 4)
        return values.permute(order).flatten(3)


class DecoderBlock(nn.Module):
    """Doubles the bins: skip connection added, residual block, sub-pixel convolution, norm and ELU.

    Arguments
        skip_channels: of the encoder block's output that is added, after a 1x1 convolution to in_channels.
        residual, norm: whether there is a residual block, and the norm with its ELU.
        subpixel: see SubpixelConv.

    Shape: x (B, in_channels, T, F), skip (B, skip_channels, T, F) -> (B, out_channels, T, 2 F).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        skip_channels: int,
        residual: bool = True,
        subpixel: str = "interleave",
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.skip = nn.Conv2d(skip_channels, in_channels, 1)
        self.residual = ResidualBlock(in_channels) if residual else None
        self.subpixel = SubpixelConv(in_channels, out_channels, subpixel=subpixel)
        self.norm = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.skip(skip) + x  # in this order: the sum has the layout of its first
        if self.residual is not None:
            x = self.residual(x)
        x = self.subpixel(x)
        return x if self.norm is None else F.elu(self.norm(x), inplace=True)


class DeepVQE(nn.Module):
    """The whole network, from spectra to a spectrum.

    Arguments
        num_bins: of the spectra, n_fft // 2 + 1.
        mic_channels: outputs of the microphone's encoder blocks, each of which halves the bins.
        far_channels: outputs of the far end's encoder blocks. The aligned features join behind as many microphone
            blocks, which must be fewer than all. Empty: noise suppression alone, no far end, no alignment.
        decoder_channels: outputs of the decoder blocks except the last, which gives the 27 of the mask.
        gru_hidden: units of the GRU; the paper does not say.
        residual: "all" blocks have a residual block, or "inner_decoder" (DeepVQE-S): none in the encoder blocks and
            in the first and last decoder block.
        subpixel, mask_norm, init_identity: see the head of this file; the last has no effect with mask_norm.
        compression: power of the magnitudes of the features, in (0, 1].
        align_hidden, max_delay_frames, align_scale, align_temperature, align_mask_start: see SoftAlignment.

    Shape: mic, far (B, num_bins, frames, 2) -> (B, num_bins, frames, 2), and the distribution over delays
    (B, frames, max_delay_frames). A network without far end does not look at *far* and gives None for the latter.

    Raises ValueError that names every argument which does not fit, and for inputs of another shape.
    """

    def __init__(
        self,
        *,
        num_bins: int,
        mic_channels: Sequence[int] = (64, 128, 128, 128, 128),
        far_channels: Sequence[int] = (32, 128),
        decoder_channels: Sequence[int] = (128, 128, 128, 64),
        gru_hidden: int = 512,
        residual: str = "all",
        subpixel: str = "interleave",
        mask_norm: bool = False,
        init_identity: bool = True,
        compression: float = 0.3,
        align_hidden: int = 32,
        max_delay_frames: int = 100,
        align_scale: bool = True,
        align_temperature: float = 1.0,
        align_mask_start: bool = False,
    ) -> None:
        super().__init__()
        channels = {
            "mic_channels": tuple(mic_channels),
            "far_channels": tuple(far_channels),
            "decoder_channels": tuple(decoder_channels),
        }
        sizes = {
            "num_bins": num_bins,
            "gru_hidden": gru_hidden,
            "align_hidden": align_hidden,
            "max_delay_frames": max_delay_frames,
        }
        choices = {"residual": (residual, RESIDUALS), "subpixel": (subpixel, SUBPIXELS)}
        powers = {"compression": (compression, 1.0), "align_temperature": (align_temperature, float("inf"))}
        _check_arguments(channels, sizes, choices, powers)
        mic_channels, far_channels, decoder_channels = channels.values()
        self.num_bins = num_bins
        self.compression = compression
        self.num_far_blocks = len(far_channels)

        everywhere = residual == "all"
        inputs = [2, *mic_channels[:-1]]
        if far_channels:
            inputs[len(far_channels)] += far_channels[-1]
        self.mic_encoder = _encoder(inputs, mic_channels, residual=everywhere)
        self.far_encoder = _encoder([2, *far_channels[:-1]], far_channels, residual=everywhere)
        self.alignment: SoftAlignment | None = None
        if far_channels:
            self.alignment = SoftAlignment(
                mic_channels=mic_channels[self.num_far_blocks - 1],
                far_channels=far_channels[-1],
                hidden_channels=align_hidden,
                max_delay_frames=max_delay_frames,
                scale=align_scale,
                temperature=align_temperature,
                mask_start=align_mask_start,
            )
        bins = num_bins
        for _ in mic_channels:
            bins = (bins + 1) // 2
        self.bottleneck = Bottleneck(mic_channels[-1] * bins, gru_hidden)
        last = len(decoder_channels)
        self.decoder = nn.ModuleList(
            DecoderBlock(
                mic_channels[-1] if index == 0 else decoder_channels[index - 1],
                NUM_MASK_CHANNELS if index == last else decoder_channels[index],
                skip_channels=mic_channels[-1 - index],
                residual=everywhere or 0 < index < last,
                subpixel=subpixel,
                norm=index < last or mask_norm,
            )
            for index in range(last + 1)
        )
        if init_identity and mask_norm:
            warnings.warn("init_identity has no effect with mask_norm: the norm would undo it", stacklevel=2)
        elif init_identity:
            self._init_identity()

    @torch.no_grad()
    def _init_identity(self) -> None:
        conv = cast(DecoderBlock, self.decoder[-1]).subpixel.conv
        bias = torch.zeros(2, NUM_MASK_CHANNELS)
        bias[:, IDENTITY_CHANNEL] = 1  # for both bins that come of one
        conv.weight.zero_()
        cast(Tensor, conv.bias).copy_(bias.flatten())

    def forward(self, mic: Tensor, far: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        self._check_inputs(mic, far)
        x, distribution = self._features(mic), None
        sizes, skips = [], []
        for index, block in enumerate(self.mic_encoder):
            if self.alignment is not None and index == self.num_far_blocks:
                aligned, distribution = self.alignment(x, self._encode_far(cast(Tensor, far)))
                x = torch.cat([x, aligned], 1)
            sizes.append(x.shape[-1])
            x = block(x)
            skips.append(x)
        x = self.bottleneck(x)
        for block in self.decoder:
            x = _first_bins(block(x, skips.pop()), sizes.pop())
        return complex_convolving_mask(x, mic), distribution

    def _encode_far(self, far: Tensor) -> Tensor:
        x = self._features(far)
        for block in self.far_encoder:
            x = block(x)
        return x

    def _features(self, spectrum: Tensor) -> Tensor:
        x = compress_spectrum(spectrum, self.compression)
        return x.contiguous(memory_format=torch.channels_last) if trains_on_cpu(self, x) else x

    def _check_inputs(self, mic: Tensor, far: Tensor | None) -> None:
        if mic.ndim != 4 or mic.shape[1] != self.num_bins or mic.shape[3] != 2:
            raise ValueError(f"mic must have shape (batch, {self.num_bins}, frames, 2), got {tuple(mic.shape)}")
        if self.alignment is None:
            return
        if far is None:
            raise ValueError("this network cancels echo: it needs the far end's spectrum too")
        if far.shape != mic.shape:
            raise ValueError(f"far must have the shape of mic, {tuple(mic.shape)}, got {tuple(far.shape)}")


def _first_bins(x: Tensor, num_bins: int) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.pad(x, (0, num_bins - x.shape[-1]))  # a slice's gradient would have channels first
    return x[..., :num_bins]


def _encoder(inputs: Sequence[int], outputs: Sequence[int], *, residual: bool) -> nn.ModuleList:
    return nn.ModuleList(EncoderBlock(i, o, residual=residual) for i, o in zip(inputs, outputs, strict=False))


def _check_arguments(
    channels: dict[str, tuple[int, ...]],
    sizes: dict[str, int],
    choices: dict[str, tuple[str, tuple[str, ...]]],
    powers: dict[str, tuple[float, float]],
) -> None:
    """Raises one ValueError with everything that is wrong, so that a user corrects all of it at once."""
    sizes = sizes | {f"{name}[{index}]": size for name, list_ in channels.items() for index, size in enumerate(list_)}
    wrong = [
        f"{name} must be a whole number of at least 1, got {value!r}"
        for name, value in sizes.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    num_mic, num_far, num_decoder = (len(list_) for list_ in channels.values())
    if num_mic == 0:
        wrong.append("mic_channels must not be empty")
    else:
        if num_far >= num_mic:
            wrong.append(f"far_channels must be shorter than the {num_mic} of mic_channels, got {num_far}")
        if num_decoder != num_mic - 1:
            wrong.append(f"decoder_channels must be {num_mic - 1}, one fewer than mic_channels, got {num_decoder}")
        if not wrong and sizes["num_bins"] <= 2 ** (num_mic - 1):
            wrong.append(f"num_bins must be above {2 ** (num_mic - 1)} to be halved {num_mic} times")
    for name, (value, known) in choices.items():
        if value not in known:
            wrong.append(f"{name} must be one of {', '.join(known)}, got {value!r}")
    for name, (value, highest) in powers.items():
        if not 0 < value <= highest:
            wrong.append(f"{name} must be above 0" + (f" and at most {highest:g}" if highest < 2 else ""))
    if wrong:
        raise ValueError("DeepVQE: " + "; ".join(wrong))
