"""Fifty steps in bf16 learn what they do in float32: each system, tiny, with its own data and its recipe's optimiser.

With the same seeds, the mean loss of steps 41 to 50 may differ by 2 %, or by 0.3 dB where it is an SI-SDR.
"""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from callbacks.amp import AutoPrecision

pytestmark = pytest.mark.slow
STEPS, LAST = 50, 10
TERMS = [f"model.loss.{term}_weight=0.02" for term in ("snr", "si_snr", "delay")]
CASES: dict[str, list[str]] = {
    "conv_tasnet": [],
    "conv_tasnet, cumulative": ["model.norm=cumulative", "model.causal=true"],
    "deepvqe": [],
    "deepvqe, all terms": [*TERMS, "model.loss.echo_weight=1.0"],
    "nest": [],
    "nest, fast": ["model.optim.sched.warmup_steps=100"],
    "unet": [],
    "unet, muon": ["model.optim.name=muon", "model.optim.lr=0.01"],
}


class Losses(pl.Callback):
    """The losses of all steps."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train_loss"]))


def last_loss(built: Any, **precision: Any) -> float:
    losses = Losses()
    pl.seed_everything(1, verbose=False)
    built.fit(max_steps=STEPS, gradient_clip_val=built.gradient_clip_val, callbacks=[losses], **precision)
    assert len(losses.values) == STEPS
    return sum(losses.values[-LAST:]) / LAST


def assert_alike(name: str, full: float, half: float) -> None:
    in_db = name.startswith("conv_tasnet")
    difference = f"{half - full:+.3f} dB" if in_db else f"{half / full - 1:+.2%}"
    print(f"{name}: {full:.4f} in float32, {half:.4f} in half precision, {difference}")
    assert abs(half - full) < (0.3 if in_db else 0.02 * full)


@pytest.mark.parametrize("name", CASES)
def test_bf16(name: str, built: Callable[..., Any], tiny: dict[str, list[str]]) -> None:
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        objects = built(*tiny[name.partition(",")[0]], *CASES[name], batch_size=4)
        asked = AutoPrecision(precision=precision).trainer_kwargs(system=objects.system, trainer={"accelerator": "cpu"})
        found[precision] = last_loss(objects, **asked)
    assert_alike(name, *found.values())


def test_fp16(built: Callable[..., Any], tiny: dict[str, list[str]]) -> None:
    """With a scaler, which Lightning gives to GPUs only."""
    found = []
    for half in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if half else None
        found.append(last_loss(built(*tiny["conv_tasnet"], batch_size=4), plugins=plugins))
    assert_alike("conv_tasnet", *found)
