"""The acceptance harness: python -m benchmarks.accept <system> --data <folder>

Fixed data, seeds and CPU budget (benchmarks/protocols/<system>.yaml); ours and the honest and dumb baselines scored in
one process on the same examples; mean, standard error and paired differences; a table and a JSON file. A system adds
itself with a protocol and a module benchmarks/accept_<system>.py that defines
`report(protocol, manifest, work) -> (text, result)`: what to print, and what goes to the JSON file.
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
TAKE_CHECKPOINT = ("deepvqe", "unet")
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


def plain_numbers(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> int:
    systems = sorted(file.stem.removeprefix("accept_") for file in HERE.glob("accept_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accept", description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=systems)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the protocol's manifest")
    parser.add_argument("--work", type=Path, default=Path("runs/accept"), help="where runs and results go")
    parser.add_argument("--cpu-minutes", type=float, help="another budget than the protocol's: no acceptance")
    parser.add_argument(
        "--ckpt", type=Path, help=f"score this checkpoint instead of training one ({' or '.join(TAKE_CHECKPOINT)})"
    )
    arguments = parser.parse_args(argv)
    if arguments.ckpt and arguments.system not in TAKE_CHECKPOINT:
        parser.error(
            f"--ckpt: {arguments.system} trains ours beside its peer, an older checkpoint would be no comparison"
        )
    if arguments.ckpt and not arguments.ckpt.is_file():
        parser.error(f"--ckpt: {arguments.ckpt}: no such file")

    protocol = yaml.safe_load((HERE / "protocols" / f"{arguments.system}.yaml").read_text())
    if arguments.cpu_minutes:
        protocol["cpu_minutes"] = arguments.cpu_minutes
    manifest = arguments.data / protocol["manifest"]
    if not manifest.is_file():
        print(f"error: {manifest}: no such manifest; --data names the folder that holds it", file=sys.stderr)
        return 2
    work = arguments.work / arguments.system
    work.mkdir(parents=True, exist_ok=True)
    harness = importlib.import_module(f"benchmarks.accept_{arguments.system}")
    report: Callable[..., tuple[str, dict[str, Any]]] = harness.report
    options = {"checkpoint": arguments.ckpt} if arguments.ckpt else {}
    text, result = report(protocol, manifest, work, **options)
    print(text)
    result = {
        "system": arguments.system,
        "protocol": protocol,
        **result,
        "cpu_minutes_total": clock.cpu_seconds() / 60,
        "wall_minutes_total": clock.wall_seconds() / 60,
        "platform": platform.platform(),
    }
    (work / "result.json").write_text(json.dumps(plain_numbers(result), indent=2) + "\n")
    print(f"written: {work / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
