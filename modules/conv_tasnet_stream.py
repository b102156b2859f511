"""A causal Conv-TasNet as a live system runs it: new samples and the state in, separated samples and the state out.

The state holds all that earlier samples mean for later ones: half a frame of the mixture, half a frame of the
synthesis that waits for its other half, the frames that each depthwise convolution looks back on, and each cumulative
norm's totals (float64, so that they stay exact for hours). Nothing is kept in the module.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast
from modules.conv_tasnet import ENCODER_ACTIVATIONS, ConvBlock, ConvTasNet
from modules.cpu_layers import DepthwiseConv1d
from modules.norms import CumulativeNorm, cumulative_layer_norm, initial_totals


class ConvTasNetStream(nn.Module):
    """Runs a causal `ConvTasNet` over a recording that arrives in pieces; the results are those of the whole.

    The output runs `delay_samples` (one stride) behind the input: the first so many samples stand for a time before
    the recording and are dropped, and zeros after the end of the recording, up to a whole number of strides and one
    stride more, bring out the rest. A sample leaves at most kernel_size samples after it came: the time until its
    stride is full and the delay.

    Raises ValueError for a network that looks ahead or whose frames do not overlap by one half.
    """

    def __init__(self, network: ConvTasNet) -> None:
        super().__init__()
        if not network.causal or network.norm == "global":
            raise ValueError(
                "running frame by frame needs causal: true and norm: cumulative or per_frame, "
                f"this network has causal: {str(network.causal).lower()} and norm: {network.norm}"
            )
        if network.padding != "centered" or 2 * network.stride != network.kernel_size:
            raise ValueError(
                "running frame by frame needs padding: centered and a stride of half the kernel_size, this network "
                f"has padding: {network.padding}, stride: {network.stride}, kernel_size: {network.kernel_size}"
            )
        self.network = network
        self.delay_samples = network.stride

    def initial_state(self, batch_size: int = 1) -> dict[str, Tensor]:
        """The state before the first sample, on the network's device, in its precision.

        Keys: mixture (B, stride), sources (B, C, stride), and by the name of a layer of the network (B, channels,
        frames it looks back on) or (B, 3).
        """
        network, weight = self.network, self.network.encoder.weight
        state = {
            "mixture": weight.new_zeros(batch_size, network.stride),
            "sources": weight.new_zeros(batch_size, network.num_sources, network.stride),
        }
        for name, layer in network.named_modules():
            if isinstance(layer, CumulativeNorm):
                state[name] = initial_totals(batch_size, device=weight.device)
            elif isinstance(layer, DepthwiseConv1d):
                look_back = (layer.kernel_size[0] - 1) * layer.dilation[0]
                state[name] = weight.new_zeros(batch_size, layer.in_channels, look_back)
        return state

    def forward(self, samples: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Separates the next n strides of samples, n >= 1.

        Shape: (B, n * stride) -> (B, C, n * stride), `delay_samples` behind.

        Raises ValueError for samples of another shape.
        """
        network, stride = self.network, self.network.stride
        if samples.ndim != 2 or samples.shape[-1] < 1 or samples.shape[-1] % stride:
            raise ValueError(f"samples must have shape (batch, multiple of {stride}), got {tuple(samples.shape)}")
        next_state = {}
        window = torch.cat([state["mixture"], samples], -1)  # (B, (n + 1) * stride)
        next_state["mixture"] = window[:, -stride:]
        with without_autocast(samples.device.type):
            features = F.conv1d(window.unsqueeze(1), network.encoder.weight, stride=stride)  # (B, N, n)
            features = ENCODER_ACTIVATIONS[network.encoder_activation](features)
        masks = self._masks(features, state, next_state)  # (B, C, N, n)
        with without_autocast(samples.device.type):
            masked = (masks * features.unsqueeze(1)).flatten(0, 1)  # (B * C, N, n)
            sources = F.conv_transpose1d(masked, network.decoder.weight, stride=stride)  # (B * C, 1, (n + 1) * stride)
        sources = sources.unflatten(0, (-1, network.num_sources)).squeeze(2)  # (B, C, (n + 1) * stride)
        sources = sources + F.pad(state["sources"], (0, samples.shape[-1]))
        next_state["sources"] = sources[..., -stride:]
        return sources[..., :-stride], {name: next_state[name] for name in state}  # outputs in the order of the inputs

    def _masks(self, features: Tensor, state: dict[str, Tensor], next_state: dict[str, Tensor]) -> Tensor:
        """`Separator.forward` with memory: (B, N, n) -> (B, C, N, n). Fills next_state."""

        def advance(name: str, x: Tensor) -> Tensor:
            layer = self.network.get_submodule(name)
            if name not in state:  # a layer without memory
                return layer(x)
            y, next_state[name] = _advance(layer, x, state[name])
            return y

        separator = self.network.separator
        x = separator.bottleneck(advance("separator.input_norm", features))  # (B, bottleneck, n)
        skip_sum: Tensor | None = None
        for index, block in enumerate(separator.blocks):
            assert isinstance(block, ConvBlock)
            name = f"separator.blocks.{index}"
            hidden = advance(f"{name}.expand_norm", block.expand_prelu(block.expand(x)))  # (B, hidden, n)
            hidden = block.depthwise_prelu(advance(f"{name}.depthwise", hidden))
            x, skip_sum = block.add_branches(advance(f"{name}.depthwise_norm", hidden), x, skip_sum)
        return separator.estimate_masks(x if skip_sum is None else skip_sum)


def _advance(layer: nn.Module, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One layer over the next n frames: (B, channels, n) and its memory -> the same two."""
    if isinstance(layer, CumulativeNorm):
        return cumulative_layer_norm(x, layer.weight, layer.bias, memory)
    assert isinstance(layer, DepthwiseConv1d)
    window = torch.cat([memory, x], -1)
    y = F.conv1d(window, layer.weight, layer.bias, dilation=layer.dilation, groups=layer.groups)
    return y, window[..., x.shape[-1] :]


def separate_stream(network: ConvTasNet, mixture: Tensor, *, frames_per_call: int = 1) -> Tensor:
    """`network(mixture)`, computed `frames_per_call` strides at a time as a live system would.

    Shape: (B, T) -> (B, C, T) for every T >= 1.

    Raises ValueError for a network that cannot run so, and for frames_per_call below 1.
    """
    if not isinstance(frames_per_call, int) or frames_per_call < 1:
        raise ValueError(f"frames_per_call must be a whole number of at least 1, got {frames_per_call!r}")
    stream = ConvTasNetStream(network)
    num_samples, stride = mixture.shape[-1], network.stride
    padded = F.pad(mixture, (0, -num_samples % stride + stream.delay_samples))
    state = stream.initial_state(mixture.shape[0])
    pieces = []
    for samples in padded.split(frames_per_call * stride, -1):
        piece, state = stream(samples, state)
        pieces.append(piece)
    return torch.cat(pieces, -1)[..., stream.delay_samples :][..., :num_samples]
