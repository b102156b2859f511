import json
import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile as sf
import torch

from callbacks.resume import ExactResume
from data.errors import DataError
from data.ssl import SelfSupervisedData

RATE = 4000
ALWAYS = {"prob": 1.0, "noise_ratio": 1.0}
TENSORS = ("audio", "length", "noisy", "noisy_length", "mask_seed")
OFF = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler")


def write(path, samples, rate=RATE):
    path.parent.mkdir(exist_ok=True)
    sf.write(path, samples, rate, subtype="FLOAT")
    return {"audio_filepath": str(path), "duration": len(samples) / rate}


def listed(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """Manifests of 13 clips of 1 to 2 s, one of them without duration, and of two noises, one longer than any clip."""
    rng = np.random.default_rng(0)
    rows = [
        write(tmp_path / "clips" / f"{n}.wav", 0.1 * rng.standard_normal(RATE + 300 * n).astype(np.float32))
        for n in range(13)
    ]
    del rows[4]["duration"]
    noises = [
        write(tmp_path / "noises" / f"{n}.wav", 0.1 * rng.standard_normal(n).astype(np.float32)) for n in (2000, 12000)
    ]
    return {
        "manifest_filepath": listed(tmp_path / "train.json", rows),
        "noise_manifest": listed(tmp_path / "noise.json", noises),
        "sample_rate": RATE,
        "batch_size": 4,
        "num_workers": 0,
    }


def data_of(section, *, stage="fit", **options):
    fixed = {key: value for key, value in section.items() if key not in ("crop_s", "is_concat")}
    data = SelfSupervisedData(**{"train_ds": section, "validation_ds": fixed} | options)
    data.setup(stage)
    return data


def equal(one, other):
    return one["name"] == other["name"] and all(torch.equal(one[key], other[key]) for key in TENSORS)


def assert_equal(batches, others):
    assert batches and all(equal(one, other) for one, other in zip(batches, others, strict=True))


def only(tmp_path, samples, **section):
    """The single batch of a manifest of one recording."""
    row = write(tmp_path / "clips" / "only.wav", samples)
    manifest = listed(tmp_path / "only.json", [row])
    section = {"manifest_filepath": manifest, "sample_rate": RATE, "batch_size": 1, "num_workers": 0} | section
    (batch,) = data_of(section).train_dataloader()
    return batch


def test_a_batch(corpus):
    data = data_of(corpus | {"batch_augmentor": ALWAYS})
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    for batch in batches:
        assert set(batch) == {*TENSORS, "name"}
        assert batch["audio"].shape == batch["noisy"].shape == (4, int(batch["length"].max()))
        assert torch.equal(batch["length"], batch["noisy_length"]) and batch["mask_seed"].dtype == torch.int64
        for item, name in enumerate(batch["name"]):
            audio, noisy, length = (batch[key][item] for key in ("audio", "noisy", "length"))
            assert length == RATE + 300 * int(name)
            np.testing.assert_array_equal(audio[:length], sf.read(_path(data, name), dtype="float32")[0])
            assert not audio[length:].any() and not noisy[length:].any()
            assert int((audio != noisy).sum()) == pytest.approx(length / 2, abs=2)  # half of it is covered
    assert len({int(seed) for batch in batches for seed in batch["mask_seed"]}) == 12


def _path(data, name):
    return next(row["audio_filepath"] for row in data.rows("train") if row["audio_filepath"].endswith(f"/{name}.wav"))


@pytest.mark.parametrize("bucketing", [False, True])
def test_items_do_not_depend_on_workers_or_a_resume(corpus, bucketing):
    section = corpus | {"batch_augmentor": ALWAYS, "use_bucketing": bucketing}
    data = data_of(section, seed=5)
    batches = list(data.train_dataloader())
    assert_equal(batches, list(data_of(section | {"num_workers": 2}, seed=5).train_dataloader()))
    resumed = data_of(section, seed=5)
    resumed.load_state_dict({"epoch": 0, "batch": 1, "items": 4})
    assert_equal(list(resumed.train_dataloader()), batches[1:])
    others = list(data_of(section, seed=6).train_dataloader())
    assert not any(equal(one, other) for one, other in zip(batches, others, strict=True))


def test_epochs_have_other_noise_and_masks_and_validation_always_the_same(corpus):
    section = corpus | {"batch_augmentor": ALWAYS}
    data = data_of(section)
    train, val = data.train_dataloader(), data.val_dataloader()
    seen = []
    for epoch in (0, 1):
        train.sampler.set_epoch(epoch)
        val.sampler.set_epoch(epoch)
        seen.append((list(train), list(val)))
    assert_equal(seen[0][1], seen[1][1])
    assert_equal(seen[0][1], list(data_of(section, seed=9).val_dataloader()))
    assert sorted(int(name) for batch in seen[0][1] for name in batch["name"]) == list(range(13))
    first, second = ({int(seed) for batch in part for seed in batch["mask_seed"]} for part, _ in seen)
    assert len(first) == len(second) == 12 and not first & second


def test_bucketing_pads_less(corpus):
    plain, bucketed = (data_of(corpus | {"use_bucketing": on}) for on in (False, True))
    samples = [sum(batch["audio"].numel() for batch in data.train_dataloader()) for data in (plain, bucketed)]
    assert samples[1] < 0.95 * samples[0]


def test_concat_goes_through_the_manifests_in_turn(corpus, tmp_path):
    other = listed(tmp_path / "other.json", [write(tmp_path / "clips" / "other.wav", np.ones(RATE, np.float32))])
    section = corpus | {"manifest_filepath": [corpus["manifest_filepath"], other], "batch_size": 2}
    batches = list(
        data_of(section | {"is_concat": True, "concat_sampling_technique": "round-robin"}).train_dataloader()
    )
    assert len(batches) == 7 and all(batch["name"].count("other") == 1 for batch in batches)
    mistaken = data_of(section | {"is_concat": True, "concat_sampling_technique": "random"})
    with pytest.raises(DataError, match="^model.train_ds.concat_sampling_probabilities must be 2 numbers"):
        mistaken.train_dataloader()


def test_short_clips_are_repeated_and_long_ones_left_out(corpus, tmp_path, caplog):
    ramp = np.arange(1000, dtype=np.float32) / 1000
    batch = only(tmp_path, ramp, min_duration=0.1, min_audio_len_secs=1.0)
    assert batch["length"].tolist() == [4000]
    np.testing.assert_array_equal(batch["audio"][0], np.tile(ramp, 4))
    with pytest.raises(DataError, match="model.train_ds.manifest_filepath=.*only.json: none of its 1 recordings lasts"):
        only(tmp_path, ramp)
    with caplog.at_level(logging.INFO):
        data = data_of(corpus | {"max_duration": 1.5})
    names = [row["audio_filepath"].rsplit("/", 1)[1] for row in data.rows("train")]
    assert names == [f"{number}.wav" for number in range(7)]  # 4 does not say how long it is
    assert "6 of 13 recordings are left out" in caplog.text


@pytest.mark.parametrize("selector, level", [(None, 0.25), ("average", 0.25), (0, 0.5), (1, 0.0)])
def test_stereo(tmp_path, selector, level):
    stereo = np.stack([np.full(RATE, 0.5), np.zeros(RATE)], 1).astype(np.float32)
    batch = only(tmp_path, stereo, channel_selector=selector)
    assert torch.equal(batch["audio"], torch.full((1, RATE), level))


def test_a_channel_that_is_not_there_is_a_bad_file(tmp_path):
    with pytest.raises(DataError, match=r"only.wav: has 1 channel\(s\), no channel 1"):
        only(tmp_path, np.ones(RATE, np.float32), channel_selector=1)


def test_silence_is_trimmed(tmp_path):
    speech = np.zeros(4 * RATE, np.float32)
    speech[RATE : 3 * RATE] = np.random.default_rng(0).standard_normal(2 * RATE)
    whole, trimmed = (only(tmp_path, speech, trim_silence=on) for on in (False, True))
    assert whole["length"].item() == 4 * RATE and 2 * RATE <= trimmed["length"].item() < 3.3 * RATE


@pytest.mark.parametrize("nemo_compat", [False, True])
def test_noise_shorter_and_longer_than_the_clip_without_augmentor(corpus, nemo_compat):
    data = data_of(corpus, nemo_compat=nemo_compat)
    seen = set()
    for batch in data.train_dataloader():
        assert torch.equal(batch["noisy_length"], batch["length"])
        added = (batch["noisy"] != batch["audio"]).sum(1).tolist()
        for count, length in zip(added, batch["length"].tolist(), strict=True):
            assert count in (2000, length)
            seen.add(count == length)
    assert seen == {True, False}


def test_nemo_compat_leaves_raw_noise_where_nothing_is_chosen(corpus):
    never = corpus | {"batch_augmentor": {"prob": 0.0}}
    fixed, raw = (next(iter(data_of(never, nemo_compat=on).val_dataloader())) for on in (False, True))
    assert torch.equal(fixed["noisy"], fixed["audio"]) and torch.equal(fixed["noisy_length"], fixed["length"])
    assert not torch.equal(raw["noisy"], raw["audio"]) and 2000 in raw["noisy_length"].tolist()


def test_all_zero_noise_is_no_reason_to_stop(corpus, tmp_path):
    noise = listed(tmp_path / "zero.json", [write(tmp_path / "noises" / "zero.wav", np.zeros(500, np.float32))])
    batch = next(iter(data_of(corpus | {"noise_manifest": noise, "batch_augmentor": ALWAYS}).train_dataloader()))
    assert torch.isfinite(batch["noisy"]).all() and (batch["noisy"] != batch["audio"]).any(1).all()


def test_unreadable_noise_and_recordings_are_counted_and_replaced(corpus, tmp_path, caplog):
    (tmp_path / "noises" / "2000.wav").unlink()
    (tmp_path / "noises" / "12000.wav").write_bytes(b"RIFF")
    (tmp_path / "clips" / "3.wav").write_bytes(b"")
    data = data_of(corpus)
    assert list(data.bad_files) == [str(tmp_path / "noises" / "2000.wav")]
    batches = list(data.val_dataloader())
    assert "3" not in [name for batch in batches for name in batch["name"]]
    assert all(torch.equal(batch["noisy"], batch["audio"]) for batch in batches)
    found = {path.rsplit("/", 2)[1] + "/" + path.rsplit("/", 1)[1]: text for path, text in data.bad_files.items()}
    assert set(found) == {"noises/2000.wav", "noises/12000.wav", "clips/3.wav"}
    assert found["noises/12000.wav"].startswith("noise.json, line 2: ")
    strict = data_of(corpus, max_bad_files=1, max_bad_fraction=0.0)
    with pytest.raises(DataError, match="of 15 files cannot be used, more than data.max_bad_files=1"):
        list(strict.val_dataloader())


def test_which_stages_have_data(corpus):
    data = SelfSupervisedData(train_ds={}, validation_ds=None)
    assert not any(data.has_data(stage) for stage in ("train", "val", "test"))
    with pytest.raises(DataError, match="no data for train: set model.train_ds.manifest_filepath=<file>"):
        data.setup("fit")
    validation = corpus | {"manifest_filepath": None, "batch_size": 2}
    data = data_of(corpus, validation_ds=validation, test_manifest=corpus["manifest_filepath"], stage="test")
    assert not data.has_data("val") and data.settings["test"].batch_size == 2
    assert sum(len(batch["name"]) for batch in data.test_dataloader()) == 13
    test = data_of(
        corpus, test_ds={"manifest_filepath": corpus["manifest_filepath"], "noise_manifest": None}, stage="test"
    )
    assert test.settings["test"].noise_manifest == (corpus["noise_manifest"],)


def test_loader_and_drop_last_follow_the_section(corpus):
    data = data_of(corpus | {"num_workers": 1}, loader={"num_workers": None, "prefetch_factor": 2})
    assert data.train_dataloader().num_workers == 1 and data.val_dataloader().prefetch_factor == 2
    assert data_of(corpus | {"num_workers": 1}, loader={"num_workers": 0}).train_dataloader().num_workers == 0
    whole = data_of(corpus | {"drop_last": False, "shuffle": False})
    assert [len(batch["name"]) for batch in whole.train_dataloader()] == [4, 4, 4, 1]
    assert [name for batch in whole.train_dataloader() for name in batch["name"]] == [str(n) for n in range(13)]
    with pytest.raises(DataError, match="13 examples are not one batch of 14 .* lower model.train_ds.batch_size"):
        data_of(corpus | {"batch_size": 14}).train_dataloader()


class Listener(pl.LightningModule):
    """Writes down which recordings it was trained on; what it learns does not matter."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.heard = []

    def training_step(self, batch, batch_idx):
        self.heard.append((tuple(batch["name"]), batch["noisy"].sum().item(), batch["mask_seed"].tolist()))
        return self.weight * batch["noisy"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_crops_of_a_recording_that_is_shorter_than_its_manifest_says(tmp_path):
    write(tmp_path / "a.wav", np.full(2 * RATE, 0.1, np.float32))
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 30.0}\n')
    one = {"sample_rate": RATE, "batch_size": 1, "num_workers": 0}
    data = data_of({"manifest_filepath": str(tmp_path / "m.jsonl"), "crop_s": 1.0, **one})
    dataset = data.train_dataloader().dataset
    assert all(len(dataset[0, epoch][0]["audio"]) == RATE for epoch in range(10)) and not data.bad_files


@pytest.mark.parametrize("drawn", [{"crop_s": 1.0}, {"is_concat": True}])
def test_only_training_draws(corpus, drawn):
    (key, value), *_ = drawn.items()
    with pytest.raises(DataError, match=f"^model.validation_ds.{key}={value}: only training draws"):
        data_of(corpus, validation_ds=corpus | drawn)


def test_crops_are_other_parts_each_epoch(tmp_path):
    ramp = (np.arange(4 * RATE) / (4 * RATE)).astype(np.float32)
    write(tmp_path / "a.wav", ramp)
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "offset": 0.5, "duration": 3.0}\n')
    one = {"sample_rate": RATE, "batch_size": 1, "num_workers": 0}
    data = data_of({"manifest_filepath": str(tmp_path / "m.jsonl"), "crop_s": 1.0, **one})
    dataset = data.train_dataloader().dataset
    crops = [dataset[0, epoch][0]["audio"] for epoch in range(20)]
    starts = torch.stack([crop[0] for crop in crops]) * 4
    assert all(len(crop) == RATE for crop in crops) and len(starts.unique()) > 15
    assert starts.min() >= 0.49 and starts.max() <= 2.51, "inside the part that the row is"
    assert torch.equal(dataset[0, 3][0]["audio"], crops[3])
    whole = data_of({"manifest_filepath": str(tmp_path / "m.jsonl"), "crop_s": 5.0, **one})
    assert len(whole.train_dataloader().dataset[0, 0][0]["audio"]) == 3 * RATE


@pytest.mark.parametrize("section", [{"use_bucketing": True}, {"is_concat": True, "concat_sampling_scale": 0.8}])
def test_a_resumed_run_goes_on_with_the_next_batch(corpus, tmp_path, section):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    def fit(ckpt_path=None):
        model = Listener()
        options = dict.fromkeys(OFF, False) | {"limit_val_batches": 0, "callbacks": [Save(), ExactResume()]}
        trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=9, **options)
        data = SelfSupervisedData(train_ds=corpus | {"batch_size": 2} | section, seed=3)
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return model.heard

    whole = fit()
    assert len(whole) == 9 and fit(tmp_path / "4.ckpt") == whole[4:]
