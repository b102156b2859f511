"""`compile`: training through compiled parts is the same training; nothing else notices.

Most tests put a backend that only counts in the place of torch's compiler, which takes a minute for a network.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader

import models
from callbacks.ema import EMA
from models.base import System
from models.conv_tasnet import ConvTasNet
from models.deepvqe import DeepVQE
from models.nest import NEST
from models.unet import UNet
from modules.compilation import compile_in_training
from modules.layer_switch import switch_layers

SEPARATION: dict[str, Any] = {"num_filters": 8, "bottleneck_channels": 8, "hidden_channels": 8, "skip_channels": 8}
SEPARATION |= {"num_blocks": 1, "num_repeats": 2, "optim": {"name": "adam", "lr": 0.01}}
ENCODER: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_heads": 2, "subsampling_conv_channels": 4}
ENCODER |= {"dropout": 0.0, "dropout_pre_encoder": 0.0, "dropout_att": 0.0}
ECHO: dict[str, Any] = {"mic_channels": [4, 6, 6], "far_channels": [4], "decoder_channels": [6, 6], "gru_hidden": 8}

SYSTEMS: dict[str, tuple[Callable[..., System], int]] = {  # and the graphs that it becomes
    "conv_tasnet": (lambda **more: ConvTasNet(**SEPARATION, **more), 1),
    "nest": (lambda **more: NEST(num_classes=16, encoder=ENCODER, **more), 1),  # both layers share it
    # torch leaves the GRU alone; what is in front of it in its block, and the linear layer behind it, are graphs
    "deepvqe": (lambda **more: DeepVQE(**ECHO, **more), 4),
    "unet": (lambda **more: UNet(base_channels=4, depth=3, **more), 1),
}


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Graphs, in `frame_count`; they are run as they are."""
    compile, counter = torch.compile, CompileCounter()

    def counting(function: Any, *, mode: str, dynamic: bool | None) -> Any:
        assert mode == "max-autotune"
        return compile(function, backend=counter, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", counting)
    torch.manual_seed(0)
    return counter


def output_and_gradients(system: System) -> list[Tensor]:
    system.zero_grad()
    torch.manual_seed(0)  # dither
    output = system(**system.example_input())
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in system.parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(float(tensor.abs().max()) for tensor in expected[1:])  # biases in front of a norm have only rounding
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "name", [n if n in ("conv_tasnet", "nest") else pytest.param(n, marks=pytest.mark.slow) for n in SYSTEMS]
)
def test_same_values_in_few_graphs_in_training_alone(counter: CompileCounter, name: str) -> None:
    build, num_graphs = SYSTEMS[name]
    system = build(compile="max-autotune").train()
    names, expected = list(system.state_dict()), output_and_gradients(system)
    assert counter.frame_count == 0, "only a training compiles"
    system.recompile()
    with torch.no_grad():
        system.eval()(**system.example_input())
    assert counter.frame_count == 0, "evaluation takes recordings of any length"
    found = output_and_gradients(system.train())
    assert counter.frame_count == num_graphs
    assert_close(found, expected)
    assert list(system.state_dict()) == names


def make_batch() -> dict[str, Tensor]:
    sources = torch.randn(2, 2, 400, generator=torch.Generator().manual_seed(1))
    return {"mixture": sources.sum(1), "sources": sources, "length": torch.full((2,), 400)}


class Switch(pl.Callback):
    """One layer becomes low rank after the second step; a checkpoint is written after the third."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: System, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if trainer.global_step == 2 and not pl_module.structure:
            name = "network.separator.bottleneck"
            replaced, _ = switch_layers(pl_module, {name: 3}, optimizers=trainer.optimizers)
            pl_module.recompile()
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EMA):
                    callback.layers_replaced(trainer, pl_module, replaced)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "middle.ckpt")


def fit(folder: Path, *, compile: bool | str, ckpt_path: Path | None = None) -> tuple[System, pl.Trainer]:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(decay=0.5), Switch()],
    )
    system = ConvTasNet(**SEPARATION, compile=compile)
    loader: Any = DataLoader([make_batch()] * 4, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(system, loader, ckpt_path=ckpt_path)
    return system, trainer


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_trains_switches_saves_and_resumes(counter: CompileCounter, tmp_path: Path) -> None:
    whole, trainer = fit(tmp_path, compile="max-autotune")
    assert counter.frame_count == 2, "anew after the switch"
    assert whole.network.separator.bottleneck.u.shape == (8, 3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    plain, _ = fit(tmp_path / "plain", compile=False)
    assert counter.frame_count == 2
    for mine, theirs in zip(whole.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    resumed, _ = fit(tmp_path / "resumed", compile="max-autotune", ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))

    graphs = counter.frame_count
    loaded = models.load(tmp_path / "end.ckpt")
    sources = loaded.predict(make_batch()["mixture"][0])["sources"]
    torch.testing.assert_close(sources, whole.eval().predict(make_batch()["mixture"][0])["sources"])
    assert counter.frame_count == graphs


def test_layers_of_a_list_that_differ_are_all_compiled(counter: CompileCounter) -> None:
    """After a switch each layer may have a rank of its own; torch's own limit is eight."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(4, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    layers = nn.ModuleList(Layer(width) for width in range(2, 12))
    compile_in_training([layers], "max-autotune")
    for layer in layers:
        layer(torch.ones(3, 4))
    assert counter.frame_count == len(layers)


@pytest.mark.slow
def test_lengths_that_vary_need_few_graphs(counter: CompileCounter) -> None:
    system = NEST(num_classes=16, encoder=ENCODER, compile="max-autotune").train()
    system.recompile()
    for size, num_samples in ((2, 16000), (3, 12000), (2, 30000), (4, 20000), (3, 26000), (2, 9000), (5, 14000)):
        system(torch.randn(size, num_samples))
    assert counter.frame_count <= 4


@pytest.mark.slow
def test_with_the_compiler_itself() -> None:
    torch.manual_seed(0)
    system = ConvTasNet(**SEPARATION, compile="default").train()
    expected = output_and_gradients(system)
    system.recompile()
    assert_close(output_and_gradients(system), expected)


@pytest.mark.parametrize("wrong", [True, "false", "fast", None])
@pytest.mark.parametrize("name", SYSTEMS)
def test_an_unknown_mode_is_named(name: str, wrong: Any) -> None:
    message = f"model.compile must be one of false, default, reduce-overhead, max-autotune, got {wrong!r}"
    with pytest.raises(ValueError, match=message):
        SYSTEMS[name][0](compile=wrong)
