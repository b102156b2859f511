"""The step of a live system -> ONNX, its state as inputs and outputs, compared with the original; and one of 8 bits.

Decisions that are not obvious
* Batches of one, all sizes fixed: a live system has one stream, and a runtime plans its memory once.
* 8 bits are for convolutions and linear layers; ranges come from frames of validation recordings, whose state is that
  of the float32 file.
"""

import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.audio import atomic_path
from data.base import SystemData
from launch import onnx_file
from launch.onnx_stream import NEXT, OnnxStream
from launch.quantise import write_quantised
from models.base import StreamingStep, System

log = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # of the largest sample, as in launch/export.py
_STEPS = 25  # compared with the original
_EVERY = 20  # frame of a recording that ranges are taken from
_PERCENTILE = 99.999  # of the values is within a range; the loudest frame alone would make all others coarse
_SCORES = ("si_sdr_", "erle_far_end")  # beginnings of names of metrics in decibels


class _Flat(nn.Module):
    """A step whose inputs and outputs are tensors one after the other."""

    def __init__(self, step: StreamingStep) -> None:
        super().__init__()
        self.module, self.names, self.num_inputs = step.module, list(step.state), len(step.inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        first, *others = tensors[: self.num_inputs]
        output, after = self.module(first, dict(zip(self.names, tensors[self.num_inputs :], strict=True)), *others)
        return output, *after.values()


def write_step(step: StreamingStep, path: Path, *, opset: int) -> None:
    """The file, with the facts as metadata."""
    outputs = [step.output, *(f"{name}{NEXT}" for name in step.state)]
    onnx_file.write(_Flat(step).eval(), step.inputs | step.state, outputs, path, opset=opset, facts=step.facts)


def export(step: StreamingStep, output: Path, *, opset: int) -> None:
    """Write *output*. Raises RuntimeError, and leaves no file, when its results differ from the original's."""
    with atomic_path(output) as temporary:
        write_step(step, temporary, opset=opset)
        difference = largest_difference(step, temporary)
        shape = " x ".join(str(size) for size in next(iter(step.inputs.values())).shape)
        log.info("%s: %d steps of %s, largest difference from the original %.2g", output, _STEPS, shape, difference)
        if not difference <= _TOLERANCE:  # NaN too
            raise RuntimeError(f"{output}: not written, its results differ by {difference:.2g} of the largest sample")
    size_mb = sum(value.nbytes for value in step.state.values()) / 1e6
    log.info("%s: %d tensors of state, %.2f MB", output, len(step.state), size_mb)


@torch.inference_mode()
def largest_difference(step: StreamingStep, path: Path) -> float:
    """Over some steps of silence and of noise, as a share of the largest sample."""
    stream, state, worst, largest = OnnxStream(path), step.state, 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for index in range(_STEPS):
        loud = float(index >= _STEPS // 4)
        first, *others = (loud * torch.randn(value.shape, generator=generator) for value in step.inputs.values())
        expected, state = step.module(first, state, *others)
        found = stream(first.numpy(), *(other.numpy() for other in others))
        worst = max(worst, float(np.abs(found - expected.numpy()).max()))
        largest = max(largest, float(expected.abs().max()))
    return worst / largest


def enhance(stream: OnnxStream, step: StreamingStep, signals: list[Tensor]) -> Tensor:
    """Whole signals, each (T,), step by step from their beginning. (T,)"""
    stream.reset()
    outputs = [torch.from_numpy(stream(*parts)) for parts in _steps(step, signals)]
    return step.join(outputs, len(signals[0]))[0]


def _steps(step: StreamingStep, signals: list[Tensor]) -> Iterator[list[np.ndarray]]:
    for parts in zip(*(step.split(signal[None]) for signal in signals), strict=True):
        yield [part.contiguous().numpy() for part in parts]


def export_int8(output: Path, system: System, step: StreamingStep, data: SystemData, *, num_examples: int) -> None:
    """`<stem>.int8.onnx` beside *output*, and what it costs in decibels on the validation recordings."""
    int8 = output.with_suffix(".int8.onnx")
    write_int8(output, int8, step, itertools.islice(_examples(data), num_examples))
    _compare(output, int8, system, step, data)


def write_int8(path: Path, output: Path, step: StreamingStep, examples: Iterator[dict[str, Tensor]]) -> None:
    """Quantise the file *path*, with the ranges that its activations have on *examples*, each signal (1, T)."""
    import onnx
    from onnxruntime import quantization

    layers = tuple(f"network.{layer}" for layer in step.not_in_8_bits)
    nodes = onnx.load(str(path)).graph.node
    write_quantised(
        path,
        output,
        _calibration(OnnxStream(path), step, examples),
        nodes_to_exclude=[node.name for node in nodes if any(layer in name for name in node.input for layer in layers)],
        op_types_to_quantize=["Conv", "Gemm"],  # the transforms of samples are MatMul: 8 bits would be heard
        calibrate_method=quantization.CalibrationMethod.Percentile,
        extra_options={"CalibPercentile": _PERCENTILE, "CalibMaxIntermediateOutputs": 16},  # frames held in memory
    )


def _compare(output: Path, int8: Path, system: System, step: StreamingStep, data: SystemData) -> None:
    """What both files score on the validation recordings, and how far the second is from the first."""
    files = {path: (OnnxStream(path), system.make_metric("val")) for path in (output, int8)}
    noise, signal, count = 0.0, 0.0, 0
    for batch in _examples(data):
        found = []
        for stream, metric in files.values():
            assert metric is not None
            found.append(enhance(stream, step, [batch[name][0] for name in stream.signals]))
            system.update_metric(metric, batch, {"enhanced": found[-1][None]})
        signal += float(found[0].square().sum())
        noise += float((found[0] - found[1]).square().sum())
        count += 1
    whole, coarse = ({name: float(v) for name, v in metric.compute().items()} for _, metric in files.values())  # type: ignore[union-attr]
    for name in (name for name in whole if name.startswith(_SCORES)):
        change = coarse[name] - whole[name]
        log.info("%s: %.2f dB, with 8 bits %.2f dB (%+.2f dB)", name, whole[name], coarse[name], change)
    ratio_db = 10 * math.log10(signal / noise) if noise else math.inf
    log.info("%s: what 8 bits change is %.1f dB below the output, on %d validation recordings", int8, ratio_db, count)


def _examples(data: SystemData) -> Iterator[dict[str, Tensor]]:
    """Validation batches of one, without padding."""
    for batch in data.val_dataloader():
        for index, length in enumerate(batch["length"].tolist()):
            one = {name: value[index : index + 1] for name, value in batch.items() if isinstance(value, Tensor)}
            yield {name: value[:, :length] if value.ndim > 1 else value for name, value in one.items()}


def _calibration(
    stream: OnnxStream, step: StreamingStep, examples: Iterator[dict[str, Tensor]]
) -> Iterator[dict[str, np.ndarray]]:
    """All inputs of some steps."""
    for example in examples:
        stream.reset()
        for index, parts in enumerate(_steps(step, [example[name][0] for name in stream.signals])):
            if index % _EVERY == _EVERY - 1:
                yield dict(zip(stream.signals, parts, strict=True)) | stream.state
            stream(*parts)
