"""Self-attention with relative positions, over padded batches and limited contexts.

Papers: Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context", 2019, arXiv:1901.02860,
section 3.3 (the four terms of a score); Gulati et al., "Conformer", 2020, arXiv:2005.08100; Noroozi et al., "Stateful
Conformer with Cache-based Inference for Streaming ASR", 2023, arXiv:2312.17279 (chunked_limited context). Names and
values are those of NeMo's `RelPositionMultiHeadAttention`.

    score[i, j] = ((q[i] + u) . k[j] + (q[i] + v) . p[i - j]) / sqrt(D / H)

Decisions that are not obvious:
* The second term goes into `scaled_dot_product_attention` as its additive mask. Hidden keys get a quarter of the lowest
  number there (exponents of two in the kernels take a factor of 1.44): their probability is exactly 0 beside any key
  that is seen. NeMo writes -10000 in place of their scores and 0 in place of their probabilities: the same; but -10000
  merely added would let large scores through.
* A row that sees no key becomes uniform instead of zero. Only frames of padding have such rows (every valid frame sees
  itself in any context), and the context of all of them is set to 0.
* Masks are True where something is hidden. A mask of padding alone is (B, 1, 1, T'), not T' times as large.
* float16 has neither range nor digits for the scores: under float16 autocast the block runs in bfloat16 where the
  device has it, else in float32.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast
from modules.cpu_layers import Linear
from modules.subsampling import padding_mask

STYLES = ("regular", "chunked_limited")


def relative_positions(
    num_frames: int,
    d_model: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sinusoids of the positions num_frames - 1 down to -(num_frames - 1): sines in even channels, cosines in odd.

    Computed in float32 whatever *dtype* is, as the weights of others were trained.

    Shape: -> (1, 2 * num_frames - 1, d_model).
    """
    positions = torch.arange(num_frames - 1, -num_frames, -1, dtype=torch.float32, device=device)
    channels = torch.arange(0, d_model, 2, dtype=torch.float32, device=device)
    angles = positions[:, None] * torch.exp(channels * (-math.log(10000.0) / d_model))  # (2 T' - 1, D / 2)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1).to(dtype)[None]


class RelativePositions:
    """`relative_positions`, computed again only for more frames than ever before, another device or another dtype.

    Not a buffer: it is no part of a checkpoint, and processes that train together may hold tables of different size.
    """

    def __init__(self, d_model: int) -> None:
        self.d_model = d_model
        self._table: Tensor | None = None

    def __call__(self, num_frames: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_exporting():  # a table in an exported graph would limit the frames
            return relative_positions(num_frames, self.d_model, device, dtype)
        table = self._table
        if table is None or table.device != device or table.dtype != dtype or table.shape[1] < 2 * num_frames - 1:
            with torch.inference_mode(False):  # a table made in validation must be good for training
                self._table = table = relative_positions(num_frames, self.d_model, device, dtype)
        first = table.shape[1] // 2 - (num_frames - 1)
        return table[:, first : first + 2 * num_frames - 1]


def relative_shift(scores: Tensor) -> Tensor:
    """From scores by relative position, descending, to scores by key: shifted[i, j] = scores[i, T' - 1 - i + j].

    In memory, (i, j) stands at i (2 T' - 2) + T' - 1 + j: a view with rows one element shorter.

    Shape: (..., T', 2 T' - 1) -> (..., T', T').
    """
    num_frames = scores.shape[-2]
    if torch.compiler.is_exporting():  # one formula for any number of frames, at the price of a copy
        padded = F.pad(scores, (1, 0)).flatten(-2)  # (..., 2 T'^2)
        return padded[..., num_frames:].unflatten(-1, (num_frames, 2 * num_frames - 1))[..., :num_frames]
    if num_frames == 1:
        return scores
    skewed = scores.flatten(-2)[..., num_frames - 1 : -1]  # (..., T' (2 T' - 2))
    return skewed.unflatten(-1, (num_frames, 2 * num_frames - 2))[..., :num_frames]


def attention_mask(length: Tensor, num_frames: int, context: tuple[int, int], style: str = "regular") -> Tensor:
    """True where query i must not see key j, because j is padding or outside of i's context.

    Arguments
        length: valid frames of each item.
        context: (left, right), frames; -1 is unlimited.
        style: "regular": j from i - left to i + right. "chunked_limited": chunks of right + 1 frames, of which i sees
            its own and left / (right + 1) before it.

    Shape: (B,) -> (B, 1, T', T') bool, or (B, 1, 1, T') where the context is unlimited.
    """
    left, right = context
    hidden = padding_mask(length, num_frames)[:, None, None]  # (B, 1, 1, T')
    if left < 0 and right < 0:
        return hidden
    frame = torch.arange(num_frames, device=length.device)
    if style == "chunked_limited":
        chunk = right + 1
        frame, left, right = frame // chunk, left // chunk, 0
    before = frame[:, None] - frame  # (T', T'): how far key j is before query i
    if left >= 0:
        hidden = hidden | (before > left)
    if right >= 0:
        hidden = hidden | (before < -right)
    return hidden


def _without_float16(device_type: str) -> AbstractContextManager:
    """Replaces float16 autocast by bfloat16 or, where the device has none, by full precision."""
    if not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) != torch.float16:
        return nullcontext()
    if device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return without_autocast(device_type)
    return torch.autocast(device_type, dtype=torch.bfloat16)


class RelPositionMultiHeadAttention(nn.Module):
    """Multi-head self-attention with relative positions.

    Arguments
        d_model: width D, a multiple of n_heads H.
        dropout: of the attention's probabilities.
        use_bias: of the linear layers, linear_pos aside, which never has one.
        pos_bias: (u, v), each (H, D / H), when they are shared with other layers; None: own ones, zero at first.

    Shape: x (B, T', D), positions (1, 2 T' - 1, D), hidden (B, 1, T' or 1, T') from `attention_mask`, padding (B, T')
    bool -> (B, T', D). Frames of padding give the bias of `linear_out`.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        dropout: float = 0.0,
        use_bias: bool = True,
        pos_bias: tuple[nn.Parameter, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        self.n_heads = n_heads
        self.dropout = dropout
        self.linear_q = Linear(d_model, d_model, bias=use_bias)
        self.linear_k = Linear(d_model, d_model, bias=use_bias)
        self.linear_v = Linear(d_model, d_model, bias=use_bias)
        self.linear_out = Linear(d_model, d_model, bias=use_bias)
        self.linear_pos = Linear(d_model, d_model, bias=False)
        self.pos_bias_u, self.pos_bias_v = pos_bias or make_pos_bias(d_model, n_heads)

    def forward(self, x: Tensor, positions: Tensor, hidden: Tensor, padding: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        with _without_float16(x.device.type):
            q, k, v = self._heads(self.linear_q(x)), self._heads(self.linear_k(x)), self._heads(self.linear_v(x))
            p = self._heads(self.linear_pos(positions))  # (1, H, 2 T' - 1, D / H)
            scaled = (q + self.pos_bias_v[:, None]) * q.shape[-1] ** -0.5
            scores = relative_shift(scaled @ p.transpose(-1, -2))  # (B, H, T', T')
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min / 4)
            context = F.scaled_dot_product_attention(
                q + self.pos_bias_u[:, None],
                k,
                v,
                attn_mask=scores,
                dropout_p=self.dropout if self.training else 0.0,
            )
            context = context.transpose(1, 2).flatten(2).masked_fill(padding[..., None], 0)  # (B, T', D)
            return self.linear_out(context)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, frames, D / H)


def make_pos_bias(d_model: int, n_heads: int) -> tuple[nn.Parameter, nn.Parameter]:
    """The biases u and v of the queries, zero. Shape: twice (n_heads, d_model / n_heads)."""
    u, v = (nn.Parameter(torch.zeros(n_heads, d_model // n_heads)) for _ in range(2))
    return u, v
