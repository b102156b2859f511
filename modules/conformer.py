"""Conformer encoder, from mel features to one vector per sub-sampled frame.

Papers: Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition", 2020, arXiv:2005.08100;
Rekesh et al., "Fast Conformer with Linearly Scalable Attention for Efficient Speech Recognition", 2023,
arXiv:2305.05084. Arguments, names of weights and values are those of NeMo's `ConformerEncoder`.

    mel -> pre_encode -> [* sqrt(D)] -> dropout -> layers -> [out_proj]

Decisions that are not obvious:
* Masks and positions are made once per forward pass for all layers, without waiting for the device.
* The table of positions grows with the input, each process's own; NeMo's processes agree on its size in every step.
* A dropped layer (stochastic depth) is computed and multiplied by 0, so that every weight has a gradient in every
  process.
* Dropout and stochastic depth draw from torch's global generators, the latter from the CPU's.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from modules.checks import numbers, switches, whole_numbers
from modules.conformer_layer import ConformerConvolution, ConformerFeedForward, ConformerLayer
from modules.relative_attention import STYLES, RelativePositions, attention_mask, make_pos_bias
from modules.subsampling import DwStridingSubsampling, LinearProjection, padding_mask

__all__ = ["ConformerConvolution", "ConformerEncoder", "ConformerFeedForward", "ConformerLayer", "layer_drop_probs"]


def layer_drop_probs(num_layers: int, drop_prob: float, mode: str = "linear", start_layer: int = 1) -> list[float]:
    """Probability that each layer is dropped in training: 0 for the first *start_layer*, then *drop_prob* for all
    ("uniform"), or rising evenly up to it in the last ("linear").

    Paper: Lee and Watanabe, "Intermediate Loss Regularization for CTC-based Speech Recognition", 2021,
    arXiv:2102.03216.

    Raises ValueError for another mode, a probability outside [0, 1), a start_layer outside 1 to num_layers.
    """
    if mode not in ("linear", "uniform"):
        raise ValueError(f"stochastic_depth_mode must be linear or uniform, got {mode!r}")
    if not 0 <= drop_prob < 1:
        raise ValueError(f"stochastic_depth_drop_prob must be in [0, 1), got {drop_prob!r}")
    if not 1 <= start_layer <= num_layers:
        raise ValueError(f"stochastic_depth_start_layer must be from 1 to n_layers ({num_layers}), got {start_layer!r}")
    number = num_layers - start_layer
    shares = [1.0] * number if mode == "uniform" else [(index + 1) / number for index in range(number)]
    return [0.0] * start_layer + [share * drop_prob for share in shares]


def _check_dropouts(**shares: float) -> None:
    numbers(least=0, most=1, **shares)
    if ones := [name for name, value in shares.items() if value == 1]:
        raise ValueError(f"{ones[0]} must be in [0, 1), got {shares[ones[0]]!r}")


def _attention_context(size: Sequence[int] | None, style: str) -> tuple[int, int]:
    if style not in STYLES:
        raise ValueError(f"att_context_style must be one of {', '.join(STYLES)}, got {style!r}")
    left, right = _pair("att_context_size", size or (-1, -1), lowest=-1)
    if style == "chunked_limited" and (right < 0 or left > 0 and left % (right + 1)):
        raise ValueError(
            f"att_context_size must have right >= 0 and left a multiple of right + 1 for chunked_limited, got {size!r}"
        )
    return left, right


def _convolution_context(size: Sequence[int] | str | None, kernel_size: int) -> tuple[int, int]:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"conv_kernel_size must be odd, got {kernel_size!r}")
    if size is None:
        return kernel_size // 2, kernel_size // 2
    if size == "causal":
        return kernel_size - 1, 0
    left, right = _pair("conv_context_size", size, lowest=0)
    if left + right + 1 != kernel_size:
        raise ValueError(f"conv_context_size must sum to conv_kernel_size - 1 ({kernel_size - 1}), got {size!r}")
    return left, right


def _pair(name: str, value: Sequence[int] | str, *, lowest: int) -> tuple[int, int]:
    match value:
        case [int(left), int(right)] if min(left, right) >= lowest:
            return left, right
    raise ValueError(f"{name} must be [left, right], whole numbers of at least {lowest}, got {value!r}")


class ConformerEncoder(nn.Module):
    """Sub-sampling and a stack of Conformer layers.

    Arguments
        feat_in: mel channels F.
        feat_out: width of the output if above 0, by one more linear layer; else d_model.
        n_layers, d_model, n_heads: number of layers, width D, attention heads; D a multiple of n_heads.
        use_bias: of the linear layers and convolutions in the Conformer layers; norms and sub-sampling keep theirs.
        subsampling: dw_striding; there is no other.
        subsampling_factor: mel frames per output frame, a power of two; with 1, a linear layer replaces sub-sampling.
        subsampling_conv_channels: of the sub-sampling; -1: d_model.
        causal_downsampling: sub-sampling that looks back only.
        ff_expansion_factor: width of the feed-forward modules, times d_model.
        self_attention_model: rel_pos; there is no other.
        att_context_size, att_context_style: see `attention_mask`; null is [-1, -1].
        xscaling: multiplies the sub-sampled frames by sqrt(D).
        untie_biases: each layer has position biases of its own, else all share one pair.
        pos_emb_max_len: accepted for NeMo's configurations, without effect: the table of positions grows by itself.
        conv_kernel_size: frames of the depth-wise convolution, odd.
        conv_norm_type: see `make_conv_norm`.
        conv_context_size: null (centred), causal, or [left, right] with sum conv_kernel_size - 1.
        dropout, dropout_pre_encoder, dropout_emb, dropout_att: within the layers, in front of them, of the positions,
            of the attention's probabilities.
        stochastic_depth_drop_prob, _mode, _start_layer: see `layer_drop_probs`.

    Shape: features (B, F, T), length (B,) -> (B, D or feat_out, T'), (B,) int64.

    Raises ValueError that begins with the name of an argument that does not fit, and for features of another width.
    """

    def __init__(
        self,
        *,
        feat_in: int,
        feat_out: int = -1,
        n_layers: int = 17,
        d_model: int = 512,
        use_bias: bool = True,
        subsampling: str = "dw_striding",
        subsampling_factor: int = 8,
        subsampling_conv_channels: int = 256,
        causal_downsampling: bool = False,
        ff_expansion_factor: int = 4,
        self_attention_model: str = "rel_pos",
        n_heads: int = 8,
        att_context_size: Sequence[int] | None = (-1, -1),
        att_context_style: str = "regular",
        xscaling: bool = True,
        untie_biases: bool = True,
        pos_emb_max_len: int = 5000,
        conv_kernel_size: int = 9,
        conv_norm_type: str = "batch_norm",
        conv_context_size: Sequence[int] | str | None = None,
        dropout: float = 0.1,
        dropout_pre_encoder: float = 0.1,
        dropout_emb: float = 0.0,
        dropout_att: float = 0.1,
        stochastic_depth_drop_prob: float = 0.0,
        stochastic_depth_mode: str = "linear",
        stochastic_depth_start_layer: int = 1,
    ) -> None:
        super().__init__()
        if subsampling != "dw_striding":
            raise ValueError(f"subsampling must be dw_striding, the only one there is, got {subsampling!r}")
        if self_attention_model != "rel_pos":
            raise ValueError(
                f"self_attention_model must be rel_pos, the only one there is, got {self_attention_model!r}"
            )
        if subsampling_conv_channels == -1:
            subsampling_conv_channels = d_model
        whole_numbers(
            feat_in=feat_in,
            n_layers=n_layers,
            d_model=d_model,
            subsampling_factor=subsampling_factor,
            subsampling_conv_channels=subsampling_conv_channels,
            ff_expansion_factor=ff_expansion_factor,
            n_heads=n_heads,
            conv_kernel_size=conv_kernel_size,
        )
        if d_model % 2:
            raise ValueError(f"d_model must be even, half sines and half cosines, got {d_model}")
        _check_dropouts(
            dropout=dropout, dropout_pre_encoder=dropout_pre_encoder, dropout_emb=dropout_emb, dropout_att=dropout_att
        )
        switches(
            use_bias=use_bias, causal_downsampling=causal_downsampling, xscaling=xscaling, untie_biases=untie_biases
        )
        self.feat_in, self.d_model, self.subsampling_factor = feat_in, d_model, subsampling_factor
        self.att_context_size = _attention_context(att_context_size, att_context_style)
        self.att_context_style = att_context_style
        conv_context = _convolution_context(conv_context_size, conv_kernel_size)
        self.scale = math.sqrt(d_model) if xscaling else 1.0

        self.pre_encode: nn.Module
        if subsampling_factor == 1:
            self.pre_encode = LinearProjection(feat_in, d_model)
        else:
            self.pre_encode = DwStridingSubsampling(
                feat_in=feat_in,
                feat_out=d_model,
                subsampling_factor=subsampling_factor,
                conv_channels=subsampling_conv_channels,
                causal=causal_downsampling,
            )
        self.dropout_pre_encoder = nn.Dropout(dropout_pre_encoder)
        self.dropout_emb = nn.Dropout(dropout_emb)
        self.positions = RelativePositions(d_model)
        pos_bias = None if untie_biases else make_pos_bias(d_model, n_heads)
        self.layers = nn.ModuleList(
            ConformerLayer(
                d_model=d_model,
                d_ff=d_model * ff_expansion_factor,
                n_heads=n_heads,
                conv_kernel_size=conv_kernel_size,
                conv_context=conv_context,
                conv_norm_type=conv_norm_type,
                use_bias=use_bias,
                dropout=dropout,
                dropout_att=dropout_att,
                pos_bias=pos_bias,
            )
            for _ in range(n_layers)
        )
        self.layer_drop_probs = layer_drop_probs(
            n_layers, stochastic_depth_drop_prob, stochastic_depth_mode, stochastic_depth_start_layer
        )
        self.out_proj = nn.Linear(d_model, feat_out) if feat_out > 0 and feat_out != d_model else None

    def forward(self, features: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        if features.ndim != 3 or features.shape[1] != self.feat_in:
            raise ValueError(f"features must have shape (batch, {self.feat_in}, frames), got {tuple(features.shape)}")
        return self.contextualise(*self.pre_encode(features.transpose(1, 2), length))

    def contextualise(self, x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """What follows sub-sampling. Shape: x (B, T', D), length (B,) -> (B, D or feat_out, T'), length (B,)."""
        (encoded,) = deque(self.each_layer(x, length), maxlen=1)  # the last; no other is kept
        return encoded.transpose(1, 2), length

    def each_layer(self, x: Tensor, length: Tensor) -> Iterator[Tensor]:
        """Of sub-sampled frames, one after the other: what enters the first layer, what each layer makes of it, and
        what `out_proj` does in the end where there is one.

        Shape: x (B, T', D), length (B,) -> (B, T', D) each, behind out_proj (B, T', feat_out).
        """
        num_frames = x.shape[1]
        x = self.dropout_pre_encoder(x * self.scale)
        positions = self.dropout_emb(self.positions(num_frames, x.device, next(self.parameters()).dtype))
        padding = padding_mask(length, num_frames)
        hidden = attention_mask(length, num_frames, self.att_context_size, self.att_context_style)
        yield x
        for layer, drop_prob in zip(self.layers, self.layer_drop_probs, strict=True):
            before, x = x, layer(x, positions, hidden, padding)
            if self.training and drop_prob:
                dropped = torch.rand((), device="cpu").item() < drop_prob  # no other device is waited for
                x = x * 0.0 + before if dropped else (x - before) / (1 - drop_prob) + before
            yield x
        if self.out_proj is not None:
            yield self.out_proj(x)
