"""Signals to hear and see: audio and spectrograms in TensorBoard while training, WAV files after a test.

The system says which signals (`figures(batch, output)`: tag -> (T,) audio of the first example, with `sample_rate`);
this callback knows nothing else about it. A system without them gets none.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import soundfile
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.spectrograms import spectrogram_figure


class AudioFigures(pl.Callback):
    """Shows the first *num_examples* of the validation set and writes the first *num_listen* of the test set.

    TensorBoard: `<example>_<tag>` as audio, and `<example>_spectrograms`, one picture of all of them
    (callbacks/spectrograms.py). Validation examples are the same every time, as the data module keeps them; so are
    the order of the signals and the names. Audio beyond ±1 is scaled to fit, and its tag then ends in `_scaled`.
    Test: float WAV files with levels as they are, `<run directory>/listen/<example>_<tag>.wav`. Both on rank 0 only;
    without a TensorBoard logger the first is left out.

    *every_n_epochs*: epochs between, counted from the first; of several validations in an epoch the first is shown.
    """

    def __init__(self, *, every_n_epochs: int = 1, num_examples: int = 2, num_listen: int = 4) -> None:
        if every_n_epochs < 1 or num_examples < 0 or num_listen < 0:
            raise ValueError(
                f"every_n_epochs={every_n_epochs}, num_examples={num_examples}, num_listen={num_listen}:"
                " give at least 1, 0 and 0"
            )
        self.every_n_epochs = every_n_epochs
        self.num_examples = num_examples
        self.num_listen = num_listen
        self.listen_dir: Path | None = None  # where the test wrote to, once it has
        self._shown_epoch = -1
        self._written = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown_epoch = -1

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        epoch = trainer.current_epoch
        first = batch_idx == 0 and dataloader_idx == 0
        if not first or epoch == self._shown_epoch or epoch % self.every_n_epochs or trainer.sanity_checking:
            return
        writer = next((x.experiment for x in trainer.loggers if isinstance(x, TensorBoardLogger)), None)
        if writer is None or not trainer.is_global_zero:
            return
        self._shown_epoch = epoch
        for example, signals in enumerate(_examples(pl_module, batch, outputs, self.num_examples)):
            for tag, signal in signals.items():
                _hear(writer, f"{example}_{tag}", signal, _rate(pl_module), trainer.global_step)
            if signals:
                figure = spectrogram_figure(signals, _rate(pl_module))
                writer.add_image(f"{example}_spectrograms", figure, trainer.global_step)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._written, self.listen_dir = 0, None

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero or self._written >= self.num_listen:
            return
        folder = Path(trainer.default_root_dir) / "listen"
        for signals in _examples(pl_module, batch, outputs, self.num_listen - self._written):
            if signals:
                folder.mkdir(parents=True, exist_ok=True)
                self.listen_dir = folder
            for tag, signal in signals.items():
                path = folder / f"{self._written}_{tag}.wav"
                soundfile.write(path, signal.numpy(), _rate(pl_module), subtype="FLOAT")
            self._written += 1


def _examples(module: pl.LightningModule, batch: Any, outputs: Any, count: int) -> list[dict[str, Tensor]]:
    """Signals of the first examples of a batch, on the CPU; none from a system that has none."""
    make = getattr(module, "figures", None)
    if make is None or not isinstance(batch, dict) or not isinstance(outputs, dict) or not _rate(module):
        return []
    size = next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)
    chosen = []
    for index in range(min(count, size)):
        signals = make(_pick(batch, index, size), _pick(outputs, index, size))
        chosen.append({tag: signal.detach().float().cpu() for tag, signal in signals.items()})
    return chosen


def _pick(tensors: dict[str, Any], index: int, size: int) -> dict[str, Any]:
    """A batch of one example: what has an entry per example keeps the one at `index`."""
    return {
        name: value[index : index + 1] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
        for name, value in tensors.items()
    }


def _rate(module: pl.LightningModule) -> int:
    return int(getattr(module, "sample_rate", None) or 0)


def _hear(writer: Any, tag: str, signal: Tensor, sample_rate: int, step: int) -> None:
    peak = signal.abs().max().item() if signal.numel() else 0.0
    audio, name = (signal / peak, f"{tag}_scaled") if peak > 1 else (signal, tag)
    writer.add_audio(name, audio[None], step, sample_rate=sample_rate)
