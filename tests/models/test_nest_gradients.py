"""The gradient of a step is that of all its examples together, however they are spread (`loss.reduce: global`)."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from data.manifest import read_manifest, write_manifest
from data.ssl import SelfSupervisedData
from models.nest import NEST

STILL = {"dropout": 0.0, "dropout_pre_encoder": 0.0, "dropout_att": 0.0}
ENCODER = {"d_model": 16, "n_heads": 2, "n_layers": 2, "subsampling_conv_channels": 4, **STILL}


class RunningStatistics(pl.Callback):
    """Batch norm as in evaluation: its statistics are of one process's micro-batch, which is not what is compared."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()


def gradient(
    manifest: Path, *, batch_size: int, devices: int = 1, accumulate: int = 1, reduce: str = "global"
) -> dict[str, Tensor]:
    """What one step of plain descent changes in each weight."""
    torch.manual_seed(0)
    system = NEST(
        num_classes=16,
        preprocessor={"dither": 0.0},
        masking={"mask_prob": 0.05, "block_size": 16},
        encoder=ENCODER,
        loss={"reduce": reduce},
        optim={"name": "sgd", "lr": 1.0, "weight_decay": 0.0},
    ).double()  # here too, or the weights that come back from processes are rounded
    before = {name: weight.detach().clone().double() for name, weight in system.named_parameters()}
    section = {"batch_size": batch_size, "min_duration": 0.1, "min_audio_len_secs": 0.1, "num_workers": 0}
    data = SelfSupervisedData(train_ds={"manifest_filepath": str(manifest), **section})
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        precision="64-true",
        max_steps=1,
        accumulate_grad_batches=accumulate,
        callbacks=[RunningStatistics()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(system, datamodule=data)
    return {name: before[name] - weight.detach() for name, weight in system.named_parameters()}


@pytest.fixture(scope="module")
def ragged(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of many lengths: each process pads its own batch, and has other numbers of masked frames."""
    rows = read_manifest(corpus / "train.jsonl")
    path = tmp_path_factory.mktemp("ragged") / "train.jsonl"
    write_manifest(path, [row | {"duration": 0.6 + 0.04 * index} for index, row in enumerate(rows)])
    return path


@pytest.fixture(scope="module")
def whole(ragged: Path) -> dict[str, Tensor]:
    found = gradient(ragged, batch_size=4)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-3
    return found


@pytest.mark.parametrize("spread", [{"devices": 2}, {"accumulate": 2}], ids=["two processes", "two micro-batches"])
def test_gradient_does_not_depend_on_how_the_examples_are_spread(
    ragged: Path, whole: dict[str, Tensor], spread: dict[str, int]
) -> None:
    found = gradient(ragged, batch_size=2, **spread)
    assert max(float((found[name] - whole[name]).abs().max()) for name in whole) < 1e-9


def test_a_mean_of_means_does(ragged: Path, whole: dict[str, Tensor]) -> None:
    found = gradient(ragged, batch_size=2, accumulate=2, reduce="local")
    assert max(float((found[name] - whole[name]).abs().max()) for name in whole) > 1e-6
