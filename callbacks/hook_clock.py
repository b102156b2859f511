"""What share of a training step a hook takes."""

import math
import time
from collections.abc import Callable

import torch


class HookClock:
    """Adds up the seconds in a hook and in training steps; on a GPU the hook's are the device's own.

    `measuring` makes a GPU finish each step, so that the few steps of a measurement are whole.
    """

    def __init__(self) -> None:
        self.hook_s, self.step_s = 0.0, 0.0  # since the last `take`
        self.total_hook_s, self.total_step_s = 0.0, 0.0  # before it
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._step_started = 0.0

    def step_starts(self) -> None:
        self._step_started = time.perf_counter()

    def step_ends(self, device: torch.device, *, measuring: bool = False) -> None:
        if measuring and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.step_s += time.perf_counter() - self._step_started

    def hook_starts(self, device: torch.device) -> Callable[[], None]:
        """Returns what is to be called when the hook ends."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self._events.append((start, end))
            return end.record
        started = time.perf_counter()

        def ends() -> None:
            self.hook_s += time.perf_counter() - started

        return ends

    def take(self) -> float:
        """The share since the last time; waits for the last hook of a GPU."""
        if self._events:
            self._events[-1][1].synchronize()
            self.hook_s += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events = []
        share = self.hook_s / self.step_s if self.step_s > 0 else 0.0
        self.total_hook_s += self.hook_s
        self.total_step_s += self.step_s
        self.hook_s, self.step_s = 0.0, 0.0
        return share

    def total_share(self) -> float | None:
        """Of all steps; None before there was one."""
        hook_s, step_s = self.total_hook_s + self.hook_s, self.total_step_s + self.step_s
        return hook_s / step_s if step_s > 0 else None


def steps_between(share: float, max_share: float) -> int:
    """The least number of steps from one call of a hook to the next with which it takes at most *max_share* of them,
    if it takes *share* of a step in which it is called.

    A step without it takes 1 - share; (share / k) / (1 - share + share / k) <= max_share.
    """
    share = min(max(share, 0.0), 1 - 1e-6)
    return max(1, math.ceil(share * (1 - max_share) / (max_share * (1 - share)) - 1e-9))
