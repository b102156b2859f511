"""One forward pass of a training batch that leaves no trace: what the layers see, and what it costs."""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modules.layer_timing import recorded_inputs


class Trial(NamedTuple):
    """*inputs*: of the layers asked for, by name, without values. *flops*: of the pass, two for a multiply-add."""

    inputs: dict[str, Tensor]
    flops: int


@torch.no_grad()
def trial_step(trainer: pl.Trainer, system: Any, batch: Any, layers: dict[str, nn.Module]) -> Trial:
    """Run `system.step` on a batch as training would; random states, buffers (batch norm's) and what a system counts in
    attributes are as before.

    All processes have to come here: a network may wait for the others in its forward pass.
    """
    attributes = dict(vars(system))
    buffers = {name: buffer.clone() for name, buffer in system.named_buffers()}
    devices = [system.device] if system.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.compiler.set_stance("force_eager"),
        trainer.precision_plugin.forward_context(),
        recorded_inputs(layers) as inputs,
        FlopCounterMode(display=False) as counter,
    ):
        system.step(batch)
    vars(system).update(attributes)
    for name, buffer in system.named_buffers():
        buffer.copy_(buffers[name])
    return Trial(inputs, counter.get_total_flops())
