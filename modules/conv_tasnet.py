"""Conv-TasNet: a learned filter bank, masks from a temporal convolutional network, a learned synthesis.

Paper: Luo and Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech
Separation", IEEE/ACM TASLP 27(8), 2019. The paper's symbols: C num_sources, N num_filters, L kernel_size,
B bottleneck_channels, H hidden_channels, Sc skip_channels, P block_kernel_size, X num_blocks, R num_repeats.

Decisions that are not obvious:
* Padding as in torchaudio: half a kernel of zeros on both sides and zeros on the right up to a whole number
  of strides. The first and last samples are then covered by as many frames as those between, and any length
  of at least one sample works.
* The last block has no residual branch, for nothing would read it.
* The filter bank and the synthesis stay in the precision of their weights under autocast: they cost nothing,
  and a waveform that went through bfloat16 carries audible noise at about -50 dB.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.cpu_layers import DepthwiseConv1d, PReLU
from modules.norms import NORMS, make_norm

# Applied to (B, C, N, K), sources on axis 1.
MASKS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "sigmoid": torch.sigmoid}


class ConvTasNet(nn.Module):
    """Separates a single-channel mixture into `num_sources` waveforms (non-causal).

    Arguments
        num_sources: talkers in the mixture.
        num_filters, kernel_size, stride: the filter bank; the last two in samples, and a stride of None is half
            the kernel size.
        bottleneck_channels, hidden_channels, skip_channels: widths of a block's input and residual path, of its
            inside, and of the path that the masks are computed from.
        block_kernel_size: frames that a depthwise convolution spans; odd.
        num_blocks, num_repeats: blocks of dilation 1, 2, 4, ... 2**(num_blocks - 1), this often in a row.
        norm: a name of `modules.norms.NORMS`. mask: a name of `MASKS`.

    Shape: (B, T) -> (B, num_sources, T) for every T >= 1.

    Raises ValueError that names every argument which does not fit, and for an input of another shape.
    """

    def __init__(
        self,
        *,
        num_sources: int = 2,
        num_filters: int = 512,
        kernel_size: int = 16,
        stride: int | None = None,
        bottleneck_channels: int = 128,
        hidden_channels: int = 512,
        skip_channels: int = 128,
        block_kernel_size: int = 3,
        num_blocks: int = 8,
        num_repeats: int = 3,
        norm: str = "global",
        mask: str = "relu",
    ) -> None:
        super().__init__()
        sizes = {
            "num_sources": num_sources,
            "num_filters": num_filters,
            "kernel_size": kernel_size,
            "stride": 1 if stride is None else stride,
            "bottleneck_channels": bottleneck_channels,
            "hidden_channels": hidden_channels,
            "skip_channels": skip_channels,
            "block_kernel_size": block_kernel_size,
            "num_blocks": num_blocks,
            "num_repeats": num_repeats,
        }
        _check_arguments(sizes, norm=norm, mask=mask)
        self.num_sources = num_sources
        self.kernel_size = kernel_size
        self.stride = max(kernel_size // 2, 1) if stride is None else stride
        framing = {
            "kernel_size": kernel_size,
            "stride": self.stride,
            "padding": kernel_size // 2,
            "bias": False,
        }
        self.encoder = nn.Conv1d(1, num_filters, **framing)
        self.separator = Separator(
            num_sources=num_sources,
            num_filters=num_filters,
            bottleneck_channels=bottleneck_channels,
            hidden_channels=hidden_channels,
            skip_channels=skip_channels,
            block_kernel_size=block_kernel_size,
            num_blocks=num_blocks,
            num_repeats=num_repeats,
            norm=norm,
            mask=mask,
        )
        self.decoder = nn.ConvTranspose1d(num_filters, 1, **framing)

    def forward(self, mixture: Tensor) -> Tensor:
        if mixture.ndim != 2 or mixture.shape[-1] < 1:
            raise ValueError(f"mixture must have shape (batch, samples >= 1), got {tuple(mixture.shape)}")
        # An odd kernel is centred on a sample, an even one between two: hence the parity.
        missing = -(mixture.shape[-1] - self.kernel_size % 2) % self.stride
        padded = F.pad(mixture, (0, missing)).unsqueeze(1)  # (B, 1, T')
        with _without_autocast(mixture.device.type):
            features = self.encoder(padded)  # (B, N, K)
        masks = self.separator(features)  # (B, C, N, K)
        with _without_autocast(mixture.device.type):
            masked = (masks * features.unsqueeze(1)).flatten(0, 1)  # (B * C, N, K)
            sources = self.decoder(masked)  # (B * C, 1, T')
        sources = sources.unflatten(0, (-1, self.num_sources)).squeeze(2)  # (B, C, T')
        # A slice to num_samples does the same, but freezes in an exported graph whether there was padding.
        return F.pad(sources, (0, -missing))


class Separator(nn.Module):
    """The temporal convolutional network that estimates one mask per source from the features of the mixture.

    Shape: (B, num_filters, K) -> (B, num_sources, num_filters, K).
    """

    def __init__(
        self,
        *,
        num_sources: int,
        num_filters: int,
        bottleneck_channels: int,
        hidden_channels: int,
        skip_channels: int,
        block_kernel_size: int,
        num_blocks: int,
        num_repeats: int,
        norm: str,
        mask: str,
    ) -> None:
        super().__init__()
        self.num_sources = num_sources
        self.mask = mask
        self.input_norm = make_norm(norm, num_filters)
        self.bottleneck = nn.Conv1d(num_filters, bottleneck_channels, 1)
        last = num_blocks * num_repeats - 1
        self.blocks = nn.ModuleList(
            ConvBlock(
                bottleneck_channels=bottleneck_channels,
                hidden_channels=hidden_channels,
                skip_channels=skip_channels,
                kernel_size=block_kernel_size,
                dilation=2 ** (index % num_blocks),
                norm=norm,
                has_residual=index != last,
            )
            for index in range(last + 1)
        )
        self.mask_prelu = PReLU()
        self.mask_conv = nn.Conv1d(skip_channels, num_sources * num_filters, 1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.bottleneck(self.input_norm(features))  # (B, bottleneck, K)
        skip_sum: Tensor | None = None
        for block in self.blocks:
            x, skip = block(x)
            skip_sum = skip if skip_sum is None else skip_sum + skip  # (B, skip, K)
        masks = self.mask_conv(self.mask_prelu(skip_sum))  # (B, C * N, K)
        return MASKS[self.mask](masks.unflatten(1, (self.num_sources, -1)))  # (B, C, N, K)


class ConvBlock(nn.Module):
    """One block of the separator (figure 1C): widen, depthwise convolution over time, residual and skip path.

    Shape: (B, bottleneck, K) -> (B, bottleneck, K) and (B, skip, K). Without a residual branch the first of
    the two is the input as it came.
    """

    def __init__(
        self,
        *,
        bottleneck_channels: int,
        hidden_channels: int,
        skip_channels: int,
        kernel_size: int,
        dilation: int,
        norm: str,
        has_residual: bool,
    ) -> None:
        super().__init__()
        self.expand = nn.Conv1d(bottleneck_channels, hidden_channels, 1)
        self.expand_prelu = PReLU()
        self.expand_norm = make_norm(norm, hidden_channels)
        self.depthwise = DepthwiseConv1d(hidden_channels, kernel_size=kernel_size, dilation=dilation)
        self.depthwise_prelu = PReLU()
        self.depthwise_norm = make_norm(norm, hidden_channels)
        self.residual = nn.Conv1d(hidden_channels, bottleneck_channels, 1) if has_residual else None
        self.skip = nn.Conv1d(hidden_channels, skip_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.expand_norm(self.expand_prelu(self.expand(x)))  # (B, hidden, K)
        hidden = self.depthwise_norm(self.depthwise_prelu(self.depthwise(hidden)))
        skip = self.skip(hidden)
        return (x if self.residual is None else x + self.residual(hidden)), skip


def _check_arguments(sizes: dict[str, int], *, norm: str, mask: str) -> None:
    """Raises one ValueError with everything that is wrong, so that a user corrects all of it at once."""
    wrong = [
        f"{name} must be a whole number of at least 1, got {value!r}"
        for name, value in sizes.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if not wrong and sizes["stride"] > sizes["kernel_size"]:
        wrong.append(f"stride must not exceed kernel_size {sizes['kernel_size']}, got {sizes['stride']}")
    if not wrong and sizes["block_kernel_size"] % 2 == 0:
        wrong.append(f"block_kernel_size must be odd, got {sizes['block_kernel_size']}")
    for name, value, known in (("norm", norm, NORMS), ("mask", mask, MASKS)):
        if value not in known:
            wrong.append(f"{name} must be one of {', '.join(sorted(known))}, got {value!r}")
    if wrong:
        raise ValueError("ConvTasNet: " + "; ".join(wrong))


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Full precision inside; no context at all where autocast is off, so that exported graphs stay plain."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
