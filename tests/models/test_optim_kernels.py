"""`fused` and `foreach`: the same training with other kernels, in every system, also where gradients are clipped."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from callbacks.not_finite import SkipNotFinite
from models.optim import check_optim
from models.unet import UNet

SYSTEMS = ("conv_tasnet", "deepvqe", "nest", "unet")


class Norm(pl.Callback):
    """Of the gradient that the optimiser's step sees."""

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients) if gradients else None


def trained(build: Callable, typed: list[str], **options: Any) -> UNet:
    built = build(*typed)
    torch.manual_seed(0)
    built.fit(max_steps=2, limit_val_batches=0, **options)
    return built.system


@pytest.mark.parametrize("key", ["fused", "foreach"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_training(built: Callable, tiny: dict[str, list[str]], name: str, key: str) -> None:
    # A large epsilon: gradients of biases in front of a norm are rounding alone, of which Adam would make steps.
    values = ("name=adamw", "lr=0.1", "eps=1.0", "weight_decay=0.1", "sched.name=none")
    typed = [*tiny[name], *(f"model.optim.{value}" for value in values)]
    plain, other = trained(built, typed), trained(built, [*typed, f"model.optim.{key}=true"])
    assert other.trainer.optimizers[0].defaults[key] is True
    for (weight, mine), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, weight=weight: weight + text)


def test_fp16_gradients_are_clipped_and_judged_before_a_fused_step(built: Callable, tiny: dict[str, list[str]]) -> None:
    """Lightning refuses both where the step itself takes fp16's scale off."""
    norm, typed = Norm(), [*tiny["unet"], "model.optim.fused=true"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trained(built, typed, plugins=plugin, gradient_clip_val=0.01, callbacks=[norm, SkipNotFinite()])
    assert 0 < norm.norm < 0.011
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"fused": 1}, "model.optim.fused must be true, false or null, got 1"),
        ({"foreach": "yes"}, "model.optim.foreach must be true, false or null, got 'yes'"),
        ({"fused": True, "foreach": True}, "model.optim.fused=true beside model.optim.foreach=true: leave one of them"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_optim({"name": "adamw", "lr": 0.1, **wrong})
