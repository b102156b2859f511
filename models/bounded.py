"""Building a network that a file describes: with memory in proportion to the weights that the file holds.

Who writes a checkpoint may write any size into it. The weights are compared with the network only when it stands, and
one of a billion layers never does.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from models.plain import CheckpointError

# A network of low rank stands in full rank first: in fewer weights, which hold more numbers.
_TIMES = 16
_TABLES = 2**27  # numbers, 512 MiB of them: filters, windows and positions, which a file need not hold
_WEIGHTS = 1000  # so many of any size, that small files are not held to their few


class _TooLarge(Exception):
    """No ValueError, which the parts of a system would take for one of their own."""


class _Sizes(TorchDispatchMode):
    """Refuses a tensor of more than *limit* numbers before there is memory for it."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args else None
        sized = isinstance(size, (list, tuple)) and all(isinstance(length, int) for length in size)
        if sized and math.prod(size) > self.limit:
            raise _TooLarge(f"a tensor of {math.prod(size)} numbers is asked for, far more than it holds")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def bounded(state: Mapping[str, Tensor], path: str | Path) -> Iterator[None]:
    """Around building the network of the weights *state* from the file *path*.

    Raises CheckpointError once it has far more or far larger weights than these.
    """
    most, count = _TIMES * len(state) + _WEIGHTS, 0

    def register(module: Any, name: str, weight: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise _TooLarge(f"a network of more than {most} weights is asked for, where it holds {len(state)}")

    hook = register_module_parameter_registration_hook(register)
    try:
        with _Sizes(_TIMES * sum(tensor.numel() for tensor in state.values()) + _TABLES):
            yield
    except _TooLarge as error:
        raise CheckpointError(f"{path}: {error}") from error
    finally:
        hook.remove()
