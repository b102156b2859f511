"""What a training will cost, from the forward pass of one example: multiply-adds, and an estimate of memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from models.base import System
from models.optim import build_optimizer


class Memory(NamedTuple):
    """Bytes of one process: what stays, and what a batch's forward pass keeps for its backward pass."""

    weights: int
    gradients: int
    optimizer: int
    activations: int


class Cost(NamedTuple):
    """*macs*: multiply-adds of a forward pass in training, over one *unit*: a second of audio, a megapixel."""

    macs: float
    unit: str
    memory: Memory


def cost_of_training(
    system: System, batch: dict[str, Any], *, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Cost:
    """Multiply-adds are those of matrix products, convolutions and attention.

    Memory is an estimate: without the allocator's gaps, cuDNN's workspace, DDP's buckets and what lives between saved
    tensors. Steps of our systems on a CPU took 1.2 to 1.8 times as much.

    *batch*: its first tensor is a signal, `(B, T)` or `(B, C, H, W)`. *context*: in which training runs a forward pass,
    such as autocast.
    """
    trained = [p for p in system.parameters() if p.requires_grad]
    weights = sum(tensor.nbytes for tensor in (*system.parameters(), *system.buffers()))
    gradients = sum(p.nbytes for p in trained)
    with FlopCounterMode(display=False) as counter:
        activations = _saved_bytes(system, batch, context)
    signal = next(value for value in batch.values() if isinstance(value, Tensor))
    if system.sample_rate is not None:
        unit, size = "second of audio", signal.shape[-1] / system.sample_rate
    else:
        unit, size = "megapixel", signal.shape[-2] * signal.shape[-1] / 1e6
    memory = Memory(weights, gradients, round(gradients * _state_share(system)), activations)
    return Cost(counter.get_total_flops() / 2 / size, unit, memory)


def _state_share(system: System) -> float:
    """How many numbers the optimiser keeps for each weight."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = build_optimizer([weight], system.optim)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in kept) / weight.nbytes


def _saved_bytes(system: System, batch: dict[str, Any], context: Callable[[], AbstractContextManager[Any]]) -> int:
    """Of all memory that the backward pass needs, each block once; weights are not counted again.

    One example is computed for all, since a whole batch would take as long as a step of training. Nothing is kept.
    """
    size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    one = {name: _first(value, system.device) for name, value in batch.items()}
    held = {p.untyped_storage().data_ptr() for p in system.parameters()}
    blocks: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps the address from a second use

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            block = StorageWeakRef(storage)
            blocks[block.cdata] = block, storage.nbytes() * (1 if _comes_from_a_weight(tensor) else size)

    devices = [system.device] if system.device.type == "cuda" else []
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing)
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), context(), hooks:
        system.step(one)
    return sum(num_bytes for _, num_bytes in blocks.values())


def _first(value: Any, device: torch.device) -> Any:
    """One example of a batch, in memory of its own."""
    if isinstance(value, Tensor):
        return value[:1].to(device, copy=True)
    return value[:1] if isinstance(value, list) else value


def _comes_from_a_weight(tensor: Tensor) -> bool:
    """Whether it was made from nothing but a weight, as autocast's copies are; the batch plays no part in its size."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1 and not hasattr(node, "variable"):
        node = node.next_functions[0][0]
    return hasattr(node, "variable")
