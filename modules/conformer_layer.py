"""One layer of a Conformer and its parts; modules/conformer.py stacks them.

Papers: Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition", 2020, arXiv:2005.08100.
Names of weights and values are those of NeMo's `ConformerLayer`.

Decisions that are not obvious:
* The convolution is registered before the attention, but computed behind it.
* Frames of padding are zeroed in front of the depth-wise convolution, seen by no query, and otherwise computed along:
  what stands in them has no meaning.
* NeMo's batch norm counts padding in its statistics, and so do its instance and group norm, in evaluation too: with the
  last two, an item's output depends on how far it is padded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.cpu_layers import Linear, PointwiseConv1d
from modules.relative_attention import RelPositionMultiHeadAttention


class ConformerFeedForward(nn.Module):
    """Linear to d_ff, SiLU, dropout, linear back. Shape: (..., d_model) -> same."""

    def __init__(self, *, d_model: int, d_ff: int, dropout: float = 0.0, use_bias: bool = True) -> None:
        super().__init__()
        self.linear1 = Linear(d_model, d_ff, bias=use_bias)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(d_ff, d_model, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.silu(self.linear1(x))))


class _Affine(nn.Module):
    """What is left of a batch norm whose statistics were folded into it. Shape: (B, num_features, T) -> same."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None] + self.bias[:, None]


class _FrameNorm(nn.LayerNorm):
    """Layer norm over the channels of each frame. Shape: (B, C, T) -> same."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


CONV_NORMS = {
    "batch_norm": nn.BatchNorm1d,
    "layer_norm": _FrameNorm,
    "instance_norm": nn.InstanceNorm1d,
    "fused_batch_norm": _Affine,
}


def make_conv_norm(name: str, channels: int) -> nn.Module:
    """The normalisation `conv_norm_type` of (B, channels, T): one of CONV_NORMS, or group_normN with N groups.

    Raises ValueError for another name, and for groups that do not divide the channels.
    """
    if name in CONV_NORMS:
        return CONV_NORMS[name](channels)
    groups = name.removeprefix("group_norm")
    if groups == name or not (groups.isascii() and groups.isdigit()):
        raise ValueError(f"conv_norm_type must be one of {', '.join(CONV_NORMS)}, group_normN, got {name!r}")
    if int(groups) < 1 or channels % int(groups):
        raise ValueError(f"conv_norm_type must have groups that divide the {channels} channels, got {name!r}")
    return nn.GroupNorm(int(groups), channels)


class ConformerConvolution(nn.Module):
    """1x1 convolution, GLU, depth-wise convolution, norm, SiLU, 1x1 convolution.

    Arguments
        kernel_size: of the depth-wise convolution.
        context: (left, right), how many frames before and behind its own each output frame sees; together
            kernel_size - 1.
        norm_type: see `make_conv_norm`.

    Shape: x (B, T, d_model), padding (B, T) bool -> (B, T, d_model).
    """

    def __init__(
        self,
        *,
        d_model: int,
        kernel_size: int,
        context: tuple[int, int],
        norm_type: str = "batch_norm",
        use_bias: bool = True,
    ) -> None:
        super().__init__()
        left, right = context
        both = min(left, right)  # the convolution adds these zeros itself, without a copy
        self.further = (left - both, right - both)
        self.pointwise_conv1 = PointwiseConv1d(d_model, 2 * d_model, bias=use_bias)
        self.depthwise_conv = nn.Conv1d(d_model, d_model, kernel_size, padding=both, groups=d_model, bias=use_bias)
        self.batch_norm = make_conv_norm(norm_type, d_model)  # whatever its kind, weights have NeMo's names
        self.pointwise_conv2 = PointwiseConv1d(d_model, d_model, bias=use_bias)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = F.glu(self.pointwise_conv1(x.transpose(1, 2)), 1).masked_fill(padding[:, None], 0)  # (B, D, T)
        if any(self.further):
            x = F.pad(x, self.further)
        x = F.silu(self.batch_norm(self.depthwise_conv(x)))
        return self.pointwise_conv2(x).transpose(1, 2)


class ConformerLayer(nn.Module):
    """Half a feed-forward module, attention, convolution, half a feed-forward module, each normed first and added.

    Arguments: those of ConformerEncoder, and
        d_ff: width of the feed-forward modules.
        conv_context: see ConformerConvolution.
        pos_bias: see RelPositionMultiHeadAttention.

    Shape: x (B, T', D), positions (1, 2 T' - 1, D), hidden (B, 1, T' or 1, T') and padding (B, T') bool -> (B, T', D).
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        n_heads: int,
        conv_kernel_size: int,
        conv_context: tuple[int, int],
        conv_norm_type: str,
        use_bias: bool,
        dropout: float,
        dropout_att: float,
        pos_bias: tuple[nn.Parameter, nn.Parameter] | None,
    ) -> None:
        super().__init__()
        self.norm_feed_forward1 = nn.LayerNorm(d_model)
        self.feed_forward1 = ConformerFeedForward(d_model=d_model, d_ff=d_ff, dropout=dropout, use_bias=use_bias)
        self.norm_conv = nn.LayerNorm(d_model)
        self.conv = ConformerConvolution(
            d_model=d_model,
            kernel_size=conv_kernel_size,
            context=conv_context,
            norm_type=conv_norm_type,
            use_bias=use_bias,
        )
        self.norm_self_att = nn.LayerNorm(d_model)
        self.self_attn = RelPositionMultiHeadAttention(
            d_model=d_model, n_heads=n_heads, dropout=dropout_att, use_bias=use_bias, pos_bias=pos_bias
        )
        self.norm_feed_forward2 = nn.LayerNorm(d_model)
        self.feed_forward2 = ConformerFeedForward(d_model=d_model, d_ff=d_ff, dropout=dropout, use_bias=use_bias)
        self.dropout = nn.Dropout(dropout)
        self.norm_out = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, positions: Tensor, hidden: Tensor, padding: Tensor) -> Tensor:
        x = x + 0.5 * self.dropout(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + self.dropout(self.self_attn(self.norm_self_att(x), positions, hidden, padding))
        x = x + self.dropout(self.conv(self.norm_conv(x), padding))
        x = x + 0.5 * self.dropout(self.feed_forward2(self.norm_feed_forward2(x)))
        return self.norm_out(x)
