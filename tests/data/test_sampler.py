import pytest

from data.sampler import EpochSampler, item_key


def epochs_of(sampler, epochs):
    result = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        result.append(list(sampler))
    return result


def test_order_is_a_function_of_seed_and_epoch():
    first, second = epochs_of(EpochSampler(range(20), seed=3), (0, 1))
    assert sorted(index for index, _ in first) == list(range(20))
    assert {epoch for _, epoch in first} == {0} and {epoch for _, epoch in second} == {1}
    assert [index for index, _ in first] != [index for index, _ in second]
    assert epochs_of(EpochSampler(range(20), seed=3), (1,)) == [second]
    # The seed and the epoch are not just added up.
    assert [i for i, _ in epochs_of(EpochSampler(range(20), seed=2), (1,))[0]] != [i for i, _ in first]


def test_training_ranks_are_disjoint_and_equally_long():
    samplers = [EpochSampler(range(10), rank=rank, num_replicas=3) for rank in range(3)]
    parts = [epochs_of(sampler, (4,))[0] for sampler in samplers]
    assert [len(part) for part in parts] == [len(sampler) for sampler in samplers] == [3, 3, 3]
    assert len({index for part in parts for index, _ in part}) == 9


def test_the_remainder_that_is_left_out_changes():
    sampler = EpochSampler(range(10), rank=0, num_replicas=3)
    others = [EpochSampler(range(10), rank=rank, num_replicas=3) for rank in (1, 2)]
    left_out = set()
    for epoch in range(10):
        seen = {index for s in (sampler, *others) for index, _ in epochs_of(s, (epoch,))[0]}
        left_out |= set(range(10)) - seen
    assert len(left_out) > 1


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize("world, batch_size", [(1, 4), (2, 4), (3, 2)])
def test_evaluation_visits_all_and_repeats_only_to_equalise_batches(size, world, batch_size):
    kwargs = {"shuffle": False, "drop_last": False, "batch_size": batch_size, "num_replicas": world}
    samplers = [EpochSampler(range(size), rank=rank, **kwargs) for rank in range(world)]
    parts = [[index for index, _ in sampler] for sampler in samplers]
    assert [len(part) for part in parts] == [len(sampler) for sampler in samplers]
    assert {index for part in parts for index in part} == set(range(size))
    assert len({-(-len(part) // batch_size) for part in parts}) == 1
    unpadded = [len(range(rank, size, world)) for rank in range(world)]
    if len({-(-length // batch_size) for length in unpadded}) == 1:
        assert [len(part) for part in parts] == unpadded


def test_skip_holds_for_the_resumed_epoch_only_and_however_often_it_is_asked_for():
    whole = epochs_of(EpochSampler(range(12), seed=1), (0, 1, 2, 3))
    sampler = EpochSampler(range(12), seed=1, start_epoch=2, skip=5)
    assert len(sampler) == 12
    assert list(sampler) == list(sampler) == whole[2][5:]
    assert epochs_of(sampler, (2, 3)) == [whole[2][5:], whole[3]]


def test_lightning_announces_the_finished_epoch_first():
    sampler = EpochSampler(range(12), seed=1, start_epoch=2)
    assert epochs_of(sampler, (1,)) == epochs_of(EpochSampler(range(12), seed=1), (2,))


def test_fixed_epoch():
    sampler = EpochSampler(range(3), shuffle=False, drop_last=False, fixed_epoch=0)
    assert epochs_of(sampler, (5, 6)) == [[(0, 0), (1, 0), (2, 0)]] * 2


def test_bad_positions_are_refused_and_bare_indices_understood():
    with pytest.raises(ValueError, match="negative"):
        EpochSampler(range(3), skip=-1)
    assert item_key(4, 5) == (4, 0) and item_key((4, 2), 5) == (4, 2)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"item {index} of 5"):
            item_key(index, 5)
