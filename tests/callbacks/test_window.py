"""Sums over batches: what adds up, what is the largest, what is unknown."""

from callbacks.window import MEMORY, Window, from_state


def test_joining() -> None:
    first = Window(batches=2, examples=16, own_examples=8, step_s=3.0, wait_s=1.0, host_mem_mb=5.0)
    second = Window(batches=2, examples=8, own_examples=4, used_cpu_s=3.0, offered_cpu_s=4.0, host_mem_mb=4.0)
    means = (first + second).means()
    assert means == {
        "examples_per_s": 6.0,
        "data_wait_share": 0.25,
        "step_s": 0.75,
        "batch_size": 3.0,
        "cpu_load": 0.75,
        "host_mem_mb": 5.0,
        "gpu_mem_mb": None,
        "gpu_mem_reserved_mb": None,
        "gpu_mem_share": None,
    }
    assert Window() + first == first and from_state({**vars(first), "peak_mem_mb": 1.0}) == first


def test_nothing_measured_is_none() -> None:
    assert set(Window().means().values()) == {None}
    assert MEMORY == ("host_mem_mb", "gpu_mem_mb", "gpu_mem_reserved_mb", "gpu_mem_share")


def test_a_clock_that_ticks_coarsely_is_no_load_above_one() -> None:
    assert Window(used_cpu_s=2.1, offered_cpu_s=2.0).means()["cpu_load"] == 1.0
