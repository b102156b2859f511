"""Ours against what else could be taken: python -m benchmarks.peers

Side by side in one run: the time of a training step and its peak memory, of Conv-TasNet against torchaudio and
asteroid, of NEST against NeMo, of UNet against one as tutorials write it and one of segmentation_models_pytorch, of
DeepVQE against the paper written down literally; and the time that an echo example takes to load, against a first
script.

How it is measured
* Each side is a process of its own that builds its network once and then waits. The sides take turns, in every round
  anew: a busy machine hits all of them. A ratio is that within a round; the table has the median over the rounds and
  their quartiles. Below 1: ours needs less.
* On a CPU the process's own time counts (user and system), on a GPU wall-clock time until the device is done.
* Memory is what the process comes to hold beyond what it held before the first step, compiling included; on a GPU
  torch's own peak.
* Both sides have the same batch, loss, optimiser, clipping and threads, and, where they are the same network, the same
  weights: the table says how far apart the losses of the first step are (of a compiled network: before compiling).
* Ours runs as train.py starts it, on a CPU with glibc told to keep freed memory (launch/hardware.py): this is part of
  what is compared. The peers run as they are. What Lightning's loop adds to a step is on neither side.
* Dropout and dither are off, and all batches have one shape.

asteroid, NeMo and segmentation_models_pytorch live in an environment of their own (`make peers`); without it the other
rows are measured.
"""

import argparse
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peer_pairs import FOREIGN, PAIRS
from data.errors import DataError

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".peers" / "bin" / "python"
MAKE_PEERS = "make peers"
SAME_LOSS = 1e-3
_START_S, _COMPILE_S, _STEP_S = 300.0, 90.0, 600.0  # how long a process may take to begin, to compile, to answer


class SideFailed(Exception):
    """Why a side cannot be measured, in one line."""


class Side:
    """A process that does one side's job when it is told to."""

    def __init__(self, python: str, task: dict[str, Any], work: Path) -> None:
        self.name, self.log = task["side"], work / f"{task['pair']} {task['side']}.log"
        threads = str(task["threads"])
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.peer_worker", json.dumps(task)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            bufsize=1,
        )

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Its next line; it sends one at a time."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                raise SideFailed(f"no answer within {limit_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise SideFailed(last_line(self.log) or f"ended with {self.process.wait()}")
        return json.loads(line)

    def measure(self, times: int) -> dict[str, float]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{times}\n")
        except BrokenPipeError:
            raise SideFailed("ended while it waited") from None
        return self.answer(_STEP_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def last_line(log: Path) -> str:
    """Where Python says what went wrong."""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def measure_pair(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every side's measurements by round, losses of the first step, and why a side has none."""
    pair = PAIRS[name]
    sizes = pair.sizes | (pair.quick if options.quick else {})
    found: dict[str, Any] = {"sizes": sizes, "rounds": {}, "losses": {}, "failed": {}}
    if pair.unit == "example":
        # Imported here: nothing else in this process needs torch.
        from benchmarks.peer_loader import make_recordings

        make_recordings(work, manifest=options.data, count=sizes["recordings"], seconds=sizes["recording_s"])
    missing = [side for side in pair.sides if side in FOREIGN and not options.python.exists()]
    found["failed"] |= {side: f"{options.python} is not there ({MAKE_PEERS})" for side in missing}
    sides = [side for side in pair.sides if side not in missing]
    if all(side.startswith("ours") for side in sides):
        return found
    running: list[Side] = []
    try:
        for side in sides:
            python = str(options.python) if side in FOREIGN else sys.executable
            task = {"pair": name, "side": side, "sizes": sizes, "work": str(work)}
            started = Side(python, task | {"threads": options.threads, "device": options.device}, work)
            running.append(started)
            limit_s = _COMPILE_S if "compiled" in side else _START_S
            found["losses"][side] = _try(started, running, found, lambda s=started, t=limit_s: s.answer(t)["losses"])
        for _ in range(options.rounds):
            for side in list(running):
                taken = _try(side, running, found, lambda s=side: s.measure(pair.times))
                if taken is not None:
                    found["rounds"].setdefault(side.name, []).append(taken)
    finally:
        for side in running:
            side.close()
    for side in found["failed"]:
        found["rounds"].pop(side, None)
    return found


def _try(side: Side, running: list[Side], found: dict[str, Any], ask: Any) -> Any:
    try:
        return ask()
    except SideFailed as error:
        found["failed"][side.name] = str(error)
        running.remove(side)
        side.close()
        return None


def rows_of(name: str, found: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Ours against each peer that was measured: medians, and ratios with their quartiles."""
    key, rows = "cpu_s" if device == "cpu" else "wall_s", []
    own = [side for side in found["rounds"] if side.startswith("ours")]
    per_job = found["sizes"]["batch"] if PAIRS[name].unit == "example" else 1
    for ours in own:
        for peer in (side for side in found["rounds"] if side not in own):
            pairs = list(zip(found["rounds"][ours], found["rounds"][peer], strict=True))
            row: dict[str, Any] = {"pair": name, "ours": ours, "peer": peer, "unit": PAIRS[name].unit}
            ratios = [a[key] / b[key] for a, b in pairs]
            row |= {"time_ratio": statistics.median(ratios), "quartiles": quartiles(ratios)}
            row |= {"ours_s": statistics.median(a[key] for a, _ in pairs) / per_job}
            row |= {"peer_s": statistics.median(b[key] for _, b in pairs) / per_job}
            if row["unit"] == "step":
                row |= {"ours_mib": pairs[-1][0]["peak_mib"], "peer_mib": pairs[-1][1]["peak_mib"]}
                row["memory_ratio"] = row["ours_mib"] / max(row["peer_mib"], 1e-9)
                losses = [found["losses"][side].get(peer) for side in (ours, peer)]
                row["loss_difference"] = None if None in losses else abs(losses[0] - losses[1])
            rows.append(row)
    return rows


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def markdown(rows: list[dict[str, Any]]) -> str:
    header = ["", "ours", "against", "ours : theirs, time", "quartiles", "ours, s each", "theirs, s each"]
    header += ["ours : theirs, memory", "ours, MiB", "theirs, MiB", "first loss"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row["pair"], row["ours"], row["peer"], f"{row['time_ratio']:.3f}"]
        cells.append(" to ".join(f"{value:.3f}" for value in row["quartiles"]))
        cells += [f"{row[key]:.4g}" for key in ("ours_s", "peer_s")]
        if row["unit"] == "example":
            cells += ["", "", "", ""]
        else:
            cells += [f"{row['memory_ratio']:.2f}", f"{row['ours_mib']:.0f}", f"{row['peer_mib']:.0f}"]
            cells.append(equality(row["loss_difference"]))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def equality(difference: float | None) -> str:
    if difference is None:
        return "another network"
    return f"equal to {difference:.0e}" if difference <= SAME_LOSS else f"DIFFERS by {difference:.1e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PAIRS), help=f"of {', '.join(PAIRS)}, with commas between")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each side (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--python", type=Path, default=PEERS, help="of the peers (default: .peers/bin/python)")
    parser.add_argument("--data", type=Path, help="manifest of talkers for the loaders' recordings (default: noise)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 rounds, to see that it works")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers; the table goes beside it as .md")
    options = parser.parse_args(argv)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in PAIRS]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(PAIRS)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    options.rounds = 2 if options.quick else options.rounds
    began = time.strftime("%Y-%m-%d")
    head = (
        f"{options.device}, {options.threads} thread(s), {options.rounds} rounds; the peers' environment: {MAKE_PEERS}"
    )
    print(head, flush=True)
    result: dict[str, Any] = {"date": began, "threads": options.threads, "device": options.device, "pairs": {}}
    rows, notes = [], []
    for name in names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="peers") as folder:
            try:
                found = measure_pair(name, options, Path(folder))
            except DataError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
        result["pairs"][name] = found | {"rows": rows_of(name, found, options.device)}
        rows += result["pairs"][name]["rows"]
        sizes = ", ".join(f"{key} {value}" for key, value in found["sizes"].items())
        notes.append(f"* {name}: {PAIRS[name].about} ({sizes})")
        notes += [f"* {name}: no row for {side}: {reason}" for side, reason in found["failed"].items()]
    text = f"{markdown(rows)}\n\n" + "\n".join(notes)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(f"{head}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
