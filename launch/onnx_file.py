"""A module -> an ONNX file that says nothing else than the module.

torch's exporter would optimise it: it takes x + 1e-12 for x, and silence becomes NaN. So that is switched off, and only
constants are folded; onnxruntime optimises by itself.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def write(
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    *,
    opset: int,
    facts: dict[str, Any],
    open_axes: dict[str, dict[int, str]] | None = None,
) -> None:
    """*inputs*: an example, in the order of `forward`. *outputs*: names. *facts*: the file's metadata. *open_axes*: of
    each input, axes whose sizes are left open, with their names; in the example they are not 1.
    """
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # two inputs share the batch, as they should
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(open_axes[name] for name in inputs) if open_axes else None,
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    fold_constants(program.model)
    remove_unused_nodes(program.model)
    program.model.metadata_props.update({name: str(value) for name, value in facts.items()})
    program.save(str(path), external_data=False)
