"""A checkpoint -> ONNX, with the length of its inputs left open, compared with the original at another length."""

import logging
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from launch import checkpoint
from launch.build import plain
from launch.errors import ConfigError
from launch.hardware import quieten
from models.checkpoint import build_system, read_checkpoint

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Write `output` and print how far onnxruntime's result is from ours on an input of another length."""
    quieten()
    config = plain(cfg)
    output = Path(config["output"])
    if output.suffix != ".onnx":
        raise ConfigError(f"output={output}: give a file that ends in .onnx")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ConfigError(f"exporting needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    path = checkpoint.locate(config["ckpt_path"])
    system = build_system(read_checkpoint(path), path, config["packages"])
    example = system.example_input()
    length = torch.export.Dim.DYNAMIC
    shapes = tuple({value.ndim - 1: length} for value in example.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        system,
        tuple(example.values()),
        str(output),
        input_names=list(example),
        output_names=list(system.outputs),
        dynamic_shapes=shapes,
        opset_version=config["opset"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    other = {name: torch.cat([value, value[..., : value.shape[-1] // 3]], -1) for name, value in example.items()}
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = system(*other.values())
    found = session.run(None, {name: value.numpy() for name, value in other.items()})[0]
    error = float(np.abs(found - expected.numpy()).max())
    log.info("%s: largest difference from the original %.2g", output, error)
