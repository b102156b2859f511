"""DeepVQE written down as the paper reads, to measure ours against (benchmarks/peers.py), and used for nothing else.

Indenbom et al. 2023, arXiv:2306.03177. The far end is unfolded over all delays, (B, C, D, T, F) numbers; the mask is
complex. Its layers stand in the order of those of modules/deepvqe.py, so the weights of one fit the other; only the
delays are counted backwards within, as unfolding gives them (`weights_of`).
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compressed(spectrum: Tensor, power: float) -> Tensor:
    """Shape: (B, F, T, 2) -> (B, 2, T, F)."""
    magnitude = torch.sqrt(spectrum[..., :1] ** 2 + spectrum[..., 1:] ** 2 + 1e-12)
    return (spectrum / (magnitude ** (1 - power) + 1e-12)).permute(0, 3, 2, 1)


class CausalConv(nn.Module):
    """4 frames, the last of them the present one, and 3 bins."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 1, 3, 0))
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=(4, 3), stride=(1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv(channels, channels)
        self.norm = nn.BatchNorm2d(channels)
        self.elu = nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.elu(self.norm(self.conv(x)))


class Encoder(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = CausalConv(in_channels, out_channels, stride=2)
        self.norm = nn.BatchNorm2d(out_channels)
        self.elu = nn.ELU()
        self.residual = Residual(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self.elu(self.norm(self.conv(x))))


class NaiveAlignment(nn.Module):
    """As SoftAlignment of modules/alignment.py: the delayed far end (B, C, T, F), the distribution (B, T, D)."""

    def __init__(self, mic_channels: int, far_channels: int, hidden_channels: int, max_delay_frames: int) -> None:
        super().__init__()
        self.mic_conv = nn.Conv2d(mic_channels, hidden_channels, kernel_size=1)
        self.far_conv = nn.Conv2d(far_channels, hidden_channels, kernel_size=1)
        self.score_conv = nn.Sequential(nn.ZeroPad2d((1, 1, 4, 0)), nn.Conv2d(hidden_channels, 1, kernel_size=(5, 3)))
        self.delays = max_delay_frames

    def unfold(self, x: Tensor) -> Tensor:
        """Shape: (B, C, T, F) -> (B, C, D, T, F), the longest delay first."""
        batch, channels, frames, bins = x.shape
        x = F.unfold(F.pad(x, (0, 0, self.delays - 1, 0)), kernel_size=(self.delays, 1))  # (B, C * D, T * F)
        return x.view(batch, channels, self.delays, frames, bins)

    def forward(self, mic: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.mic_conv(mic), self.unfold(self.far_conv(far))  # (B, H, T, F), (B, H, D, T, F)
        scores = torch.sum(query.unsqueeze(2) * key, dim=-1) / math.sqrt(mic.shape[-1])  # (B, H, D, T)
        weights = torch.softmax(self.score_conv(scores.transpose(2, 3)), dim=-1)  # (B, 1, T, D)
        aligned = torch.sum(self.unfold(far) * weights.transpose(2, 3).unsqueeze(-1), dim=2)
        return aligned, weights[:, 0].flip(-1)


class Bottleneck(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, bins = x.shape
        x = x.permute(0, 2, 1, 3).reshape(batch, frames, channels * bins)
        x = self.linear(self.gru(x)[0])
        return x.reshape(batch, frames, channels, bins).permute(0, 2, 1, 3)


class Decoder(nn.Module):
    """Shape: x (B, C, T, F), skip (B, S, T, F) -> (B, out_channels, T, 2 F)."""

    def __init__(self, in_channels: int, out_channels: int, skip_channels: int, last: bool) -> None:
        super().__init__()
        self.skip = nn.Conv2d(skip_channels, in_channels, kernel_size=1)
        self.residual = Residual(in_channels)
        self.conv = CausalConv(in_channels, 2 * out_channels)
        self.act = nn.Identity() if last else nn.Sequential(nn.BatchNorm2d(out_channels), nn.ELU())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.conv(self.residual(x + self.skip(skip)))
        batch, channels, frames, bins = x.shape
        x = x.view(batch, 2, channels // 2, frames, bins).permute(0, 2, 3, 4, 1)
        return self.act(x.reshape(batch, channels // 2, frames, 2 * bins))


def complex_mask(mask: Tensor, spectrum: Tensor) -> Tensor:
    """Three frames by three bins of the microphone, weighted and added up.

    Shape: mask (B, 27, T, F), spectrum (B, F, T, 2) -> (B, F, T, 2).
    """
    batch, _, frames, bins = mask.shape
    roots = torch.exp(2j * math.pi / 3 * torch.arange(3, device=mask.device)).view(1, 3, 1, 1, 1)
    weights = torch.sum(roots * mask.view(batch, 3, 9, frames, bins), dim=1)  # (B, 9, T, F)
    parts = F.pad(spectrum.permute(0, 3, 2, 1), (1, 1, 2, 0))  # (B, 2, T + 2, F + 2)
    parts = F.unfold(parts, kernel_size=(3, 3)).view(batch, 2, 9, frames, bins)
    output = torch.sum(weights * torch.complex(parts[:, 0], parts[:, 1]), dim=1)  # (B, T, F)
    return torch.view_as_real(output).transpose(1, 2)


class NaiveDeepVQE(nn.Module):
    """Arguments and shapes as DeepVQE of modules/deepvqe.py, whose other variants are left out."""

    def __init__(
        self,
        *,
        num_bins: int,
        mic_channels: Sequence[int] = (64, 128, 128, 128, 128),
        far_channels: Sequence[int] = (32, 128),
        decoder_channels: Sequence[int] = (128, 128, 128, 64),
        gru_hidden: int = 512,
        compression: float = 0.3,
        align_hidden: int = 32,
        max_delay_frames: int = 100,
    ) -> None:
        super().__init__()
        self.compression, self.far_blocks = compression, len(far_channels)
        inputs = [2, *mic_channels[:-1]]
        inputs[self.far_blocks] += far_channels[-1]
        self.mic_encoder = nn.ModuleList(Encoder(i, o) for i, o in zip(inputs, mic_channels, strict=True))
        inputs = [2, *far_channels[:-1]]
        self.far_encoder = nn.ModuleList(Encoder(i, o) for i, o in zip(inputs, far_channels, strict=True))
        joined = mic_channels[self.far_blocks - 1], far_channels[-1]
        self.alignment = NaiveAlignment(*joined, align_hidden, max_delay_frames)
        bins = num_bins
        for _ in mic_channels:
            bins = (bins + 1) // 2
        self.bottleneck = Bottleneck(mic_channels[-1] * bins, gru_hidden)
        inputs, outputs = [mic_channels[-1], *decoder_channels], [*decoder_channels, 27]
        self.decoder = nn.ModuleList(
            Decoder(i, o, skip, last=o == 27)
            for i, o, skip in zip(inputs, outputs, reversed(mic_channels), strict=True)
        )

    def forward(self, mic: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        x, distribution, skips, sizes = compressed(mic, self.compression), torch.empty(0), [], []
        for index, block in enumerate(self.mic_encoder):
            if index == self.far_blocks:
                features = compressed(far, self.compression)
                for far_block in self.far_encoder:
                    features = far_block(features)
                aligned, distribution = self.alignment(x, features)
                x = torch.cat([x, aligned], dim=1)
            sizes.append(x.shape[-1])
            x = block(x)
            skips.append(x)
        x = self.bottleneck(x)
        for block in self.decoder:
            x = block(x, skips.pop())[..., : sizes.pop()]
        return complex_mask(x, mic), distribution


def weights_of(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The weights of ours, or of its alignment, under the names of the literal one."""
    ours = [
        value.flip(-1) if "score_conv.weight" in name else value  # the delays, counted from the other end
        for name, value in state.items()
        if not name.endswith("temperature")
    ]
    return dict(zip(network.state_dict(), ours, strict=True))
