"""What makes the host wait for a GPU, found without one."""

from torch import Tensor, bool
from torch.utils._python_dispatch import TorchDispatchMode

READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "item")


class NoValueIsAsked(TorchDispatchMode):
    """Fails inside where a number is read, or where a shape depends on values, as with a mask for an index."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled here, and asking for it imports the compiler: seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype == bool] if name.startswith("index") else []
        assert name not in READS_VALUES and not masks, func
        return func(*args, **(kwargs or {}))
