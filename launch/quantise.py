"""An ONNX file of a segmentation system -> one of 8 bits, calibrated on validation images, and what that costs in IoU.

Static quantisation: QuantizeLinear and DequantizeLinear around the layers, weights int8 per channel, ranges of the
activations as calibration finds them. (Dynamic quantisation leaves convolutions as they are.)

Decisions that are not obvious
* Weights take 7 of the 8 bits. CPUs without VNNI add products in pairs in 16 bits, which 8 bits overflow: there a small
  U-Net fell from an IoU of 0.968 to 0.930 with 8 bits, and stayed at 0.968 with 7.
* onnxruntime's symbolic shape inference gives up on the open sizes of a U-Net, so only its other preparations run.
* Photos are looked at in pieces of at most 1024 pixels a side, so that the memory is bounded.
"""

import contextlib
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import atomic_path

_LARGEST = 1024  # pixels

Example = tuple[np.ndarray, np.ndarray]
"""An image, float32 (1, 3, H, W) from 0 to 1, and its mask, uint8 (H, W): 0, 1 and 255 where it is not known."""


def examples(batches: Iterable[dict[str, Any]]) -> Iterator[Example]:
    """The images of batches `image` uint8 (B, 3, H, W), `mask` (B, 1, H, W) and `size` (B, 2), without padding."""
    for batch in batches:
        for image, mask, (height, width) in zip(batch["image"], batch["mask"], batch["size"].tolist(), strict=True):
            yield image[None, :, :height, :width].numpy().astype(np.float32) / 255, mask[0, :height, :width].numpy()


def pieces(image: np.ndarray, mask: np.ndarray) -> Iterator[Example]:
    """An example in equal parts of at most 1024 x 1024 pixels."""
    height, width = mask.shape
    for rows in np.array_split(np.arange(height), math.ceil(height / _LARGEST)):
        for columns in np.array_split(np.arange(width), math.ceil(width / _LARGEST)):
            part = np.s_[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            yield image[part], mask[part]


def write_int8(path: Path, output: Path, calibration: Iterable[Example]) -> None:
    """Quantise the file *path*, with the ranges that its activations have on *calibration*."""
    images = (image for example in calibration for image, _ in pieces(*example))
    name = _session(path).get_inputs()[0].name
    write_quantised(path, output, ({name: image} for image in images))


def write_quantised(path: Path, output: Path, inputs: Iterator[dict[str, np.ndarray]], **options: Any) -> None:
    """Quantise the file *path*, with the ranges that its activations have on *inputs*, by name.

    *options*: of onnxruntime's quantize_static, beside those that all our files have.
    """
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder, atomic_path(output) as temporary:
        prepared = Path(folder) / "prepared.onnx"
        quantization.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        with contextlib.redirect_stdout(None):  # it prints how it counts
            quantization.quantize_static(
                str(prepared),
                str(temporary),
                _Reader(inputs),  # type: ignore[arg-type]
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QInt8,
                **options,
            )


class _Reader:
    """As onnxruntime wants calibration data: one input after the other, then None."""

    def __init__(self, inputs: Iterator[dict[str, np.ndarray]]) -> None:
        self._inputs = inputs

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


def intersection_over_union(path: Path, data: Iterable[Example], *, threshold: float) -> tuple[float, int]:
    """Of the pixels whose probability is at least *threshold* with those that are marked, over all of *data*.

    Returns it and the number of images. Pixels that are not known do not count; 1 where nothing is marked nor found.
    """
    limit = math.inf if threshold >= 1 else -math.inf if threshold <= 0 else math.log(threshold / (1 - threshold))
    session = _session(path)
    name = session.get_inputs()[0].name
    num_images = num_both = num_either = 0
    for example in data:
        num_images += 1
        for image, mask in pieces(*example):
            (logits,) = session.run(None, {name: image})  # (1, 1, H, W)
            found, marked = (logits[0, 0] >= limit) & (mask != 255), mask == 1
            num_both += int((found & marked).sum())
            num_either += int((found | marked).sum())
    return (num_both / num_either if num_either else 1.0), num_images


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
