"""The share of a step that a hook takes, and how seldom it has to be called to take less."""

import pytest
import torch

from callbacks.hook_clock import HookClock, steps_between


@pytest.mark.parametrize(
    ("share", "max_share", "expected"),
    [(0.0, 0.05, 1), (0.05, 0.05, 1), (0.0501, 0.05, 2), (0.5, 0.05, 19), (0.5, 0.5, 1), (1.0, 0.5, 1_000_000)],
)
def test_steps_between_is_the_least_that_is_enough(share: float, max_share: float, expected: int) -> None:
    every = steps_between(share, max_share)
    assert every == pytest.approx(expected, rel=1e-5)
    if share < 1:

        def taken(k: int) -> float:
            return (share / k) / (1 - share + share / k)

        assert taken(every) <= max_share + 1e-9 and (every == 1 or taken(every - 1) > max_share)


def test_shares_since_the_last_time_and_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr("callbacks.hook_clock.time.perf_counter", lambda: next(now))
    clock, cpu = HookClock(), torch.device("cpu")
    assert clock.total_share() is None
    clock.step_starts()
    clock.hook_starts(cpu)()
    clock.step_ends(cpu)
    assert clock.total_share() == 0.2
    assert (clock.take(), clock.take()) == (0.2, 0.0)
    clock.step_starts()
    clock.step_ends(cpu)
    assert (clock.take(), clock.total_share()) == (0.0, 0.1)
