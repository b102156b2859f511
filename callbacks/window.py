"""What some training batches took, added up: times and counts as sums, memory as the largest that was seen."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Window:
    """Sums over some batches; `+` joins two windows.

    *examples* are those of all processes, *own_examples* those of this one. *step_s* is the time inside the batches,
    *wait_s* that between them. *used_cpu_s* of *offered_cpu_s* were used (callbacks/host.py). Memory is None before it
    was measured, that of a GPU also where there is none.
    """

    batches: int = 0
    examples: int = 0
    own_examples: int = 0
    step_s: float = 0.0
    wait_s: float = 0.0
    used_cpu_s: float = 0.0
    offered_cpu_s: float = 0.0
    host_mem_mb: float | None = None
    gpu_mem_mb: float | None = None
    gpu_mem_reserved_mb: float | None = None
    gpu_mem_share: float | None = None

    def __add__(self, other: "Window") -> "Window":
        joined = {}
        for name in (field.name for field in fields(self)):
            values = [value for value in (getattr(self, name), getattr(other, name)) if value is not None]
            joined[name] = max(values, default=None) if name in MEMORY else sum(values)
        return Window(**joined)

    def means(self) -> dict[str, float | None]:
        """What is told of it: per second, per batch, as shares of 1; None is what was not measured."""
        time_s = self.step_s + self.wait_s
        return {
            "examples_per_s": self.examples / time_s if self.batches else None,
            "data_wait_share": self.wait_s / time_s if self.batches else None,
            "step_s": self.step_s / self.batches if self.batches else None,
            "batch_size": self.own_examples / self.batches if self.batches else None,
            "cpu_load": min(1.0, self.used_cpu_s / self.offered_cpu_s) if self.offered_cpu_s else None,
            **{name: getattr(self, name) for name in MEMORY},
        }


MEMORY = tuple(field.name for field in fields(Window) if "_mem_" in field.name)


def from_state(state: dict[str, Any]) -> Window:
    """A window from its fields in a checkpoint, which may be older than some of them."""
    return Window(**{field.name: state[field.name] for field in fields(Window) if field.name in state})
