import math
import random
from dataclasses import replace

import pytest
import torch

from data.noise_augmentation import MultiSpeakerNoiseAugmentation, augmented_noise

ALWAYS = MultiSpeakerNoiseAugmentation(prob=1.0, noise_ratio=1.0)


def batch(lengths=(800, 500, 650), noise_lengths=(800, 200, 650), *, seed=0):
    """Recordings and noises; a recording's samples tell which one it is: item i holds values from i + 1 to i + 1.5."""
    generator = torch.Generator().manual_seed(seed)
    audio, noise = torch.zeros(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths))
    for item, (count, noise_count) in enumerate(zip(lengths, noise_lengths, strict=True)):
        audio[item, :count] = item + 1 + 0.5 * torch.rand(count, generator=generator)
        noise[item, :noise_count] = torch.randn(noise_count, generator=generator)
    return audio, torch.tensor(lengths), noise, torch.tensor(noise_lengths)


def generators(seeds=(1, 2, 3)):
    return [random.Random(seed) for seed in seeds]


def level_db(speech, added):
    return 10 * math.log10(speech.square().mean() / added.square().mean())


@pytest.mark.parametrize("nemo_compat", [False, True])
def test_a_recording_that_is_not_chosen(nemo_compat):
    audio, length, noise, noise_length = batch()
    never = MultiSpeakerNoiseAugmentation(prob=0.0)
    added, noisy_length = augmented_noise(
        audio, length, noise, noise_length, settings=never, rngs=generators(), nemo_compat=nemo_compat
    )
    assert torch.equal(added, noise if nemo_compat else torch.zeros_like(noise))
    assert torch.equal(noisy_length, noise_length if nemo_compat else length)


@pytest.mark.parametrize("num_segments", [1, 4])
@pytest.mark.parametrize("noise_ratio", [0.0, 1.0])
def test_level_share_and_bounds(num_segments, noise_ratio):
    settings = MultiSpeakerNoiseAugmentation(
        prob=1.0,
        noise_ratio=noise_ratio,
        min_r_speech=3.0,
        max_r_speech=3.0,
        min_r_noise=3.0,
        max_r_noise=3.0,
        min_mix_rate=0.25,
        max_mix_rate=0.25,
        min_num_segments=num_segments,
        max_num_segments=num_segments,
        max_num_speakers=3,
    )
    audio, length, noise, noise_length = batch()
    before = [tensor.clone() for tensor in (audio, length, noise, noise_length)]
    added, noisy_length = augmented_noise(
        audio, length, noise, noise_length, settings=settings, rngs=generators(), nemo_compat=False
    )
    assert torch.equal(noisy_length, length)
    for item, count in enumerate(length.tolist()):
        assert not added[item, count:].any()
        assert int((added[item] != 0).sum()) == count // 4
        assert level_db(audio[item, :count], added[item, :count]) == pytest.approx(3.0, abs=1e-3)
    assert all(torch.equal(*pair) for pair in zip(before, (audio, length, noise, noise_length), strict=True))


def test_speech_comes_from_other_recordings_and_noise_from_the_own():
    audio, length, noise, noise_length = batch()
    speech = replace(ALWAYS, noise_ratio=0.0, min_r_speech=0.0, max_r_speech=0.0)
    added, _ = augmented_noise(audio, length, noise, noise_length, settings=speech, rngs=generators())
    for item, count in enumerate(length.tolist()):
        part = added[item, :count][added[item, :count] != 0]
        sources = [torch.unique(audio[other]) for other in range(3) if other != item]
        # Up to its gain it is a stretch of one of the others: the ratio of its ends gives that away.
        assert any(1 <= part.max() / part.min() <= source.max() / source[source > 0].min() for source in sources)
    added, _ = augmented_noise(audio, length, noise, noise_length, settings=ALWAYS, rngs=generators())
    shorter = added[1][added[1] != 0]  # 250 samples of a noise of 200, which is repeated
    gain = shorter[0] / noise[1, 0]
    torch.testing.assert_close(shorter, torch.cat([noise[1, :200], noise[1, :50]]) * gain)


def test_an_item_does_not_depend_on_the_draws_of_others():
    audio, length, noise, noise_length = batch()
    first, _ = augmented_noise(audio, length, noise, noise_length, settings=ALWAYS, rngs=generators((1, 2, 3)))
    other, _ = augmented_noise(audio, length, noise, noise_length, settings=ALWAYS, rngs=generators((9, 2, 8)))
    assert torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])


def test_silence_and_a_batch_of_one():
    audio, length, noise, noise_length = batch((400,), (400,))
    speech = replace(ALWAYS, noise_ratio=0.0)
    added, _ = augmented_noise(audio, length, noise, noise_length, settings=speech, rngs=generators((1,)))
    part = added[added != 0]  # no other recording there: its own noise
    torch.testing.assert_close(part, noise[0, :200] * (part[0] / noise[0, 0]))
    added, _ = augmented_noise(audio, length, noise * 0, noise_length, settings=ALWAYS, rngs=generators((1,)))
    assert not added.any() and torch.isfinite(added).all()


def test_more_segments_than_samples():
    tiny = replace(ALWAYS, noise_ratio=0.0, min_num_segments=9, max_num_segments=9, max_num_speakers=2)
    for nemo_compat in (False, True):
        audio, length, noise, noise_length = batch((4, 3, 5), (4, 3, 5))
        added, _ = augmented_noise(
            audio, length, noise, noise_length, settings=tiny, rngs=generators(), nemo_compat=nemo_compat
        )
        assert torch.isfinite(added).all() and [int((row != 0).sum()) for row in added] == [2, 1, 2]


def test_long_recordings_need_no_draw_per_sample():
    class Counting(random.Random):
        draws = 0

        def random(self):
            self.draws += 1
            return super().random()

        def getrandbits(self, count):
            self.draws += 1
            return super().getrandbits(count)

    many = replace(ALWAYS, min_num_segments=5, max_num_segments=5)
    rng = Counting(1)
    length = torch.tensor([20000])
    augmented_noise(torch.ones(1, 20000), length, torch.ones(1, 20000), length, settings=many, rngs=[rng])
    assert rng.draws < 50


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"prob": 1.5}, "prob must be a number from 0 to 1, got 1.5"),
        ({"min_r_noise": 30.0}, "max_r_noise must not be below min_r_noise=30.0, got 20.0"),
        ({"max_num_speakers": 0}, "max_num_speakers must be a whole number of at least 1, got 0"),
        ({"max_mix_rate": "all"}, "max_mix_rate must be a number from 0 to 1, got 'all'"),
    ],
)
def test_bad_values_are_named(keys, says):
    with pytest.raises(ValueError, match=says):
        MultiSpeakerNoiseAugmentation(**keys)
