"""U-Net: a pixel-wise classifier of images of any size, from an encoder, a decoder and skip connections between them.

Paper: Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
arXiv:1505.04597; with padded convolutions, so that the logits have the image's size, and norms.

Features are (N, C, H, W). Level k of the encoder has base_channels * 2**k channels and 1 / 2**k of the resolution.

Decisions that are not obvious:
* up "bilinear" enlarges with aligned corners and halves the channels of the bottom and of the decoder, as widely used
  public implementations do; "transposed" learns the enlargement and has nearly twice the parameters.
* Max pooling drops the last row or column of an odd size. The enlarged features get it back as zeros, on both sides in
  turn, so no input has to be padded. Only one that would vanish on the way down is, with copies of its last row and
  column, and the logits are cropped.
* norm "batch" is unreliable with one or two images per batch; "group" normalises each image alone.
* With patch 2 or more the network sees squares of that many pixels as channels of one, at 1 / patch of the resolution,
  and gives the logits of all pixels of a square at once (Shi et al., "Real-Time Single Image and Video Super-Resolution
  Using an Efficient Sub-Pixel Convolutional Neural Network", CVPR 2016): a quarter of the work with patch 2. Strokes of
  a pixel or two come out too wide then; refine hands a few features of each pixel, and the pixel itself, to one more
  convolution at full resolution.
* A fresh network takes 3 % of the pixels for marked: with a bias of zero the first steps would go into learning that
  nearly everything is background.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.checks import choices, numbers, whole_numbers

UPS = ("bilinear", "transposed")
NORMS = ("batch", "group")
PRIOR = 0.03  # share of marked pixels that a fresh network expects


class DoubleConv(nn.Module):
    """Twice: 3x3 convolution, norm, ReLU. Shape: (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, hidden_channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 3, padding=1, bias=False)
        self.norm1 = _make_norm(norm, hidden_channels)
        self.conv2 = nn.Conv2d(hidden_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(x)), inplace=True)


class Decoder(DoubleConv):
    """Doubles the resolution, puts the skip connection in front of the channels, convolves twice.

    Shape: x (N, C, h, w), skip (N, in_channels / 2, H, W), H from 2 h to 2 h + 1 and W likewise
    -> (N, out_channels, H, W). C is in_channels with up "transposed" and half of it with "bilinear".
    """

    def __init__(self, in_channels: int, out_channels: int, *, up: str, norm: str) -> None:
        super().__init__(in_channels, out_channels, hidden_channels=in_channels // 2, norm=norm)
        if up == "transposed":
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
        else:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self.up(x)
        rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(torch.cat([skip, x], 1))


class UNet(nn.Module):
    """Logits of every pixel of an image.

    Arguments
        in_channels, num_classes: of the image and of the logits.
        base_channels: of the first level, doubled from level to level. With norm "group" 1, 2, 4 or a multiple of 8.
        depth: how often the resolution is halved, 3 to 5.
        up: a name of `UPS`, how the decoder enlarges.
        norm: a name of `NORMS`; "group" has 8 groups, or one per channel where there are fewer than 8.
        dropout: share of the channels at the bottom that training sets to zero.
        patch: side in pixels of the squares that are folded into channels, 1 to 4; 1: none are.
        refine: features of each pixel at full resolution, with a patch above 1; 0: the squares' logits are the answer.

    Shape: (N, in_channels, H, W) -> (N, num_classes, H, W) for every size, meant for 16 pixels and more. Nothing in it
    turns the memory format: channels last stays channels last.

    Raises ValueError for an argument that does not fit and for an input of another shape or of whole numbers.

    >>> network = UNet(base_channels=8)
    >>> network(torch.rand(2, 3, 37, 53)).shape
    torch.Size([2, 1, 37, 53])
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        num_classes: int = 1,
        base_channels: int = 32,
        depth: int = 4,
        up: str = "bilinear",
        norm: str = "batch",
        dropout: float = 0.0,
        patch: int = 1,
        refine: int = 0,
    ) -> None:
        super().__init__()
        _check_arguments(in_channels, num_classes, base_channels, depth, up, norm, dropout, patch, refine)
        self.in_channels = in_channels
        self.depth = depth
        self.patch = patch
        channels = [base_channels * 2**level for level in range(depth + 1)]
        # What a block hands on to be enlarged: a bilinear enlargement cannot halve the channels, so the block does.
        handed = [width // 2 if up == "bilinear" else width for width in channels]
        inputs = in_channels * patch**2
        for level, width in enumerate(channels):
            outputs = handed[level] if level == depth else width
            self.add_module(f"enc{level}", DoubleConv(inputs, outputs, hidden_channels=outputs, norm=norm))
            inputs = outputs
        for step, level in enumerate(reversed(range(depth))):
            outputs = handed[level] if level else base_channels
            self.add_module(f"dec{step}", Decoder(channels[level + 1], outputs, up=up, norm=norm))
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(base_channels, (refine or num_classes) * patch**2, 1)
        last = self.head
        self.refine: nn.Sequential | None = None
        if refine:
            last = nn.Conv2d(refine, num_classes, 1)
            sharpen = nn.Conv2d(refine + in_channels, refine, 3, padding=1, bias=False)
            self.refine = nn.Sequential(sharpen, _make_norm(norm, refine), nn.ReLU(inplace=True), last)
        self._initialise(last)

    def _initialise(self, last: nn.Conv2d) -> None:
        """He et al. 2015, by fan-out. Not the last layer, whose fan-out of one class would give it huge weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module is not last:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert last.bias is not None
        nn.init.constant_(last.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != self.in_channels or not image.is_floating_point():
            expected = f"image must be floating point of shape (batch, {self.in_channels}, height, width)"
            raise ValueError(f"{expected}, got {image.dtype} of {tuple(image.shape)}")
        height, width = image.shape[2:]
        least = self.patch * 2**self.depth
        if height < least or width < least:
            missing = (0, max(least - width, 0), 0, max(least - height, 0))
            image = F.pad(image, missing, mode="replicate")
        if self.patch == 1:
            logits = self._classify(image)
        else:
            missing = (0, -image.shape[3] % self.patch, 0, -image.shape[2] % self.patch)
            image = F.pad(image, missing, mode="replicate")
            logits = F.pixel_shuffle(self._classify(F.pixel_unshuffle(image, self.patch)), self.patch)
            if self.refine is not None:  # not logits yet, but features
                logits = self.refine(torch.cat([logits, image], 1))
        return logits[:, :, :height, :width]

    def _classify(self, x: Tensor) -> Tensor:
        """Shape: (N, in_channels * patch**2, H, W) -> (N, num_classes * patch**2, H, W)"""
        x = self.get_submodule("enc0")(x)
        skips = []
        for level in range(1, self.depth + 1):
            skips.append(x)
            x = self.get_submodule(f"enc{level}")(F.max_pool2d(x, 2))
        x = self.dropout(x)
        for step, skip in enumerate(reversed(skips)):
            x = self.get_submodule(f"dec{step}")(x, skip)
        return self.head(x)


def _make_norm(norm: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(min(8, channels), channels)


def _check_arguments(
    in_channels: int,
    num_classes: int,
    base_channels: int,
    depth: int,
    up: str,
    norm: str,
    dropout: float,
    patch: int,
    refine: int,
) -> None:
    whole_numbers(
        in_channels=in_channels, num_classes=num_classes, base_channels=base_channels, depth=depth, patch=patch
    )
    numbers(least=3, most=5, depth=depth)
    numbers(least=1, most=4, patch=patch)
    if refine:
        whole_numbers(refine=refine)
        if patch == 1:
            raise ValueError(f"refine={refine} needs a patch above 1; without one all is at full resolution")
    choices(up=(up, UPS), norm=(norm, NORMS))
    numbers(least=0, most=1, dropout=dropout)
    for name, channels in {"base_channels": base_channels, "refine": refine}.items():
        if norm == "group" and channels % 8 and channels not in (1, 2, 4):
            raise ValueError(f"{name} must be 1, 2, 4 or a multiple of 8 for norm 'group', got {channels}")
