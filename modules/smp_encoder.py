"""Networks of segmentation_models_pytorch (MIT), an extra, in the place of our U-Net: `pip install` it to use them.

Their weights are random at first. Pretrained encoders are downloads of hundreds of megabytes from another site, which
neither a constructor nor a checkpoint that is being loaded should start.
"""

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modules.checks import whole_numbers

REQUIREMENT = "segmentation-models-pytorch==0.6.0"


class SmpNetwork(nn.Module):
    """A network of segmentation_models_pytorch that takes images of any size.

    Images are padded on the right and at the bottom to multiples of the encoder's stride, mirrored where they are large
    enough for that, with copies of the last row and column elsewhere; the logits are cropped.

    *name*: `<architecture>/<encoder>` as the package spells them: Unet/resnet34, UnetPlusPlus/efficientnet-b3.

    Shape: (N, in_channels, H, W) -> (N, num_classes, H, W).

    Raises ValueError when the package is not installed and for a name that it does not know.
    """

    def __init__(self, *, name: str = "Unet/resnet34", in_channels: int = 3, num_classes: int = 1) -> None:
        super().__init__()
        whole_numbers(in_channels=in_channels, num_classes=num_classes)
        self.network = _build(name, in_channels, num_classes)
        self.stride = int(self.network.encoder.output_stride)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        # Also where nothing is missing: an exported graph would keep that of its example and pad no other image.
        missing = (0, -width % self.stride, 0, -height % self.stride)
        # Nor would it choose between two modes.
        return self.network(F.pad(image, missing, mode="replicate"))[:, :, :height, :width]


def _build(name: str, in_channels: int, num_classes: int) -> Any:
    try:
        smp = importlib.import_module("segmentation_models_pytorch")
    except ImportError as error:
        raise ValueError(f"network smp:{name} needs another package: pip install {REQUIREMENT}") from error
    architectures = {known.__name__: known for known in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    architecture, slash, encoder = name.partition("/")
    if not slash or architecture not in architectures:
        known = ", ".join(architectures)
        raise ValueError(f"network smp:{name} must be smp:<architecture>/<encoder>, the architecture one of {known}")
    # "tu-..." names one of the encoders of timm, which are too many to list.
    if encoder not in smp.encoders.encoders and not encoder.startswith("tu-"):
        known = ", ".join(sorted(smp.encoders.encoders))
        raise ValueError(f"network smp:{name}: the encoder must be one of {known}")
    try:
        return architectures[architecture](
            encoder_name=encoder, encoder_weights=None, in_channels=in_channels, classes=num_classes
        )
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"network smp:{name} cannot be built: {error}") from error
