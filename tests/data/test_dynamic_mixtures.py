import numpy as np
import pytest
import soundfile as sf
import torch

from data.dynamic_mixtures import MixtureDataset, mix
from data.errors import AudioError, DataError
from data.levels import rms

RATE = 8000


def rms_db(signal):
    return 20 * torch.log10(signal.square().mean(-1).sqrt())


def talker_of(signal):
    """Which of the corpus' speakers a signal is."""
    spectrum = torch.fft.rfft(signal * torch.hann_window(len(signal)))
    return round((float(spectrum.abs().argmax()) * RATE / len(signal) - 300) / 200)


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if name != "name") and one["name"] == other["name"]


@pytest.mark.parametrize("num_sources", [2, 3, 4, 5])
def test_mix_sets_levels_and_adds_up_exactly(num_sources):
    torch.manual_seed(0)
    sources = torch.randn(num_sources, 4000) * torch.rand(num_sources, 1)
    levels_db = torch.linspace(-4, 5, num_sources)
    mixture, scaled, noise = mix(sources, levels_db=levels_db, level_db=-25.0)
    assert noise is None and torch.equal(mixture, scaled.sum(0))
    torch.testing.assert_close(rms_db(scaled) - rms_db(scaled[:1]), levels_db - levels_db[0], atol=1e-3, rtol=0)
    assert abs(float(rms_db(mixture)) + 25) < 1e-3


def test_mix_adds_noise_at_its_level():
    torch.manual_seed(0)
    mixture, sources, noise = mix(
        torch.randn(2, 4000), levels_db=torch.zeros(2), level_db=-25.0, noise=7 * torch.randn(4000), noise_snr_db=12.0
    )
    assert torch.equal(mixture, sources.sum(0) + noise)
    assert abs(float(rms_db(sources.sum(0)) - rms_db(noise)) - 12) < 1e-3
    assert abs(float(rms_db(mixture)) + 25) < 1e-3  # with the noise: it is what a network gets to hear
    _, _, noise = mix(torch.randn(2, 10), levels_db=torch.zeros(2), level_db=-25.0, noise=torch.zeros(10))
    assert not noise.any()


def test_mix_turns_down_what_would_pass_full_scale_and_leaves_silence_silent():
    click = torch.zeros(2, 8000)
    click[:, 100] = 1
    equal_levels = {"levels_db": torch.zeros(2), "level_db": -25.0}
    mixture, sources, _ = mix(click, **equal_levels)
    assert 0.999 < float(mixture.abs().max()) <= 1.0
    voice = torch.randn(8000)
    mixture, sources, _ = mix(torch.stack([voice, torch.zeros(8000)]), **equal_levels)
    assert not sources[1].any() and abs(float(rms_db(mixture)) + 25) < 1e-3
    mixture, sources, noise = mix(torch.zeros(2, 10), **equal_levels, noise=torch.ones(10))
    assert not mixture.any() and not sources.any() and not noise.any()


@pytest.mark.parametrize("num_sources", [2, 3])
def test_items_and_batches(make_corpus, tmp_path, num_sources):
    dataset = MixtureDataset(make_corpus(tmp_path), num_items=4, num_sources=num_sources, segment_s=0.5)
    items = [dataset[index, 0] for index in range(len(dataset))]
    for item in items:
        assert item["mixture"].shape == (4000,) and item["mixture"].dtype == torch.float32
        assert item["sources"].shape == (num_sources, 4000)
        assert item["length"].item() == 4000 and item["length"].dtype == torch.int64
        assert torch.equal(item["mixture"], item["sources"].sum(0))
        assert abs(float(rms_db(item["mixture"])) + 25) < 0.01
        assert len({talker_of(source) for source in item["sources"]}) == num_sources
        snr_db = rms_db(item["sources"][:1]) - rms_db(item["sources"][1:])
        assert float(snr_db.abs().max()) < 5.01
    batch = dataset.collate(items)
    assert batch["mixture"].shape == (4, 4000) and batch["length"].tolist() == [4000] * 4
    assert torch.equal(batch["mixture"], batch["sources"].sum(1))


@pytest.mark.parametrize("cache", [True, False])
def test_an_item_is_a_function_of_seed_epoch_and_index(make_corpus, tmp_path, cache):
    rows = make_corpus(tmp_path)
    dataset = MixtureDataset(rows, num_items=8, segment_s=0.5, cache=cache)
    again = MixtureDataset(rows, num_items=8, segment_s=0.5, cache=cache)
    again[7, 5]
    assert equal(dataset[3, 2], again[3, 2])
    assert equal(dataset[3], dataset[3, 0])
    for other in (dataset[3, 1], dataset[2, 2], MixtureDataset(rows, num_items=8, segment_s=0.5, seed=1)[3, 2]):
        assert not equal(dataset[3, 2], other)
    with pytest.raises(IndexError):
        dataset[8, 0]


def test_pairs_change_with_the_epoch_and_all_speakers_take_part(make_corpus, tmp_path):
    dataset = MixtureDataset(make_corpus(tmp_path), num_items=6, segment_s=0.25)
    pairs = [[tuple(talker_of(s) for s in dataset[i, epoch]["sources"]) for i in range(6)] for epoch in (0, 1)]
    assert pairs[0] != pairs[1]
    assert {talker for pair in pairs[0] + pairs[1] for talker in pair} == set(range(4))


def test_cache_and_files_give_the_same_mixture(make_corpus, tmp_path):
    rows = make_corpus(tmp_path, rate=16000)
    kept, read = (MixtureDataset(rows, num_items=3, segment_s=0.5, cache=cache) for cache in (True, False))
    for index in range(3):
        torch.testing.assert_close(kept[index]["mixture"], read[index]["mixture"], atol=1e-4, rtol=0)


def test_auto_cache_follows_the_limit(make_corpus, tmp_path):
    rows = make_corpus(tmp_path)
    assert MixtureDataset(rows, num_items=1)._talkers.cache
    assert not MixtureDataset(rows, num_items=1, cache_limit_mb=0.01)._talkers.cache


def test_short_utterances_are_continued_with_the_same_speaker(make_corpus, tmp_path):
    dataset = MixtureDataset(make_corpus(tmp_path, seconds=0.3), num_items=3, segment_s=1.0)
    for index in range(3):
        for source in dataset[index]["sources"]:
            assert source.shape == (8000,)
            assert len({talker_of(part) for part in source.split(2000)}) == 1
            assert float(source.unfold(0, 400, 400).abs().amax(-1).min()) > 0  # no gap


def test_silent_crops_are_drawn_again(tmp_path):
    rows = []
    for speaker in range(2):  # one second of speech in four
        voice = np.zeros(4 * RATE)
        voice[RATE : 2 * RATE] = 0.1 * np.random.default_rng(speaker).standard_normal(RATE)
        sf.write(tmp_path / f"{speaker}.wav", voice, RATE)
        rows.append({"audio_filepath": str(tmp_path / f"{speaker}.wav"), "duration": 4.0, "speaker": str(speaker)})
    dataset = MixtureDataset(rows, num_items=60, segment_s=0.5)
    empty = sum(not source.any() for index in range(60) for source in dataset[index]["sources"])
    assert empty < 0.3 * 120  # with a single draw it is 0.6
    silence = [row | {"audio_filepath": str(tmp_path / "silence.wav")} for row in rows]
    sf.write(tmp_path / "silence.wav", np.zeros(4 * RATE), RATE)
    item = MixtureDataset(silence, num_items=1, segment_s=0.5)[0]
    assert not item["mixture"].any() and torch.isfinite(item["sources"]).all()


def test_data_that_cannot_be_mixed_is_named(make_corpus, tmp_path):
    rows = make_corpus(tmp_path, speakers=1)
    with pytest.raises(DataError, match="1 speaker"):
        MixtureDataset(rows, num_items=1)
    with pytest.raises(DataError, match=r"s0_0\.wav.*no speaker"):
        MixtureDataset([{"audio_filepath": "s0_0.wav", "duration": 1.0}], num_items=1)
    rows = make_corpus(tmp_path, speakers=2, utterances=1)
    (tmp_path / "s1_0.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"s1_0\.wav: is empty"):
        MixtureDataset(rows, num_items=1)[0]


EVERYTHING = {"gain_db": 3.0, "gain_p": 0.5, "speed": [0.95, 1.0, 1.05], "noise_snr_db": (5.0, 20.0), "noise_p": 0.8}


@pytest.fixture
def noise_rows(tmp_path):
    """A hiss of 0.6 s and one of 2 s."""
    rows = []
    for number, seconds in enumerate((0.6, 2.0)):
        path = tmp_path / f"noise{number}.wav"
        sf.write(path, 0.1 * np.random.default_rng(number).standard_normal(round(seconds * RATE)), RATE)
        rows.append({"audio_filepath": str(path), "duration": seconds})
    return rows


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("num_sources", [2, 3, 8])
def test_the_mixture_is_the_sum_to_the_last_bit_after_augmentation(
    make_corpus, tmp_path, noise_rows, num_sources, with_noise
):
    options = EVERYTHING | {"noise_rows": noise_rows if with_noise else None}
    rows = make_corpus(tmp_path, speakers=8)
    for seed in range(5):
        dataset = MixtureDataset(
            rows, num_items=4, num_sources=num_sources, segment_s=0.2, seed=seed, level_db=-2.0, **options
        )
        items = [dataset[index, 0] for index in range(4)]
        batch = dataset.collate(items)
        for item, dim in [*((item, 0) for item in items), (batch, 1)]:
            assert ("noise" in item) == with_noise
            total = item["sources"].sum(dim) + item["noise"] if with_noise else item["sources"].sum(dim)
            assert torch.equal(item["mixture"], total)
            assert float(item["mixture"].abs().max()) <= 1.0
            assert item["mixture"].shape[-1] == 1600 and torch.isfinite(item["mixture"]).all()


def test_gains_change_the_levels_of_some_talkers(make_corpus, tmp_path):
    options = {"num_items": 40, "segment_s": 0.2, "snr_db": (0.0, 0.0)}
    rows = make_corpus(tmp_path, speakers=2)
    dataset = MixtureDataset(rows, gain_db=3.0, gain_p=0.5, **options)
    levels_db = torch.stack([rms_db(dataset[index, 0]["sources"]) for index in range(40)])
    difference_db = (levels_db[:, 0] - levels_db[:, 1]).abs()
    assert 3 < float(difference_db.max()) < 6.01
    assert 2 < int((difference_db < 1e-3).sum()) < 20  # neither talker changed: a quarter


def test_speed_moves_the_pitch_and_keeps_the_length(make_corpus, tmp_path):
    rows = make_corpus(tmp_path, speakers=2, seconds=2.0)
    dataset = MixtureDataset(rows, num_items=20, segment_s=1.0, speed=[0.75, 1.0, 1.31])
    seen = set()
    for index in range(20):
        item = dataset[index, 0]
        assert item["sources"].shape == (2, 8000) and item["length"] == 8000
        for speaker, source in zip(item["name"].split("_"), item["sources"], strict=False):
            pitch_hz = float(torch.fft.rfft(source * torch.hann_window(8000)).abs().argmax())
            seen.add(round(pitch_hz / (300 + 200 * int(speaker[1:])), 2))
    assert seen == {0.75, 1.0, 1.31}


def test_noise_lies_in_its_range_and_is_left_out_at_random(make_corpus, tmp_path, noise_rows):
    rows = make_corpus(tmp_path)
    dataset = MixtureDataset(rows, num_items=40, segment_s=1.0, noise_rows=noise_rows, noise_snr_db=(5.0, 20.0))
    snr_db = [rms_db(item["sources"].sum(0)) - rms_db(item["noise"]) for item in (dataset[i, 0] for i in range(40))]
    assert 4.99 < min(snr_db) < 7 and 18 < max(snr_db) < 20.01
    assert float(dataset[0, 0]["noise"].unfold(0, 400, 400).abs().amax(-1).min()) > 0  # no gap where one was too short
    sometimes = MixtureDataset(rows, num_items=40, segment_s=0.1, noise_rows=noise_rows, noise_p=0.5)
    assert 10 < sum(bool(sometimes[index, 0]["noise"].any()) for index in range(40)) < 30


def test_augmentation_leaves_speakers_and_crops_as_they_are(make_corpus, tmp_path, noise_rows):
    rows = make_corpus(tmp_path)
    plain, noisy = (MixtureDataset(rows, num_items=8, segment_s=0.2, noise_rows=n) for n in (None, noise_rows))
    for index in range(8):
        one, other = plain[index, 1], noisy[index, 1]
        assert one["name"] == other["name"] and one["name"].endswith(f"{index:06d}")
        gain = rms_db(one["sources"]) - rms_db(other["sources"])  # the common gain has noise to make room for
        torch.testing.assert_close(one["sources"] * 10 ** (-gain[:, None] / 20), other["sources"], atol=1e-5, rtol=0)


def test_cache_and_files_are_equal_where_nothing_is_resampled(make_corpus, tmp_path, noise_rows):
    rows = make_corpus(tmp_path)
    kept, read = (
        MixtureDataset(rows, num_items=6, segment_s=0.3, cache=cache, noise_rows=noise_rows, **EVERYTHING)
        for cache in (True, False)
    )
    assert all(equal(kept[index, 3], read[index, 3]) for index in range(6))


def test_without_a_level_the_first_talker_keeps_its_own() -> None:
    sources = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.02], [0.3]])
    mixture, mixed, _ = mix(sources, levels_db=torch.tensor([0.0, -3.0]), level_db=None)
    torch.testing.assert_close(mixed[0], sources[0])
    torch.testing.assert_close(rms(mixed[1]), rms(sources[0]) * 10 ** (-3 / 20))
    assert torch.equal(mixture, mixed.sum(0))


def test_pieces_are_mixtures_of_their_own(make_corpus, tmp_path):
    talkers = make_corpus(tmp_path)
    dataset = MixtureDataset(talkers, num_items=4, segment_s=0.5, pieces=[[0, 4], [2, 1]], seed=3)
    batch = dataset.collate([dataset[(0, 0)], dataset[(1, 0)]])
    assert batch["sources"].shape == (8, 2, 1000) and batch["length"].tolist() == [1000] * 8
    assert torch.equal(batch["mixture"], batch["sources"].sum(1))
    pieces = [piece for item in (dataset[(0, 0)], dataset[(0, 1)]) for piece in item]
    assert len({tuple(piece["mixture"][:4].tolist()) for piece in pieces}) == 8, "no two are the same"
    again = MixtureDataset(talkers, num_items=4, segment_s=0.5, pieces=[[0, 4], [2, 1]], seed=3)[(0, 0)]
    assert all(torch.equal(a["mixture"], b["mixture"]) for a, b in zip(again, dataset[(0, 0)], strict=True))
    whole = MixtureDataset(talkers, num_items=4, segment_s=0.5, seed=3)
    assert torch.equal(dataset[(1, 2)]["mixture"], whole[(1, 2)]["mixture"]), "from epoch 2 on as without pieces"
