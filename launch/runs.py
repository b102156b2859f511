"""The runs below a folder, the newest last: python -m launch.runs [folder]

A line each: status, steps, the best value of its monitored metric, age, directory, and what was typed. What was typed
for all of them stands once below.
"""

import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_SETTLED_S = 2.0  # a log that is newer than its summary by more is that of a run that went on


class Run(NamedTuple):
    """*status*: completed, stopped or failed, of summary.json; `unfinished`: training, or killed. *seen_s*: when it
    last wrote, in seconds since 1970."""

    folder: Path
    status: str
    steps: int | None
    metric: str
    best: float | None
    seen_s: float
    overrides: list[str]


def find_runs(root: Path) -> list[Run]:
    """Every directory below *root*, itself included, that holds a run's configuration; by the time of its last sign."""
    folders = [file.parent.parent for file in root.rglob(".hydra/config.yaml")]
    return sorted((read_run(folder) for folder in folders), key=lambda run: run.seen_s)


def read_run(folder: Path) -> Run:
    """What a run directory tells; what is damaged or not there yet is left out."""
    config: dict[str, Any] = _read(folder / ".hydra" / "config.yaml", yaml.safe_load, dict)
    typed: list[Any] = _read(folder / ".hydra" / "overrides.yaml", yaml.safe_load, list)
    summary: dict[str, Any] = _read(folder / "summary.json", json.loads, dict)
    monitor = config.get("monitor")
    monitor = monitor if isinstance(monitor, dict) else {}
    metric = str(monitor.get("metric", ""))
    files = [file for pattern in ("*.log", "metrics.csv", "checkpoints/*.ckpt") for file in folder.glob(pattern)]
    seen_s = max((file.stat().st_mtime for file in files), default=folder.stat().st_mtime)
    ended = folder / "summary.json"
    over = ended.is_file() and seen_s <= ended.stat().st_mtime + _SETTLED_S
    values, steps = _logged(folder / "metrics.csv", metric)
    return Run(
        folder,
        str(summary.get("status", "unfinished")) if over else "unfinished",
        summary["steps"] if over and isinstance(summary.get("steps"), int) else steps,
        metric,
        (max if monitor.get("mode") == "max" else min)(values, default=None),
        seen_s,
        [str(text) for text in typed if not str(text).startswith(("exp_manager.name=", "exp_manager.version="))],
    )


def _read(path: Path, parse: Any, kind: type) -> Any:
    """What is in a file, an empty one of its kind where it is not."""
    try:
        content = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return kind()
    return content if isinstance(content, kind) else kind()


def _logged(path: Path, metric: str) -> tuple[list[float], int | None]:
    """The finite values of a metric, and the steps that were made, counted from 1."""
    values, last = [], None
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                last = last if (step := _number(row.get("step"))) is None else step
                if (value := _number(row.get(metric))) is not None:
                    values.append(value)
    return values, None if last is None else int(last) + 1


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def table(runs: list[Run], *, now_s: float) -> str:
    header = ("status", "steps", "best", "last sign", "directory", "typed")
    shared = [text for text in runs[0].overrides if len(runs) > 1 and all(text in run.overrides for run in runs)]
    lines = [header, *(_cells(run, shared, now_s) for run in runs)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    shown = ["  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in lines]
    return "\n".join([*shown, f"typed for all: {' '.join(shared)}"] if shared else shown)


def _cells(run: Run, shared: list[str], now_s: float) -> tuple[str, ...]:
    best = "-" if run.best is None else f"{run.metric} {run.best:.4g}"
    steps = "-" if run.steps is None else str(run.steps)
    typed = " ".join(text for text in run.overrides if text not in shared)
    return run.status, steps, best, _ago(now_s - run.seen_s), str(run.folder), typed


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.runs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="where to look, runs by default")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        print(f"error: {arguments.folder}: no such folder; name the one that runs are in", file=sys.stderr)
        return 2
    runs = find_runs(arguments.folder)
    print(table(runs, now_s=time.time()) if runs else f"{arguments.folder}: no runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
