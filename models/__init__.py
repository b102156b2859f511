"""The systems, and the Python API: `from models import load; system = load("x.ckpt")`."""

from models.checkpoint import load

__all__ = ["load"]
