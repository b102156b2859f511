"""The batch size with the most examples per second among those that fit into memory: measured once, before training.

Decisions that are not obvious
* Steps of real batches on a system and data that are thrown away afterwards: the run is then built and seeded as ever,
  and weights, random numbers and the order of the data know nothing of it.
* What is decided is a decision like that of launch/micro_batch.py and lives with it in plan.json, where processes that
  are started later, and a resume, find it. Processes that a launcher starts at the same time wait for it.
* Memory grows with the batch, so a size that would need more than its share by the growth up to now is not tried: a
  CPU's system ends a process that takes too much. Two sizes in a row that are no faster end the search too.
* Networks are not compiled meanwhile, which would take minutes for each size.
"""

import contextlib
import logging
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device

from callbacks.out_of_memory import is_out_of_memory
from data.base import SystemData
from data.errors import DataError
from launch import micro_batch
from launch.errors import ConfigError
from launch.hardware import num_processes
from models.base import System
from models.optim import build_optimizer

log = logging.getLogger(__name__)

NAME = "find_batch_size"
_STRATEGIES = ("auto", "ddp", "ddp_spawn", "ddp_find_unused_parameters_true", "ddp_spawn_find_unused_parameters_true")
_BATCHES = 2  # of each size
_MEASURED_S, _MAX_ROUNDS = 0.3, 5  # steps on these batches are repeated until they took so long together
_WAIT_S, _LOOK_EVERY_S = 3600.0, 0.5


class Settings(NamedTuple):
    """See config/train.yaml."""

    enabled: bool = False
    max_memory_share: float = 0.8
    max_batch_size: int = 256


class Trial(NamedTuple):
    """*memory_mb*: of the whole process at most, on a GPU of its tensors."""

    batch_size: int
    examples_per_s: float
    memory_mb: float


def settings(section: Any) -> Settings:
    """Of the configuration; true or false alone is `enabled`. Raises ConfigError."""
    given = section if isinstance(section, dict) else {"enabled": section}
    if unknown := sorted(set(given) - set(Settings._fields)):
        raise ConfigError(f"{NAME}.{unknown[0]}: no such key, there are {', '.join(Settings._fields)}")
    found = Settings(**given)
    if not isinstance(found.enabled, bool):
        raise ConfigError(f"{NAME}.enabled must be true or false, got {found.enabled!r}")
    share, most = found.max_memory_share, found.max_batch_size
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise ConfigError(f"{NAME}.max_memory_share must be a number above 0 up to 1, got {share!r}")
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ConfigError(f"{NAME}.max_batch_size must be a whole number of at least 1, got {most!r}")
    return found


def problems(section: Any, trainer: dict[str, Any]) -> list[str]:
    """A line for what the section refuses, and for a Trainer under which one process cannot measure for all."""
    try:
        wanted = settings(section)
    except ConfigError as error:
        return [str(error)]
    if not wanted.enabled:
        return []
    lines = []
    if trainer["strategy"] not in _STRATEGIES:
        why = (
            "which forks a process that has computed" if "fork" in str(trainer["strategy"]) else "which shares weights"
        )
        lines.append(f"{NAME} cannot measure for trainer.strategy={trainer['strategy']}, {why}: leave one of them out")
    if trainer["accelerator"] not in ("cpu", "cuda"):
        lines.append(f"{NAME} cannot measure the memory of trainer.accelerator={trainer['accelerator']}: leave it out")
    return lines


@contextlib.contextmanager
def unsaid() -> Iterator[None]:
    """Nothing below a warning is logged meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def measure(system: System, data: SystemData, section: dict[str, Any], wanted: Settings) -> list[Trial]:
    """Of 1, 2, 4, ... examples, as far as memory and data go. *section*: the Trainer's arguments.

    Raises ConfigError where not even one example fits.
    """
    trainer = _single(section)
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    data.loader["num_workers"] = 0
    with unsaid():
        data.setup("fit")
    system = precision.convert_module(system).to(device).train()  # type: ignore[assignment]
    system.recompute_activations()
    optimizer = build_optimizer(system.groups_to_train(), system.optim)

    def step(batch: Any) -> None:
        batch = precision.convert_input(move_data_to_device(batch, device))
        with precision.forward_context():
            loss = system.step(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    processes = num_processes(section) * section["num_nodes"]
    memory, trials, size = _Memory(device, wanted.max_memory_share), [], 1
    while size <= wanted.max_batch_size and memory.has_room_for(size) and not _slower(trials):
        try:
            batches = _batches(data, size, processes)
            seconds = _seconds_per_step(step, batches)
        except DataError as error:
            if not trials:
                raise
            log.info("batch size %d: %s", size, error)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.info("batch size %d: out of memory", size)
            break
        if not trials:
            memory.held(optimizer)
        trials.append(Trial(size, round(size / seconds, 3), round(memory.note(size) / 2**20, 1)))
        size *= 2
    if not trials:
        raise ConfigError(f"{NAME}: a single example does not fit into {wanted.max_memory_share:g} of the memory")
    return trials


def decide(trials: list[Trial], config: dict[str, Any], size_key: str) -> tuple[micro_batch.Decision, dict[str, Any]]:
    """The values that change, and what stands in plan.json about it; both are told.

    A step keeps its number of examples where the new size divides it. Intervals that count batches keep theirs.
    """
    chosen = max(trials, key=lambda trial: trial.examples_per_s).batch_size
    log.info("%10s %12s %10s", "batch size", "examples/s", "MiB")
    for trial in trials:
        mark = "  chosen" if trial.batch_size == chosen else ""
        log.info("%10d %12.4g %10.0f%s", *trial, mark)
    accumulation = "trainer.accumulate_grad_batches"
    before, accumulated = (micro_batch.value_of(config, key) for key in (size_key, accumulation))
    together = before * accumulated
    parts = max(1, round(together / chosen))
    values = {size_key: chosen, accumulation: parts}
    counted = {key: micro_batch.value_of(config, key) for key in micro_batch.PER_BATCH}
    values |= {key: max(1, round(n * before / chosen)) for key, n in counted.items() if type(n) is int}
    decision = {
        key: {"was": was, "is": value}
        for key, value in values.items()
        if (was := micro_batch.value_of(config, key)) != value
    }
    if chosen * parts != together:
        log.warning(
            "a step has %d examples of each process now, where %d are configured;"
            " model.optim.scale_lr_with_batch=<examples> brings the rate in line",
            chosen * parts,
            together,
        )
    return decision, {"batch_size": chosen, "tried": [trial._asdict() for trial in trials]}


def wait_for_plan(directory: Path, *, wait_s: float = _WAIT_S) -> dict[str, Any]:
    """The plan, once the first process has decided. Raises ConfigError where it does not."""
    end = time.monotonic() + wait_s
    while NAME not in (plan := micro_batch.plan_of(directory, None)):
        if time.monotonic() > end:
            raise ConfigError(f"{NAME}: the first process has written nothing to {directory / 'plan.json'}")
        time.sleep(_LOOK_EVERY_S)
    return plan


def _single(section: dict[str, Any]) -> pl.Trainer:
    """On the first device alone."""
    devices = section["devices"]
    first = devices[:1] if isinstance(devices, list) else 1
    bare = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with unsaid():
        return pl.Trainer(accelerator=section["accelerator"], devices=first, precision=section["precision"], **bare)  # type: ignore[arg-type]


def _batches(data: SystemData, size: int, processes: int) -> list[Any]:
    """The first ones of that size. Raises DataError where there are not as many for each process."""
    data.batch_sizes["train"] = size
    loader = data.train_dataloader()
    if len(loader) < processes:
        raise DataError(f"fewer than {size} examples for each of {processes} processes")
    return [batch for batch, _ in zip(loader, range(_BATCHES), strict=False)]


def _seconds_per_step(step: Callable[[Any], None], batches: list[Any]) -> float:
    step(batches[0])  # not counted: much is made at the first time
    start, rounds = time.perf_counter(), 0
    while rounds == 0 or (rounds < _MAX_ROUNDS and time.perf_counter() - start < _MEASURED_S):
        for batch in batches:
            step(batch)
        rounds += 1
    return (time.perf_counter() - start) / (rounds * len(batches))


def _slower(trials: list[Trial]) -> bool:
    """Whether the last two were no faster than one before them."""
    rates = [trial.examples_per_s for trial in trials]
    return len(rates) > 2 and max(rates[-2:]) <= max(rates[:-2])


class _Memory:
    """What this process takes at most, and what it may take."""

    def __init__(self, device: torch.device, share: float) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            free, total = torch.cuda.mem_get_info(device)
            self.start = torch.cuda.memory_reserved(device)
            self.limit = share * total - (total - free - self.start)  # others have their part of it
        else:
            self.start = psutil.Process().memory_info().rss
            self.limit = share * (self.start + psutil.virtual_memory().available)
        self.peaks: dict[int, int] = {}

    def held(self, optimizer: torch.optim.Optimizer) -> None:
        """What gradients and the optimiser take, whatever the batch: the beginning from which memory grows with it."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        self.start += sum(tensor.nbytes for tensor in (*weights, *states))

    def note(self, size: int) -> int:
        if self.device.type == "cuda":
            self.peaks[size] = torch.cuda.max_memory_reserved(self.device)
        else:
            self.peaks[size] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self.peaks[size]

    def has_room_for(self, size: int) -> bool:
        """By what the last size took beyond the beginning."""
        if not self.peaks:
            return True
        last, peak = max(self.peaks.items())
        needed = self.start + max(0, peak - self.start) * size / last
        if needed > self.limit:
            log.info(
                "batch size %d would need about %.0f MiB, %.0f may be used (%s.max_memory_share)",
                size,
                needed / 2**20,
                self.limit / 2**20,
                NAME,
            )
        return needed <= self.limit
