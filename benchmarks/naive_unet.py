"""A plain U-Net as tutorials write it, to measure ours against (benchmarks/peers.py), and used for nothing else.

Ronneberger et al. 2015 with padded convolutions: twice convolution, batch norm and ReLU; max pooling; transposed
convolutions; torch.cat. Its layers stand in the order of those of modules/unet.py with up="transposed", so the weights
of one fit the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Up(nn.Module):
    """Shape: (N, C, h, w), skip (N, C / 2, H, W) -> (N, C / 2, H, W)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = double_conv(in_channels, in_channels // 2)
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class NaiveUNet(nn.Module):
    """RGB from 0 to 1 -> logits. Shape: (N, 3, H, W) -> (N, 1, H, W)."""

    def __init__(self, *, base_channels: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [base_channels * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(double_conv(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(Up(width) for width in reversed(widths[1:]))
        self.head = nn.Conv2d(base_channels, 1, kernel_size=1)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        x = (image - self.mean) / self.std
        skips = []
        for index, conv in enumerate(self.down):
            x = conv(x if index == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)
