import numpy as np
import pytest
import soundfile as sf
import torch

from data.errors import DataError
from data.manifest import read_manifest, write_manifest
from data.mixtures import SeparationData

RATE = 8000


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one if name != "name")


@pytest.fixture
def manifests(make_corpus, tmp_path):
    for stage in ("train", "val", "test"):
        write_manifest(tmp_path / f"{stage}.jsonl", make_corpus(tmp_path / stage))
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
    assert set(train[0]) == {"mixture", "sources", "length", "name"} and len(train[0]["name"]) == 2


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


def test_a_folder_in_place_of_manifests(make_corpus, tmp_path):
    make_corpus(tmp_path / "speech", speakers=6)
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
        {"num_sources": 0},
        {"num_sources": 9},
        {"train_mixtures": 2.5},
        {"gain_db": None},
        {"pieces": 1.5},
        {"pieces": [[1, 4]]},
        {"pieces": "two"},
        {"gain_db": -1.0},
        {"gain_p": 1.5},
        {"noise_p": -0.1},
        {"speed": [3.0]},
        {"noise_snr_db": 5.0},
        {"max_bad_files": -1},
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


@pytest.fixture
def noise_manifest(tmp_path):
    sf.write(tmp_path / "hiss.wav", 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    write_manifest(tmp_path / "noise.jsonl", [{"audio_filepath": "hiss.wav", "duration": 1.0}])
    return str(tmp_path / "noise.jsonl")


def test_training_is_augmented_and_evaluation_is_not(manifests, noise_manifest):
    plain = data_of(manifests, gain_p=0.0)
    changed = data_of(manifests, speed=[0.9, 1.1], noise_manifest=noise_manifest)
    for data in (plain, changed):
        data.setup()
    batches = [next(iter(data.train_dataloader())) for data in (plain, changed)]
    assert "noise" in batches[1] and batches[0]["name"] == batches[1]["name"]
    assert not torch.equal(batches[0]["sources"], batches[1]["sources"])
    for stage in ("val_dataloader", "test_dataloader"):
        assert all(
            equal(one, other) for one, other in zip(getattr(plain, stage)(), getattr(changed, stage)(), strict=True)
        )


def test_noise_in_evaluation_has_a_manifest_of_its_own(manifests, noise_manifest):
    data = data_of(manifests, val_noise_manifest=noise_manifest, noise_p=0.0)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["noise"].any(-1).all()  # in each mixture: noise_p is for training
    assert torch.equal(batch["mixture"], batch["sources"].sum(1) + batch["noise"])
    assert "noise" not in next(iter(data.test_dataloader()))


def test_workers_and_a_resume_give_the_same_batches(manifests, noise_manifest):
    options = {"speed": [0.9, 1.0, 1.1], "noise_manifest": noise_manifest, "noise_p": 0.5, "num_sources": 3}
    batches = []
    for workers in (0, 2):
        data = data_of(manifests, **options)
        data.loader = {"num_workers": workers, "prefetch_factor": 1}
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
    assert len(batches[0]) == 4
    assert all(equal(one, other) and one["name"] == other["name"] for one, other in zip(*batches, strict=True))
    resumed = data_of(manifests, **options)
    resumed.setup("fit")
    resumed.load_state_dict({"epoch": 0, "batch": 3, "items": 6})  # as of a checkpoint without bad files
    (last,) = resumed.train_dataloader()
    assert equal(last, batches[0][3])


@pytest.fixture
def fixed_manifest(tmp_path):
    """Three mixtures of two talkers, of 1.0, 1.25 and 1.5 s."""
    rows = []
    for number in range(3):
        length = 8000 + 2000 * number
        rng = np.random.default_rng(number)
        sources = {f"s{n}": rng.integers(-3000, 3000, length).astype(np.int16) for n in (1, 2)}
        row = {"duration": length / RATE, "id": f"mix{number}"}
        for name, signal in {"mix": sources["s1"] + sources["s2"], **sources}.items():
            sf.write(tmp_path / f"{name}_{number}.wav", signal, RATE)
            row[f"{name}_filepath"] = f"{name}_{number}.wav"
        rows.append(row)
    write_manifest(tmp_path / "mixtures.jsonl", rows)
    return str(tmp_path / "mixtures.jsonl")


def test_each_stage_may_have_fixed_mixtures(manifests, fixed_manifest, caplog):
    data = data_of(manifests | {"test_manifest": fixed_manifest}, test_mixtures=1)
    data.setup()
    (first, second) = data.test_dataloader()  # all of them, whole
    assert first["length"].tolist() == [8000, 10000] and first["name"] + second["name"] == ["mix0", "mix1", "mix2"]
    assert first["sources"].shape == (2, 2, 10000) and not first["sources"][0, :, 8000:].any()
    assert torch.equal(first["mixture"], first["sources"].sum(1))
    assert next(iter(data.train_dataloader()))["name"][0].startswith("s")

    caplog.set_level("INFO")
    data = data_of({"train_manifest": fixed_manifest})
    data.setup("fit")
    assert "fixed" in caplog.text
    (batch,) = data.train_dataloader()
    assert batch["sources"].shape == (2, 2, 4000)  # crops


def test_noise_cannot_be_added_to_fixed_mixtures(fixed_manifest, noise_manifest):
    data = data_of({"train_manifest": fixed_manifest}, noise_manifest=noise_manifest)
    with pytest.raises(DataError, match=r"data\.noise_manifest=.*noise\.jsonl: the mixtures of .* are fixed"):
        data.setup("fit")


def test_echo_recordings_are_refused(manifests, tmp_path):
    write_manifest(tmp_path / "echo.jsonl", [{"mic_filepath": "m.wav", "duration": 1.0, "scenario": "near_end"}])
    with pytest.raises(DataError, match=r"echo\.jsonl: holds echo recordings \(mic_filepath\), .* not for separation"):
        data_of(manifests | {"test_manifest": str(tmp_path / "echo.jsonl")}).setup("test")
