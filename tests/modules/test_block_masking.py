import math

import pytest
import torch

from modules.block_masking import RandomBlockMasking, overlapping_blocks, separate_blocks
from modules.counter_random import uniform
from tests.modules.device_waits import NoValueIsAsked


def overlapping_by_hand(numbers: torch.Tensor, length: int, block_size: int, mask_prob: float) -> list[bool]:
    mask = [False] * len(numbers)
    for start in range(length - block_size + 1):
        if numbers[start] < mask_prob:
            mask[start : start + block_size] = [True] * block_size
    return mask


def separate_by_hand(scores: torch.Tensor, offset: float, length: int, block_size: int, mask_prob: float) -> list[bool]:
    wanted = torch.ceil(torch.tensor(length) * mask_prob / block_size)  # float32, which may round 30 up to 31
    num_blocks = min(int(wanted), math.ceil(len(scores) * mask_prob / block_size))
    if (num_blocks + 1) * block_size > length:
        block_size = max(1, length // (num_blocks + 1))
    slots = range(max(0, length // block_size - 1))
    mask = [False] * len(scores)
    for slot in sorted(slots, key=lambda slot: -scores[slot].item())[:num_blocks]:
        start = slot * block_size + int(offset * block_size)
        mask[start : start + block_size] = [True] * block_size
    return mask


LENGTHS = torch.tensor([0, 1, 2, 7, 19, 20, 39, 100, 150])


@pytest.mark.parametrize(
    ("block_size", "mask_prob"), [(1, 0.3), (20, 0.02), (7, 0.1), (200, 1.0), (20, 0.0), (20, 1.0)]
)
def test_overlapping_blocks(block_size, mask_prob):
    numbers = uniform(torch.arange(len(LENGTHS)), 150)
    mask = overlapping_blocks(numbers, LENGTHS, block_size=block_size, mask_prob=mask_prob)
    expected = [
        overlapping_by_hand(row, length, block_size, mask_prob)
        for row, length in zip(numbers, LENGTHS.tolist(), strict=True)
    ]
    assert mask.tolist() == expected
    assert mask.any() == (mask_prob > 0 and block_size < 200)


@pytest.mark.parametrize(
    ("block_size", "mask_prob"), [(1, 0.3), (20, 0.5), (48, 0.65), (200, 0.5), (20, 0.0), (20, 1.0)]
)
def test_separate_blocks(block_size, mask_prob):
    scores, offset = uniform(torch.arange(len(LENGTHS)), 150), torch.linspace(0, 0.999, len(LENGTHS))
    mask = separate_blocks(scores, offset, LENGTHS, block_size=block_size, mask_prob=mask_prob)
    expected = [
        separate_by_hand(row, shift, length, block_size, mask_prob)
        for row, shift, length in zip(scores, offset.tolist(), LENGTHS.tolist(), strict=True)
    ]
    assert mask.tolist() == expected
    assert mask.any() == (mask_prob > 0)


@pytest.mark.parametrize("allow_overlap", [True, False])
def test_mask_depends_on_an_items_seed_and_length_only(allow_overlap):
    masking = RandomBlockMasking(feat_in=1, block_size=10, mask_prob=0.1, allow_overlap=allow_overlap)
    length, seeds = torch.tensor([50, 90, 120]), torch.tensor([5, 6, 7])
    mask = masking.draw(160, length, seeds)
    for index in range(3):
        alone = masking.draw(int(length[index]), length[index : index + 1], seeds[index : index + 1])[0]
        assert torch.equal(mask[index, : length[index]], alone)
        assert alone.any() and not mask[index, length[index] :].any()
    assert torch.equal(mask, masking.draw(160, length, seeds))
    assert not torch.equal(mask, masking.draw(160, length, seeds + 100))


@pytest.mark.parametrize("allow_overlap", [True, False])
def test_never_behind_an_items_end(allow_overlap):
    masking = RandomBlockMasking(feat_in=1, block_size=4, mask_prob=0.6, allow_overlap=allow_overlap)
    length = torch.arange(200) % 41
    mask = masking.draw(40, length, torch.arange(200))
    assert mask.any() and not (mask & (torch.arange(40) >= length[:, None])).any()


def test_item_shorter_than_a_block_gets_no_mask():
    masking = RandomBlockMasking(feat_in=1, block_size=40, mask_prob=1.0, allow_overlap=True)
    mask = masking.draw(48, torch.tensor([39, 40]), torch.tensor([0, 0]))
    assert mask.sum(1).tolist() == [0, 40]


# Measured on NeMo 3.0.0 with 20000 items of 200 frames: share of masked frames, its deviation over items, and the share
# of items without any mask.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"block_size": 40, "mask_prob": 0.01, "allow_overlap": True}, (0.271947, 0.189411, 0.1983)),
        ({"block_size": 48, "mask_prob": 0.5}, (0.72, 0, 0)),
        ({"block_size": 40, "mask_prob": 0.01}, (0.2, 0, 0)),
    ],
)
def test_statistics(options, expected):
    num_items = 4000
    mask = RandomBlockMasking(feat_in=1, **options).draw(200, torch.full((num_items,), 200), torch.arange(num_items))
    share, (mean, deviation, unmasked) = mask.double().mean(1), expected
    error = (1 / num_items + 1 / 20000) ** 0.5
    assert share.mean().item() == pytest.approx(mean, abs=4 * deviation * error + 1e-6)
    assert (share == 0).double().mean().item() == pytest.approx(
        unmasked, abs=4 * (unmasked * (1 - unmasked)) ** 0.5 * error
    )


@pytest.mark.parametrize("allow_overlap", [True, False])
def test_without_seeds_draws_as_nemo_does(allow_overlap):
    options = {"block_size": 10, "mask_prob": 0.2}
    length = torch.tensor([60, 100])
    torch.manual_seed(3)
    mask = RandomBlockMasking(feat_in=1, allow_overlap=allow_overlap, mask_value=0, **options).draw(100, length)
    torch.manual_seed(3)
    scores = torch.rand(2, 100)
    if allow_overlap:
        expected = overlapping_blocks(scores, length, **options)
    else:
        expected = separate_blocks(scores, torch.rand(2), length, **options)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("allow_overlap", [True, False])
def test_nothing_waits_for_the_device(allow_overlap):
    masking = RandomBlockMasking(feat_in=3, allow_overlap=allow_overlap)
    with NoValueIsAsked():
        masking(torch.randn(2, 3, 100), torch.tensor([100, 60]), torch.tensor([1, 2]))


def test_masked_frames_are_the_vector():
    masking = RandomBlockMasking(feat_in=3, block_size=5, mask_prob=0.1, allow_overlap=True)
    features = torch.randn(2, 3, 50)
    masked, mask = masking(features, torch.tensor([50, 30]), torch.tensor([1, 2]))
    assert 0 < mask.sum() < 80
    frames = masked.transpose(1, 2)
    assert torch.equal(frames[mask], masking.mask_embedding.expand(int(mask.sum()), 3))
    assert torch.equal(frames[~mask], features.transpose(1, 2)[~mask])
    assert masking(features.bfloat16(), torch.tensor([50, 30]))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "trained"),
    [({}, False), ({"freeze": False}, True), ({"freeze": False, "mask_value": 1.5}, False)],
)
def test_vector(options, trained):
    torch.manual_seed(0)
    vector = RandomBlockMasking(feat_in=5000, **options).mask_embedding
    assert vector.requires_grad == trained
    if "mask_value" in options:
        assert (vector == 1.5).all()
    else:
        assert vector.mean().item() == pytest.approx(0, abs=0.006)
        assert vector.std().item() == pytest.approx(0.1, rel=0.05)


def test_trained_vector_gets_a_gradient():
    masking = RandomBlockMasking(feat_in=2, block_size=5, mask_prob=1.0, allow_overlap=True, freeze=False)
    masking(torch.zeros(1, 2, 10), torch.tensor([10]))[0].sum().backward()
    assert masking.mask_embedding.grad is not None and masking.mask_embedding.grad.tolist() == [10, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feat_in": 0}, "^feat_in must be a whole number of at least 1, got 0"),
        ({"block_size": 0}, "^block_size must be a whole number of at least 1, got 0"),
        ({"block_size": 2.5}, "^block_size must be a whole number of at least 1, got 2.5"),
        ({"mask_prob": 1.5}, "^mask_prob must be a number from 0 to 1, got 1.5"),
        ({"mask_prob": "a"}, "^mask_prob must be a number from 0 to 1, got 'a'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        RandomBlockMasking(**{"feat_in": 4} | options)


def test_option_without_effect():
    with pytest.warns(UserWarning, match="max_mask_ratio has no effect"):
        RandomBlockMasking(feat_in=4, max_mask_ratio=0.5)
