"""Running out of memory is played: the function raises what torch raises, for batches above a limit."""

import pytest
import torch

from modules import adaptive_batch
from modules.adaptive_batch import AdaptiveBatch, next_size


class Limited:
    """Squares numbers; runs out of memory above `limit` items. Remembers the batches that came and that got through."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tried: list[list[int]] = []
        self.done: list[list[int]] = []

    def __call__(self, stack: torch.Tensor) -> torch.Tensor:
        self.tried.append(stack.tolist())
        if len(stack) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.done.append(stack.tolist())
        return stack.square()


@pytest.mark.parametrize("num_items", [0, 1, 7, 8, 21])
@pytest.mark.parametrize("limit", [1, 3, 5, 100])
def test_out_of_memory_loses_nothing_and_repeats_only_what_failed(num_items, limit):
    function = Limited(limit)
    batch = AdaptiveBatch(size=8, adapt=False)
    results = list(batch.run(function, torch.arange(num_items)))
    assert [int(result) for result in results] == [index**2 for index in range(num_items)]
    assert sum(function.done, []) == list(range(num_items))  # each once, in order
    largest = min(limit, num_items) if limit < 8 else 8
    assert all(len(items) <= largest for items in function.done)


def test_a_failed_batch_is_halved_and_the_finished_ones_stay():
    function = Limited(100)
    batch = AdaptiveBatch(size=4, adapt=False)
    results = batch.run(function, torch.arange(12))
    assert int(next(results)) == 0
    function.limit = 2  # as if another process had taken the memory
    assert len(list(results)) == 11
    assert function.tried == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert batch.size == 2


def test_the_last_batch_is_halved_from_its_own_length():
    """Three items that do not fit are not tried again as three, though the size of the run allows four."""
    function = Limited(100)
    batch = AdaptiveBatch(size=8, adapt=False)
    results = batch.run(function, torch.arange(11))
    next(results)
    function.limit = 2
    list(results)
    assert function.tried[1:] == [[8, 9, 10], [8], [9], [10]]


@pytest.mark.parametrize(("size", "least"), [(8, 1), (8, 3), (1, 1)])
def test_the_smallest_batch_raises(size, least):
    function = Limited(0)
    with pytest.raises(torch.OutOfMemoryError):
        list(AdaptiveBatch(size=size, least=least, adapt=False).run(function, torch.arange(20)))
    assert len(function.tried) == (1 if size == 1 else 3 if least == 3 else 4)  # 8 4 3 and 8 4 2 1, and no more


def test_fewer_items_than_the_smallest_batch_are_not_tried_twice():
    function = Limited(0)
    with pytest.raises(torch.OutOfMemoryError):
        list(AdaptiveBatch(size=8, least=3, adapt=False).run(function, torch.arange(2)))
    assert function.tried == [[0, 1]]


def test_other_errors_pass_through():
    def broken(stack: torch.Tensor) -> torch.Tensor:
        calls.append(len(stack))
        raise RuntimeError("not a question of memory")

    calls: list[int] = []
    with pytest.raises(RuntimeError, match="not a question of memory"):
        list(AdaptiveBatch(size=8, adapt=False).run(broken, torch.arange(20)))
    assert calls == [8]


def test_a_wrong_number_of_results_is_an_error():
    with pytest.raises(ValueError, match="1 results for a batch of 4 items"):
        list(AdaptiveBatch(size=4, adapt=False).run(lambda stack: stack[:1], torch.arange(4)))


def test_items_are_taken_when_they_are_needed():
    taken = []

    def items():
        for index in range(100):
            taken.append(index)
            yield torch.tensor(index)

    results = AdaptiveBatch(size=4, adapt=False).run(Limited(100), items())
    assert taken == []
    next(results)
    assert taken == [0, 1, 2, 3]


def test_size_follows_the_memory(monkeypatch):
    """Doubles with much room, stays with some, halves with little; the cache is emptied above 80 % only."""
    shares = iter([0.5, 0.6, 0.7, 0.85, 0.95, 0.5])
    emptied = []
    monkeypatch.setattr(adaptive_batch, "cuda_memory_share", lambda: next(shares))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(function.tried[-1]))
    function = Limited(100)
    batch = AdaptiveBatch(size=2, most=6, adapt=True)
    list(batch.run(function, torch.arange(2 + 4 + 6 + 6 + 6 + 3)))
    assert [len(items) for items in function.tried] == [2, 4, 6, 6, 6, 3]
    assert emptied == [list(range(12, 18)), list(range(18, 24))]
    assert batch.size == 6


def test_size_grows_again_once_the_failure_is_long_ago(monkeypatch):
    monkeypatch.setattr(adaptive_batch, "cuda_memory_share", lambda: 0.1)
    function = Limited(3)
    batch = AdaptiveBatch(size=4, adapt=True)
    sizes = []
    for _ in batch.run(function, torch.arange(100)):
        sizes.append(batch.size)
        if len(function.tried) == 10:
            assert batch.success_rate == 0.9
    assert [len(items) for items in function.tried[:20]] == [4] + 19 * [2]
    assert len(function.tried[21]) == 4  # the failure has left the twenty that count


def test_constant_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch = AdaptiveBatch(size=3)
    function = Limited(100)
    list(batch.run(function, torch.arange(9)))
    assert [len(items) for items in function.tried] == [3, 3, 3]


def test_limits_hold_from_everywhere():
    for size in range(2, 41):
        assert next_size(size, least=2, most=40, out_of_memory=True) == max(size // 2, 2)
        assert next_size(size, least=2, most=40) == min(2 * size, 40)
        assert next_size(size, least=2, most=40, success_rate=0.95) == size


@pytest.mark.parametrize(
    ("sizes", "message"), [((0, 1, 8), "size"), ((2, 4, 8), "2"), ((9, 1, 8), "9"), ((1, 1, 0), "m")]
)
def test_sizes_that_do_not_fit(sizes, message):
    size, least, most = sizes
    with pytest.raises(ValueError, match=message):
        AdaptiveBatch(size=size, least=least, most=most)
