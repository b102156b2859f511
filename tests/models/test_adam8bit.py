"""`adam8bit`: what is said without the package, and with it every system trains and goes on from a checkpoint."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from models.optim import ADAM8BIT_REQUIREMENT, check_optim
from modules.layer_switch import switch_layers
from tests.pages import ROOT

LAYERS = {
    "conv_tasnet": "network.separator.bottleneck",
    "deepvqe": "network.bottleneck.linear",
    "nest": "encoder.layers.0.feed_forward1.linear1",
    "unet": "network.enc2.conv1",
}


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    line = f"model.optim.name=adam8bit needs a package: pip install {ADAM8BIT_REQUIREMENT}"
    with pytest.raises(ValueError, match=re.escape(line)):
        check_optim({"name": "adam8bit", "lr": 1e-3})
    assert f'"{ADAM8BIT_REQUIREMENT}"' in (ROOT / "pyproject.toml").read_text(), "an extra"


def train(built: Callable, typed: list[str], folder: Path, *, steps: int, switch: str | None = None) -> dict:
    """Weights at the end, goes on from last.ckpt where there is one; a layer changes to low rank after a step."""

    class Switch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
            if trainer.global_step == 1 and switch is not None:
                switch_layers(pl_module, {switch: 2}, optimizers=trainer.optimizers)

    bare = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, **bare}
    trainer = pl.Trainer(max_steps=steps, limit_val_batches=0, callbacks=[Switch()], **options)  # type: ignore[arg-type]
    system, data, _ = built(*typed)
    torch.manual_seed(steps)
    last = folder / "last.ckpt"
    trainer.fit(system, datamodule=data, ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(last)
    assert "8bit" in type(trainer.optimizers[0]).__name__
    return system.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_every_system(built: Callable, tiny: dict[str, list[str]], tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    # Weights below that size have states of 32 bits.
    typed = [*tiny[name], "model.optim.name=adam8bit", "+model.optim.min_8bit_size=16"]
    before = built(*typed).system.state_dict()
    first = train(built, typed, tmp_path, steps=2)
    second = train(built, typed, tmp_path, steps=4)
    changed = [key for key in before if not torch.equal(before[key], first[key])]
    assert changed and any(not torch.equal(first[key], second[key]) for key in changed)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4
    train(built, typed, tmp_path / "none", steps=3, switch=LAYERS[name])
