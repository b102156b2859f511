import numpy as np
import pytest

from data.concat_sampling import ConcatSampler

SIZES = (1000, 100)


def parts_of(**options):
    """How many places of an epoch each part has, and the order itself."""
    order = ConcatSampler(range(sum(SIZES)), sizes=SIZES, **options).order(0)
    return [int((order < SIZES[0]).sum()), int((order >= SIZES[0]).sum())], order


@pytest.mark.parametrize(
    "options, share",
    [
        ({}, 1 / 11),
        ({"temperature": 2.0}, 1 / (1 + 10**0.5)),
        ({"technique": "round-robin"}, 0.5),
        ({"technique": "random", "probabilities": [1, 3]}, 0.75),
    ],
)
def test_techniques(options, share):
    counts, order = parts_of(**options)
    assert sum(counts) == len(order) == 1100
    assert counts[1] / 1100 == pytest.approx(share, abs=0.04)
    places = np.bincount(order, minlength=1100)
    assert np.ptp(places[:1000]) <= 1 and np.ptp(places[1000:]) <= 1  # each part is gone through, and then again


def test_scale_order_and_epochs():
    assert len(parts_of(scale=0.1)[1]) == 110 and len(parts_of(scale=3.0)[1]) == 3300
    assert (parts_of(seed=1)[1] == parts_of(seed=1)[1]).all() and (parts_of(seed=1)[1] != parts_of(seed=2)[1]).any()
    in_order = parts_of(shuffle=False, technique="round-robin")[1]
    assert in_order[:6].tolist() == [0, 1000, 1, 1001, 2, 1002]
    one = ConcatSampler(range(1100), sizes=SIZES, scale=0.5)
    assert len(one) == len(list(one)) == 550


@pytest.mark.parametrize("probabilities", [None, [1.0], [0, 0], [1, 2, 3]])
def test_probabilities_that_do_not_fit(probabilities):
    with pytest.raises(ValueError, match="concat_sampling_probabilities must be 2 numbers"):
        parts_of(technique="random", probabilities=probabilities)
