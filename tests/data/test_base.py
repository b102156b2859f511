import json
import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile as sf
import torch
from torch.utils.data import Dataset

from callbacks.resume import ExactResume
from data.base import SystemData
from data.errors import DataError, ManifestError
from data.sampler import item_key

BATCHES, BATCH_SIZE = 6, 2  # batches per epoch, items per batch
OFF = ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler"]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Points(Dataset):
    """Items with noise that is a function of (seed, epoch, index)."""

    def __init__(self, size=BATCHES * BATCH_SIZE + 1, seed=3):
        self.size, self.seed = size, seed

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        index, epoch = item_key(key, len(self))
        noise = np.random.default_rng([self.seed, epoch, index]).standard_normal()
        return torch.tensor([index, epoch, noise], dtype=torch.float32)


class PointData(SystemData):
    def __init__(self, **kwargs):
        super().__init__(train_manifest="not read", val_manifest="not read", batch_size=BATCH_SIZE, **kwargs)

    def dataset(self, stage):
        return Points(4 if stage == "val" else BATCHES * BATCH_SIZE + 1)


class Model(pl.LightningModule):
    """Learns a line; writes down what it was trained and validated on."""

    def __init__(self, read_length=False):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.line.weight, 0.5)
        torch.nn.init.constant_(self.line.bias, 0.0)
        self.read_length = read_length
        self.seen, self.validated, self.logged_at = [], [], []

    def training_step(self, batch, batch_idx):
        loss = (self.line(batch[:, 2:]) - batch[:, :1]).square().mean()
        self.seen.append((self.trainer.current_epoch, batch_idx, loss.item(), batch.tolist()))
        self.logged_at.append(self.trainer.fit_loop.epoch_loop._batches_that_stepped)
        return loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validated.append(batch.tolist())

    def configure_optimizers(self):
        if self.read_length:
            assert self.trainer.estimated_stepping_batches > 0
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class SaveEverywhere(pl.Callback):
    """Saves in every hook in which a checkpoint may be written, as <hook>-<epoch>-<batches done>.ckpt."""

    def __init__(self, folder, stop_after):
        self.folder, self.stop_after, self.paths = folder, stop_after, {}

    def save(self, trainer, hook):
        if self.folder is None or trainer.sanity_checking:
            return
        loop = trainer.fit_loop
        name = (
            f"{hook}-{max(0, loop.epoch_progress.current.ready - 1)}-{loop.epoch_loop.batch_progress.current.processed}"
        )
        self.paths[name] = self.folder / f"{name}.ckpt"
        trainer.save_checkpoint(self.paths[name])

    def on_train_epoch_start(self, trainer, module):
        self.save(trainer, "epoch_start")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.save(trainer, "batch_start")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.stop_after
        self.save(trainer, "batch_end")

    def on_validation_end(self, trainer, module):
        self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, "epoch_end")

    def on_train_end(self, trainer, module):
        self.save(trainer, "train_end")


def fit(folder=None, *, ckpt_path=None, workers=0, read_length=False, data=None, stop_after=None, **trainer_options):
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "val_check_interval": 3} | trainer_options
    callback = SaveEverywhere(folder, stop_after)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        **dict.fromkeys(OFF, False),
        callbacks=[callback, ExactResume()],
        **options,
    )
    model = Model(read_length)
    data = data or PointData(seed=1, loader={"num_workers": workers, "prefetch_factor": 2})
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer, callback.paths


def assert_continues(resumed, reference, done):
    """The resumed fit does what the reference did after `done` batches, bit for bit."""
    model, trainer, _ = resumed
    whole, whole_trainer, _ = reference
    assert model.seen == whole.seen[done:]
    assert torch.equal(model.line.weight, whole.line.weight) and torch.equal(model.line.bias, whole.line.bias)
    assert trainer.global_step == whole_trainer.global_step
    if model.seen:  # a fit that finds nothing left to do does not even close its epoch
        assert trainer.current_epoch == whole_trainer.current_epoch


def batches_done(name):
    _, epoch, batch = name.split("-")
    return BATCHES * int(epoch) + int(batch)


@pytest.mark.parametrize("workers, accumulate, read_length", [(0, 1, True), (0, 2, False), (2, 1, False), (2, 2, True)])
def test_resume_is_exact(tmp_path, workers, accumulate, read_length):
    options = {"workers": workers, "read_length": read_length, "accumulate_grad_batches": accumulate}
    reference = fit(tmp_path, **options)
    assert len(reference[0].seen) == 2 * BATCHES
    assert len({step[3][0][2] for step in reference[0].seen}) == 2 * BATCHES  # new noise in each epoch
    names = ["batch_end-0-4", "validation_end-1-3", "batch_end-0-6", "epoch_end-0-6"]
    if accumulate == 2:  # gradients of half a step are not in a checkpoint
        names.remove("validation_end-1-3")
    for name in names:
        resumed = fit(ckpt_path=reference[2][name], **options)
        assert_continues(resumed, reference, batches_done(name))


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 2 * BATCHES}, {"limit_val_batches": 0}])
def test_resume_is_exact_from_every_hook(tmp_path, limits):
    reference = fit(tmp_path, **limits)
    expected = {"batch_start-0-2", "batch_end-1-6", "epoch_start-0-0", "epoch_end-0-6", "train_end-1-6"}
    assert expected <= set(reference[2])
    names = [name for name in reference[2] if not name.startswith("batch_") or batches_done(name) % 6 in (0, 2)]
    for name in names:
        done = batches_done(name)
        if name.startswith("epoch_start-1"):  # named after the batches of the epoch before
            done = BATCHES
        resumed = fit(ckpt_path=reference[2][name], **limits)
        assert_continues(resumed, reference, done)
        if "start" not in name:  # Lightning takes a checkpoint for one from the end of a step
            assert resumed[0].logged_at == reference[0].logged_at[done:], name


@pytest.mark.parametrize("steps", [BATCHES + 2, BATCHES])
def test_more_steps_after_max_steps_continue_the_epoch(tmp_path, steps):
    """Lightning alone counts the epoch twice, or trains on one batch too many."""
    options = {"max_epochs": -1, "limit_val_batches": 0}
    reference = fit(max_steps=2 * BATCHES, **options)
    first = fit(tmp_path, max_steps=steps, **options)
    for name, path in first[2].items():
        if name.startswith(("epoch_end-1", "train_end")):
            resumed = fit(ckpt_path=path, max_steps=2 * BATCHES, **options)
            assert_continues(resumed, reference, batches_done(name))


def test_a_stop_in_mid_epoch_can_be_resumed(tmp_path):
    reference = fit(limit_val_batches=0)
    _, trainer, paths = fit(tmp_path, stop_after=4, limit_val_batches=0)
    assert trainer.global_step == 4
    for name in ("batch_end-0-4", "epoch_end-0-4", "train_end-0-4"):
        assert_continues(fit(ckpt_path=paths[name], limit_val_batches=0), reference, 4)


def test_the_position_in_the_checkpoint(tmp_path):
    _, _, paths = fit(tmp_path)
    expected = {
        "batch_start-0-2": (0, 2),
        "batch_end-0-2": (0, 2),
        "validation_end-0-3": (0, 3),
        "batch_end-0-6": (1, 0),
        "validation_end-0-6": (1, 0),
        "epoch_end-0-6": (1, 0),
        "epoch_start-1-6": (1, 0),
        "batch_start-1-0": (1, 0),
        "train_end-1-6": (2, 0),
    }
    for name, (epoch, batch) in expected.items():
        state = torch.load(paths[name], weights_only=True)["PointData"]
        assert state == {"epoch": epoch, "batch": batch, "items": batch * BATCH_SIZE, "together": BATCH_SIZE}, name


def test_validation_items_are_fixed(tmp_path):
    model, _, _ = fit(val_check_interval=1.0)
    assert model.validated[:2] == model.validated[2:] and model.validated[0][0][1] == 0


def test_another_batch_size_repeats_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    _, _, paths = fit(tmp_path, limit_val_batches=0)
    first = {tuple(item[:2]) for item in torch.tensor(fit(limit_val_batches=0)[0].seen[0][3]).tolist()}
    data = PointData(seed=1, loader={"num_workers": 0})
    data.batch_sizes["train"] = 1
    model, _, _ = fit(ckpt_path=paths["batch_end-0-1"], data=data, limit_val_batches=0, max_epochs=1)
    assert "another batch size" in caplog.text
    assert first.isdisjoint(tuple(item[:2]) for step in model.seen for item in step[3])


def test_a_second_fit_begins_anew(tmp_path):
    _, _, paths = fit(tmp_path)
    data = PointData(seed=1, loader={"num_workers": 0})
    fit(ckpt_path=paths["batch_end-0-4"], data=data)
    assert fit(data=data)[0].seen == fit()[0].seen


def test_fit_without_validation_data():
    class TrainOnly(PointData):
        def has_data(self, stage):
            return stage == "train"

    model, trainer, _ = fit(data=TrainOnly(loader={"num_workers": 0}), val_check_interval=1.0)
    assert len(model.seen) == 2 * BATCHES and model.validated == []


class Listed(SystemData):
    """The rows are the data."""

    def dataset(self, stage):
        return self.rows(stage)


@pytest.mark.parametrize(
    "options, validations, says",
    [
        ({"val_check_interval": 8}, 1, "trainer.val_check_interval=8 is more than the 6 batches of an epoch"),
        ({"val_check_interval": 5, "limit_train_batches": 4}, 1, "is more than the 4 batches of an epoch"),
        ({"val_check_interval": 4, "limit_train_batches": 0.5}, 1, "is more than the 3 batches of an epoch"),
        ({"val_check_interval": 6}, 2, ""),
        ({"val_check_interval": 1.0}, 2, ""),
        ({"val_check_interval": 8, "check_val_every_n_epoch": None}, 1, ""),
    ],
)
def test_a_validation_interval_of_more_than_an_epoch(caplog, options, validations, says):
    with caplog.at_level(logging.INFO, logger="data.base"):
        model, _, _ = fit(**options)
    assert len(model.validated) == 2 * validations  # two batches each
    assert (says in caplog.text) if says else not caplog.text


def test_each_stage_reads_its_own_manifest_once(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio_filepath": "a.wav", "duration": 1.0}) + "\n")
    data = Listed(test_manifest=str(tmp_path / "a.jsonl"), train_manifest=str(tmp_path / "missing.jsonl"))
    data.setup("test")
    (tmp_path / "a.jsonl").unlink()
    data.setup("test")
    assert data.rows("test")[0]["audio_filepath"] == str(tmp_path / "a.wav")
    assert data.val_dataloader() == [] and data.rows("val") is None
    with pytest.raises(ManifestError, match=r"missing\.jsonl"):
        data.setup("fit")


def test_missing_data_is_named():
    with pytest.raises(DataError, match=r"data\.train_manifest"):
        Listed(val_manifest="x").setup("fit")
    with pytest.raises(DataError, match=r"data\.test_manifest"):
        Listed(train_manifest="x").setup("test")


def test_a_folder_of_recordings_is_split_by_speaker(tmp_path):
    for number in range(6):
        sf.write(tmp_path / f"s{number}_0.wav", np.zeros(800), 8000)
    data, other_seed = Listed(folder=str(tmp_path), seed=0), Listed(folder=str(tmp_path), seed=9)
    data.setup()
    assert {stage: len(data.rows(stage)) for stage in ("train", "val", "test")} == {"train": 2, "val": 2, "test": 2}
    assert data.rows("test") == other_seed.rows("test")


def test_too_little_data_for_a_batch():
    data = PointData(loader={"num_workers": 0})
    data.batch_sizes["train"] = 64
    data.setup("fit")
    with pytest.raises(DataError, match="13 examples are not one batch of 64"):
        data.train_dataloader()


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"folder": "x", "val_manifest": "y"}, "not both"),
        ({"batch_size": 0}, "batch_size"),
        ({"loader": {"workers": 2}}, r"loader\.workers"),
        ({"loader": {"num_workers": -2}}, "num_workers"),
        ({"max_bad_files": -1}, "max_bad_files"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction"),
        *(({"seed": value}, "^seed must be a whole number") for value in ("abc", None, 1.5, -3, True)),
        *(({"max_bad_files": value}, "^max_bad_files must be a whole number") for value in ("abc", None, 1.5, True)),
        *(({"max_bad_fraction": value}, "^max_bad_fraction must be a number") for value in ("abc", None, True)),
    ],
)
def test_bad_options_are_named(bad, says):
    with pytest.raises(ValueError, match=says):
        SystemData(**bad)
