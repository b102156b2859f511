import inspect
from dataclasses import fields

import numpy as np
import pytest
import soundfile as sf
import torch

from data.aec import EchoData
from data.echo_path import EchoPath
from data.echo_synthesis import EchoMixing
from data.errors import DataError
from data.loudspeaker import Loudspeaker
from data.manifest import write_manifest
from data.rooms import RoomSettings

RATE = 8000
SIGNALS = ("mic", "far", "target", "near", "echo", "noise")
NUMBERS = ("has_target", "length", "scenario", "delay_samples", "path_change_sample", "ser_db", "snr_db")


def equal(one, other):
    return all(one[key] == other[key] if key == "name" else torch.equal(one[key], other[key]) for key in one)


def audio(path, seed, seconds=1.0):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    sf.write(path, samples, RATE)
    return {"audio_filepath": path.name, "duration": seconds}


@pytest.fixture
def manifests(tmp_path):
    for number, stage in enumerate(("train", "val", "test")):
        speakers = [
            audio(tmp_path / f"{stage}_{s}.wav", 10 * number + s) | {"speaker": f"{stage}{s}"} for s in range(3)
        ]
        write_manifest(tmp_path / f"{stage}.jsonl", speakers)
        write_manifest(tmp_path / f"{stage}_noise.jsonl", [audio(tmp_path / f"{stage}_noise.wav", 50 + number)])
    return {f"{stage}_manifest": str(tmp_path / f"{stage}.jsonl") for stage in ("train", "val", "test")}


@pytest.fixture
def recordings(tmp_path):
    """A manifest of two recordings of 0.5 and 0.75 s, with stated delays."""
    rows = []
    for number, scenario in enumerate(("far_end", "double_talk")):
        seconds = 0.5 + 0.25 * number
        row = {"scenario": scenario, "duration": seconds, "delay_ms": 100 + 50 * number, "id": f"r{number}"}
        for kind in ("mic", "farend"):
            row[f"{kind}_filepath"] = audio(tmp_path / f"{kind}{number}.wav", 80 + number, seconds)["audio_filepath"]
        rows.append(row)
    write_manifest(tmp_path / "recordings.jsonl", rows)
    return str(tmp_path / "recordings.jsonl")


def data_of(manifests, **options):
    defaults = {
        "sample_rate": RATE,
        "segment_s": 0.4,
        "eval_segment_s": 0.5,
        "train_examples": 7,
        "val_examples": 3,
        "test_examples": 4,
        "num_rooms": 1,
        "t60_s": (0.1, 0.15),
        "batch_size": 2,
        "loader": {"num_workers": 0},
    }
    return EchoData(**manifests, **(defaults | options))


def test_loaders(manifests, tmp_path):
    data = data_of(manifests, noise_manifest=str(tmp_path / "train_noise.jsonl"), noise_p=1.0, clip_p=0.0)
    data.setup()
    train, val, test = list(data.train_dataloader()), list(data.val_dataloader()), list(data.test_dataloader())
    assert [len(batch["mic"]) for batch in train] == [2] * 3
    assert [len(batch["mic"]) for batch in val] == [2, 1] and len(test) == 2
    for batch, length in ((train[0], 3200), (val[0], 4000)):
        assert set(batch) == {*SIGNALS, *NUMBERS, "name"}
        assert all(batch[key].shape == (2, length) for key in SIGNALS)
        assert all(batch[key].shape == (2,) for key in NUMBERS) and len(batch["name"]) == 2
        assert torch.equal(batch["mic"], batch["near"] + batch["echo"] + batch["noise"])
    assert train[0]["noise"].any(-1).all() and not val[0]["noise"].any()
    for stage in ("val", "test"):  # each stage has noise of its own, or none
        data = data_of(manifests, noise_p=1.0, **{f"{stage}_noise_manifest": str(tmp_path / f"{stage}_noise.jsonl")})
        data.setup()
        assert data.dataset(stage)[0]["noise"].any() and not data.dataset("train")[0]["noise"].any()


def test_workers_and_a_resume_give_the_same_batches(manifests, tmp_path):
    options = {"noise_manifest": str(tmp_path / "train_noise.jsonl"), "num_rooms": None, "path_change_p": 0.5}
    batches = []
    for workers in (0, 2):
        data = data_of(manifests, **options)
        data.loader = {"num_workers": workers, "prefetch_factor": 1}
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
    assert len(batches[0]) == 3 and all(equal(one, other) for one, other in zip(*batches, strict=True))
    resumed = data_of(manifests, **options)
    resumed.setup("fit")
    resumed.load_state_dict({"epoch": 0, "batch": 2, "items": 4})
    (last,) = resumed.train_dataloader()
    assert equal(last, batches[0][2])


def test_evaluation_does_not_depend_on_the_training_seed(manifests):
    first, second, third = data_of(manifests), data_of(manifests, seed=1), data_of(manifests, eval_seed=9)
    for data in (first, second, third):
        data.setup()
    for stage in ("val_dataloader", "test_dataloader"):
        one, same, other = (next(iter(getattr(data, stage)())) for data in (first, second, third))
        assert equal(one, same) and not torch.equal(one["mic"], other["mic"])
    train = [next(iter(data.train_dataloader()))["mic"] for data in (first, second)]
    assert not torch.equal(*train)


def test_no_training_shares_draws_or_rooms_with_an_evaluation(manifests):
    seeds = [data_of(manifests, seed=seed, eval_seed=seed).seeds for seed in range(10)]
    used = [{each[stage] for each in seeds} for stage in ("train", "val", "test")]
    assert len(set.union(*used)) == 30


def test_recordings_without_a_target_teach_nothing(manifests, tmp_path, caplog):
    def recorded(scenario, **files):
        names = {"mic": "train_0.wav", "farend": "train_1.wav"} | files
        row = {f"{kind}_filepath": name for kind, name in names.items()} | {"duration": 1.0, "scenario": scenario}
        write_manifest(tmp_path / "real.jsonl", [row])
        return data_of(manifests | {"val_manifest": str(tmp_path / "real.jsonl")})

    with pytest.raises(DataError, match=r"data\.val_manifest=.*real\.jsonl: no recording has a target"):
        recorded("double_talk").setup("fit")
    recorded("double_talk", clean="train_2.wav").setup("fit")
    assert "mute output" not in caplog.text
    recorded("far_end").setup("fit")
    assert "a mute output is the best" in caplog.text


def test_every_key_reaches_its_part(manifests, tmp_path):
    changed = {
        "scenario_weights": {"far_end": 1.0},
        "delay_ms": (10.0, 20.0),
        "speaker_clip": (0.5, 0.6),
        "speaker_distance_m": (0.1, 0.2),
    }
    data = data_of(manifests, **changed)
    data.setup("fit")
    dataset = data.dataset("train")
    assert dataset.mixing.scenario_weights == {"far_end": 1.0} and dataset.path.delay_ms == (10.0, 20.0)
    assert dataset.loudspeaker.speaker_clip == (0.5, 0.6)
    assert dataset.rooms.settings.speaker_distance_m == (0.1, 0.2) and dataset.rooms.settings.num_rooms == 1
    given = {name: key.default for name, key in inspect.signature(EchoData).parameters.items()}
    for kind in (EchoMixing, EchoPath, Loudspeaker, RoomSettings):
        defaults = kind()
        for field in fields(kind):
            assert given[field.name] == getattr(defaults, field.name), field.name


def test_measured_responses(manifests, tmp_path):
    rows = [audio(tmp_path / f"rir{number}.wav", number, 0.1) | {"room": 7} for number in range(2)]
    write_manifest(tmp_path / "rir.jsonl", rows)
    data = data_of(manifests, rir_manifest=str(tmp_path / "rir.jsonl"), rir_s=0.05)
    assert data.dataset("train").measured.rir_s == 0.05 and data.dataset("val").measured is None
    for stage in ("val", "test"):
        other = data_of(manifests, **{f"{stage}_rir_manifest": str(tmp_path / "rir.jsonl")})
        assert other.dataset(stage).measured is not None and other.dataset("train").measured is None
    write_manifest(tmp_path / "rir.jsonl", rows[:1])
    with pytest.raises(DataError, match=r"rir\.jsonl, line 1: .*rir0\.wav: room 7 has one response only"):
        data.dataset("train")


def test_no_validation(manifests):
    data = data_of(manifests, val_examples=0, test_examples=0)
    data.setup("fit")
    assert data.val_dataloader() == [] and not data.has_data("test")


def test_recordings_in_place_of_talkers(manifests, recordings, caplog):
    data = data_of(manifests | {"test_manifest": recordings}, max_delay_ms=120)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["name"] == ["r0", "r1"] and batch["length"].tolist() == [4000, 6000]  # whole
    assert "recordings.jsonl: echoes come up to 150 ms" in caplog.text
    caplog.set_level("INFO")
    data = data_of({"train_manifest": recordings})
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["mic"].shape == (2, 3200) and "no effect" in caplog.text  # crops


def test_one_warning_of_delays_that_the_model_does_not_look_for(manifests, caplog):
    for max_delay_ms, warnings in ((100, 1), (152, 0), (None, 0)):
        caplog.clear()
        data_of(manifests, max_delay_ms=max_delay_ms, speaker_distance_m=(0.1, 0.343)).setup()
        assert len(caplog.records) == warnings
        if warnings:
            assert "data.delay_ms: echoes come up to 151 ms" in caplog.text and "for 100 ms at most" in caplog.text


def test_mixtures_of_talkers_are_refused(tmp_path):
    row = {key: audio(tmp_path / f"{key}.wav", 1)["audio_filepath"] for key in ("mix_filepath", "s1_filepath")}
    write_manifest(tmp_path / "mixtures.jsonl", [row | {"duration": 1.0}])
    with pytest.raises(DataError, match=r"mixtures\.jsonl: holds mixtures of talkers"):
        data_of({"train_manifest": str(tmp_path / "mixtures.jsonl")}).setup("fit")


@pytest.mark.parametrize(
    "bad",
    [
        {"sample_rate": 0},
        {"segment_s": 0},
        {"eval_segment_s": -1},
        {"eval_seed": 0.5},
        {"max_delay_ms": "long"},
        {"train_examples": 0},
        {"val_examples": -1},
        {"test_examples": 1.5},
        {"cache": "yes"},
        {"cache_limit_mb": -1},
        {"ser_db": [1]},
        {"nonlinear_p": 2},
        {"t60_s": 0.3},
        {"delay_ms": [-5, 0]},
        {"gain_step_db": [900, 900]},
        {"ser_db": [-200, 0]},
        {"clip_db": [0, 200]},
        {"noise_manifest": 5},
        {"speaker_highpass_hz": [300, 500], "speaker_lowpass_hz": [400, 800]},
        {"delay_ms": [0, 400], "segment_s": 0.4},
    ],
)
def test_bad_options_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EchoData(**bad)
    with pytest.raises(TypeError, match="dealy_ms"):
        EchoData(dealy_ms=[0, 5])
