"""What NEST's encoder is good for after the training: the features of its layers, and a network to export."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.base import ExportedNetwork
from modules.conformer import ConformerEncoder
from modules.mel import MelPreprocessor


def layer_numbers(encoder: ConformerEncoder, layers: int | Sequence[int] | Literal["all"]) -> list[int]:
    """Layers as a user names them -> as `ConformerEncoder.each_layer` counts. Raises ValueError for others."""
    if layers == "all":
        return list(range(1, len(encoder.layers) + 1))
    last = len(encoder.layers) + (encoder.out_proj is not None)
    typed = [layers] if isinstance(layers, int) else list(layers)
    if wrong := [number for number in typed if not -last - 1 <= number <= last]:
        raise ValueError(f"there is no layer {wrong[0]}, the encoder has 0 to {last}, or -1 to {-last - 1}")
    wanted = [number % (last + 1) for number in typed]
    if len(set(wanted)) < max(len(wanted), 1):
        raise ValueError("give at least one layer, and each once")
    return wanted


def layer_outputs(
    encoder: ConformerEncoder, preprocessor: MelPreprocessor, audio: Tensor, layers: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Number and output of each of *layers*; those behind them are not computed.

    Shape: audio (B, S) -> (B, T', D), the frames that S samples fill. Raises ValueError where they fill none.
    """
    length = torch.full((len(audio),), audio.shape[-1], device=audio.device)
    if not audio.numel() or int(preprocessor.frames(length).min()) < 1:
        raise ValueError("the recording is too short for a single frame")
    mel, mel_length = preprocessor(audio, length)
    frames, num_frames = encoder.pre_encode(mel.transpose(1, 2), mel_length)
    for number, output in enumerate(encoder.each_layer(frames, num_frames)):
        if number in layers:
            yield number, output[:, : int(num_frames[0])]
        if number == max(layers):
            return


def as_type(features: Tensor, dtype: Literal["float32", "float16"]) -> Tensor:
    """Raises ValueError where a number gets too large."""
    converted = features.to(getattr(torch, dtype))
    if dtype == "float16" and converted.isinf().any():
        raise ValueError("a feature is larger than float16 can say: dtype=float32 can")
    return converted


class _Exported(nn.Module):
    """Shape: (B, F, T) or, with a *preprocessor*, (B, S), and (B,) -> (B, D, T'), (B,)."""

    def __init__(self, encoder: ConformerEncoder, preprocessor: MelPreprocessor | None) -> None:
        super().__init__()
        self.encoder, self.preprocessor = encoder, preprocessor

    def forward(self, signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        if self.preprocessor is not None:
            signal, length = self.preprocessor(signal, length)
        encoded, num_frames = self.encoder(signal, length)
        return encoded, num_frames.clone()  # without sub-sampling it is the input, which an output must not be


def exported(
    encoder: ConformerEncoder, preprocessor: MelPreprocessor, *, waveform: bool, facts: dict[str, Any]
) -> ExportedNetwork:
    """`features` (B, F, T) or, with *waveform*, `audio` (B, S), and their `length` (B,) -> `encoded` (B, D, T') and
    `encoded_length` (B,).
    """
    generator = torch.Generator().manual_seed(0)

    def batch(size: int, num_frames: int) -> dict[str, Tensor]:
        """Items of several lengths."""
        if waveform:
            name, shape, scale = "audio", (size, (num_frames + 1) * preprocessor.hop_samples), 0.1
        else:
            name, shape, scale = "features", (size, encoder.feat_in, num_frames), 1.0
        shares = torch.tensor([1.0, 0.6, 0.3])[:size]
        return {name: scale * torch.randn(shape, generator=generator), "length": (shape[-1] * shares).long()}

    signal_axes = {"audio": {0: "batch", 1: "samples"}} if waveform else {"features": {0: "batch", 2: "frames"}}
    return ExportedNetwork(
        _Exported(encoder, preprocessor.for_export() if waveform else None).eval(),
        sizes=(batch(1, 21), batch(2, 100), batch(3, 333)),
        open_axes={**signal_axes, "length": {0: "batch"}},
        outputs=("encoded", "encoded_length"),
        facts=facts,
    )
