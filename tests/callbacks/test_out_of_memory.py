"""What ran out of memory is told with its shapes and what to type."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.out_of_memory import OutOfMemory, divided, is_out_of_memory, remedies
from data.base import SystemData
from data.mixtures import SeparationData
from data.ssl import SelfSupervisedData


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_the_whole_batch_in_equal_parts() -> None:
    assert {size: divided(size) for size in (1, 2, 3, 7, 8, 9, 15)} == {
        1: (1, 1), 2: (1, 2), 3: (1, 3), 7: (1, 7), 8: (4, 2), 9: (3, 3), 15: (5, 3)
    }  # fmt: skip


def trainer(data: SystemData, precision: str = "32-true") -> Any:
    return SimpleNamespace(datamodule=data, accumulate_grad_batches=3, precision=precision)


def test_remedies_are_overrides_of_the_system() -> None:
    separation = SeparationData(sample_rate=8000, batch_size=6, eval_batch_size=5)
    lines = remedies(trainer(separation), "train")
    assert [line.split(":")[0] for line in lines] == [
        "data.batch_size=3 trainer.accumulate_grad_batches=6",
        "trainer.precision=bf16-mixed",
        "a smaller data.segment_s",
    ]
    assert remedies(trainer(separation), "val")[0].startswith("data.eval_batch_size=2 ")
    assert not any("precision" in line for line in remedies(trainer(separation, "bf16-mixed"), "train"))
    nest = SelfSupervisedData(train_ds={"batch_size": 8}, validation_ds={"batch_size": 4})
    assert remedies(trainer(nest), "train")[0].startswith(
        "model.train_ds.batch_size=4 trainer.accumulate_grad_batches=6"
    )
    assert remedies(trainer(nest), "val")[0].startswith("model.validation_ds.batch_size=2 ")
    assert remedies(trainer(nest), "train")[-1].startswith("a smaller model.train_ds.crop_s:")
    single = SeparationData(sample_rate=8000, batch_size=1)
    assert len(remedies(trainer(single), "train")) == 2, "there is no half"


@pytest.mark.parametrize("stage", ["train", "val"])
def test_the_batch_is_described(tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture, stage: str) -> None:
    class Large(tiny.Tiny):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if stage == "train" and self.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    callback = OutOfMemory()
    with pytest.raises(torch.OutOfMemoryError):
        tiny.make_trainer(tmp_path, [callback]).fit(Large(), datamodule=tiny.Data())
    shape, step = ((2, 2), 2) if stage == "train" else ((1, 2), 3)
    assert f"out of memory at step {step}, process 0, with a batch of x {shape} float32; at most " in caplog.text
    assert callback.stage == stage


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="halve_batch=maybe"):
        OutOfMemory(halve_batch="maybe")  # type: ignore[arg-type]
