"""Corpora of fixed mixtures: LibriMix and wsj0-mix, as their own scripts lay them out.

    Libri2Mix/wav8k/min/{train-100,train-360,dev,test}/{mix_clean,mix_both,mix_single,s1,s2,noise}/<id>.wav
    Libri2Mix/wav8k/min/metadata/mixture_<part>_mix_<type>.csv
    2speakers/wav8k/min/{tr,cv,tt}/{mix,s1,s2}/<id>.wav

The rows are those of `data.manifest` with the talkers' names in "speakers". Each file is opened: all of a mixture must
have the same length and the rate that was asked for. A mixture for which that fails is left out with a warning.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data.audio import PathLike, audio_info
from data.errors import AudioError, DataError, ManifestError
from data.folders import contents, find_folder, leave_out_bad, recordings_below
from data.manifest import source_keys
from data.tables import read_table

Row = dict[str, Any]
Files = dict[str, Path]  # mix_filepath, s1_filepath, …, noise_filepath
Splits = dict[str, list[Row]]

_LIBRIMIX_PARTS = {"train": ("train-100", "train-360"), "val": ("dev",), "test": ("test",)}
_WSJ0MIX_PARTS = {"train": ("tr",), "val": ("cv",), "test": ("tt",)}


def librimix(root: PathLike, *, sample_rate: int, mode: str, kind: str) -> Splits:
    """Rows of train (train-100 and train-360), val (dev) and test of Libri2Mix or Libri3Mix.

    The metadata lists the mixtures where it is there, the folders do otherwise. Metadata names files by the paths
    of the machine on which they were made; a path that does not exist here is looked up below `root`.

    Args:
        root: Libri2Mix, Libri3Mix, or a folder that holds one of them.
        sample_rate: in Hz; names the folder wav8k or wav16k.
        mode: "min" or "max", cut to the shortest or padded to the longest talker.
        kind: "clean" (talkers), "both" (talkers and noise), "single" (the first talker and noise).

    Raises:
        DataError: the folders are not those of LibriMix, or too many mixtures cannot be used.
    """
    base = find_folder(root, f"wav{sample_rate // 1000}k/{mode}")
    mix = f"mix_{kind}"

    def list_part(part: str) -> list[Files] | None:
        metadata = base / "metadata" / f"mixture_{part}_{mix}.csv"
        if metadata.is_file():
            return [
                _metadata_files(values, base, where=f"{metadata}, line {number}")
                for number, values in read_table(metadata)
            ]
        return _folder_files(base / part, mix=mix, one_source=kind == "single", noise=kind != "clean")

    return _splits(base, _LIBRIMIX_PARTS, list_part, speakers_of=_librimix_speakers, sample_rate=sample_rate)


def wsj0mix(root: PathLike, *, sample_rate: int, mode: str) -> Splits:
    """Rows of train (tr), val (cv) and test (tt) of wsj0-2mix or wsj0-3mix. The talkers of val are those of train.

    Args:
        root: 2speakers, 3speakers, or a folder that holds one of them.
        sample_rate: in Hz; names the folder wav8k or wav16k.
        mode: "min" or "max", cut to the shortest or padded to the longest talker.

    Raises:
        DataError: the folders are not those of wsj0-mix, or too many mixtures cannot be used.
    """
    base = find_folder(root, f"wav{sample_rate // 1000}k/{mode}")
    list_part = partial(_folder_files, mix="mix", one_source=False, noise=False)
    return _splits(
        base, _WSJ0MIX_PARTS, lambda part: list_part(base / part), speakers_of=_wsj0_speakers, sample_rate=sample_rate
    )


def talkers(rows: list[Row]) -> list[Row]:
    """The sources of fixed mixtures as recordings of single talkers, for mixing them anew."""
    return [
        {"audio_filepath": row[key], "duration": row["duration"], "speaker": speaker}
        for row in rows
        for key, speaker in zip(source_keys(row), row["speakers"], strict=True)
    ]


def _splits(
    base: Path,
    parts_of: dict[str, tuple[str, ...]],
    list_part: Callable[[str], list[Files] | None],
    *,
    speakers_of: Callable[[str], list[str]],
    sample_rate: int,
) -> Splits:
    """Rows of the parts that are there; at least one must be."""
    splits: Splits = {split: [] for split in parts_of}
    for split, parts in parts_of.items():
        for part in parts:
            listed = list_part(part)
            if listed is not None:
                make_row = partial(_mixture_row, sample_rate=sample_rate, speakers_of=speakers_of)
                splits[split] += leave_out_bad(listed, make_row, where=base / part, what="mixtures")
    if not any(splits.values()):
        parts = [part for group in parts_of.values() for part in group]
        raise DataError(f"{base}: no mixtures in it; looked for {', '.join(parts)}, there is {contents(base)}")
    return splits


def _folder_files(folder: Path, *, mix: str, one_source: bool, noise: bool) -> list[Files] | None:
    """The files of each mixture of a part, by its folders; None if there is no such part."""
    if not folder.is_dir():
        return None
    sources = ["s1"] if one_source else sorted(path.name for path in folder.glob("s[1-9]") if path.is_dir())
    wanted = [mix, *(sources if len(sources) > 1 or one_source else ["s1", "s2"]), *(["noise"] if noise else [])]
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing:
        raise DataError(f"{folder}: looked for {', '.join(wanted)} in it, there is {contents(folder)}")
    names = [path.relative_to(folder / mix) for path in recordings_below(folder / mix)]
    if not names:
        raise DataError(f"{folder / mix}: no recordings in it")
    keys = ["mix", *wanted[1:]]
    return [
        {f"{key}_filepath": folder / inner / name for key, inner in zip(keys, wanted, strict=True)} for name in names
    ]


def _metadata_files(values: dict[str, Any], base: Path, *, where: str) -> Files:
    """The files of one line of LibriMix metadata."""
    columns = {"mix_filepath": "mixture_path", "noise_filepath": "noise_path"}
    columns |= {f"s{number}_filepath": f"source_{number}_path" for number in range(1, 10)}
    files = {key: _here(values[column], base) for key, column in columns.items() if column in values}
    if "mix_filepath" not in files or "s1_filepath" not in files:
        raise ManifestError(f"{where}: mixture_path and source_1_path are needed, there is {', '.join(values)}")
    return files


def _here(stored: str, base: Path) -> Path:
    """The path that metadata names, or <part>/<folder>/<file> of it below `base` where it does not exist."""
    path = Path(stored)
    if path.is_absolute() and path.exists():
        return path
    return base.joinpath(*re.split(r"[/\\]", stored)[-3:])  # it may come from Windows


def _mixture_row(files: Files, *, sample_rate: int, speakers_of: Callable[[str], list[str]]) -> Row:
    mix = files["mix_filepath"]
    infos = {key: audio_info(path) for key, path in files.items()}
    num_frames = infos["mix_filepath"].num_frames
    for key, info in infos.items():
        if info.sample_rate != sample_rate:
            raise AudioError(f"{files[key]}: has {info.sample_rate} Hz, its folder says {sample_rate} Hz")
        if info.num_frames != num_frames:
            raise AudioError(f"{files[key]}: has {info.num_frames} samples, its mixture {mix} has {num_frames}")
    num_sources, speakers = len(source_keys(files)), speakers_of(mix.stem)
    if len(speakers) < num_sources or not all(speakers):
        raise DataError(f"{mix}: its name does not tell the {num_sources} talkers")
    paths = {key: str(files[key]) for key in ("mix_filepath", *source_keys(files), "noise_filepath") if key in files}
    return {
        "id": mix.stem,
        "speakers": speakers[:num_sources],
        "duration": round(num_frames / sample_rate, 4),
        **paths,
    }


def _librimix_speakers(name: str) -> list[str]:
    """`4077-13754-0001_5142-33396-0065` -> 4077, 5142: the utterances of LibriSpeech, each begins with its speaker."""
    return [utterance.partition("-")[0] for utterance in name.split("_")]


def _wsj0_speakers(name: str) -> list[str]:
    """`011a0101_1.9857_01ta020r_-1.9857` -> 011, 01t: utterance and gain in turns, the speaker in three letters."""
    return [utterance[:3] for utterance in name.split("_")[::2]]
