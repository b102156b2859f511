"""The data of the AEC-Challenge (Microsoft, github.com/microsoft/AEC-Challenge), as it is unpacked.

    synthetic/meta.csv, {farend_speech/farend_speech,echo_signal/echo,nearend_speech/nearend_speech,
        nearend_mic_signal/nearend_mic}_fileid_<n>.wav                        made double talk, 16 kHz
    synthetic_fullband/[meta.csv,] f<n>_{mic,farend,echo,nearend,target}.wav  made double talk, 48 kHz
    real/, real_doubled/ <device>_<scenario>_{mic,lpb}.wav                    recordings of devices, no clean speech
    test_set*/, blind_test_set*/ the same in sub-folders, [_enrl.wav]         for tests

Decisions that are not obvious
* A folder is known by the files in it, so the repository, its `datasets` or any folder in it may be the root. Real
  recordings below a folder whose name begins with test_set or blind_test_set are for tests, each set in a manifest of
  its own; a device that is in one of them is not trained on.
* The made examples are all double talk. Of a share of them there is far-end single talk as well (the echo alone, target
  silence), and of another near-end single talk (the clean near end, which is to come out as it went in).
* The clean near end of `synthetic` is louder than in its microphone: `clean_scale` is the corpus's nearend_scale.
* Real far-end single talk has silence for a target. Real double talk and near-end single talk have none: nobody knows
  the clean speech, and a noisy microphone as a target would teach to keep the noise. They have manifests of their own
  (`no_target`), to be scored with measures that need no target.
"""

import hashlib
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.audio import PathLike, audio_info, common_length
from data.corpus import SPLITS, check_manifests
from data.errors import AudioError, DataError, ManifestError
from data.folders import contents, leave_out_bad
from data.tables import read_table

log = logging.getLogger(__name__)

Row = dict[str, Any]
Splits = dict[str, list[Row]]

CONVERTED = "converted_"
"""How folders of converted copies begin; they are no part of the challenge."""

_DEPTH = 4  # <repository>/datasets/test_set/clean
_SYNTHETIC = {
    "mic_filepath": ("nearend_mic_signal", "nearend_mic"),
    "farend_filepath": ("farend_speech", "farend_speech"),
    "clean_filepath": ("nearend_speech", "nearend_speech"),
    "echo_filepath": ("echo_signal", "echo"),
}
_FULLBAND = {
    "mic_filepath": "mic",
    "farend_filepath": "farend",
    "clean_filepath": "target",
    "echo_filepath": "echo",
}
_REAL = {"mic_filepath": "mic", "farend_filepath": "lpb"}
_FULLBAND_NAME = re.compile(r"(f\d+)_(?:mic|farend|echo|nearend|target)\.wav")
_REAL_NAME = re.compile(
    r"(?P<recording>(?P<device>.+)_(?P<kind>doubletalk|farend[_-]singletalk|nearend[_-]singletalk|sweep)"
    r"(?:[_-]with[_-]movement)?)_(?P<role>mic|mic_c|lpb|enrl)\.wav"
)
_SCENARIOS = {"doubletalk": "double_talk", "farend": "far_end", "nearend": "near_end"}
_TEST_SET = re.compile(r"(blind_)?test_set")
_INNER = ("clean", "noisy", "doubletalk", "farend-singletalk", "nearend-singletalk")  # folders of a test set
_PARTS = ("", "_far_end", "_no_target")  # suffixes of manifests of train and val


def aec_challenge(root: PathLike, *, single_talk: float = 0.5, val_fraction: float = 0.05) -> Splits:
    """Rows of all that is found below a folder, by the name of their manifest.

    Args:
        root: the repository, its `datasets`, or a folder in it.
        single_talk: share of the made examples of which there is far-end single talk as well, and share of those of
            which there is near-end single talk; 0.5 is half double talk and a quarter of each.
        val_fraction: share of what is for training (near-end speakers of `synthetic`, examples of `synthetic_fullband`,
            devices of `real`) that is for validation, drawn by name.

    Returns:
        train, val: made examples, and real far-end single talk; test: made examples that the corpus gives to the test.
        {train,val}_far_end: the real far-end single talk of each, to take echoes from.
        {train,val}_no_target: the other real recordings.
        <test set>: the recordings of a test set.

    Raises:
        DataError: nothing of the challenge is there, a part of it is not complete, or too many of it cannot be used.
    """
    top = Path(os.path.abspath(root))
    if not top.is_dir():
        raise DataError(f"{root}: no such folder")
    splits: Splits = {split: [] for split in SPLITS}
    splits |= {split + part: [] for part in _PARTS[1:] for split in ("train", "val")}
    made, real, tests = [], [], {}
    for folder, kind, names in _folders(top, _DEPTH):
        test_set = _test_set_of(folder, top)
        if kind != "real":
            rows = {"synthetic": _synthetic, "fullband": _fullband}[kind](folder, names, with_echo=single_talk > 0)
            made += _drawn(rows, "speaker", fraction=val_fraction)
        elif test_set is not None:
            tests.setdefault(test_set, []).extend(_real(folder, names))
        else:
            real += _real(folder, names)
    if not made and not real and not tests:
        raise DataError(
            f"{root}: nothing of the AEC-Challenge in it (synthetic with meta.csv, f00000_mic.wav,"
            f" <device>_doubletalk_mic.wav, ...); there is {contents(top)}"
        )
    for row in made:
        splits[row.pop("split")] += _with_single_talk(row, share=single_talk)
    for row in _drawn(_without_tested(real, tests), "device", fraction=val_fraction):
        split = row.pop("split")
        for part in ("", "_far_end") if row["scenario"] == "far_end" else ("_no_target",):
            splits[split + part].append(row)
    return splits | tests


def check_aec_challenge(folder: Path) -> list[str]:
    """One line per problem of the manifests that are in `folder`; see `data.corpus.check_splits`.

    No recording and no device may be in two of train, val and test. Test sets are looked at each for itself.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not paths:
        return [f"{folder / 'train.jsonl'}: no such manifest; check the path"]
    groups = [[split + part for split in SPLITS if split + part in paths] for part in _PARTS]
    groups += [[name] for name in paths if not any(name in group for group in groups)]
    return [
        problem
        for group in groups
        for problem in check_manifests({name: paths[name] for name in group}, owner="device")
    ]


def _folders(folder: Path, depth: int) -> Iterator[tuple[Path, str, list[str]]]:
    """The folders with data of the challenge: their kind (synthetic, fullband, real) and the names of their files."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = [entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    inner = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", CONVERTED))]
    if any(part in inner for part, _ in _SYNTHETIC.values()):
        yield folder, "synthetic", names
        return
    if any(map(_FULLBAND_NAME.fullmatch, names)):
        yield folder, "fullband", names
    elif any(map(_REAL_NAME.fullmatch, names)):
        yield folder, "real", names
    for name in inner if depth > 0 else ():
        yield from _folders(folder / name, depth - 1)


def _test_set_of(folder: Path, top: Path) -> str | None:
    """The name of the test set that a folder below `top` belongs to; None: it is for training."""
    while top.name in _INNER:
        top = top.parent
    return next((part for part in folder.relative_to(top.parent).parts if _TEST_SET.match(part)), None)


def _synthetic(folder: Path, names: list[str], *, with_echo: bool) -> list[Row]:
    """Double talk of `synthetic`, as its metadata lists it; each row has its `split`."""
    wanted = {key: place for key, place in _SYNTHETIC.items() if with_echo or key != "echo_filepath"}
    missing = [inner for inner, _ in wanted.values() if not (folder / inner).is_dir()]
    missing += [] if "meta.csv" in names else ["meta.csv"]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} is missing; there is {contents(folder)}")
    metadata = folder / "meta.csv"

    def make_row(line: tuple[int, Row]) -> Row:
        where, values = f"{metadata}, line {line[0]}", line[1]
        number, split = _value(values, "fileid", where), _value(values, "split", where)
        if not number.isdecimal():
            raise ManifestError(f"{where}: fileid must be a whole number, got {number!r}")
        if split not in ("train", "test"):
            raise ManifestError(f"{where}: split must be train or test, got {split!r}")
        scale = _number(values, "nearend_scale", where)
        if scale <= 0:
            raise ManifestError(f"{where}: nearend_scale must be above 0, got {scale:g}")
        files = {key: folder / inner / f"{stem}_fileid_{number}.wav" for key, (inner, stem) in wanted.items()}
        known = {"speaker": values["nearend_speaker"]} if "nearend_speaker" in values else {}
        return {"id": f"synthetic_{number}", "split": split, **known, "clean_scale": scale, **_measured(files)}

    lines = list(read_table(metadata))
    if not lines:
        raise DataError(f"{metadata}: lists no examples; fetch it again")
    rows = leave_out_bad(lines, make_row, where=folder, what="examples")
    return [{**row, "scenario": "double_talk"} for row in rows]


def _fullband(folder: Path, names: list[str], *, with_echo: bool) -> list[Row]:
    """Double talk of `synthetic_fullband`, with the delay that its metadata states; all of it is for training."""
    stems = sorted({found[1] for name in names if (found := _FULLBAND_NAME.fullmatch(name))})
    wanted = {key: role for key, role in _FULLBAND.items() if with_echo or key != "echo_filepath"}
    metadata = folder / "meta.csv"
    delays_ms: dict[str, float] = {}
    if metadata.is_file():
        for number, values in read_table(metadata):
            where = f"{metadata}, line {number}"
            stem = Path(_value(values, "file_id", where)).stem  # f00007, or 7
            stem = stem if stem.startswith("f") else f"f{stem:0>5}"
            delays_ms[stem] = _number(values, "echo_delay", where)
            if delays_ms[stem] < 0:
                raise ManifestError(f"{where}: echo_delay must be 0 or more, got {delays_ms[stem]:g}")
    else:
        log.warning("%s: no such file, so nothing tells the delays of %s", metadata, folder.name)

    def make_row(stem: str) -> Row:
        files = {key: folder / f"{stem}_{role}.wav" for key, role in wanted.items()}
        known = {"delay_ms": delays_ms[stem]} if stem in delays_ms else {}
        return {"id": f"fullband_{stem}", "split": "train", **known, "scenario": "double_talk", **_measured(files)}

    return leave_out_bad(stems, make_row, where=folder, what="examples")


def _real(folder: Path, names: list[str]) -> list[Row]:
    """Recordings of devices. Sweeps are left out and counted; so are enrolment recordings, without a word."""
    found = [match for name in names if (match := _REAL_NAME.fullmatch(name)) and match["role"] != "enrl"]
    recordings: dict[str, dict[str, re.Match[str]]] = {}
    for match in found:
        if match["kind"] != "sweep":
            recordings.setdefault(match["recording"], {})[match["role"].removesuffix("_c")] = match
    if sweeps := sum(match["kind"] == "sweep" for match in found if match["role"] != "lpb"):
        print(f"{folder}: {sweeps} sweep(s) left out, they measure rooms")
    inner = f"{folder.name}_" if folder.name in ("clean", "noisy") else ""  # the same names in both

    def make_row(recording: str) -> Row:
        roles = recordings[recording]
        some = next(iter(roles.values()))
        scenario = _SCENARIOS[re.split("[_-]", some["kind"])[0]]
        for role in ("mic",) if scenario == "near_end" else ("mic", "lpb"):
            if role not in roles:
                raise AudioError(f"{folder / some[0]}: its partner {recording}_{role}.wav is missing; fetch it too")
        files = {key: folder / roles[role][0] for key, role in _REAL.items() if role in roles}
        return {"id": inner + recording, "device": some["device"], "scenario": scenario, **_measured(files)}

    return leave_out_bad(sorted(recordings), make_row, where=folder)


def _without_tested(rows: list[Row], tests: Splits) -> list[Row]:
    """The rows of devices that no test set has."""
    tested = {row["device"] for test in tests.values() for row in test}
    kept = [row for row in rows if row["device"] not in tested]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} real recording(s) left out: their devices are in a test set")
    return kept


def _drawn(rows: list[Row], key: str, *, fraction: float) -> list[Row]:
    """The rows with their split, val for a share of the owners (the value of `key`, else the id) of those for training.

    The order that is drawn from depends on the owners' names alone.
    """
    owners = {row.get(key, row["id"]) for row in rows if row.get("split", "train") == "train"}
    count = math.ceil(fraction * len(owners)) if len(owners) > 1 else 0
    chosen = set(sorted(owners, key=_place)[: min(count, len(owners) - 1)])
    return [
        row | {"split": "val" if row.get(key, row["id"]) in chosen else "train"}
        if row.get("split", "train") == "train"
        else row
        for row in rows
    ]


def _with_single_talk(row: Row, *, share: float) -> list[Row]:
    """A made double talk, and of a share of them far-end, of a share near-end single talk of the same files."""
    place = _place(row["id"])
    rows = [_other(row, without=("echo_filepath",))]
    if place < share:
        far = {"id": f"{row['id']}_far_end", "scenario": "far_end", "mic_filepath": row["echo_filepath"]}
        rows.append(_other(row, without=("echo_filepath", "clean_filepath", "clean_scale"), **far))
    if 1 - place <= share:
        near = {"id": f"{row['id']}_near_end", "scenario": "near_end", "mic_filepath": row["clean_filepath"]}
        rows.append(_other(row, without=("echo_filepath", "farend_filepath", "clean_scale", "delay_ms"), **near))
    return rows


def _other(row: Row, *, without: tuple[str, ...], **changes: str) -> Row:
    return {key: value for key, value in (row | changes).items() if key not in without}


def _place(name: str) -> float:
    """A number from 0 to below 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha1(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48


def _measured(files: dict[str, Path]) -> Row:
    """The files and how long all of them last. Raises AudioError where one cannot be opened or they do not fit."""
    infos = {key: audio_info(path) for key, path in files.items()}
    length = common_length([(files[key], info.sample_rate, info.num_frames) for key, info in infos.items()])
    duration_s = round(length / infos["mic_filepath"].sample_rate, 4)
    return {"duration": duration_s, **{key: str(path) for key, path in files.items()}}


def _value(values: Row, column: str, where: str) -> str:
    if column not in values:
        raise ManifestError(f"{where}: column {column} is missing or empty; there is {', '.join(values)}")
    return values[column]


def _number(values: Row, column: str, where: str) -> float:
    text = _value(values, column, where)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ManifestError(f"{where}: {column} must be a number, got {text!r}")
    return number
