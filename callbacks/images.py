"""Images to look at: in TensorBoard while training, PNG files after a test.

The system says which (`figures(batch, output)`: tag -> (3, H, W) of the first example, uint8, or float from 0 to 1, or
a map of numbers from 0 to 1, (H, W), which is drawn in colours); this callback knows nothing else about it. A system
without them gets none.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from callbacks.examples import FirstExamples
from callbacks.spectrograms import coloured

_LEAST = 128  # pixels of each side of a map


class ImageFigures(FirstExamples):
    """Shows the first *num_examples* of the validation set and writes the first *num_look* of the test set.

    TensorBoard: `<example>_<tag>`. Test: `<run directory>/look/<example>_<tag>.png`.

    *every_n_epochs*: epochs between, counted from the first; of several validations in an epoch the first is shown.
    """

    folder = "look"

    def __init__(self, *, every_n_epochs: int = 1, num_examples: int = 2, num_look: int = 4) -> None:
        if every_n_epochs < 1 or num_examples < 0 or num_look < 0:
            raise ValueError(
                f"every_n_epochs={every_n_epochs}, num_examples={num_examples}, num_look={num_look}:"
                " give at least 1, 0 and 0"
            )
        super().__init__(every_n_epochs=every_n_epochs, num_shown=num_examples, num_written=num_look)

    def select(self, module: pl.LightningModule, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        drawn = {tag: _drawn(figure) for tag, figure in figures.items()}
        return {tag: image for tag, image in drawn.items() if image is not None}

    def show(
        self, writer: Any, example: int, figures: dict[str, Tensor], module: pl.LightningModule, step: int
    ) -> None:
        for tag, image in figures.items():
            writer.add_image(f"{example}_{tag}", image, step)

    def write(self, stem: Path, figure: Tensor, module: pl.LightningModule) -> None:
        Image.fromarray(figure.permute(1, 2, 0).numpy()).save(f"{stem}.png")  # (3, H, W) -> (H, W, 3)


def _drawn(figure: Tensor) -> Tensor | None:
    """An image (3, H, W) or a map (H, W) as uint8 (3, H', W'); None for what is neither."""
    if figure.ndim == 2:
        return _in_colours(figure)
    if figure.ndim != 3 or figure.shape[0] != 3:
        return None
    if figure.dtype == torch.uint8:
        return figure
    return (figure.detach().float().nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)


def _in_colours(numbers: Tensor) -> Tensor:
    """(H, W) -> (3, H', W'), each number a rectangle that is large enough to be seen."""
    colours = torch.from_numpy(coloured(numbers.detach().float().nan_to_num().cpu().numpy())).permute(2, 0, 1)
    high, wide = (max(1, _LEAST // max(1, size)) for size in numbers.shape)
    return colours.repeat_interleave(high, 1).repeat_interleave(wide, 2)
