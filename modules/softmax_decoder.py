"""From encoded frames to the log probabilities of codes, for one or more codebooks.

Names and numbers as in NeMo's MultiSoftmaxDecoder; output channel c * num_decoders + n of the convolution belongs to
class c of book n.
"""

import torch
from torch import Tensor, nn

from modules.checks import switches, whole_numbers
from modules.cpu_layers import PointwiseConv1d


class MultiSoftmaxDecoder(nn.Module):
    """A linear layer for each frame and a softmax for each book, at least in float32.

    Arguments
        feat_in: features of a frame.
        num_classes: classes of a book, C below.
        num_decoders: books, N below.
        squeeze_single: no axis for the books where there is one only.
        use_bias: whether the linear layer has one.

    Shape: (B, feat_in, T) -> (B, T, C, N), or (B, T, C) with squeeze_single and one book.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        *,
        feat_in: int,
        num_classes: int,
        num_decoders: int = 1,
        squeeze_single: bool = False,
        use_bias: bool = True,
    ) -> None:
        super().__init__()
        whole_numbers(feat_in=feat_in, num_classes=num_classes, num_decoders=num_decoders)
        switches(squeeze_single=squeeze_single, use_bias=use_bias)
        self.num_classes = num_classes
        self.squeeze = squeeze_single and num_decoders == 1
        projection = PointwiseConv1d(feat_in, num_classes * num_decoders, bias=use_bias)
        nn.init.xavier_uniform_(projection.weight)
        self.decoder_layers = nn.Sequential(projection)

    def forward(self, encoded: Tensor) -> Tensor:
        logits = self.decoder_layers(encoded).transpose(1, 2).unflatten(2, (self.num_classes, -1))  # (B, T, C, N)
        logits = logits.squeeze(3) if self.squeeze else logits
        return logits.log_softmax(2, dtype=torch.promote_types(logits.dtype, torch.float32))
