"""DeepVQE as a live system runs it: one frame of both spectra and the state in, one enhanced frame and the state out.

The state holds all that earlier frames mean for later ones: three frames of input of each causal convolution, what the
alignment looks back on (the far end's features, their projections, scores), the GRU, and the two frames of the
microphone that the mask reaches. Nothing is kept in the module. The paper's network has 29 such tensors.

The alignment's memories begin with the newest frame: place d - 1 in them is a delay of d.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.alignment import SoftAlignment
from modules.complex_mask import complex_convolving_mask
from modules.deepvqe import CausalConv, DecoderBlock, DeepVQE, EncoderBlock, ResidualBlock, compress_spectrum
from modules.low_rank import LowRankConv
from modules.stft import STFT

State = dict[str, Tensor]

_NUM_FRAMES = "num_frames"


class DeepVQEStream(nn.Module):
    """Runs a `DeepVQE` frame by frame; the results are those of the whole spectra at once.

    Layers that were switched to low rank run as they are. For evaluation: norms use their running statistics.
    """

    def __init__(self, network: DeepVQE) -> None:
        super().__init__()
        self.network = network

    def initial_state(self, batch_size: int = 1) -> State:
        """The state before the first frame, on the network's device, in its precision.

        Keys: by the name of a convolution (B, in_channels, 3, F); bottleneck (B, hidden); spectrum (B, num_bins, 2, 2);
        with a far end of D delays alignment.key (B, H, D - 1, F), alignment.far (B, D - 1, C * F), alignment.scores
        (B, H, 4, D), and, where the alignment masks the start, num_frames int64 () of frames that have been.
        """
        network, gru = self.network, self.network.bottleneck.gru
        weight = gru.get_parameter("weight_ih_l0")

        def zeros(*sizes: int) -> Tensor:
            return weight.new_zeros(batch_size, *sizes)

        state = {name: zeros(conv.in_channels, 3, bins) for name, conv, bins in _convolutions(network)}
        if (alignment := network.alignment) is not None:
            bins, delays = _num_bins(network)[network.num_far_blocks], alignment.max_delay_frames
            hidden, channels = alignment.score_conv.in_channels, alignment.far_channels
            state["alignment.key"] = zeros(hidden, delays - 1, bins)
            state["alignment.far"] = zeros(delays - 1, channels * bins)
            state["alignment.scores"] = zeros(hidden, alignment.score_conv.kernel_size[0] - 1, delays)
            if alignment.mask_start:
                state[_NUM_FRAMES] = torch.zeros((), dtype=torch.int64, device=weight.device)
        state["bottleneck"] = zeros(gru.hidden_size)
        state["spectrum"] = zeros(network.num_bins, 2, 2)
        return state

    def forward(self, mic: Tensor, state: State, far: Tensor | None = None) -> tuple[Tensor, State]:
        """The next frame; the new state has the same keys in the same order, without others that *state* may have.

        Shape: mic, far (B, num_bins, 2) -> (B, num_bins, 2). A network without far end gets none.
        """
        step = _Step(self.network, state)
        enhanced = step.run(mic.unsqueeze(2), None if far is None else far.unsqueeze(2))
        return enhanced.squeeze(2), {name: step.after[name] for name in state if name in step.after}


class WaveformStream(nn.Module):
    """`DeepVQEStream` with the transforms around it: a hop of samples in, a hop of samples out, `delay_samples` later.

    The first so many samples that come out stand for a time before the recording; a sample leaves n_fft samples after
    it came at the latest. Around the recording there is silence, where `STFT` reflects its first and last half frame.
    The transforms are matrix products, which every runtime has.

    Raises ValueError for frames that do not overlap by one half.
    """

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, network: DeepVQE, stft: STFT) -> None:
        super().__init__()
        if stft.n_fft != 2 * stft.hop_samples:
            raise ValueError(f"streaming needs frames of two hops, got {stft.n_fft} and {stft.hop_samples} samples")
        self.stream = DeepVQEStream(network)
        self.hop_samples = self.delay_samples = stft.hop_samples
        window = stft.window.double().cpu()
        envelope = (window.square() + window.square().roll(stft.hop_samples)).clamp_min(1e-11)  # as torch.istft's
        bins = torch.eye(network.num_bins, dtype=torch.float64)
        forward = torch.fft.rfft(window.diag())  # (n_fft, num_bins)
        inverse = torch.stack([torch.fft.irfft(part, stft.n_fft) for part in (bins + 0j, 1j * bins)], 1)
        self.register_buffer("analysis", torch.view_as_real(forward).flatten(1).float(), persistent=False)
        self.register_buffer("synthesis", (inverse.flatten(0, 1) * window / envelope).float(), persistent=False)
        self.to(network.bottleneck.gru.get_parameter("weight_ih_l0").device)

    def initial_state(self, batch_size: int = 1) -> State:
        """That of `DeepVQEStream`, and mic_samples, far_samples, enhanced_samples (B, hop_samples)."""
        state = self.stream.initial_state(batch_size)
        names = ("mic", "far", "enhanced") if self.stream.network.alignment is not None else ("mic", "enhanced")
        return state | {f"{name}_samples": self.analysis.new_zeros(batch_size, self.hop_samples) for name in names}

    def forward(self, mic: Tensor, state: State, far: Tensor | None = None) -> tuple[Tensor, State]:
        """The next hop. Shape: mic, far (B, hop_samples) -> (B, hop_samples)."""
        heard, after = {}, {}
        for name, samples in (("mic", mic), ("far", far)):
            if samples is not None:
                window = torch.cat([state[f"{name}_samples"], samples], 1)  # (B, n_fft)
                heard[name] = (window @ self.analysis).unflatten(1, (-1, 2))
                after[f"{name}_samples"] = window[:, self.hop_samples :]
        spectrum, of_network = self.stream(heard["mic"], state, heard.get("far"))
        frame = spectrum.flatten(1) @ self.synthesis  # (B, n_fft)
        enhanced, after["enhanced_samples"] = frame.split(self.hop_samples, 1)
        after |= of_network
        return enhanced + state["enhanced_samples"], {name: after[name] for name in state}


def frames(stft: STFT, recording: Tensor) -> tuple[Tensor, ...]:
    """What `DeepVQEStream` is given of a recording: (B, T) -> (B, num_bins, 2) each."""
    return stft(stft.whole_hops(recording)).unbind(2)


def of_frames(stft: STFT, frames: Sequence[Tensor], num_samples: int) -> Tensor:
    """All that `DeepVQEStream` gave: (B, num_bins, 2) each -> (B, num_samples)"""
    whole = (len(frames) - 1) * stft.hop_samples
    return stft.inverse(torch.stack(list(frames), 2), whole)[:, :num_samples]


def hops(stft: STFT, recording: Tensor) -> tuple[Tensor, ...]:
    """What `WaveformStream` is given of a recording: (B, T) -> (B, hop_samples) each, one more for its delay."""
    return F.pad(stft.whole_hops(recording), (0, stft.hop_samples)).split(stft.hop_samples, 1)


def of_hops(stft: STFT, hops: Sequence[Tensor], num_samples: int) -> Tensor:
    """All that `WaveformStream` gave, without its delay: (B, hop_samples) each -> (B, num_samples)"""
    return torch.cat(list(hops), 1)[:, stft.hop_samples :][:, :num_samples]


def enhance_stream(network: DeepVQE, stft: STFT, *signals: Tensor) -> Tensor:
    """Whole recordings of the microphone and the far end, hop by hop as a live system would; without the delay.

    Shape: (B, T) each -> (B, T).
    """
    stream, pieces = WaveformStream(network, stft), []
    state = stream.initial_state(len(signals[0]))
    for mic, *far in zip(*(hops(stft, signal) for signal in signals), strict=True):
        piece, state = stream(mic, state, *far)
        pieces.append(piece)
    return of_hops(stft, pieces, signals[0].shape[-1])


class _Step:
    """`DeepVQE.forward` over one frame, with memory; features are (B, C, 1, F)."""

    def __init__(self, network: DeepVQE, before: State) -> None:
        self.network, self.before = network, before
        self.after: State = {}

    def run(self, mic: Tensor, far: Tensor | None) -> Tensor:
        """(B, num_bins, 1, 2) -> same"""
        network = self.network
        x, sizes, skips = compress_spectrum(mic, network.compression), [], []
        for index, block in enumerate(network.mic_encoder):
            if network.alignment is not None and index == network.num_far_blocks:
                x = torch.cat([x, self.align(network.alignment, x, self.encode_far(cast(Tensor, far)))], 1)
            sizes.append(x.shape[-1])
            x = self.encode(f"mic_encoder.{index}", cast(EncoderBlock, block), x)
            skips.append(x)
        x = self.bottleneck(x)
        for index, block in enumerate(network.decoder):
            x = self.decode(f"decoder.{index}", cast(DecoderBlock, block), x, skips.pop())[..., : sizes.pop()]
        memory = self.before["spectrum"]
        self.after["spectrum"] = torch.cat([memory[:, :, 1:], mic], 2)
        return complex_convolving_mask(x, mic, memory)

    def encode_far(self, far: Tensor) -> Tensor:
        x = compress_spectrum(far, self.network.compression)
        for index, block in enumerate(self.network.far_encoder):
            x = self.encode(f"far_encoder.{index}", cast(EncoderBlock, block), x)
        return x

    def encode(self, name: str, block: EncoderBlock, x: Tensor) -> Tensor:
        x = F.elu(block.norm(self.convolve(f"{name}.conv", block.conv, x)))
        return self.residual(name, block.residual, x)

    def decode(self, name: str, block: DecoderBlock, x: Tensor, skip: Tensor) -> Tensor:
        x = self.residual(name, block.residual, x + block.skip(skip))
        x = block.subpixel.spread(self.convolve(f"{name}.subpixel.conv", block.subpixel.conv, x))
        return x if block.norm is None else F.elu(block.norm(x))

    def residual(self, name: str, block: ResidualBlock | None, x: Tensor) -> Tensor:
        if block is None:
            return x
        return x + F.elu(block.norm(self.convolve(f"{name}.residual.conv", block.conv, x)))

    def convolve(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        window = torch.cat([self.before[name], x], 2)  # (B, C, 4, F)
        self.after[name] = window[:, :, 1:]
        return cast(CausalConv, layer).convolve_padded(window)

    def bottleneck(self, x: Tensor) -> Tensor:
        gru = self.network.bottleneck.gru
        weights = [gru.get_parameter(f"{kind}_l0") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        hidden = torch.gru_cell(x.flatten(1), self.before["bottleneck"], *weights)
        self.after["bottleneck"] = hidden
        return self.network.bottleneck.linear(hidden).view_as(x)

    def align(self, alignment: SoftAlignment, mic: Tensor, far: Tensor) -> Tensor:
        """The far end's features, delayed. (B, C, 1, F) twice -> (B, C_far, 1, F)"""
        key = torch.cat([alignment.far_projection(far), self.before["alignment.key"]], 2)  # (B, H, D, F)
        values = torch.cat([far.flatten(1).unsqueeze(1), self.before["alignment.far"]], 1)  # (B, D, C * F)
        self.after["alignment.key"], self.after["alignment.far"] = key[:, :, :-1], values[:, :-1]
        query = alignment.mic_projection(mic)  # (B, H, 1, F)
        if alignment.scale:
            query = query / math.sqrt(query.shape[-1])
        scores = torch.cat([self.before["alignment.scores"], query @ key.transpose(2, 3)], 2)  # (B, H, 5, D)
        self.after["alignment.scores"] = scores[:, :, 1:]
        conv = alignment.score_conv
        logits = F.conv2d(scores, conv.weight, conv.bias, padding=(0, 1))[:, 0] / alignment.temperature  # (B, 1, D)
        if alignment.mask_start:
            num_frames = self.before[_NUM_FRAMES]
            missing = torch.arange(alignment.max_delay_frames, device=logits.device) > num_frames
            logits = logits.masked_fill(missing, -math.inf)
            self.after[_NUM_FRAMES] = num_frames + 1
        return (logits.softmax(-1) @ values).view_as(far)


def _num_bins(network: DeepVQE) -> list[int]:
    """Of the input of each microphone block, and of the last one's output; the far end's are the first of them."""
    bins = [network.num_bins]
    for _ in network.mic_encoder:
        bins.append((bins[-1] + 1) // 2)
    return bins


def _convolutions(network: DeepVQE) -> list[tuple[str, CausalConv, int]]:
    """Name, layer (of low rank: the one it stands for) and bins of the input of each convolution that looks back."""
    bins, found = _num_bins(network), []
    for blocks in ("mic_encoder", "far_encoder", "decoder"):
        for index, block in enumerate(network.get_submodule(blocks).children()):
            for name, layer in block.named_modules():
                dense = layer.dense if isinstance(layer, LowRankConv) else layer
                if isinstance(dense, CausalConv):
                    place = len(bins) - 1 - index if blocks == "decoder" else index + (name == "residual.conv")
                    found.append((f"{blocks}.{index}.{name}", dense, bins[place]))
    return found
