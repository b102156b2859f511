"""The acceptance harness: python -m benchmarks.accept <system> --data <folder>

Fixed data, seeds and CPU budget (benchmarks/protocols/<system>.yaml); ours and the honest and dumb baselines scored in
one process on the same examples; mean, standard error and paired differences; a table and a JSON file. A system adds
itself with a module benchmarks/accept_<system>.py that defines `scores`.
"""

import argparse
import importlib
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from callbacks import clock

HERE = Path(__file__).parent
# One list of scores per contestant, over the same examples in the same order.
Scores = dict[str, list[float]]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for what too few values cannot give."""
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarise(scores: Scores, ours: str = "ours") -> list[dict[str, Any]]:
    """A row for each contestant: mean, standard error, and the paired difference of ours to it."""
    rows = []
    for name, values in scores.items():
        mean, error = mean_and_error(values)
        gain, gain_error = mean_and_error([a - b for a, b in zip(scores[ours], values, strict=True)])
        rows.append({"name": name, "mean": mean, "error": error, "gain": gain, "gain_error": gain_error})
    return rows


def table(rows: list[dict[str, Any]], unit: str) -> str:
    """The rows as text."""
    lines = [f"{'':<28}{unit:>16}   ours minus it (paired)"]
    for row in rows:
        paired = "" if row["name"] == "ours" else f"{row['gain']:+8.2f} +- {row['gain_error']:.2f}"
        lines.append(f"{row['name']:<28}{row['mean']:>8.2f} +- {row['error']:.2f}   {paired}")
    return "\n".join(lines)


def plain_numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON knows no NaN."""
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def main(argv: list[str] | None = None) -> int:
    systems = sorted(file.stem for file in (HERE / "protocols").glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accept", description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=systems)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the protocol's manifest")
    parser.add_argument("--work", type=Path, default=Path("runs/accept"), help="where runs and results go")
    parser.add_argument("--cpu-minutes", type=float, help="another budget than the protocol's: no acceptance")
    arguments = parser.parse_args(argv)

    protocol = yaml.safe_load((HERE / "protocols" / f"{arguments.system}.yaml").read_text())
    if arguments.cpu_minutes:
        protocol["cpu_minutes"] = arguments.cpu_minutes
    manifest = arguments.data / protocol["manifest"]
    if not manifest.is_file():
        print(f"error: {manifest}: no such manifest; --data names the folder that holds it", file=sys.stderr)
        return 2
    work = arguments.work / arguments.system
    work.mkdir(parents=True, exist_ok=True)
    harness: Callable[..., tuple[Scores, str, dict[str, Any]]]
    harness = importlib.import_module(f"benchmarks.accept_{arguments.system}").scores
    scores, unit, facts = harness(protocol, manifest, work)

    rows = summarise(scores)
    print(table(rows, unit))
    result = {
        "system": arguments.system,
        "protocol": protocol,
        "unit": unit,
        "rows": plain_numbers(rows),
        "scores": scores,
        "facts": facts,
        "cpu_minutes_total": clock.cpu_seconds() / 60,
        "wall_minutes_total": clock.wall_seconds() / 60,
        "platform": platform.platform(),
    }
    (work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {work / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
