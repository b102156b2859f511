import logging
import pickle

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile as sf
import torch
from torch.utils.data import Dataset

from callbacks.resume import ExactResume
from data.bad_files import BadFiles, ResilientDataset
from data.base import SystemData
from data.errors import AudioError, DataError
from data.manifest import write_manifest
from data.mixtures import SeparationData

BAD = {"s0_1": "truncated", "s1_0": "empty", "s1_2": "NaN", "s3_1": "no such file", "s4_0": "folder"}
MISSING = ("s3_1", "s4_0")


def spoil(folder):
    """One recording of each bad kind."""
    whole = (folder / "s0_1.wav").read_bytes()
    (folder / "s0_1.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "s1_0.wav").write_bytes(b"")
    sf.write(folder / "s1_2.wav", np.full(8000, np.nan), 8000, subtype="FLOAT")
    (folder / "s3_1.wav").unlink()
    (folder / "s4_0.wav").unlink()
    (folder / "s4_0.wav").mkdir()


@pytest.fixture
def manifest(make_corpus, tmp_path):
    rows = make_corpus(tmp_path / "speech", speakers=6, utterances=3)
    spoil(tmp_path / "speech")
    write_manifest(tmp_path / "train.jsonl", rows)
    return str(tmp_path / "train.jsonl")


def data_of(manifest, *, workers=0, **options):
    defaults = {"batch_size": 2, "segment_s": 0.25, "train_mixtures": 40, "cache": False}
    loader = {"num_workers": workers, "prefetch_factor": 1} if workers else {"num_workers": 0}
    return SeparationData(train_manifest=manifest, loader=loader, **(defaults | options))


def equal(one, other):
    return torch.equal(one["sources"], other["sources"]) and one["name"] == other["name"]


@pytest.mark.parametrize("cache", [True, False])
def test_bad_recordings_are_replaced_counted_and_named_once(manifest, tmp_path, caplog, cache):
    data = data_of(manifest, cache=cache, train_mixtures=100)
    data.setup("fit")
    assert sorted(data.bad_files) == [str(tmp_path / "speech" / f"{name}.wav") for name in MISSING]
    batches = list(data.train_dataloader())
    assert len(batches) == 50 and all(set(batch) == {"mixture", "sources", "length", "name"} for batch in batches)
    assert all(torch.isfinite(batch["sources"]).all() and batch["mixture"].any(-1).all() for batch in batches)
    assert len(data.bad_files) == len(BAD)
    for name, reason in BAD.items():
        path = str(tmp_path / "speech" / f"{name}.wav")
        line = 1 + 3 * int(name[1]) + int(name[3])
        assert data.bad_files[path].startswith(f"train.jsonl, line {line}: {path}: ") and reason in data.bad_files[path]
        assert caplog.text.count(data.bad_files[path]) == 1


def test_replacements_do_not_depend_on_workers_or_a_resume(manifest):
    alone, with_workers = data_of(manifest), data_of(manifest, workers=2)
    for data in (alone, with_workers):
        data.setup("fit")
    batches, others = list(alone.train_dataloader()), list(with_workers.train_dataloader())
    assert all(equal(one, other) for one, other in zip(batches, others, strict=True))
    assert alone.bad_files == with_workers.bad_files
    resumed = data_of(manifest)
    resumed.setup("fit")
    resumed.load_state_dict({"epoch": 0, "batch": 7, "items": 14})
    rest = list(resumed.train_dataloader())
    assert all(equal(one, other) for one, other in zip(rest, batches[7:], strict=True))


def test_too_many_missing_files_end_the_run_before_training(make_corpus, tmp_path):
    rows = make_corpus(tmp_path, speakers=5, utterances=3)
    write_manifest(tmp_path / "train.jsonl", rows)
    for row in rows[:13]:
        (tmp_path / row["audio_filepath"]).unlink()
    with pytest.raises(DataError) as error:
        data_of(str(tmp_path / "train.jsonl")).setup("fit")
    lines = str(error.value).splitlines()
    assert lines[0].startswith(
        "13 of 15 files cannot be used, more than data.max_bad_files=10 and data.max_bad_fraction=0.01"
    )
    assert lines[1] == f"train.jsonl, line 1: {rows[0]['audio_filepath']}: no such file"
    assert len(lines) == 12 and lines[-1] == "and 3 more"


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_end_the_run_with_the_list(manifest, workers):
    data = data_of(manifest, workers=workers, max_bad_files=2)
    data.setup("fit")  # two are missing
    with pytest.raises(DataError, match=r"(?s)3 of 18 files.*s3_1\.wav: no such file.*s4_0\.wav: is a folder") as error:
        list(data.train_dataloader())
    assert len(str(error.value).splitlines()) == 4


def test_the_accepted_share_counts_in_large_corpora():
    rows = [{"audio_filepath": __file__}, *({"audio_filepath": f"{i}.wav"} for i in range(4))]
    BadFiles(max_files=0, max_fraction=0.8).watch(rows)
    with pytest.raises(DataError, match="4 of 5"):
        BadFiles(max_files=0, max_fraction=0.79).watch(rows)
    with pytest.raises(DataError, match="4 of 5"):
        BadFiles(max_files=3, max_fraction=0.0).watch(rows)


class Numbers(Dataset):
    """Item (index, epoch); some indices have a bad file."""

    def __init__(self, size, bad=()):
        self.size, self.bad = size, bad

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        if key[0] in self.bad:
            raise AudioError(f"{key[0]}.wav: is empty (0 bytes)")
        return torch.tensor(key)


def test_the_next_example_takes_the_place_and_after_the_last_the_first():
    dataset = ResilientDataset(Numbers(5, bad=(1, 2, 4)), BadFiles())
    assert [dataset[index, 7][0].tolist() for index in range(5)] == [[0, 7], [3, 7], [3, 7], [3, 7], [0, 7]]
    assert dataset[1, 7][1] == ["1.wav: is empty (0 bytes)", "2.wav: is empty (0 bytes)"]
    assert pickle.loads(pickle.dumps(dataset))[1, 7][0].tolist() == [3, 7]  # as a spawned worker gets it


def test_data_without_a_good_example_is_an_error():
    dataset = ResilientDataset(Numbers(3, bad=(0, 1, 2)), BadFiles())
    with pytest.raises(DataError, match=r"100 examples in a row cannot be made, the last because of 0\.wav: is empty"):
        dataset[0, 0]


def test_several_processes_do_not_stop_alone():
    bad_files = BadFiles(max_files=0)
    bad_files.num_processes = 2
    bad_files.add(["1.wav: is empty"])
    bad_files.merge({"2.wav": "2.wav: is empty"})
    with pytest.raises(DataError, match=r"(?s)2 of 0 files.*1\.wav.*2\.wav"):
        bad_files.check()


class NumberData(SystemData):
    def __init__(self, *, bad, **options):
        super().__init__(batch_size=2, loader={"num_workers": 0}, **options)
        self.bad = bad

    def has_data(self, stage):
        return stage == "train"

    def dataset(self, stage):
        return Numbers(12, self.bad)


class Model(pl.LightningModule):
    """Writes down what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.weight + batch.float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder=None, ckpt_path=None, **options):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[ExactResume()],
        **dict.fromkeys(off, False),
        **{"max_epochs": 2} | options,
    )
    model = Model()
    trainer.fit(model, data, ckpt_path=ckpt_path)
    if folder is not None:
        trainer.save_checkpoint(folder / "x.ckpt")
    return model


def test_a_resumed_run_replaces_alike_and_counts_anew(tmp_path):
    """Who resumes may have mended the files."""
    whole = fit(NumberData(bad=(3, 8)))
    assert all(index not in (3, 8) for batch in whole.seen for index, _ in batch)
    fit(NumberData(bad=(3, 8)), tmp_path, max_steps=7)
    data = NumberData(bad=(3, 8))
    resumed = fit(data, ckpt_path=tmp_path / "x.ckpt")
    assert resumed.seen == whole.seen[7:] and set(data.bad_files) <= {"3.wav", "8.wav"}


def test_a_path_may_hold_what_ends_one_in_a_message():
    bad_files = BadFiles()
    bad_files.watch([{"audio_filepath": path, "manifest_line": path[-5]} for path in ("Take: 1.wav", "Take: 2.wav")])
    bad_files.found.clear()
    bad_files.add(["Take: 1.wav: is empty: 0 bytes", "Take: 2.wav: is empty: 0 bytes"])
    assert sorted(bad_files.found) == ["Take: 1.wav", "Take: 2.wav"]
    bad_files.add(["'odd\\0.wav': is empty"])
    assert "odd\\0.wav" in bad_files.found


def test_training_stops_at_the_batch_that_is_one_too_many():
    data = NumberData(bad=(3, 8), max_bad_files=1)
    with pytest.raises(DataError, match=r"(?s)2 of 0 files cannot be used.*3\.wav.*8\.wav"):
        fit(data)


def test_bad_fixed_mixtures_give_way_to_the_next(tmp_path):
    rows = []
    for number in range(3):
        files = {f"{name}_filepath": f"{name}_{number}.wav" for name in ("mix", "s1", "s2")}
        for file in files.values():
            sf.write(tmp_path / file, 0.1 * np.random.default_rng(number).standard_normal(8000), 8000)
        rows.append({**files, "duration": 1.0, "id": f"mix{number}"})
    (tmp_path / "s2_1.wav").write_bytes(b"")
    write_manifest(tmp_path / "test.jsonl", rows)
    data = SeparationData(test_manifest=str(tmp_path / "test.jsonl"), batch_size=1, loader={"num_workers": 0})
    data.setup("test")
    assert [batch["name"][0] for batch in data.test_dataloader()] == ["mix0", "mix2", "mix2"]
    (text,) = data.bad_files.values()
    assert text.startswith("test.jsonl, line 2: ") and "s2_1.wav: is empty" in text
