"""summary.json: what a run reached and what it cost, for other programs to read."""

import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.graceful import GracefulStop
from callbacks.saving import write_text
from callbacks.window import Window

_COST = ("steps", "wall_s", "cpu_s", "peak_mem_mb", *Window().means())


class Summary(pl.Callback):
    """Writes `<run directory>/summary.json` when training ends, however it ends, and again after a test.

    Keys: `metrics` (the last logged value of each `train_*` and `val_*`, and `test_*` after a test),
    `best_checkpoint` (relative to the run directory), `bad_files` (how many could not be used), `versions`, `status`:
    completed, stopped (by a signal) or failed, and what the `summary()` of each callback that has one returns: of
    `Monitor` steps, wall_s, cpu_s, examples_per_s, … A value that is not known, or not finite, is null. A test alone
    adds its metrics to a summary that is there.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}
        self._status = "completed"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._metrics, self._status = {}, "completed"

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(c, GracefulStop) and c.stopped for c in trainer.callbacks):  # type: ignore[attr-defined]
            self._status = "stopped"
        self._write(trainer, ("train_", "val_"))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit":
            self._status = "stopped" if isinstance(exception, KeyboardInterrupt | SystemExit) else "failed"
            self._write(trainer, ("train_", "val_"))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, ("test_",))

    def _write(self, trainer: pl.Trainer, prefixes: tuple[str, ...]) -> None:
        values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith(prefixes)}
        self._metrics |= {k: float(v) for k, v in values.items() if not isinstance(v, Tensor) or v.numel() == 1}
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(trainer.default_root_dir) / "summary.json"
        trained = any(not name.startswith("test_") for name in self._metrics) or trainer.global_step > 0
        content = None if trained else _existing(path)
        if content is None:
            content = self._content(trainer, path.parent)
        content["metrics"] = {**content["metrics"], **self._metrics}
        write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")

    def _content(self, trainer: pl.Trainer, folder: Path) -> dict[str, Any]:
        cost: dict[str, Any] = dict.fromkeys(_COST)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (summary := getattr(callback, "summary", None)) is not None:
                cost |= summary()
        return {
            "status": self._status,
            "metrics": {},
            "best_checkpoint": _best_checkpoint(trainer, folder),
            **cost,
            "steps": trainer.global_step,
            "bad_files": len(getattr(trainer.datamodule, "bad_files", ())),  # type: ignore[attr-defined]
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,  # with its build, such as +cu130
                "torchaudio": _version("torchaudio"),
                "pytorch_lightning": pl.__version__,
            },
        }


def _best_checkpoint(trainer: pl.Trainer, folder: Path) -> str | None:
    """Of the first checkpoint callback that compares a metric and has saved something."""
    for callback in trainer.checkpoint_callbacks:
        best = getattr(callback, "best_model_path", "")
        if best and getattr(callback, "monitor", None):
            path, root = Path(best).resolve(), folder.resolve()
            return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return None


def _existing(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) and isinstance(content.get("metrics"), dict) else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
