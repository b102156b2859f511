"""A checkpoint -> ONNX with sizes of its inputs left open, compared with the original at three; and one of 8 bits.

What is written is `forward`, or what the system says instead (`exported_network`). Of a system that runs live it is one
step: launch/export_stream.py.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor, nn

from data.audio import atomic_path
from data.base import SystemData
from launch import checkpoint, export_stream, onnx_file, quantise
from launch.build import disagreements, plain, typed_keys
from launch.errors import ConfigError
from launch.hardware import quieten
from launch.targets import Blueprint
from models.base import ExportedNetwork, System
from models.checkpoint import build_system, read_trained

log = logging.getLogger(__name__)

# Of the largest sample. Float32 and another order of summation stay two orders of magnitude below.
_TOLERANCE = 1e-3
_MOST_BYTES = 1_900_000_000  # of protobuf's 2 GiB, less room for what is not weights


def run(cfg: DictConfig) -> None:
    """Write `output`, and print how far onnxruntime's results are from ours; with `int8` another file beside it.

    Raises RuntimeError, and leaves no file, when they are further than 1e-3 of the largest sample.
    """
    quieten()
    config = plain(cfg, typed_keys(list(HydraConfig.get().overrides.task)))
    output = Path(config["output"])
    if output.suffix != ".onnx":
        raise ConfigError(f"output={output}: give a file that ends in .onnx")
    try:
        import onnx  # noqa: F401  onnxruntime's quantisation needs it
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ConfigError(f"exporting needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    path = checkpoint.locate(config["ckpt_path"])
    content = read_trained(path)
    system = build_system(content, path, config["packages"])
    if wrong := next((name for name in ("waveform", "int8") if not isinstance(config[name], bool)), None):
        raise ConfigError(f"{wrong} must be true or false, got {config[wrong]!r}")
    step = system.streaming_step(waveform=config["waveform"])
    network = system.exported_network(waveform=config["waveform"]) if step is None else None
    if step is None and network is None and config["waveform"]:
        raise ConfigError(f"waveform=true is for echo cancellation and pre-training, not for {type(system).__name__}")
    data = _validation_data(system, config) if config["int8"] else None
    if step is not None:
        export_stream.export(step, output, opset=config["opset"])
        if data is not None:
            export_stream.export_int8(output, system, step, data, num_examples=config["calibration_examples"])
        return
    with atomic_path(output) as temporary:
        if network is None:
            module, sizes = system, of_three_sizes(system.example_input(), system.dynamic_axes)
            write_onnx(system, sizes[-1], temporary, opset=config["opset"])
        else:
            module, sizes = network.module, network.sizes
            write_network(network, temporary, opset=config["opset"])
        for inputs in sizes:
            difference, shape = largest_difference(module, temporary, inputs), _shape(inputs)
            log.info("%s: input of %s, largest difference from the original %.2g", output, shape, difference)
            if not difference <= _TOLERANCE:  # NaN too
                raise RuntimeError(
                    f"{output}: not written, its results differ by {difference:.2g} of the largest sample for an input"
                    f" of {shape} ({_TOLERANCE:g} would do)"
                )
    if data is not None:
        threshold: Any = system.threshold
        _write_int8(output, data, num_images=config["calibration_examples"], threshold=threshold)


def write_onnx(system: System, example: dict[str, Tensor], path: Path, *, opset: int) -> None:
    """`system.forward`; the sizes of `system.dynamic_axes`, which must not be 1 in *example*, are left open."""
    torch.onnx.export(
        system,
        tuple(example.values()),
        str(path),
        input_names=list(example),
        output_names=list(system.forward_outputs or system.outputs),
        dynamic_shapes=tuple(
            {axis % value.ndim: torch.export.Dim.DYNAMIC for axis in system.dynamic_axes} for value in example.values()
        ),
        opset_version=opset,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def write_network(network: ExportedNetwork, path: Path, *, opset: int) -> None:
    """The file, with the facts as metadata. Raises ConfigError for a network that one file cannot hold."""
    num_bytes = sum(weight.nbytes for weight in [*network.module.parameters(), *network.module.buffers()])
    if num_bytes > _MOST_BYTES:
        raise ConfigError(f"its weights have {num_bytes / 1e9:.1f} GB, an ONNX file holds 2")
    with torch.no_grad():
        onnx_file.write(
            network.module,
            network.sizes[1],
            network.outputs,
            path,
            opset=opset,
            facts=network.facts,
            open_axes=network.open_axes,
        )


def of_three_sizes(example: dict[str, Tensor], axes: Sequence[int]) -> list[dict[str, Tensor]]:
    """Along each of *axes* a third and odd, as it is, and both together; so of a batch of one 1, 1 and 2."""
    sizes = [{}, example, {}]
    for name, value in example.items():
        shorter = longer = value
        for axis in axes:
            third = value.shape[axis] // 3 | 1
            shorter = shorter.narrow(axis, 0, third)
            longer = torch.cat([longer, longer.narrow(axis, 0, third)], axis)
        sizes[0][name], sizes[2][name] = shorter.contiguous(), longer
    return sizes


def _shape(inputs: dict[str, Tensor]) -> str:
    return " x ".join(map(str, next(iter(inputs.values())).shape))


def largest_difference(module: nn.Module, path: Path, inputs: dict[str, Tensor]) -> float:
    """Between the outputs of an ONNX file and the module's, over all of them, as a share of the largest sample;
    infinite where whole numbers, such as lengths, are not the same.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Any = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.inference_mode():
        result: Any = module(*inputs.values())
    expected = [value.numpy() for value in (result if isinstance(result, tuple) else (result,))]
    return max(_difference(theirs, ours) for theirs, ours in zip(found, expected, strict=True))


def _difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    if ours.dtype.kind == "i":
        return 0.0 if np.array_equal(theirs, ours) else math.inf
    return float(np.abs(theirs - ours).max() / max(np.abs(ours).max(), np.finfo(ours.dtype).tiny))


def _validation_data(system: System, config: dict[str, Any]) -> SystemData:
    """Of the checkpoint's configuration and what was typed. Raises ConfigError where there can be none."""
    if not hasattr(system, "threshold") and system.streaming_step(waveform=False) is None:
        name = type(system).__name__
        raise ConfigError(f"int8=true is for the segmentation of images and for echo cancellation, not for {name}")
    problems = []
    num_examples = config["calibration_examples"]
    if not isinstance(num_examples, int) or isinstance(num_examples, bool) or num_examples < 1:
        problems.append(f"calibration_examples must be a whole number of at least 1, got {num_examples!r}")
    blueprint = Blueprint("data", config["data"], SystemData, config["packages"])
    problems += [*blueprint.problems, *disagreements(dict(system.hparams), config["data"])]
    if problems:
        raise ConfigError("\n".join(problems))
    data = blueprint.build()
    if not data.has_data("val"):
        raise ConfigError("int8=true needs validation data: set data.val_manifest=… (the checkpoint's run had none)")
    data.setup("validate")
    return data


def _write_int8(output: Path, data: SystemData, *, num_images: int, threshold: float) -> None:
    """`<stem>.int8.onnx` beside *output*, and what both score on the validation images."""
    int8 = output.with_suffix(".int8.onnx")
    calibration = itertools.islice(quantise.examples(data.val_dataloader()), num_images)
    quantise.write_int8(output, int8, calibration)
    scores = []
    for file in (output, int8):
        images = quantise.examples(data.val_dataloader())
        score, count = quantise.intersection_over_union(file, images, threshold=threshold)
        log.info("%s: IoU %.4f on %d validation images at threshold %.2f", file, score, count, threshold)
        scores.append(score)
    log.info("8 bits cost %.2f points of IoU", 100 * (scores[0] - scores[1]))
