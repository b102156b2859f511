"""Do low-rank gradients calm a training whose loss spikes? python -m benchmarks.spikes --data <folder>

A small self-supervised encoder with a rate that is too high (benchmarks/protocols/spikes.yaml): DBC against clipping
against neither, and both together, over the same steps and seeds. Two measures, declared before measuring:
* spikes: steps whose training loss exceeds the median of the steps before it by a margin, or is not finite;
* the validation metric at the end.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.accept import mean_and_error
from benchmarks.contest import Contest, Row, curve, load_protocol, logged, markdown, parser, write_result

NEITHER = "neither"


def count_spikes(losses: Sequence[float], *, window: int, margin: float) -> int:
    """Losses that are above the median of the *window* before them by more than *margin*, or not finite.

    The first *window* are not judged; those that are not finite are in no median.
    """
    spikes = 0
    for index in range(window, len(losses)):
        earlier = [loss for loss in losses[index - window : index] if math.isfinite(loss)]
        calm = bool(earlier) and losses[index] <= median(earlier) + margin  # False for NaN
        spikes += not calm
    return spikes


def measured(run: Path, protocol: dict[str, Any]) -> Row:
    """What is kept of a run."""
    summary = json.loads((run / "summary.json").read_text())
    losses = [loss for _, loss in logged(run, "train_loss")]
    points = curve(run, protocol["metric"])
    judged = max(1, len(losses) - protocol["window"])
    end = points[-1].value
    spikes = count_spikes(losses, window=protocol["window"], margin=protocol["margin"])
    return {
        "spikes": spikes,
        "spikes_per_100": 100 * spikes / judged,
        "metric": end if math.isfinite(end) else protocol["diverged"],
        "dbc": summary.get("dbc"),
        "curve": points,
        "losses": losses,
        **{name: summary[name] for name in ("steps", "cpu_s", "wall_s")},
    }


def over_seeds(seeds: dict[int, dict[str, Row]], rival: str) -> dict[str, dict[str, Any]]:
    """Each contestant: means and standard errors over the seeds, and its paired differences to another."""
    found = {}
    for name in next(iter(seeds.values())):
        row: dict[str, Any] = {}
        for measure in ("spikes_per_100", "metric"):
            own = [rows[name][measure] for rows in seeds.values()]
            theirs = [rows[rival][measure] for rows in seeds.values()]
            row[measure] = mean_and_error(own)
            row[f"{measure}_minus"] = mean_and_error([a - b for a, b in zip(own, theirs, strict=True)])
        row["cpu_s"] = mean_and_error([rows[name]["cpu_s"] for rows in seeds.values()])
        found[name] = row
    return found


def table(found: dict[str, dict[str, Any]], metric: str, rival: str) -> str:
    header = ["", "spikes per 100 steps", f"minus {rival}", f"final {metric}", f"minus {rival}", "CPU s"]
    measures = ("spikes_per_100", "spikes_per_100_minus", "metric", "metric_minus")
    lines = []
    for name, row in found.items():
        cells = [f"{row[key][0]:{'+' if key.endswith('minus') else ''}.3f} ± {row[key][1]:.3f}" for key in measures]
        lines.append([name, *cells, f"{row['cpu_s'][0]:.0f}"])
    return markdown(header, lines)


def verdict(found: dict[str, dict[str, Any]], name: str, rival: str, errors: float) -> str:
    """Whether a contestant helps against another: fewer spikes, or a better metric, by enough and neither worse."""
    spikes, gain = found[name]["spikes_per_100_minus"], found[name]["metric_minus"]
    better = spikes[0] < -errors * spikes[1] or gain[0] > errors * gain[1]
    worse = spikes[0] > errors * spikes[1] or gain[0] < -errors * gain[1]
    return (
        f"{name} against {rival}: spikes per 100 steps {spikes[0]:+.2f} ± {spikes[1]:.2f},"
        f" metric {gain[0]:+.3f} ± {gain[1]:.3f}: {'helps' if better and not worse else 'does not help'}"
    )


def main(argv: list[str] | None = None) -> int:
    protocol = load_protocol("spikes")
    arguments = parser("spikes", __doc__, protocol).parse_args(argv)
    contest = Contest(protocol, data=arguments.data, work=arguments.work, measure=lambda run: measured(run, protocol))
    contestants = protocol["contestants"].items()
    seeds = {
        int(seed): {name: contest.result(name, int(seed), typed) for name, typed in contestants}
        for seed in arguments.seeds.split(",")
    }
    rivals = {rival: over_seeds(seeds, rival) for rival in (NEITHER, protocol["rival"])}
    lines = [
        verdict(found, name, rival, protocol["errors"])
        for rival, found in rivals.items()
        for name, typed in contestants
        if any("dbc" in text for text in typed)
    ]
    rival = protocol["rival"]
    print("\n".join([table(rivals[rival], protocol["metric"], rival), "", *lines]))
    write_result(arguments.work, {"protocol": protocol, "against": rivals, "verdicts": lines, "seeds": seeds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
