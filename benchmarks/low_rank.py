"""Does training pay that switches to low rank? python -m benchmarks.low_rank --data <folder>

Dense against progressive low rank, and against a network that is as small from the start; same data, seeds, rate and
CPU budget (benchmarks/protocols/low_rank.yaml). What is compared is the best validation metric so far over the CPU time
used so far, in which switching, its decomposition and its measurements are contained:
* speed-up: CPU time in which dense reaches its best metric, over the time in which a contestant reaches the same; and
  the same for a metric so far below it as the goal allows;
* metric at equal CPU time, minus dense's.
"""

import json
import math
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Any

import torch

from benchmarks.accept import mean_and_error
from benchmarks.contest import (
    Contest,
    Point,
    Row,
    curve,
    load_protocol,
    markdown,
    parser,
    points_of,
    running_best,
    size_of,
    write_result,
)
from models.checkpoint import read_checkpoint
from models.conv_tasnet import ConvTasNet

DENSE, SMALL = "dense", "small dense"


def run_seed(contest: Contest, seed: int) -> dict[str, Row]:
    """Every contestant's row, by name."""
    protocol = contest.protocol
    rows = {name: contest.result(name, seed, typed or []) for name, typed in protocol["contestants"].items()}
    like = rows[protocol["small_like"]]
    hidden = equal_width(like["arguments"], like["parameters"])
    rows[SMALL] = contest.result(SMALL, seed, [f"model.hidden_channels={hidden}"])
    return rows


def measured(run: Path, metric: str) -> Row:
    """What is kept of a run."""
    summary = json.loads((run / "summary.json").read_text())
    checkpoint = run / "checkpoints" / "last.ckpt"
    parameters, flops = size_of(checkpoint)
    arguments = {k: v for k, v in read_checkpoint(checkpoint)["system"]["arguments"].items() if k != "optim"}
    switches = [
        {key: switch[key] for key in ("step", "parameters_before", "parameters_after", "flops_before", "flops_after")}
        | {"layers": len(switch["layers"]), "dense": len(switch["dense"])}
        for switch in summary.get("low_rank") or []
    ]
    kept = {name: summary[name] for name in ("steps", "cpu_s", "wall_s")}
    points = curve(run, metric)
    return kept | {
        "step_cpu_s": step_cpu_s(points),
        "parameters": parameters,
        "flops": flops,
        "arguments": arguments,
        "switches": switches,
        "curve": points,
    }


def equal_width(arguments: dict[str, Any], parameters: int) -> int:
    """The number of hidden channels with which a Conv-TasNet comes closest to so many parameters from below."""

    def count(hidden: int) -> int:
        with torch.device("meta"):
            network = ConvTasNet(**{**arguments, "hidden_channels": hidden})
        return sum(parameter.numel() for parameter in network.parameters())

    widths = range(1, 4 * int(arguments["hidden_channels"]))
    return widths[max(0, bisect_left(widths, parameters + 1, key=count) - 1)]


def step_cpu_s(points: list[Point]) -> float:
    """CPU seconds per step, validation included, in the second half of a run."""
    first, last = points[len(points) // 2 - 1], points[-1]
    return (last.cpu_s - first.cpu_s) / (last.step - first.step) if last.step > first.step else math.nan


def time_to(points: list[Point], target: float) -> float | None:
    """CPU seconds until the best metric so far reaches the target, on straight lines between validations."""
    best = running_best(points)
    for before, after in zip([None, *best], best, strict=False):
        if after.value < target:
            continue
        if before is None or not math.isfinite(before.value):
            return after.cpu_s
        share = (target - before.value) / (after.value - before.value)
        return before.cpu_s + share * (after.cpu_s - before.cpu_s)
    return None


def value_at(points: list[Point], cpu_s: float) -> float:
    """The best metric so far when so many CPU seconds are used, on straight lines between validations."""
    best = running_best(points)
    for before, after in zip(best, best[1:], strict=False):
        if before.cpu_s <= cpu_s < after.cpu_s:
            share = (cpu_s - before.cpu_s) / (after.cpu_s - before.cpu_s)
            return before.value + share * (after.value - before.value) if share else before.value
    return best[-1].value if best and cpu_s >= best[-1].cpu_s else math.nan


def compare(dense: Row, other: Row, *, within: float) -> dict[str, Any]:
    """A contestant beside dense, of one seed.

    `speedup`: CPU time in which dense reaches its best metric, over the contestant's; `speedup_near`: both to *within*
    below it. `reached`, `reached_near`: False where the contestant never was as good; the speed-up is a bound then: had
    it been as good right at its end.
    """
    ours, theirs = (points_of(row) for row in (other, dense))
    target = running_best(theirs)[-1].value
    end_s = min(ours[-1].cpu_s, theirs[-1].cpu_s)
    found: dict[str, Any] = {"target": target, "gain": value_at(ours, end_s) - value_at(theirs, end_s)}
    for name, wanted in (("", target), ("_near", target - within)):
        dense_s, own_s = time_to(theirs, wanted), time_to(ours, wanted)
        assert dense_s is not None
        found[f"reached{name}"] = own_s is not None
        found[f"speedup{name}"] = dense_s / (ours[-1].cpu_s if own_s is None else own_s)
    return found


def over_seeds(seeds: dict[int, dict[str, Row]], *, within: float) -> dict[str, dict[str, Any]]:
    """Each contestant: means and standard errors over the seeds. *within*: see `compare`."""
    found = {}
    for name in next(iter(seeds.values())):
        parts = [compare(rows[DENSE], rows[name], within=within) for rows in seeds.values()]
        own = [rows[name] for rows in seeds.values()]
        means = {
            key: mean_and_error([float(row[key]) for row in own])[0]
            for key in ("parameters", "flops", "step_cpu_s", "steps")
        }
        found[name] = {
            **{key: mean_and_error([part[key] for part in parts]) for key in ("speedup", "speedup_near", "gain")},
            "speedups": [part["speedup"] for part in parts],
            "speedups_near": [part["speedup_near"] for part in parts],
            "all_reached": all(part["reached"] for part in parts),
            "all_reached_near": all(part["reached_near"] for part in parts),
            "best": mean_and_error([running_best(points_of(row))[-1].value for row in own]),
            "switched_at": [switch["step"] for row in own for switch in row["switches"]],
            **means,
        }
    return found


def table(found: dict[str, dict[str, Any]], metric: str, *, within: float) -> str:
    header = ["", "speed-up", "least to most", f"to {within:g} below", "least to most", f"best {metric}"]
    header += ["at equal CPU time minus dense", "parameters", "FLOPs per s of audio", "CPU s per step", "steps"]
    header += ["switched after steps"]
    lines = []
    for name, row in found.items():
        cells = [name]
        for key in ("", "_near"):
            sign, spread = "" if row[f"all_reached{key}"] else "< ", row[f"speedups{key}"]
            cells += [
                "{}{:.2f} ± {:.2f}".format(sign, *row[f"speedup{key}"]),
                f"{min(spread):.2f} to {max(spread):.2f}",
            ]
        cells += [f"{row['best'][0]:.2f} ± {row['best'][1]:.2f}", f"{row['gain'][0]:+.2f} ± {row['gain'][1]:.2f}"]
        cells += [f"{row['parameters'] / 1e6:.2f} M", f"{row['flops'] / 1e9:.2f} G", f"{row['step_cpu_s']:.3f}"]
        cells += [f"{row['steps']:.0f}", ", ".join(map(str, row["switched_at"])) or "-"]
        lines.append(cells)
    return markdown(header, lines)


def verdict(name: str, row: dict[str, Any], goals: dict[str, float]) -> str:
    """Whether the goal is reached, in words: the speed-up to nearly dense's best, and no worse at the end."""
    speedup, gain, within = row["speedup_near"][0], row["gain"][0], goals["within"]
    reached = speedup >= goals["speedup"] and gain >= -within and row["all_reached_near"]
    return (
        f"goal: {name}: {speedup:.2f}x of {goals['speedup']}x to within {within} of dense's best, metric at equal CPU"
        f" time {gain:+.2f}: {'reached' if reached else 'missed'}"
    )


def main(argv: list[str] | None = None) -> int:
    protocol = load_protocol("low_rank")
    asked = parser("low_rank", __doc__, protocol)
    asked.add_argument("--size", choices=list(protocol["sizes"]), default="medium", help="of the network")
    asked.add_argument("--minutes", type=float, default=protocol["cpu_minutes"], help="CPU minutes of a training")
    arguments = asked.parse_args(argv)
    protocol["cpu_minutes"] = arguments.minutes
    protocol["recipe"] = [*protocol["recipe"], *protocol["sizes"][arguments.size]]
    metric = protocol["metric"]
    contest = Contest(protocol, data=arguments.data, work=arguments.work, measure=lambda run: measured(run, metric))
    seeds = {int(seed): run_seed(contest, int(seed)) for seed in arguments.seeds.split(",")}
    within = protocol["goals"]["within"]
    found = over_seeds(seeds, within=within)
    lines = [verdict(name, row, protocol["goals"]) for name, row in found.items() if name not in (DENSE, SMALL)]
    print("\n".join([table(found, metric, within=within), "", *lines]))
    write_result(arguments.work, {"protocol": protocol, "contestants": found, "verdicts": lines, "seeds": seeds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
