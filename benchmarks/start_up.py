"""How long it takes to begin: python -m benchmarks.start_up [experiment=<recipe> key=value …]

CPU seconds (user and system, of all processes) of `python train.py --help`, of the help on one recipe, and of a
training from the command to the end of its first step, checkpoint included; each several times.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
_ONE_STEP = ("trainer.max_steps=1", "trainer.limit_val_batches=0", "test=false")


def cpu_seconds(command: Sequence[str]) -> float:
    """Of one run of a command and its children. Raises SystemExit with its last line where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise SystemExit((done.stderr.strip().splitlines() or [f"error: ended with {done.returncode}"])[-1])
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=["experiment=conv_tasnet_demo"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    train = [sys.executable, str(ROOT / "train.py")]
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "python train.py --help": [*train, "--help"],
            f"python train.py {' '.join(options.overrides)} --help": [*train, *options.overrides, "--help"],
            f"python train.py {' '.join(options.overrides)}, to the end of the first step": [
                *train,
                *options.overrides,
                *_ONE_STEP,
                f"exp_manager.exp_dir={folder}",
            ],
        }
        print("| command | CPU seconds, median | range |\n|---|---|---|", flush=True)
        for name, command in commands.items():
            found = [cpu_seconds(command) for _ in range(options.rounds)]
            print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
