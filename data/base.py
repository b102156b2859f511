"""What the data of all systems share: manifests, loaders, the position that a resume continues from.

Decisions that are not obvious
* The position is taken from Lightning's own counters when a checkpoint is written, in the words "epoch E, B
  batches done", and turned into a sampler that starts there. Workers, prefetching and the moment of the
  save play no part.
* The loop counters themselves are Lightning's, and in some places it resumes them wrongly (a closed epoch
  with `max_steps`, a validation that was due). callbacks/resume.py mends that; this position fits what it
  does.
* A file that cannot be used does not stop a run, see data/bad_files.py. The count is not in the state: who resumes a
  run may have mended the files.
* Lightning stores the state under the class's `__qualname__`: renaming a subclass loses the position of old
  checkpoints.
"""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from data.bad_files import BadFiles, ResilientDataset
from data.checks import whole_number
from data.errors import DataError
from data.kept import KeptBatches
from data.loader import choose_loader_settings, make_loader
from data.manifest import read_manifest
from data.sampler import EpochSampler
from data.speakers import scan_speakers, split_by_speaker

log = logging.getLogger(__name__)

STAGES = ("train", "val", "test")
_STAGES_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": (), None: STAGES}
_LOADER_KEYS = (
    "num_workers",
    "prefetch_factor",
    "pin_memory",
    "persistent_workers",
    "multiprocessing_context",
    "keep_on_device",
    "keep_on_device_mb",
)
_START = {"epoch": 0, "batch": 0, "items": 0, "together": 0}


class SystemData(pl.LightningDataModule):
    """Base of every system's data module. A subclass implements `dataset(stage)`.

    Use it with `Trainer(use_distributed_sampler=False)`: its samplers know rank and world size.

    Args:
        train_manifest: manifest to train on.
        val_manifest: manifest to validate on; None: no validation.
        test_manifest: manifest to test on.
        folder: in place of manifests, a folder that `scan_folder` splits into the three parts; a subclass's argument
            for it is called `FOLDER_KEY`.
        batch_size: training examples per process and step.
        eval_batch_size: examples per process in validation and test; None: `batch_size`.
        seed: seed of order and of all randomness in training examples.
        max_bad_files: files that cannot be used and are passed over before the run is stopped.
        max_bad_fraction: the same as a share of all files in the manifests; the larger number counts.
        loader: num_workers, prefetch_factor, pin_memory, persistent_workers, multiprocessing_context, as in
            `data.loader.choose_loader_settings`; keep_on_device: batches of stages that are the same in each epoch stay
            on the training device; keep_on_device_mb: at most that many MiB of each stage.
    """

    FOLDER_KEY: ClassVar[str] = "speech_dir"
    LENGTH_KEY: ClassVar[str | None] = None
    """The setting by which training examples become shorter or smaller, and need less memory."""

    def __init__(
        self,
        *,
        train_manifest: str | None = None,
        val_manifest: str | None = None,
        test_manifest: str | None = None,
        folder: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        seed: int = 0,
        max_bad_files: int = 10,
        max_bad_fraction: float = 0.01,
        loader: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.manifests = {"train": train_manifest, "val": val_manifest, "test": test_manifest}
        if folder is not None and any(self.manifests.values()):
            key = self.FOLDER_KEY
            raise ValueError(f"give either {key} or manifests, not both: {key} is split into all three parts")
        for stage, manifest in self.manifests.items():
            if manifest is not None and not (isinstance(manifest, str | os.PathLike) and str(manifest)):
                raise ValueError(f"{stage}_manifest must be the path of a manifest, got {manifest!r}")
        batch_size = whole_number("batch_size", batch_size, least=1)
        eval_batch_size = whole_number(
            "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, least=1
        )
        unknown = sorted(set(loader or {}) - set(_LOADER_KEYS))
        if unknown:
            raise ValueError(f"loader.{unknown[0]}: no such key, there are {', '.join(_LOADER_KEYS)}")
        loader = dict(loader or {})
        self.keep_on_device = loader.pop("keep_on_device", False)
        if not isinstance(self.keep_on_device, bool):
            raise ValueError(f"loader.keep_on_device must be true or false, got {self.keep_on_device!r}")
        self.keep_on_device_mb = whole_number(
            "loader.keep_on_device_mb", loader.pop("keep_on_device_mb", 1024), least=1
        )
        choose_loader_settings(**loader)  # bad values are refused here, not when training starts
        self.folder = folder
        self.batch_sizes = {"train": batch_size, "val": eval_batch_size, "test": eval_batch_size}
        self.seed = whole_number("seed", seed, least=0)
        self.loader = loader
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._bad_files = BadFiles(max_files=max_bad_files, max_fraction=max_bad_fraction)
        self._datasets: dict[str, ResilientDataset | None] = {}
        self._resumed = dict(_START)

    def dataset(self, stage: str) -> Dataset | None:
        """The dataset of a stage (train, val, test), or None when it has no data. Called once per stage.

        It is indexed with the pair `(index, epoch)`. Where it raises an AudioError (any FileError), the example is
        replaced by the next one.
        """
        raise NotImplementedError

    def has_data(self, stage: str) -> bool:
        """Whether the configuration names data for this stage (nothing is read)."""
        return self.folder is not None or self.manifests[stage] is not None

    def scan_folder(self, folder: str) -> dict[str, list[dict[str, Any]]]:
        """The rows of train, val and test: by default of recordings, split 80/10/10 by speaker.

        The split depends on the speakers' names only, so that other seeds are tested on the same voices.
        """
        return split_by_speaker(scan_speakers(folder))

    def rows(self, stage: str) -> list[dict[str, Any]] | None:
        """The manifest rows of a stage, read at the first call; None when it has no data."""
        if not self.has_data(stage):
            return None
        if stage not in self._rows:
            if self.folder is not None:
                self._rows = self.scan_folder(self.folder)
                self._bad_files.watch(row for rows in self._rows.values() for row in rows)
            else:
                self._rows[stage] = self.read_rows(str(self.manifests[stage]))
        return self._rows[stage]

    def read_rows(self, manifest: str, *, required: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of a manifest, see `read_manifest`; files that are missing count as bad.

        Raises:
            DataError: the manifest cannot be read, or too many of its files are missing.
        """
        rows = read_manifest(Path(manifest), required=required)
        self._bad_files.watch(rows)
        return rows

    @property
    def bad_files(self) -> dict[str, str]:
        """Files that could not be used so far: path -> what is wrong, with the manifest line."""
        return dict(self._bad_files.found)

    def merge_bad_files(self, found: dict[str, str]) -> None:
        """Add what all processes have found, which callbacks/bad_files.py collects.

        Raises:
            DataError: these are too many.
        """
        self._bad_files.merge(found)
        self._bad_files.check()

    def setup(self, stage: str | None = None) -> None:
        """Read what a Trainer function (fit, validate, test, predict) needs.

        Raises:
            DataError: it needs data that the configuration does not name, or that cannot be read.
        """
        for part in _STAGES_OF[stage]:
            optional = stage is None or (stage == "fit" and part == "val")
            if not self.has_data(part) and not optional:
                raise DataError(f"no data for {part}: {self.data_hint(part)}")
            if part not in self._datasets:
                dataset = self.dataset(part) if self.has_data(part) else None
                self._datasets[part] = None if dataset is None else ResilientDataset(dataset, self._bad_files)

    def train_dataloader(self) -> DataLoader | list:
        loader = self._loader("train")
        if self.trainer is not None:
            _settle_validation(self.trainer, len(loader))
        return loader

    def val_dataloader(self) -> DataLoader | list:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader | list:
        return self._loader("test")

    def loader_settings(self, stage: str) -> dict[str, Any]:
        """Arguments of `data.loader.make_loader` for a stage, beyond those that it always gets."""
        return self.loader

    def key(self, stage: str, name: str) -> str:
        """How a setting of a stage is typed, for messages."""
        return f"data.{name}"

    def batch_size_key(self, stage: str) -> str:
        """How the batch size of a stage is typed."""
        return self.key(stage, "batch_size" if stage == "train" else "eval_batch_size")

    def data_hint(self, stage: str) -> str:
        """What to do when a stage has no data, for messages."""
        return f"set data.{stage}_manifest=<file> or data.{self.FOLDER_KEY}=<folder>"

    def sampler(self, stage: str, dataset: Dataset) -> EpochSampler:
        """The sampler of a stage for this process, starting at the resumed position."""
        training = stage == "train"
        return EpochSampler(
            dataset,  # type: ignore[arg-type]
            seed=self.seed,
            shuffle=training,
            drop_last=training,
            **self.position(stage),
        )

    def position(self, stage: str) -> dict[str, Any]:
        """Arguments of a sampler: this process's part of the items, and where in them it is."""
        rank, world = self._rank_and_world()
        training = stage == "train"
        return {
            "batch_size": self.batch_sizes[stage],
            "rank": rank,
            "num_replicas": world,
            "fixed_epoch": None if training else 0,
            "start_epoch": self._resumed["epoch"] if training else 0,
            "skip": -(-self._resumed["items"] // world) if training else 0,  # rounded up: none twice
        }

    def state_dict(self) -> dict[str, int]:
        """The position: of epoch `epoch`, `batch` batches, or `items` examples of all processes, are done.

        `together`: examples of all processes in a batch.
        """
        assert self.trainer is not None
        fit_loop = self.trainer.fit_loop
        epochs, batches = fit_loop.epoch_progress.current, fit_loop.epoch_loop.batch_progress
        epoch, batch = max(0, epochs.ready - 1), batches.current.processed
        if epochs.started < epochs.ready:  # announced; the batch counters are still those of the last epoch
            batch = 0
        elif batches.is_last_batch or batch >= self.trainer.num_training_batches:
            epoch, batch = epoch + 1, 0
        _, world = self._rank_and_world()
        together = self.batch_sizes["train"] * world
        return {"epoch": epoch, "batch": batch, "items": batch * together, "together": together}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by Lightning before it asks for the loader."""
        self._resumed = {key: state_dict.get(key, 0) for key in _START}  # `together` is younger than the others
        _, world = self._rank_and_world()
        together = self.batch_sizes["train"] * world
        if state_dict["items"] != state_dict["batch"] * together:
            whole = state_dict["items"] % together == 0
            log.log(
                logging.INFO if whole else logging.WARNING,
                "resumed with another batch size or number of processes: epoch %d goes on after %d examples%s",
                state_dict["epoch"],
                state_dict["items"],
                "" if whole else f", which are no whole number of batches of {together}: its last ones differ",
            )
        # Lightning cannot know that the data module does it.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")

    @property
    def examples_per_batch(self) -> tuple[int, int]:
        """Of all processes together: in the checkpoint that a run is resumed from, and now."""
        _, world = self._rank_and_world()
        now = self.batch_sizes["train"] * world
        return self._resumed["together"] or now, now

    def teardown(self, stage: str | None = None) -> None:
        if stage == "fit":
            self._resumed = dict(_START)  # the next fit with this object begins anew

    def _loader(self, stage: str) -> DataLoader | list:
        dataset = self._datasets.get(stage)
        if dataset is None:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        sampler = self.sampler(stage, dataset)
        self._bad_files.num_processes = sampler.num_replicas
        batch_size = self.batch_sizes[stage]
        if sampler.drop_last and len(sampler) < batch_size:
            raise DataError(
                f"{len(dataset)} examples are not one batch of {batch_size} on each of"
                f" {sampler.num_replicas} process(es): lower {self.key(stage, 'batch_size')} or add data"
            )
        trainer = self.trainer
        dataset.kept = self._kept(stage) if trainer is not None and self.keep_on_device else None
        return make_loader(
            dataset,
            sampler=sampler,
            batch_size=batch_size,
            collate_fn=dataset.collate,
            accelerator="cpu" if trainer is None else trainer.strategy.root_device.type,
            processes=1 if trainer is None else trainer.num_devices,
            **self.loader_settings(stage),
        )

    def _kept(self, stage: str) -> KeptBatches | None:
        """Where batches of a stage stay that come again, None where none do."""
        assert self.trainer is not None
        overfits = bool(self.trainer.overfit_batches)
        if stage == "train" and not overfits and self.trainer.is_global_zero:
            log.info(
                "data.loader.keep_on_device: not for training, whose order and examples are others in each epoch (but"
                " with trainer.overfit_batches)"
            )
        if stage == "val" or (stage == "train" and overfits):
            return KeptBatches(stage, self.trainer.strategy.root_device, self.keep_on_device_mb)
        return None

    def _rank_and_world(self) -> tuple[int, int]:
        """This process and the number of processes; without a Trainer there is one."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _settle_validation(trainer: pl.Trainer, num_batches: int) -> None:
    """What `val_check_interval` means for epochs of so many batches, where it is a number of batches.

    More than an epoch has are counted over epochs, where Lightning would refuse them; a run that ends before them is
    told so.
    """
    interval = trainer.val_check_interval
    if isinstance(interval, bool) or not isinstance(interval, int):
        return
    limit = trainer.limit_train_batches
    epoch = min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)
    if interval > epoch and trainer.check_val_every_n_epoch is not None:
        trainer.check_val_every_n_epoch = None
        log.info(
            "trainer.val_check_interval=%d is more than the %d batches of an epoch: it is counted over epochs"
            " (trainer.check_val_every_n_epoch=null)",
            interval,
            epoch,
        )
    ends = [trainer.max_steps * trainer.accumulate_grad_batches] if trainer.max_steps >= 0 else []
    ends += [trainer.max_epochs * epoch] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    if ends and min(ends) < interval:
        log.warning(
            "this run has %d batches, its first validation is due after trainer.val_check_interval=%d: there will be"
            " none, and no best checkpoint; lower it",
            min(ends),
            interval,
        )
