"""The gradient of the first step is that of all its examples, however they are spread: every system, its own data.

In float64, without dropout and dither, and with batch norm as in evaluation: its statistics are those of a process's
batch. NEST adds noise only, since the other talkers that it may add are by definition those of the same batch.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from callbacks.ddp import AutoDDP

BATCH = 4  # examples of the step
STILL = ["model.preprocessor.dither=0.0", "model.train_ds.batch_augmentor.noise_ratio=1.0"]
STILL += [f"model.encoder.{key}=0.0" for key in ("dropout", "dropout_pre_encoder", "dropout_att")]
TERMS = [f"model.loss.{term}_weight=0.02" for term in ("snr", "si_snr", "delay")]
# The seeds of DeepVQE's data are such that the processes' batches hold other numbers of near ends and known delays.
CASES = {
    "conv_tasnet": ["model.norm=global"],
    "conv_tasnet, causal": ["model.norm=cumulative", "model.causal=true"],
    "deepvqe": ["data.seed=3"],
    "deepvqe, all terms": ["data.seed=3", *TERMS, "model.loss.echo_weight=1.0"],
    "nest": STILL,
    "nest, bucketing": [*STILL, "model.train_ds.use_bucketing=true"],
    "unet": ["model.norm=group"],
    "unet, batch norm": ["model.norm=batch"],
    "unet, all ratios": ["model.norm=group", *(f"model.loss.{term}=0.2" for term in ("jaccard", "tversky", "mcc"))],
    "unet, ratios of images": ["model.norm=group", "model.loss.per_image=true"],
}
ALWAYS = ("conv_tasnet", "deepvqe, all terms", "nest", "unet")
# Losses that are other ones of each batch: means over examples that not all batches hold alike, ratios of sums.
OF_EACH_BATCH = ("deepvqe, all terms", "unet", "unet, batch norm", "unet, all ratios")


class Step(NamedTuple):
    """Gradients by parameter; of each example its name and the sums of its signals."""

    gradients: dict[str, Tensor]
    examples: list[Any]


class Record(pl.Callback):
    """Writes what this process was given and the gradient that the optimiser sees; batch norm is as in evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.examples: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
            module.register_forward_hook(_refuse_less_than_float64)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        signals = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        for index, name in enumerate(batch["name"]):
            self.examples.append((Path(name).stem, {key: float(value[index].sum()) for key, value in signals.items()}))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        weights = {name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad}
        assert not (unused := [name for name, weight in weights.items() if weight.grad is None]), unused
        step = Step({name: weight.grad for name, weight in weights.items()}, self.examples)  # type: ignore[misc]
        torch.save(step._asdict(), self.folder / f"{trainer.global_rank}.pt")


def _refuse_less_than_float64(module: Any, inputs: Any, output: Any) -> None:
    for value in output if isinstance(output, tuple) else (output,):
        assert not (isinstance(value, Tensor) and value.is_floating_point()) or value.dtype == torch.float64, module


def first_step(built: Any, folder: Path, *, processes: int = 1, accumulate: int = 1) -> Step:
    strategy: Any = "auto"
    if processes > 1:  # forked, so that they begin at once
        section = {"devices": processes, "num_nodes": 1, "accelerator": "cpu", "strategy": "ddp_fork"}
        strategy = AutoDDP().trainer_kwargs(system=built.system, trainer=section)["strategy"]
    built.fit(
        devices=processes,
        strategy=strategy,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        max_steps=1,
        callbacks=[Record(folder)],
    )
    ranks = [Step(**torch.load(folder / f"{rank}.pt")) for rank in range(processes)]
    for other in ranks[1:]:
        assert all(torch.equal(gradient, other.gradients[name]) for name, gradient in ranks[0].gradients.items())
    return Step(ranks[0].gradients, sorted((e for rank in ranks for e in rank.examples), key=str))


def largest_difference(one: Step, other: Step) -> float:
    """Of any parameter's gradient, relative to the largest entry of it (at least a millionth of the network's)."""
    largest = {name: float(gradient.abs().max()) for name, gradient in one.gradients.items()}
    assert one.gradients.keys() == other.gradients.keys() and max(largest.values()) > 1e-3
    floor = 1e-6 * max(largest.values())
    return max(
        float((gradient - other.gradients[name]).abs().max()) / max(largest[name], floor)
        for name, gradient in one.gradients.items()
    )


@pytest.fixture(scope="module")
def spread(
    built: Callable[..., Any], tiny: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Step]:
    """A case's first step, over so many processes, or micro-batches of one."""

    @functools.cache
    def step(name: str, *, processes: int = 1, accumulate: int = 1) -> Step:
        batch_size = BATCH // (processes * accumulate)
        objects = built(*tiny[name.partition(",")[0]], *CASES[name], batch_size=batch_size)
        return first_step(objects, tmp_path_factory.mktemp("step"), processes=processes, accumulate=accumulate)

    return step


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in CASES]
)
def test_two_processes_are_one_with_the_double_batch(name: str, spread: Callable[..., Step]) -> None:
    whole, halves = spread(name), spread(name, processes=2)
    assert len(whole.examples) == BATCH and whole.examples == halves.examples
    difference = largest_difference(whole, halves)
    print(f"{name}: largest relative difference {difference:.1e}")
    assert difference < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "bucketing" not in name])  # other batches, other examples
def test_two_micro_batches_are_one_where_the_loss_is_no_other_one_of_each(
    name: str, spread: Callable[..., Step]
) -> None:
    whole, halves = spread(name), spread(name, accumulate=2)
    assert whole.examples == halves.examples
    difference = largest_difference(whole, halves)
    print(f"{name}: largest relative difference {difference:.1e}")
    assert difference > 1e-3 if name in OF_EACH_BATCH else difference < 1e-9
