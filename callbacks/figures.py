"""Signals to hear and see: audio and spectrograms in TensorBoard while training, WAV files after a test.

The system says which signals (`figures(batch, output)`: tag -> (T,) audio of the first example, with `sample_rate`);
this callback knows nothing else about it. A system without them gets none.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import soundfile
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

_RANGE_DB = 80.0


class AudioFigures(pl.Callback):
    """Shows the first *num_examples* of the validation set and writes the first *num_listen* of the test set.

    TensorBoard: `<example>_<tag>` as audio and as a grey spectrogram (white is the loudest point, black 80 dB
    below). Audio beyond ±1 is scaled to fit, and its tag then ends in `_scaled`. Test: float WAV files with levels as
    they are, `<run directory>/listen/<example>_<tag>.wav`. Both on rank 0 only; without a TensorBoard logger the
    first is left out.

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
                _show(writer, f"{example}_{tag}", signal, _rate(pl_module), trainer.global_step)

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


def _show(writer: Any, tag: str, signal: Tensor, sample_rate: int, step: int) -> None:
    peak = signal.abs().max().item() if signal.numel() else 0.0
    audio, name = (signal / peak, f"{tag}_scaled") if peak > 1 else (signal, tag)
    writer.add_audio(name, audio[None], step, sample_rate=sample_rate)
    writer.add_image(f"{tag}_spectrogram", spectrogram_image(signal, sample_rate), step)


def spectrogram_image(signal: Tensor, sample_rate: int) -> Tensor:
    """A grey-scale spectrogram, low frequencies at the bottom, 80 dB from black to white.

    Windows of 32 ms (rounded up to a power of two), half overlapped.

    *Shape*: (T,) -> (1, F, N), values 0 to 1
    """
    size = 2 ** max(4, (sample_rate * 32 // 1000 - 1).bit_length())
    window = torch.hann_window(size)
    padded = torch.nn.functional.pad(signal, (0, max(0, size - signal.numel())))
    power = torch.stft(padded, size, size // 2, window=window, return_complex=True, center=False).abs().square()
    level_db = 10 * torch.log10(power.clamp_min(1e-20))  # (F, N)
    return (1 + (level_db - level_db.max()) / _RANGE_DB).clamp(0, 1).flip(0)[None]
