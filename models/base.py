"""System: what the four systems share - optimiser, schedule, logging, metrics, weights.

A system is a LightningModule whose constructor takes keyword-only plain Python values, one per key of its YAML, and
which says in `step` what one batch costs. Everything else here has a default. The constructor's arguments travel in
every checkpoint (`save_hyperparameters`), so `models.load` rebuilds a system without any configuration.
"""

import inspect
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from models.global_loss import CountedGradient, CountedMeans
from models.optim import build_optimizer, build_schedule, check_optim, lr_scale, parameter_groups
from modules import low_rank
from modules.checks import switches
from modules.compilation import MODES, compile_in_training
from modules.recomputation import recompute_in_training

log = logging.getLogger(__name__)


def is_chosen(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Whether one of the regular expressions *include* is found in a name, and none of *exclude*; null: all, none."""
    included = not include or any(re.search(pattern, name) for pattern in include)
    return included and not any(re.search(pattern, name) for pattern in exclude or ())


class StreamingStep(NamedTuple):
    """One step of a live system: `module(first input, state, *other inputs)` gives the output and the next state.

    *inputs*, *state*: by name, as before the first step. *output*: its name. *facts*: what whoever runs it has to know,
    such as sample_rate. *split*: recordings (B, T) -> each step's input. *join*: all outputs, T -> (B, T), undelayed.
    *not_in_8_bits*: beginnings of names of layers whose rounding is heard.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    state: dict[str, Tensor]
    output: str
    facts: dict[str, Any]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], int], Tensor]
    not_in_8_bits: tuple[str, ...] = ()


class ExportedNetwork(NamedTuple):
    """What export.py writes of a system whose `forward` is not it: `module(*inputs)` gives the outputs.

    *sizes*: inputs by name, three times: smaller, as they are traced (no open size is 1), larger. *open_axes*: of each
    input, those whose sizes are left open, and a name for each. *outputs*: names. *facts*: what whoever runs it has to
    know.
    """

    module: nn.Module
    sizes: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
    open_axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    facts: dict[str, Any]


class Tensors(NamedTuple):
    """Several arrays of one result by name, and what whoever reads them has to know, as text by name."""

    tensors: dict[str, Tensor]
    facts: dict[str, str]


class System(pl.LightningModule, ABC):
    """One trainable system.

    *optim*: `{name, lr, …, sched: {name, …}}`, see models/optim.py. *compile*: false, or torch.compile's mode for the
    `compiled_parts`, see modules/compilation.py. *gradient_checkpointing*: the backward pass computes what the
    `checkpointed_parts` have in them once more, see modules/recomputation.py.

    Class attributes that a system sets: `inputs` and `outputs`, the named signals of `predict` and their kinds
    (`audio`, `image` or `array`, of outputs also as `Tensors`; of outputs also `records`, a list of dicts).
    `sample_rate` is set where signals are audio.
    """

    FORMAT_VERSION: ClassVar[int] = 1
    inputs: ClassVar[dict[str, str]] = {}
    outputs: ClassVar[dict[str, str]] = {}
    dynamic_axes: ClassVar[tuple[int, ...]] = (-1,)
    """Axes of the inputs whose sizes export.py leaves open."""
    forward_outputs: ClassVar[tuple[str, ...]] = ()
    """What `forward` returns, by name, where that is not what `predict` does."""
    chosen_in_evaluation: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that evaluate.py may change, because they change no result of the network."""
    of_training: ClassVar[tuple[str, ...]] = ()
    """Beginnings of keys (`encoder.dropout`) that neither the weights' shapes nor their meaning depend on."""
    compiled_parts: ClassVar[tuple[str, ...]] = ("network",)
    """The modules that `compile` compiles; of a list each for itself."""
    checkpointed_parts: ClassVar[tuple[str, ...]] = ()
    """The modules that `gradient_checkpointing` computes twice, of those that are there; of a list each for itself."""
    compiled_shapes_vary: ClassVar[bool] = False
    """Whether hardly two training batches have inputs of one shape."""
    sample_rate: int | None = None
    loss_reduce: str = "global"
    """Over what a loss with a `loss_count` is the mean: `global`, all that a step of the optimiser sees, on all
    processes; `local`, each micro-batch of each process, and the step takes the mean of these means."""

    def __init__(
        self,
        *,
        optim: dict[str, Any] | None = None,
        compile: bool | str = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # of the subclass: Lightning walks up the constructor's frames ...
        for name in self.hparams.keys() - inspect.signature(type(self)).parameters.keys():
            del self.hparams[name]  # ... and takes this constructor's own too
        self.optim = dict(optim or {})
        check_optim(self.optim)
        if compile is not False and compile not in MODES:
            raise ValueError(f"model.compile must be one of false, {', '.join(MODES)}, got {compile!r}")
        self.compile_mode = compile
        switches(**{"model.gradient_checkpointing": gradient_checkpointing})
        if gradient_checkpointing and compile is not False:
            raise ValueError(
                f"model.gradient_checkpointing=true beside model.compile={compile}: leave one of them out; the compiler"
                " chooses itself what is computed twice"
            )
        if gradient_checkpointing and not self.checkpointed_parts:
            raise ValueError(f"model.gradient_checkpointing=true: {type(self).__name__} has no checkpointed_parts")
        self.gradient_checkpointing = gradient_checkpointing
        self.lr_scale: float | None = None  # what rates were multiplied by for the size of the batch
        self.optim_param_groups: dict[str, dict[str, Any]] = {}  # child -> optimiser values of its own
        self._metrics: dict[str, Metric] = {}
        self._means: dict[str, CountedMeans] = {}
        self._loss_count: Tensor | None = None  # of the batch whose backward is next
        self._gradient = CountedGradient()

    # What a system defines

    @abstractmethod
    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What one batch costs: `loss`, further scalars to log, and any tensors that metrics or figures need.

        `num_compared`, if there is one, says how many examples the scalars are the mean of; all of them otherwise.
        `loss_count` `()` says it where they are no examples but what a batch holds of something, such as masked frames;
        0 is allowed, and the scalars are finite then too. See models/global_loss.py.
        """

    def make_metric(self, stage: str) -> Metric | None:
        """What a stage (`val` or `test`) reports: a torchmetrics object whose `compute` returns name -> value."""
        return None

    def update_metric(self, metric: Metric, batch: dict[str, Tensor], output: dict[str, Tensor]) -> None:
        """Feed `metric` with a batch and what `step` returned for it."""
        raise NotImplementedError(f"{type(self).__name__} makes a metric, so it has to define update_metric")

    def example_scores(self, metric: Metric) -> list[dict[str, Any]]:
        """A row (column -> value) for each example of the batch that `metric` was last fed with; none: no such rows.

        `evaluate.py per_file=…` writes them, with the example's name and its length in seconds.
        """
        return []

    def figures(self, batch: dict[str, Tensor], output: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of the first example is worth hearing or seeing: tag -> audio (T,), an image (3, H, W) of uint8, or of
        float from 0 to 1, or a map (H, W) of float from 0 to 1, which is drawn in colours.
        """
        return {}

    def example_input(self) -> dict[str, Tensor]:
        """A small input for each name in `inputs`, as `forward` takes them."""
        raise ValueError(f"{type(self).__name__} has no example_input")

    def streaming_step(self, *, waveform: bool) -> StreamingStep | None:
        """What export.py writes of a system that runs live; None: `exported_network`. *waveform*: samples in and out,
        where the network itself has spectra.
        """
        return None

    def exported_network(self, *, waveform: bool) -> ExportedNetwork | None:
        """What export.py writes of a system that does not run live; None: `forward`. *waveform*: samples in, where the
        network itself has features.
        """
        return None

    def predict(self, *signals: Tensor, **options: Any) -> dict[str, Tensor]:
        """Signals in, signals out, as named by `inputs` and `outputs`; pure. A single input also positional."""
        raise ValueError(f"{type(self).__name__} has no predict")

    # Training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self._step_and_log(batch, "train")
        self._loss_count = output.get("loss_count") if self.loss_reduce == "global" else None
        return output["loss"]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._loss_count is not None:
            loss = self._gradient.weigh(loss, self._loss_count)
        super().backward(loss, *args, **kwargs)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self._gradient.reset()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        # Here and not in on_before_optimizer_step, where callbacks come first and would see gradients of sums. They are
        # accumulated and reduced over processes; that fp16's are still scaled makes no difference.
        def closure() -> Any:
            loss = optimizer_closure()
            world_size = self.trainer.world_size  # by which DDP divides, and Lightning by the number of micro-batches
            scale = float(world_size * self.trainer.accumulate_grad_batches)
            self._gradient.divide(self.parameters(), scale=scale, distributed=world_size > 1)
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step_and_log(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        output: dict[str, Any] = self._step_and_log(batch, "test")
        if "test" in self._metrics:
            output = output | {"example_scores": self.example_scores(self._metrics["test"])}
        return output

    def _step_and_log(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        output = self.step(batch)
        training = stage == "train"
        size = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim)
        size = int(output.pop("num_compared", size))
        scalars = {
            f"{stage}_{name}": value
            for name, value in output.items()
            if name != "loss_count" and (not isinstance(value, Tensor) or value.ndim == 0)
        }
        if training or "loss_count" not in output:
            self.log_dict(scalars, on_step=training, on_epoch=not training, batch_size=size, sync_dist=not training)
        else:
            self._means.setdefault(stage, CountedMeans()).add(scalars, output["loss_count"])
        if stage in self._metrics:
            self.update_metric(self._metrics[stage], batch, output)
        return output

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.recompute_activations()
        for name in {"val", "test"} - set(self._metrics):
            if (metric := self.make_metric(name)) is not None:
                self._metrics[name] = metric

    def on_validation_epoch_start(self) -> None:
        self._begin_stage("val")

    def on_test_epoch_start(self) -> None:
        self._begin_stage("test")

    def on_validation_epoch_end(self) -> None:
        self._log_stage("val")

    def on_test_epoch_end(self) -> None:
        self._log_stage("test")

    def on_train_start(self) -> None:
        self.recompile()

    def recompile(self) -> None:
        """Compile the parts, also after a change to their layers; nothing where `compile` is false."""
        if self.compile_mode is not False:
            parts = [self.get_submodule(name) for name in self.compiled_parts]
            compile_in_training(parts, self.compile_mode, dynamic=self.compiled_shapes_vary or None)

    def recompute_activations(self) -> None:
        """From now on, where `gradient_checkpointing` is true, the parts keep nothing for their backward pass."""
        if self.gradient_checkpointing:
            modules = dict(self.named_modules())
            recompute_in_training(modules[name] for name in self.checkpointed_parts if name in modules)

    def on_train_epoch_end(self) -> None:
        # Each process logs the loss of its own batches; what checkpoints compare has to be one number.
        if self.trainer.world_size > 1 and (loss := self.trainer.callback_metrics.get("train_loss")) is not None:
            self.log("train_loss", self.trainer.strategy.reduce(loss, reduce_op="mean"), logger=False)

    def _begin_stage(self, stage: str) -> None:
        self._means.pop(stage, None)
        # Not submodules: their states are no weights, and the module tree stays the network's alone.
        if stage in self._metrics:
            self._metrics[stage].to(self.device).reset()

    def _log_stage(self, stage: str) -> None:
        values: dict[str, Any] = {}
        if stage in self._means:
            values |= self._means[stage].compute(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        if stage in self._metrics:
            metrics = self._metrics[stage].compute()
            values |= {f"{stage}_{name}": torch.as_tensor(value) for name, value in metrics.items()}
        # Already reduced over the ranks.
        self.log_dict({name: value.float() for name, value in values.items()}, sync_dist=True)

    def groups_to_train(self) -> Any:
        """The parameters, or groups of them with optimiser values of their own."""
        return parameter_groups(self, self.optim_param_groups, self.optim)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.groups_to_train(), self.optim)
        if self.optim.get("scale_lr_with_batch") is not None:
            self._scale_rates(optimizer)
        try:
            schedule = build_schedule(optimizer, self._total_steps(), **(self.optim.get("sched") or {}))
        except ValueError as error:  # which length of training and size of batch decide
            raise MisconfigurationException(str(error)) from error
        if schedule and str(schedule.get("monitor", "")).startswith("val_"):
            schedule["frequency"] = self.trainer.check_val_every_n_epoch or 1  # only epochs with a value of their own
        return {"optimizer": optimizer, "lr_scheduler": schedule} if schedule else optimizer

    def _scale_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the rates of all groups from the batch that they are meant for to that of this run.

        A resumed run keeps what its checkpoint was trained with, since the rates there go on.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "examples_per_batch"):
            raise MisconfigurationException("model.optim.scale_lr_with_batch needs data that knows its batch size")
        together, accumulated = data.examples_per_batch[1], self.trainer.accumulate_grad_batches
        scale = lr_scale(self.optim, together * accumulated)
        resumed = self.lr_scale if self.trainer.ckpt_path else None
        self.lr_scale = scale if resumed is None else resumed
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.lr_scale
        if not self.trainer.is_global_zero:
            return
        batch = f"{together * accumulated} examples a step ({together} x {accumulated} accumulated)"
        if resumed not in (None, scale):
            log.warning(
                "the checkpoint's learning rate goes on, scaled by %g; a new run with %s would scale it by %g",
                resumed,
                batch,
                scale,
            )
            return
        scaled = ", ".join(f"{rate:g} x {self.lr_scale:g} = {rate * self.lr_scale:g}" for rate in dict.fromkeys(rates))
        meant = self.optim["scale_lr_with_batch"]
        log.info("learning rate %s: for %s, where model.optim.lr is meant for %d", scaled, batch, meant)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if metric is not None:
            # A training metric is each process's own; rates that differ would let the replicas drift apart.
            own = torch.as_tensor(metric, device=self.device)
            metric = self.trainer.strategy.reduce(own, reduce_op="mean")
        super().lr_scheduler_step(scheduler, metric)

    def _total_steps(self) -> float:
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        if self.trainer.max_epochs == -1:
            return math.inf
        return self.trainer.estimated_stepping_batches

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["format_version"] = self.FORMAT_VERSION
        checkpoint["system"] = {
            "name": f"{type(self).__module__}.{type(self).__qualname__}",
            "arguments": dict(self.hparams),
        }
        checkpoint["structure"] = self.structure
        if self.lr_scale is not None:
            checkpoint["lr_scale"] = self.lr_scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.lr_scale = checkpoint.get("lr_scale")
        # The weights are loaded next: a resume from either side of a switch, or a test of the best checkpoint.
        self.restructure(checkpoint.get("structure") or [])

    @property
    def structure(self) -> list[dict[str, Any]]:
        """In what the module tree differs from the one that was constructed; plain values, for checkpoints."""
        return [{"change": "low_rank", "ranks": ranks}] if (ranks := low_rank.ranks(self)) else []

    def restructure(self, structure: list[dict[str, Any]]) -> None:
        """Give the module tree a checkpoint's `structure`; weights of layers that change are to be loaded next.

        Raises ValueError for what this system cannot become.
        """
        ranks: dict[str, int] = {}
        for change in structure if isinstance(structure, list) else [structure]:
            if not isinstance(change, dict) or change.get("change") != "low_rank":
                raise ValueError(f"its layers were changed in a way this version does not know: {change!r:.100}")
            if not isinstance(change.get("ranks"), dict):
                raise ValueError("its structure holds no ranks of layers")
            ranks |= change["ranks"]
        low_rank.restructure(self, ranks)

    def import_weights(self, content: dict[str, Any]) -> dict[str, Tensor]:
        """The state dict in what a file of another implementation holds, in this system's names.

        Raises ValueError when there is none.
        """
        if not isinstance(state := content.get("state_dict"), dict):
            raise ValueError("no weights in it (no state_dict)")
        return state

    def load_weights(
        self, state: dict[str, Tensor], *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
    ) -> dict[str, list[str]]:
        """Copy what matches in name and shape from `state`; say what did not.

        *include*, *exclude*: regular expressions searched in the names; null includes all, excludes none.

        Returns `loaded`, `missing` (ours, not in the file), `unexpected` (in the file, not ours) and `mismatched`
        (other shape) names.
        """
        own = self.state_dict()
        state = low_rank.dense_state(state, own)
        chosen = {name: tensor for name, tensor in state.items() if is_chosen(name, include, exclude)}
        loaded = {name: tensor for name, tensor in chosen.items() if name in own and own[name].shape == tensor.shape}
        self.load_state_dict(loaded, strict=False)
        return {
            "loaded": sorted(loaded),
            "missing": sorted(set(own) - set(chosen)),
            "unexpected": sorted(set(chosen) - set(own)),
            "mismatched": sorted((set(chosen) & set(own)) - set(loaded)),
        }
