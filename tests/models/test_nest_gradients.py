"""The gradient of a step is that of all its examples together, however they are spread (`loss.reduce: global`)."""

from pathlib import Path
from typing import Any

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


def build(reduce: str = "global", mask_position: str = "pre_conv") -> NEST:
    torch.manual_seed(0)
    return NEST(
        num_classes=16,
        preprocessor={"dither": 0.0},
        mask_position=mask_position,
        masking={"mask_prob": 0.05 if mask_position == "pre_conv" else 0.3, "block_size": 16},
        encoder=ENCODER,
        loss={"reduce": reduce},
        optim={"name": "sgd", "lr": 1.0, "weight_decay": 0.0},
    ).double()  # here too, or the weights that come back from processes are rounded


def section(manifest: Path, *, batch_size: int) -> dict[str, Any]:
    sizes = {"min_duration": 0.1, "min_audio_len_secs": 0.1, "num_workers": 0}
    return {"manifest_filepath": str(manifest), "batch_size": batch_size, **sizes}


def gradient(
    manifest: Path,
    *,
    batch_size: int,
    devices: int = 1,
    accumulate: int = 1,
    reduce: str = "global",
    mask_position: str = "pre_conv",
) -> dict[str, Tensor]:
    """What one step of plain descent changes in each weight."""
    system = build(reduce, mask_position)
    before = {name: weight.detach().clone().double() for name, weight in system.named_parameters()}
    data = SelfSupervisedData(train_ds=section(manifest, batch_size=batch_size))
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
    found = {name: before[name] - weight.detach() for name, weight in system.named_parameters()}
    return found | {"train_loss": trainer.callback_metrics["train_loss"]}


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
    assert max(float((found[name] - whole[name]).abs().max()) for name in whole if name != "train_loss") < 1e-9


def test_masked_after_the_subsampling_too(ragged: Path) -> None:
    """There DDP is not to wait for weights that never learn."""
    whole = gradient(ragged, batch_size=4, mask_position="post_conv")
    found = gradient(ragged, batch_size=2, devices=2, mask_position="post_conv")
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3
    assert max(float((found[name] - whole[name]).abs().max()) for name in whole if name != "train_loss") < 1e-9


def test_a_mean_of_means_does(ragged: Path, whole: dict[str, Tensor]) -> None:
    found = gradient(ragged, batch_size=2, accumulate=2, reduce="local")
    assert max(float((found[name] - whole[name]).abs().max()) for name in whole if name != "train_loss") > 1e-6


def test_processes_agree_on_the_loss_by_which_checkpoints_are_chosen(ragged: Path) -> None:
    both = gradient(ragged, batch_size=2, devices=2)["train_loss"]
    single = SelfSupervisedData(train_ds=section(ragged, batch_size=4))
    single.setup("fit")
    batch, system = next(iter(single.train_dataloader())), build()
    RunningStatistics().on_train_start(None, system)  # type: ignore[arg-type]
    parts = [{key: value[rank::2] for key, value in batch.items()} for rank in range(2)]
    parts = [
        {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in p.items()} for p in parts
    ]
    losses = [float(system.step(part)["loss"].detach()) for part in parts]
    assert abs(losses[0] - losses[1]) > 1e-4
    assert float(both) == pytest.approx(sum(losses) / 2, rel=1e-6)
