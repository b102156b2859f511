"""Prepare corpora: python -m data.prepare <corpus> [options]; --check validates and writes nothing.

One sub-command per corpus. To add one, write a function that adds its arguments and returns what runs it, and
enter it in `COMMANDS`. Exit codes: 0 done or in order, 2 something the user can mend (one line per problem on
stderr).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.corpus import check_splits
from data.demo import check_demo, make_demo
from data.errors import DataError
from data.manifest import read_manifest, scan_speakers, split_by_speaker, write_manifest

MAX_PROBLEMS_SHOWN = 10

Run = Callable[[argparse.Namespace], list[str]]  # gives the problems that --check found


def demo(parser: argparse.ArgumentParser) -> Run:
    """a small synthetic corpus: talkers, noises, rooms (offline, under a minute)"""
    parser.add_argument("--output", default="demo_data", help="folder to make (default: %(default)s)")
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="another seed, other voices (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=_at_least(1), default=2, help="parallel syntheses (default: %(default)s)")

    def run(options: argparse.Namespace) -> list[str]:
        if options.check:
            return check_demo(options.output)
        make_demo(options.output, seed=options.seed, jobs=options.jobs)
        return []

    return run


def manifest(parser: argparse.ArgumentParser) -> Run:
    """manifests for a folder of recordings, split by speaker"""
    parser.add_argument("--input", help="folder of recordings, one sub-folder (or file name up to _ or -) per speaker")
    parser.add_argument("--output", required=True, help="folder for train.jsonl, val.jsonl and test.jsonl")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="seed of the split (default: %(default)s)")
    parser.add_argument("--val-fraction", type=_share, default=0.1, help="share of speakers (default: %(default)s)")
    parser.add_argument("--test-fraction", type=_share, default=0.1, help="share of speakers (default: %(default)s)")

    def run(options: argparse.Namespace) -> list[str]:
        if options.check:
            return check_splits(Path(options.output))
        if options.input is None:
            return ["--input is missing: the folder of recordings"]
        splits = split_by_speaker(
            scan_speakers(options.input),
            seed=options.seed,
            val_fraction=options.val_fraction,
            test_fraction=options.test_fraction,
        )
        _write_splits(Path(options.output), splits)
        return []

    return run


def _write_splits(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Write the manifests of the splits that have rows; one that is there already must say the same."""
    paths = {split: folder / f"{split}.jsonl" for split in splits}
    for split, path in paths.items():
        if path.exists() and read_manifest(path) != splits[split]:
            raise DataError(f"{path}: exists and says something else; remove it or choose another --output")
    for split, rows in splits.items():
        if rows:
            known = paths[split].exists()
            if not known:
                write_manifest(paths[split], rows)
            num_speakers = len({row["speaker"] for row in rows})
            hours = sum(row["duration"] for row in rows) / 3600
            state = ", unchanged" if known else ""
            print(f"{paths[split]}: {num_speakers} speakers, {len(rows)} recordings, {hours:.2f} hours{state}")


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {"demo": demo, "manifest": manifest}


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {text}")
        return value

    parse.__name__ = "whole number"  # argparse names it in its message
    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, got {text}")
    return value


_share.__name__ = "number"  # as above


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Prepare corpora for training.")
    commands = parser.add_subparsers(dest="corpus", required=True, metavar="corpus")
    runs: dict[str, Run] = {}
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.add_argument("--check", action="store_true", help="validate what is there, write nothing")
        runs[name] = command(sub)
    options = parser.parse_args(argv)
    try:
        problems = runs[options.corpus](options)
    except (DataError, OSError) as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        print("stopped; the same command starts again", file=sys.stderr)
        return 130
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > MAX_PROBLEMS_SHOWN:
        print(f"error: and {len(problems) - MAX_PROBLEMS_SHOWN} more", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
