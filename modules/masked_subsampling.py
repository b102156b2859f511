"""Masking after the sub-sampling (`mask_position: post_conv`): the frames that are hidden are the encoder's own.

NeMo's names: the wrapper stands in the place of `encoder.pre_encode`, so its parts are `encoder.pre_encode.pre_encode`
and `encoder.pre_encode.masking`.
"""

from torch import Tensor, nn

from modules.block_masking import RandomBlockMasking


class MaskedSubsampling(nn.Module):
    """A sub-sampling that can also hide blocks of what it returns.

    Its weights get no gradient: both what is masked and what is predicted are taken as they are, else the easiest
    way to predict a frame would be to make all frames alike.

    Shape: `(B, T, F)`, `(B,)` -> `(B, T', D)`, `(B,)`.
    """

    def __init__(self, pre_encode: nn.Module, masking: RandomBlockMasking) -> None:
        super().__init__()
        self.pre_encode = pre_encode
        self.masking = masking

    def forward(self, features: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Sub-sampled frames and their number, nothing hidden."""
        frames, length = self.pre_encode(features, length)
        return frames.detach(), length
