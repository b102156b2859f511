"""torch.compile for the parts of a network, in training only.

Compiled in place, so that names of weights, and with them checkpoints, stay the same.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

MODES = ("default", "reduce-overhead", "max-autotune")
"""torch.compile's, in rising order of the time that compiling takes."""
_VARIANTS_PER_MODULE = 4  # of code: shapes known or open, with and without autocast


def compile_in_training(modules: Iterable[nn.Module], mode: str, *, dynamic: bool | None = None) -> None:
    """Compile modules in place; what was compiled before is forgotten. In evaluation they run as they are.

    In a ModuleList, which is never called itself, each module for itself: equal ones share what was compiled.
    *mode*: see MODES. *dynamic*: True, for inputs of any shape at once; None, when a second shape comes.
    """
    torch.compiler.reset()
    parts = list(called(modules))
    # Torch counts the variants of all modules of a class together; beyond its limit (8) they run uncompiled. After a
    # switch to low rank no two layers need be alike.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VARIANTS_PER_MODULE * len(parts))
    for module in parts:
        _compile(module, mode, dynamic)


def called(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Modules, and of a ModuleList, which is never called itself, each of its own."""
    for module in modules:
        yield from module if isinstance(module, nn.ModuleList) else (module,)


def _compile(module: nn.Module, mode: str, dynamic: bool | None) -> None:
    module.compile(mode=mode, dynamic=dynamic)
    compiled, plain = module._compiled_call_impl, module._call_impl
    assert compiled is not None
    module._compiled_call_impl = lambda *inputs, **options: (compiled if module.training else plain)(*inputs, **options)
