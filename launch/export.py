"""A checkpoint -> ONNX with the length of its inputs left open, compared with the original at three lengths."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.audio import atomic_path
from launch import checkpoint
from launch.build import plain
from launch.errors import ConfigError
from launch.hardware import quieten
from models.base import System
from models.checkpoint import build_system, read_checkpoint

log = logging.getLogger(__name__)

# Of the largest sample. Float32 and another order of summation stay two orders of magnitude below.
_TOLERANCE = 1e-3


def run(cfg: DictConfig) -> None:
    """Write `output`, and print how far onnxruntime's results are from ours.

    Raises RuntimeError, and leaves no file, when they are further than 1e-3 of the largest sample.
    """
    quieten()
    config = plain(cfg)
    output = Path(config["output"])
    if output.suffix != ".onnx":
        raise ConfigError(f"output={output}: give a file that ends in .onnx")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ConfigError(f"exporting needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    path = checkpoint.locate(config["ckpt_path"])
    system = build_system(read_checkpoint(path), path, config["packages"])
    if system.not_exportable:
        raise ConfigError(f"{type(system).__name__} cannot be exported: {system.not_exportable}")
    example = system.example_input()
    with atomic_path(output) as temporary:
        write_onnx(system, example, temporary, opset=config["opset"])
        for inputs in of_three_lengths(example):
            difference, num_samples = largest_difference(system, temporary, inputs), _length(inputs)
            log.info("%s: %d samples, largest difference from the original %.2g", output, num_samples, difference)
            if not difference <= _TOLERANCE:  # NaN too
                raise RuntimeError(
                    f"{output}: not written, its results differ by {difference:.2g} of the largest sample at"
                    f" {num_samples} samples (up to {_TOLERANCE:g} would do)"
                )


def write_onnx(system: System, example: dict[str, Tensor], path: Path, *, opset: int) -> None:
    """`system.forward` on *example*, whose last axes may have any length."""
    torch.onnx.export(
        system,
        tuple(example.values()),
        str(path),
        input_names=list(example),
        output_names=list(system.outputs),
        dynamic_shapes=tuple({value.ndim - 1: torch.export.Dim.DYNAMIC} for value in example.values()),
        opset_version=opset,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def of_three_lengths(example: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Shorter and odd, as it is, and longer."""
    shorter = _length(example) // 3 | 1
    return [
        {name: value[..., :shorter] for name, value in example.items()},
        example,
        {name: torch.cat([value, value[..., :shorter]], -1) for name, value in example.items()},
    ]


def _length(inputs: dict[str, Tensor]) -> int:
    return next(iter(inputs.values())).shape[-1]


def largest_difference(system: System, path: Path, inputs: dict[str, Tensor]) -> float:
    """Between the outputs of an ONNX file and the system's, over all of them, as a share of the largest sample."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.inference_mode():
        result: Any = system(*inputs.values())
    expected = [value.numpy() for value in (result if isinstance(result, tuple) else (result,))]
    differences = [np.abs(theirs - ours).max() for theirs, ours in zip(found, expected, strict=True)]
    largest = [max(np.abs(ours).max(), np.finfo(ours.dtype).tiny) for ours in expected]
    return max(float(difference / scale) for difference, scale in zip(differences, largest, strict=True))
