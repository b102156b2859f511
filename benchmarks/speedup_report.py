"""What benchmarks/speedups.py has measured, as Markdown, JSON, a bar chart, and a choice for config/trainer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"`{' '.join(report['recipe'])}` on {report['machine']}; {report['rounds']} rounds of {report['steps']} steps",
        "",
        "| row | typed | step | data wait | memory | examples/s | to the recipe | to the first script | loss curve |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        typed = f"`{' '.join(row['overrides'])}`" if row["overrides"] else ""
        if "failed" in row:
            lines.append(f"| {row['row']} | {typed} | {row['failed']} | | | | | | |")
            continue
        ratios = [
            f"{r['median']:.2f} ({r['least']:.2f} to {r['most']:.2f})" if (r := row.get(key)) else ""
            for key in ("to_recipe", "to_first")
        ]
        if "computed" in row:
            lines.append(f"| {row['row']} | {typed} | {row['computed']} | | | | {ratios[0]} | | |")
            continue
        lines.append(
            f"| {row['row']} | {typed} | {row['step_s']:.3f} s | {row['data_wait']:.0%} | {row['peak_mb']:.0f} MiB |"
            f" {row['examples_per_s']:.2f} | {ratios[0]} | {ratios[1]} | {row['loss']} |"
        )
    lines += [f"| {name} | | {reason} | | | | | | |" for name, reason in report["not_here"].items()]
    return "\n".join([*lines, "", "What paid, together:", "", "```", report["command"], "```"])


def write(report: dict[str, Any], text: str, folder: Path) -> None:
    """speedups.md, speedups.json and a bar chart, speedups.png."""
    import matplotlib.figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speedups.md").write_text(text + "\n")
    (folder / "speedups.json").write_text(json.dumps(report, indent=2) + "\n")
    shown = [row for row in report["rows"] if "to_recipe" in row][::-1]
    figure = matplotlib.figure.Figure(figsize=(8, 1.2 + 0.35 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    ratios = [row["to_recipe"] for row in shown]
    spread = [[r["median"] - r["least"] for r in ratios], [r["most"] - r["median"] for r in ratios]]
    axes.barh([row["row"] for row in shown], [r["median"] for r in ratios], xerr=spread, color="tab:blue")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("examples per second, the recipe being 1")
    axes.set_title(" ".join(report["recipe"]))
    figure.savefig(folder / "speedups.png", dpi=120)
    print(f"{folder}: speedups.md, speedups.json, speedups.png")


def write_trainer(report: dict[str, Any], overrides: Sequence[str], file: Path) -> None:
    """A choice `trainer=this_machine` of what paid in the trainer section; the rest, as a comment, to be typed."""
    own = [text.removeprefix("trainer.") for text in overrides if text.startswith("trainer.")]
    rest = [text for text in overrides if not text.startswith("trainer.")]
    lines = [
        f"# What paid for {' '.join(report['recipe'])} on {report['machine']} (python -m benchmarks.speedups --write).",
        f"# With it: {' '.join(rest) or 'nothing else'}",
        "defaults: [default]",
        *(f"{key}: {value}   # was faster here" for key, _, value in (text.partition("=") for text in own)),
    ]
    file.write_text("\n".join(lines) + "\n")
    print(f"{file}: choose it with trainer=this_machine")
