"""Whether loading keeps up with training: python -m benchmarks.keeping_up [experiment=<recipe> key=value …]

Examples per second of a recipe as it is, and of the same run on one batch that stays in memory
(trainer.overfit_batches=1 data.loader.keep_on_device=true), for which nothing has to be loaded; in turns, in processes
of their own. 1: loading costs nothing. Without arguments the four demo recipes are measured, which need
`python -m data.prepare demo --output demo_data` and `python -m data.prepare demo_photos --output demo_photos`.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speedup_rows import QUIET, SYSTEMS
from benchmarks.speedups import Measured, train

_ONE_BATCH = ("trainer.overfit_batches=1", "data.loader.keep_on_device=true", "data.loader.num_workers=0")
_NEVER_VALIDATED = ("trainer.val_check_interval=null", "trainer.check_val_every_n_epoch=1000000")


def ratios(recipe: Sequence[str], *, rounds: int, steps: int, folder: Path) -> list[tuple[Measured, Measured]] | str:
    """Of each round the run as it is and the one on one batch; or the line with which one of them ended."""
    found = []
    typed = [*recipe, *QUIET, *_NEVER_VALIDATED, f"trainer.max_steps={steps}"]
    for number in range(rounds):
        pair = [train([*typed, *more], folder / f"{number}-{len(more)}") for more in ((), _ONE_BATCH)]
        if failed := next((run for run in pair if isinstance(run, str)), None):
            return failed
        found.append(tuple(pair))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keeping_up", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what would be typed after train.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of a run; the second half counts")
    options = parser.parse_args(argv)
    recipes = [options.overrides] if options.overrides else [[f"experiment={system}_demo"] for system in SYSTEMS]
    print(f"{options.rounds} rounds of {options.steps} steps\n")
    print("| recipe | examples/s | on one batch | ratio | data wait |\n|---|---|---|---|---|", flush=True)
    code = 0
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            found = ratios(recipe, rounds=options.rounds, steps=options.steps, folder=Path(folder))
        if isinstance(found, str):
            print(f"| {' '.join(recipe)} | {found} | | | |", flush=True)
            code = 1
            continue
        real, one = ([pair[side].examples_per_s for pair in found] for side in (0, 1))
        shares = [a / b for a, b in zip(real, one, strict=True)]
        print(
            f"| {' '.join(recipe)} | {statistics.median(real):.1f} | {statistics.median(one):.1f} |"
            f" {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) |"
            f" {statistics.median(pair[0].data_wait for pair in found):.0%} |",
            flush=True,
        )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
