"""Layers whose stock CPU kernels are slow in training, with the same parameters and the same results.

* `DepthwiseConv1d`: oneDNN has fast depthwise kernels only without dilation, so the dilated convolution is
  expressed without one (1.5 to 2.5 times as fast, forward and backward together).
* `PReLU`: for its one slope the stock backward pass writes a second full tensor and sums that up, where one dot
  product does (3 times as fast).
* `two_pointwise`: two convolutions over the same input are one with the filters of both, whose backward pass writes the
  gradient of that input once instead of twice and a sum.
* `PointwiseConv1d`, `Linear`: products of large matrices, for which torch asks MKL (of convolutions, where one thread
  computes). On CPUs for which MKL was not made oneDNN is about twice as fast, and torch hands it every convolution that
  is dilated, as one of kernel size 1 can be without a change.
* `GRU`: the stock backward pass adds to the gradient of the recurrent weights once for every frame; one product of all
  frames gives the same.

They save only while training on a CPU. Everywhere else (GPU, evaluation, export, compilation) the stock
operation runs, so that graphs stay plain.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.autocast import without_autocast

_LARGE = 2**23  # multiply-adds
_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def depthwise_by_phase(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, *, causal: bool = False
) -> Tensor:
    """Depthwise convolution of kernel size P, zeros around as in `DepthwiseConv1d`, as an undilated 2-D convolution.

    Sample k stands in row k // d and column k % d of an image, so the samples that a kernel of dilation d meets
    are neighbours in one column: a (P, 1) kernel without dilation over the image is the dilated convolution.

    Shape: x (B, C, K), weight (C, 1, P), bias (C,) -> (B, C, K).
    """
    num_frames = x.shape[-1]
    both, before, after = _rows_of_padding(weight.shape[-1], causal)
    missing = -num_frames % dilation
    if before or after or missing:
        x = F.pad(x, (before * dilation, after * dilation + missing))
    image = x.unflatten(-1, (-1, dilation))  # (B, C, K/d, d)
    y = F.conv2d(image, weight.unsqueeze(-1), bias, padding=(both, 0), groups=x.shape[1]).flatten(-2)
    return y[..., :num_frames]


def _rows_of_padding(kernel_size: int, causal: bool) -> tuple[int, int, int]:
    """Zeros that keep the length, in dilation steps: on both sides (a convolution adds them itself, without a copy),
    and further ones before and after."""
    before = kernel_size - 1 if causal else (kernel_size - 1) // 2
    after = kernel_size - 1 - before
    both = min(before, after)
    return both, before - both, after - both


class DepthwiseConv1d(nn.Conv1d):
    """Depthwise convolution that keeps the length; parameters as in nn.Conv1d(channels, groups=channels).

    Zeros stand around the frames: as many on the left as on the right (one more on the right for an even kernel
    size, times the dilation), all on the left when *causal*: no frame then sees a later one.

    Shape: (B, channels, K) -> (B, channels, K).
    """

    def __init__(self, channels: int, *, kernel_size: int, dilation: int = 1, causal: bool = False) -> None:
        both, before, after = _rows_of_padding(kernel_size, causal)
        super().__init__(channels, channels, kernel_size, padding=both * dilation, dilation=dilation, groups=channels)
        self.causal = causal
        self.uneven_padding = (before * dilation, after * dilation)

    def forward(self, input: Tensor) -> Tensor:
        if trains_on_cpu(self, input) and self.dilation[0] > 1:
            return depthwise_by_phase(input, self.weight, self.bias, self.dilation[0], causal=self.causal)
        return super().forward(F.pad(input, self.uneven_padding) if any(self.uneven_padding) else input)


class _PReLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.leaky_relu(x, float(slope))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        grad_x = torch.ops.aten.leaky_relu_backward(grad, x, float(slope), False)
        negative = x.clamp_max(0)
        grad_slope = torch.dot(grad.reshape(-1), negative.reshape(-1))  # d y / d slope = min(x, 0)
        return grad_x, grad_slope.reshape(slope.shape)


class PReLU(nn.PReLU):
    """PReLU with one slope for all channels; parameter as in nn.PReLU(). Shape: any -> same."""

    def __init__(self) -> None:
        super().__init__(num_parameters=1)

    def forward(self, input: Tensor) -> Tensor:
        # Reading the slope as a number costs nothing on a CPU; mixed dtypes (autocast) keep the stock rules.
        if trains_on_cpu(self, input) and input.dtype == self.weight.dtype:
            return _PReLUFunction.apply(input, self.weight)
        return super().forward(input)


def pointwise(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution of kernel size 1 that is part of a *layer*.

    Shape: x (B, inputs, …), weight (outputs, inputs, 1, …), bias (outputs,) -> (B, outputs, …).
    """
    dilation = 2 if _is_large(layer, x, weight) else 1
    return _CONVOLUTIONS[x.ndim](x, weight, bias, dilation=dilation)


def linear(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, part of a *layer*. Shape: x (…, inputs), weight (outputs, inputs) -> (…, outputs)."""
    if not _is_large(layer, x, weight):
        return F.linear(x, weight, bias)
    # Rows as pixels of an image whose channels stand last in memory: no number is copied.
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, inputs, N, 1)
    y = F.conv2d(rows, weight[:, :, None, None], bias, dilation=2)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class PointwiseConv1d(nn.Conv1d):
    """A convolution of kernel size 1; parameters as in nn.Conv1d. Shape: (B, inputs, K) -> (B, outputs, K)."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return pointwise(self, input, self.weight, self.bias)


class Linear(nn.Linear):
    """nn.Linear, by `linear`. Shape: (…, inputs) -> (…, outputs)."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(self, input, self.weight, self.bias)


class _Recurrence(torch.autograd.Function):
    """The frames of a GRU one after another; *gates*: what its inputs add to the reset, update and new gates.

    Weight and bias may have half the precision, which the products then have.

    Shape: gates (T, B, 3 H), weight (3 H, H), bias (3 H,) -> (T, B, H).
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        num_frames, batch, size = gates.shape[0], gates.shape[1], weight.shape[1]
        hidden = gates.new_zeros(num_frames + 1, batch, size)  # the state before each frame, and the last one
        values, recurrent = torch.empty_like(gates), gates.new_empty(num_frames, batch, size)
        reset_update, new = values.split((2 * size, size), 2)
        for t in range(num_frames):
            product = torch.addmm(bias, hidden[t].to(weight.dtype), weight.t())
            torch.add(gates[t, :, : 2 * size], product[:, : 2 * size], out=reset_update[t]).sigmoid_()
            recurrent[t] = product[:, 2 * size :]
            torch.addcmul(gates[t, :, 2 * size :], reset_update[t, :, :size], recurrent[t], out=new[t]).tanh_()
            torch.lerp(new[t], hidden[t], reset_update[t, :, size:], out=hidden[t + 1])
        ctx.save_for_backward(values, recurrent, hidden, weight)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, recurrent, hidden, weight = ctx.saved_tensors
        reset, update, new = values.split(weight.shape[1], 2)
        before = hidden[:-1]
        # What a frame's state changes by with what its gates are computed from, all frames at once.
        of_new = (1 - update) * (1 - new.square())
        of_inputs = torch.stack(
            [of_new * recurrent * reset * (1 - reset), (before - new) * update * (1 - update), of_new], 2
        )  # (T, B, 3, H)
        of_products = of_inputs.clone()
        of_products[:, :, 2] *= reset
        state = torch.zeros_like(grad[0])
        for t in range(len(grad) - 1, -1, -1):
            state = state + grad[t]
            of_inputs[t] *= state.unsqueeze(1)
            of_products[t] *= state.unsqueeze(1)
            state = state * update[t] + of_products[t].flatten(1).to(weight.dtype) @ weight
        products = of_products.flatten(2).flatten(0, 1)  # (T B, 3 H)
        of_weight = products.t().to(weight.dtype) @ before.flatten(0, 1).to(weight.dtype)
        return of_inputs.flatten(2), of_weight, products.sum(0).to(weight.dtype)


class GRU(nn.GRU):
    """nn.GRU of one layer, batch first.

    Shape: (B, T, input_size) -> (B, T, hidden_size), and the last state (1, B, hidden_size).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, batch_first=True)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if hx is not None or not trains_on_cpu(self, input):
            return super().forward(input, hx)
        input_weight, weight, input_bias, bias = self.parameters()
        gates = linear(self, input, input_weight, input_bias)  # (B, T, 3 H)
        weight, bias = weight.to(gates.dtype), bias.to(gates.dtype)  # halved under autocast
        with without_autocast("cpu"):
            wide = torch.promote_types(gates.dtype, torch.float32)
            hidden = _Recurrence.apply(gates.transpose(0, 1).to(wide).contiguous(), weight, bias)
        return hidden.transpose(0, 1), hidden[-1:]


def two_pointwise(x: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """What two convolutions of kernel size 1 make of x. Shape: (B, C, K) -> (B, channels of first, K) and of second."""
    # A layer that was replaced, such as by one of low rank, has no such filters.
    if not (type(first) is PointwiseConv1d and type(second) is PointwiseConv1d and trains_on_cpu(first, x)):
        return first(x), second(x)
    if first.bias is None or second.bias is None:
        return first(x), second(x)
    y = pointwise(first, x, torch.cat([first.weight, second.weight]), torch.cat([first.bias, second.bias]))
    return y[:, : first.out_channels], y[:, first.out_channels :]


def _is_large(layer: nn.Module, x: Tensor, weight: Tensor) -> bool:
    """Whether a product is one for oneDNN: setting up its kernels takes longer than a small one."""
    if not trains_on_cpu(layer, x) or torch.is_autocast_enabled("cpu"):  # in this order: compiled code asks no further
        return False
    return x.dtype == weight.dtype == torch.float32 and x.numel() * weight.shape[0] >= _LARGE


def trains_on_cpu(module: nn.Module, x: Tensor) -> bool:
    """Whether what stands in this file pays for *module* and its input *x*."""
    return not torch.compiler.is_compiling() and module.training and x.is_cpu
