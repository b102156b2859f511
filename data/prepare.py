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

from data.aec_challenge import CONVERTED, check_aec_challenge
from data.aec_challenge import aec_challenge as aec_challenge_rows
from data.aishell3 import aishell3 as aishell3_rows
from data.arguments import at_least, positive, share, share_or_all
from data.convert import convert_manifests
from data.corpus import check_splits
from data.demo import check_demo, make_demo
from data.demo_photos import check_demo_photos, make_demo_photos
from data.echo_scenarios import SCENARIOS
from data.errors import DataError
from data.folders import find_folder
from data.image_folders import check_image_splits, scan_clwd, scan_images, split_by_source
from data.manifest import is_echo, is_image, is_mixture, manifest_text, source_keys, write_manifest
from data.mixture_corpora import Splits, talkers
from data.mixture_corpora import librimix as librimix_rows
from data.mixture_corpora import wsj0mix as wsj0mix_rows
from data.speakers import scan_speakers, split_by_speaker

MAX_PROBLEMS_SHOWN = 10

Run = Callable[[argparse.Namespace], list[str]]  # gives the problems that --check found


def demo(parser: argparse.ArgumentParser) -> Run:
    """a small synthetic corpus: talkers, noises, rooms (offline, under a minute)"""
    parser.add_argument("--output", default="demo_data", help="folder to make (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="another seed, other voices (default: %(default)s)")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="parallel syntheses (default: %(default)s)")

    def run(options: argparse.Namespace) -> list[str]:
        if options.check:
            return check_demo(options.output)
        make_demo(options.output, seed=options.seed, jobs=options.jobs)
        return []

    return run


def manifest(parser: argparse.ArgumentParser) -> Run:
    """manifests for a folder of recordings, split by speaker"""
    _add_folders(parser, "folder of recordings, one sub-folder (or file name up to _ or -) per speaker")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the split (default: %(default)s)")
    parser.add_argument("--val-fraction", type=share, default=0.1, help="share of speakers (default: %(default)s)")
    parser.add_argument("--test-fraction", type=share, default=0.1, help="share of speakers (default: %(default)s)")
    parser.add_argument("--max-speakers", type=at_least(1), help="choose so many speakers (default: all)")

    def make(options: argparse.Namespace) -> Splits:
        return split_by_speaker(
            scan_speakers(options.input, max_speakers=options.max_speakers, seed=options.seed),
            seed=options.seed,
            val_fraction=options.val_fraction,
            test_fraction=options.test_fraction,
        )

    return _check_or_write(make, check_splits)


def librimix(parser: argparse.ArgumentParser) -> Run:
    """Libri2Mix or Libri3Mix: manifests of its mixtures, and of its talkers (*_talkers.jsonl) to mix anew"""
    _add_folders(parser, "Libri2Mix or Libri3Mix, as its own script makes it")
    _add_version(parser)
    parser.add_argument(
        "--type", choices=("clean", "both", "single"), default="clean", help="mix_<type> (default: %(default)s)"
    )

    def make(options: argparse.Namespace) -> Splits:
        rows = librimix_rows(options.input, sample_rate=options.sample_rate, mode=options.mode, kind=options.type)
        return _with_talkers(rows)

    return _check_or_write(make, lambda folder: check_splits(folder) + check_splits(folder, suffix="_talkers"))


def wsj0mix(parser: argparse.ArgumentParser) -> Run:
    """wsj0-2mix or wsj0-3mix: manifests of its mixtures, and of its talkers (*_talkers.jsonl) to mix anew"""
    _add_folders(parser, "2speakers or 3speakers, with wav8k/min/{tr,cv,tt}/{mix,s1,s2} in it")
    _add_version(parser)

    def make(options: argparse.Namespace) -> Splits:
        return _with_talkers(wsj0mix_rows(options.input, sample_rate=options.sample_rate, mode=options.mode))

    def check(folder: Path) -> list[str]:
        # The corpus itself takes the talkers of tr and cv from the same set.
        return check_splits(folder) + check_splits(folder, suffix="_talkers", shared=("train", "val"))

    return _check_or_write(make, check)


def aishell3(parser: argparse.ArgumentParser) -> Run:
    """AISHELL-3: manifests of its talkers; train and val are two parts of its train folder"""
    _add_folders(parser, "data_aishell3, with train/wav and test/wav in it")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of all choices (default: %(default)s)")
    parser.add_argument("--val-fraction", type=share, default=0.1, help="share of train's (default: %(default)s)")
    parser.add_argument("--max-speakers", type=at_least(1), help="so many of train and of test (default: all)")
    parser.add_argument("--max-hours", type=positive, help="so many of train and of test (default: all)")

    def make(options: argparse.Namespace) -> Splits:
        return aishell3_rows(
            options.input,
            max_speakers=options.max_speakers,
            max_hours=options.max_hours,
            val_fraction=options.val_fraction,
            seed=options.seed,
        )

    return _check_or_write(make, check_splits)


def aec_challenge(parser: argparse.ArgumentParser) -> Run:
    """AEC-Challenge: manifests of its made and real echoes (*_far_end.jsonl: real ones to add talkers to), and of its
    test sets"""
    _add_folders(parser, "the challenge's repository, its datasets, or a folder in it such as synthetic or real")
    parser.add_argument(
        "--single-talk",
        type=share_or_all,
        default=0.5,
        help="share of the made double talks of which there is far-end single talk as well, and share of those of"
        " which there is near-end single talk (default: %(default)s)",
    )
    parser.add_argument("--val-fraction", type=share, default=0.05, help="share of train's (default: %(default)s)")
    parser.add_argument(
        "--convert",
        type=at_least(8000),
        metavar="HZ",
        help="copy all recordings to mono WAV of 16 bits at this rate, below --output, and name the copies; training"
        " reads them faster (default: name the recordings as they are)",
    )

    def make(options: argparse.Namespace) -> Splits:
        rows = aec_challenge_rows(options.input, single_talk=options.single_talk, val_fraction=options.val_fraction)
        if options.convert is None:
            return rows
        folder = Path(options.output) / f"{CONVERTED}{options.convert}"
        return convert_manifests(rows, root=options.input, folder=folder, sample_rate=options.convert)

    return _check_or_write(make, check_aec_challenge)


def demo_photos(parser: argparse.ArgumentParser) -> Run:
    """photos to draw marks on, copied from the scikit-image and scikit-learn wheels (offline, in a second)"""
    parser.add_argument("--output", default="demo_photos", help="folder to make (default: %(default)s)")

    def run(options: argparse.Namespace) -> list[str]:
        if options.check:
            return check_demo_photos(options.output)
        make_demo_photos(options.output)
        return []

    return run


def images(parser: argparse.ArgumentParser) -> Run:
    """manifests for a folder of photos, of images with masks, or of watermarked / clean pairs, split by source photo"""
    _add_folders(parser, "folder with images/ and masks/, with watermarked/, clean/ and perhaps masks/, or of photos")
    parser.add_argument(
        "--allow-missing-mask",
        choices=("error", "clean"),
        default="error",
        help="clean: an image without mask has no marks (default: %(default)s)",
    )
    parser.add_argument("--val-fraction", type=share, default=0.1, help="share of sources (default: %(default)s)")
    parser.add_argument("--test-fraction", type=share, default=0.1, help="share of sources (default: %(default)s)")

    def make(options: argparse.Namespace) -> Splits:
        rows = scan_images(options.input, allow_missing_mask=options.allow_missing_mask)
        return split_by_source(rows, val_fraction=options.val_fraction, test_fraction=options.test_fraction)

    return _check_or_write(make, check_image_splits)


def clwd(parser: argparse.ArgumentParser) -> Run:
    """CLWD: manifests of its images with masks; train and val are two parts of its train folder"""
    _add_folders(parser, "CLWD, with train/Watermarked_image and test/Watermarked_image in it")
    parser.add_argument("--val-fraction", type=share, default=0.1, help="share of train's (default: %(default)s)")

    def make(options: argparse.Namespace) -> Splits:
        root = find_folder(options.input, "train/Watermarked_image").parent.parent
        return split_by_source(scan_clwd(root), val_fraction=options.val_fraction)

    def check(folder: Path) -> list[str]:
        # The corpus itself may take the photos of train and test from the same set.
        return check_image_splits(folder, given="test")

    return _check_or_write(make, check)


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {
    "demo": demo,
    "manifest": manifest,
    "librimix": librimix,
    "wsj0mix": wsj0mix,
    "aishell3": aishell3,
    "aec_challenge": aec_challenge,
    "demo_photos": demo_photos,
    "images": images,
    "clwd": clwd,
}


def _add_folders(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--input", help=f"{what}; not needed with --check")
    parser.add_argument("--output", required=True, help="folder for train.jsonl, val.jsonl and test.jsonl")


def _add_version(parser: argparse.ArgumentParser) -> None:
    """Which of the versions that a mixture corpus comes in."""
    parser.add_argument(
        "--sample-rate", type=int, choices=(8000, 16000), default=8000, help="in Hz (default: %(default)s)"
    )
    parser.add_argument(
        "--mode", choices=("min", "max"), default="min", help="cut to the shortest talker or not (default: %(default)s)"
    )


def _check_or_write(make: Callable[[argparse.Namespace], Splits], check: Callable[[Path], list[str]]) -> Run:
    """What all commands do that write manifests: with --check look at those in --output, else make them."""

    def run(options: argparse.Namespace) -> list[str]:
        if options.check:
            return check(Path(options.output))
        if options.input is None:
            return ["--input is missing: the folder of the corpus"]
        _write_manifests(Path(options.output), make(options))
        return []

    return run


def _with_talkers(splits: Splits) -> Splits:
    """Manifests of fixed mixtures, and beside each one of their sources."""
    return splits | {f"{split}_talkers": talkers(rows) for split, rows in splits.items()}


def _write_manifests(folder: Path, manifests: Splits) -> None:
    """Write the manifests that have rows; one that is there already must say the same, and is not touched."""
    paths = {name: folder / f"{name}.jsonl" for name in manifests}
    known = {name: path.exists() for name, path in paths.items()}
    for name, path in paths.items():
        if known[name] and path.read_bytes() != manifest_text(path, manifests[name]).encode():
            raise DataError(f"{path}: exists and says something else; remove it or choose another --output")
    for name, rows in manifests.items():
        if rows:
            if not known[name]:
                write_manifest(paths[name], rows)
            print(f"{paths[name]}: {_summary(rows)}{', unchanged' if known[name] else ''}")


def _summary(rows: list[dict[str, Any]]) -> str:
    if is_image(rows[0]):
        return _image_summary(rows)
    hours = sum(row["duration"] for row in rows) / 3600
    if is_mixture(rows[0]):
        return f"{len(rows)} mixtures of {len(source_keys(rows[0]))}, {hours:.2f} hours"
    if is_echo(rows[0]):
        counts = {name: sum(row["scenario"] == name for row in rows) for name in SCENARIOS}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) + f", {hours:.2f} hours"
    return f"{len({row['speaker'] for row in rows})} speakers, {len(rows)} recordings, {hours:.2f} hours"


def _image_summary(rows: list[dict[str, Any]]) -> str:
    """So many of each sort; a layout that was taken for another shows here."""
    sorts = {
        "images with masks": sum("mask_filepath" in row for row in rows),
        "images with clean photos": sum("clean_filepath" in row for row in rows),
        "images without marks": sum(row.get("marked") is False for row in rows),
    }
    sorts["photos to draw marks on"] = len(rows) - sum(sorts.values())
    return ", ".join(f"{count} {sort}" for sort, count in sorts.items() if count)


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
