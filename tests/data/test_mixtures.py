import numpy as np
import pytest
import soundfile as sf
import torch

from data.errors import AudioError, DataError
from data.manifest import read_manifest, write_manifest
from data.mixtures import MixtureDataset, SeparationData, mix

RATE = 8000


def rms_db(signal):
    return 20 * torch.log10(signal.square().mean(-1).sqrt())


def corpus(folder, speakers=4, utterances=2, seconds=1.0, rate=RATE):
    """Speaker n is a tone of 300 + 200 n Hz; each utterance has a level of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for speaker in range(speakers):
        for number in range(utterances):
            path = folder / f"s{speaker}_{number}.wav"
            time = np.arange(int(seconds * rate)) / rate
            sf.write(path, 0.1 * (1 + number) * np.sin(2 * np.pi * (300 + 200 * speaker) * time), rate)
            rows.append({"audio_filepath": str(path), "duration": seconds, "speaker": f"s{speaker}"})
    return rows


def talker_of(signal):
    """Which of the corpus' speakers a signal is."""
    spectrum = torch.fft.rfft(signal * torch.hann_window(len(signal)))
    return round((float(spectrum.abs().argmax()) * RATE / len(signal) - 300) / 200)


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in ("mixture", "sources", "length"))


@pytest.mark.parametrize("num_sources", [2, 3, 4, 5])
def test_mix_sets_levels_and_adds_up_exactly(num_sources):
    torch.manual_seed(0)
    sources = torch.randn(num_sources, 4000) * torch.rand(num_sources, 1)
    relative_db = torch.linspace(-4, 5, num_sources - 1)
    mixture, scaled = mix(sources, relative_db=relative_db, level_db=-25.0)
    assert torch.equal(mixture, scaled.sum(0))
    torch.testing.assert_close(rms_db(scaled[:1]) - rms_db(scaled[1:]), relative_db, atol=1e-3, rtol=0)
    assert abs(float(rms_db(mixture)) + 25) < 1e-3


def test_mix_turns_down_what_would_pass_full_scale_and_leaves_silence_silent():
    click = torch.zeros(2, 8000)
    click[:, 100] = 1
    mixture, sources = mix(click, relative_db=torch.zeros(1), level_db=-25.0)
    assert 0.999 < float(mixture.abs().max()) <= 1.0
    voice = torch.randn(8000)
    mixture, sources = mix(torch.stack([voice, torch.zeros(8000)]), relative_db=torch.zeros(1), level_db=-25.0)
    assert not sources[1].any() and abs(float(rms_db(mixture)) + 25) < 1e-3
    mixture, sources = mix(torch.zeros(2, 10), relative_db=torch.zeros(1), level_db=-25.0)
    assert not mixture.any() and not sources.any()


@pytest.mark.parametrize("num_sources", [2, 3])
def test_items_and_batches(tmp_path, num_sources):
    dataset = MixtureDataset(corpus(tmp_path), num_items=4, num_sources=num_sources, segment_s=0.5)
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
def test_an_item_is_a_function_of_seed_epoch_and_index(tmp_path, cache):
    rows = corpus(tmp_path)
    dataset = MixtureDataset(rows, num_items=8, segment_s=0.5, cache=cache)
    again = MixtureDataset(rows, num_items=8, segment_s=0.5, cache=cache)
    again[7, 5]
    assert equal(dataset[3, 2], again[3, 2])
    assert equal(dataset[3], dataset[3, 0])
    for other in (dataset[3, 1], dataset[2, 2], MixtureDataset(rows, num_items=8, segment_s=0.5, seed=1)[3, 2]):
        assert not equal(dataset[3, 2], other)
    with pytest.raises(IndexError):
        dataset[8, 0]


def test_pairs_change_with_the_epoch_and_all_speakers_take_part(tmp_path):
    dataset = MixtureDataset(corpus(tmp_path), num_items=6, segment_s=0.25)
    pairs = [[tuple(talker_of(s) for s in dataset[i, epoch]["sources"]) for i in range(6)] for epoch in (0, 1)]
    assert pairs[0] != pairs[1]
    assert {talker for pair in pairs[0] + pairs[1] for talker in pair} == set(range(4))


def test_cache_and_files_give_the_same_mixture(tmp_path):
    rows = corpus(tmp_path, rate=16000)
    kept, read = (MixtureDataset(rows, num_items=3, segment_s=0.5, cache=cache) for cache in (True, False))
    for index in range(3):
        torch.testing.assert_close(kept[index]["mixture"], read[index]["mixture"], atol=1e-4, rtol=0)


def test_auto_cache_follows_the_limit(tmp_path):
    rows = corpus(tmp_path)
    assert MixtureDataset(rows, num_items=1)._audio.cache
    assert not MixtureDataset(rows, num_items=1, cache_limit_mb=0.01)._audio.cache


def test_short_utterances_are_continued_with_the_same_speaker(tmp_path):
    dataset = MixtureDataset(corpus(tmp_path, seconds=0.3), num_items=3, segment_s=1.0)
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


def test_data_that_cannot_be_mixed_is_named(tmp_path):
    rows = corpus(tmp_path, speakers=1)
    with pytest.raises(DataError, match="1 speaker"):
        MixtureDataset(rows, num_items=1)
    with pytest.raises(DataError, match=r"s0_0\.wav.*no speaker"):
        MixtureDataset([{"audio_filepath": "s0_0.wav", "duration": 1.0}], num_items=1)
    rows = corpus(tmp_path, speakers=2, utterances=1)
    (tmp_path / "s1_0.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"s1_0\.wav: is empty"):
        MixtureDataset(rows, num_items=1)[0]


@pytest.fixture
def manifests(tmp_path):
    for stage in ("train", "val", "test"):
        write_manifest(tmp_path / f"{stage}.jsonl", corpus(tmp_path / stage))
    return {f"{stage}_manifest": str(tmp_path / f"{stage}.jsonl") for stage in ("train", "val", "test")}


def data_of(manifests, **options):
    defaults = {"segment_s": 0.5, "eval_segment_s": 0.75, "train_mixtures": 9, "val_mixtures": 3, "test_mixtures": 4}
    return SeparationData(**manifests, batch_size=2, loader={"num_workers": 0}, **(defaults | options))


def test_loaders(manifests):
    data = data_of(manifests)
    data.setup()
    train, val, test = list(data.train_dataloader()), list(data.val_dataloader()), list(data.test_dataloader())
    assert [len(batch["mixture"]) for batch in train] == [2] * 4
    assert [len(batch["mixture"]) for batch in val] == [2, 1] and len(test) == 2
    assert train[0]["sources"].shape == (2, 2, 4000) and val[0]["sources"].shape == (2, 2, 6000)
    assert set(train[0]) == {"mixture", "sources", "length"}


def test_evaluation_mixtures_do_not_depend_on_the_training_seed(manifests):
    first, second = data_of(manifests, seed=0), data_of(manifests, seed=1)
    for data in (first, second):
        data.setup()
    for stage, same in (("val_dataloader", True), ("test_dataloader", True), ("train_dataloader", False)):
        batches = [next(iter(getattr(data, stage)())) for data in (first, second)]
        assert equal(*batches) == same
    assert first.seeds["val"] != first.seeds["test"]


def test_no_validation(manifests):
    data = data_of(manifests | {"val_manifest": None})
    data.setup("fit")
    assert data.val_dataloader() == []
    data = data_of(manifests, val_mixtures=0, test_mixtures=0)
    data.setup("fit")
    assert data.val_dataloader() == [] and not data.has_data("test")


def test_a_folder_in_place_of_manifests(tmp_path):
    corpus(tmp_path / "speech", speakers=6)
    data = data_of({"speech_dir": str(tmp_path / "speech")})
    data.setup()
    assert len(data.train_dataloader()) == 4
    speakers = {row["speaker"] for stage in ("train", "val", "test") for row in data.rows(stage)}
    assert len(speakers) == 6


def test_manifest_rows_are_read_through(manifests):
    rows = read_manifest(manifests["train_manifest"])
    assert data_of(manifests).rows("train") == rows


@pytest.mark.parametrize(
    "bad",
    [
        {"num_sources": 1},
        {"segment_s": 0.0},
        {"snr_db": [5, -5]},
        {"snr_db": [5]},
        {"train_mixtures": 0},
        {"cache": "yes"},
    ],
)
def test_bad_options_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SeparationData(**bad)
    with pytest.raises(TypeError, match="sampel_rate"):
        SeparationData(sampel_rate=8000)
