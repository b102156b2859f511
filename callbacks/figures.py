"""Signals to hear and see: audio and spectrograms in TensorBoard while training, WAV files after a test.

The system says which signals (`figures(batch, output)`: tag -> (T,) audio of the first example, with `sample_rate`);
this callback knows nothing else about it. A system without them gets none.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import soundfile
from torch import Tensor

from callbacks.examples import FirstExamples
from callbacks.spectrograms import spectrogram_figure


class AudioFigures(FirstExamples):
    """Shows the first *num_examples* of the validation set and writes the first *num_listen* of the test set.

    TensorBoard: `<example>_<tag>` as audio, and `<example>_spectrograms`, one picture of all of them
    (callbacks/spectrograms.py). Audio beyond ±1 is scaled to fit, and its tag then ends in `_scaled`.
    Test: float WAV files with levels as they are, `<run directory>/listen/<example>_<tag>.wav`.

    *every_n_epochs*: epochs between, counted from the first; of several validations in an epoch the first is shown.
    """

    folder = "listen"

    def __init__(self, *, every_n_epochs: int = 1, num_examples: int = 2, num_listen: int = 4) -> None:
        if every_n_epochs < 1 or num_examples < 0 or num_listen < 0:
            raise ValueError(
                f"every_n_epochs={every_n_epochs}, num_examples={num_examples}, num_listen={num_listen}:"
                " give at least 1, 0 and 0"
            )
        super().__init__(every_n_epochs=every_n_epochs, num_shown=num_examples, num_written=num_listen)

    def select(self, module: pl.LightningModule, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        if not _rate(module):
            return {}
        return {tag: signal.float() for tag, signal in figures.items() if signal.ndim == 1}

    def show(
        self, writer: Any, example: int, figures: dict[str, Tensor], module: pl.LightningModule, step: int
    ) -> None:
        for tag, signal in figures.items():
            _hear(writer, f"{example}_{tag}", signal, _rate(module), step)
        writer.add_image(f"{example}_spectrograms", spectrogram_figure(figures, _rate(module)), step)

    def write(self, stem: Path, figure: Tensor, module: pl.LightningModule) -> None:
        soundfile.write(f"{stem}.wav", figure.numpy(), _rate(module), subtype="FLOAT")


def _rate(module: pl.LightningModule) -> int:
    return int(getattr(module, "sample_rate", None) or 0)


def _hear(writer: Any, tag: str, signal: Tensor, sample_rate: int, step: int) -> None:
    peak = signal.abs().max().item() if signal.numel() else 0.0
    audio, name = (signal / peak, f"{tag}_scaled") if peak > 1 else (signal, tag)
    writer.add_audio(name, audio[None], step, sample_rate=sample_rate)
