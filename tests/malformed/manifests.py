"""Manifests that cannot be read: nothing is trained, the message names the file and the line."""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from data.aec import EchoData
from data.base import SystemData
from data.manifest import read_manifest
from data.mixtures import SeparationData
from data.ssl import SelfSupervisedData
from data.watermark import WatermarkData
from tests.malformed.cases import Case, Kind, World, refused

TALKER = {"audio_filepath": "a.wav", "duration": 1.0, "speaker": "anna"}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def one(world: World, content: bytes, what: str, *, suffix: str = "jsonl", names: str | None = None) -> Case:
    """A manifest that is read as all are. *names*: beside the file, what the message must hold."""
    file = world.folder / f"manifest{len(os.listdir(world.folder))}.{suffix}"
    file.write_bytes(content)
    return Case(what, lambda: refused(lambda: read_manifest(file)), names or str(file))


def contents(*given: tuple[str, bytes], suffix: str = "jsonl") -> Kind:
    def kind(world: World) -> Iterator[Case]:
        for what, content in given:
            yield one(world, content, what, suffix=suffix)

    return kind


def second_row(*given: tuple[str, dict[str, Any]], first: dict[str, Any] = TALKER) -> Kind:
    """A good row, and one with these values in place of the good one's; null takes a key out."""

    def kind(world: World) -> Iterator[Case]:
        for what, values in given:
            row = {key: value for key, value in {**first, **values}.items() if value is not None}
            yield one(world, lines(first, row), what, names="line 2: ")

    return kind


def long_line(world: World) -> Iterator[Case]:
    """Their messages must not be as long as they are."""
    yield one(world, lines({**TALKER, "duration": "9" * 1_000_000}), "a duration of a million digits as text")
    yield one(world, b"x" * 1_000_000, "a million characters that are no JSON")
    yield one(world, b'{"a": ' + b"9" * 1_000_000 + b"}", "a number of a million digits")


def not_there(world: World) -> Iterator[Case]:
    folder = world.folder / f"manifest{len(os.listdir(world.folder))}.jsonl"
    folder.mkdir()
    for what, path in (("no file", world.folder / "none.jsonl"), ("a folder", folder), ("a NUL", "a\0b.jsonl")):
        named = str(path).replace("\0", "\\x00")
        yield Case(what, lambda path=path: refused(lambda: read_manifest(path)), named)


def missing_files(world: World) -> Iterator[Case]:
    """Too many of the files that it names are not there."""
    for count in (1, 11, 300):
        file = world.folder / f"missing{count}.jsonl"
        file.write_bytes(lines(*({**TALKER, "audio_filepath": f"none{i}.wav"} for i in range(count))))
        data = SeparationData(train_manifest=str(file), max_bad_files=min(10, count - 1))
        yield Case(f"{count} missing files", lambda data=data: refused(lambda: data.setup("fit")), "none0.wav")


def for_another_system(world: World) -> Iterator[Case]:
    """Rows of another kind than a system learns from."""
    speech, photos = str(world.corpus / "train.jsonl"), str(world.photos / "train.jsonl")
    given: Sequence[tuple[SystemData, str]] = [
        (SeparationData(train_manifest=photos), photos),
        (EchoData(train_manifest=photos), photos),
        (WatermarkData(train_manifest=speech), speech),
        (SelfSupervisedData(train_ds={"manifest_filepath": photos}), photos),
    ]
    for data, path in given:
        what = f"{type(data).__name__} of {path}"
        yield Case(what, lambda data=data: refused(lambda: data.setup("fit")), os.path.basename(path))


def of_an_evaluation(world: World) -> Iterator[Case]:
    """A mistake in what only validation or test reads, which a run reads before it begins."""
    bad = world.folder / "noise.jsonl"
    bad.write_bytes(lines(TALKER, {"audio": "b.wav"}))
    parts = {part: str(world.corpus / f"{part}.jsonl") for part in ("train", "val", "test")}
    speech: dict[str, Any] = {f"{part}_manifest": path for part, path in parts.items()}
    sections = {f"{ds}_ds": {"manifest_filepath": parts[part]} for ds, part in (("train", "train"), ("test", "test"))}
    noisy = {"manifest_filepath": parts["val"], "noise_manifest": str(bad)}
    given: Sequence[tuple[str, SystemData]] = [
        ("fit", SeparationData(**speech, val_noise_manifest=str(bad))),
        ("test", SeparationData(**speech, test_noise_manifest=str(bad))),
        ("fit", EchoData(**speech, val_rir_manifest=str(bad))),
        ("fit", SelfSupervisedData(**sections, validation_ds=noisy)),
        ("test", SelfSupervisedData(**sections | {"test_ds": noisy})),
    ]
    for stage, data in given:
        what = f"{stage} of {type(data).__name__}"
        yield Case(what, lambda data=data, stage=stage: refused(lambda: data.setup(stage)), "noise.jsonl, line 2")


KINDS: dict[str, Kind] = {
    "manifest that is not JSON": contents(
        ("text", b"speech/anna/01.flac\n"),
        ("Python", b"{'audio_filepath': 'a.wav', 'duration': 1.0}\n"),
        ("a comment", lines(TALKER) + b"// more\n"),
        ("two rows in a line", lines(TALKER).strip() + lines(TALKER)),
        ("YAML", b"audio_filepath: a.wav\nduration: 1.0\n"),
    ),
    "manifest with a truncated line": contents(
        *((f"{cut} characters of a line", lines(TALKER) + lines(TALKER)[:cut]) for cut in (1, 20, 50)),
    ),
    "manifest whose rows are no objects": contents(
        ("a list of rows", json.dumps([TALKER, TALKER]).encode()),
        ("a number", b"3\n"),
        ("a text", b'"a.wav"\n'),
        ("null", b"null\n"),
    ),
    "manifest spread over lines": contents(("indented", json.dumps(TALKER, indent=2).encode())),
    "empty manifest": contents(("0 bytes", b""), ("blank lines", b"\n\n  \n"), ("a byte order mark", b"\xef\xbb\xbf")),
    "binary manifest": contents(
        ("a WAV header", b"RIFF\x24\x00\x00\x00WAVEfmt "),
        ("a pickle", b"\x80\x02}q\x00."),
        ("gzip", b"\x1f\x8b\x08\x00" + bytes(20)),
    ),
    "manifest of another encoding": contents(
        *((code, lines(TALKER).decode().encode(code)) for code in ("utf-16", "utf-32")),
        ("latin-1", '{"audio_filepath": "größe.wav", "duration": 1.0}'.encode("latin-1")),
    ),
    "manifest row without a key": second_row(
        *((key, {key: None}) for key in ("audio_filepath", "duration")),
        ("all of them", dict.fromkeys(TALKER)),
    ),
    "manifest row with a wrong type": second_row(
        ("a path that is a number", {"audio_filepath": 3}),
        ("a path that is a list", {"audio_filepath": ["a.wav"]}),
        ("a speaker that is a list", {"speaker": ["anna"]}),
        ("a text that is a number", {"text": 3}),
    ),
    "manifest row with an impossible duration": second_row(
        *((str(value), {"duration": value}) for value in (-1.0, 0, float("nan"), 1e400, "4.2")),
    ),
    "manifest row with an impossible offset": second_row(
        *((str(value)[:9], {"offset": value}) for value in (-0.5, float("inf"), True, "0", 10**400)),
    ),
    "manifest row with an impossible path": second_row(
        *((repr(path), {"audio_filepath": path}) for path in ("", "a\0.wav", "\ud800.wav")),
    ),
    "manifest row of deep nesting": contents(
        *((f"{depth} lists", b'{"a": ' + b"[" * depth + b"]" * depth + b"}\n") for depth in (20, 100_000)),
    ),
    "manifest with a line of a million characters": long_line,
    "manifest of rows of several kinds": second_row(
        ("a mixture", {"audio_filepath": None, "mix_filepath": "m.wav", "s1_filepath": "1.wav"}),
        ("an image", {"audio_filepath": None, "image_filepath": "a.png"}),
    ),
    "mixture with a gap in its sources": second_row(
        ("no s1", {"s1_filepath": None}),
        ("no s2, but s3", {"s2_filepath": None, "s3_filepath": "3.wav"}),
        first={"mix_filepath": "m.wav", "s1_filepath": "1.wav", "s2_filepath": "2.wav", "duration": 1.0},
    ),
    "echo recording that contradicts itself": second_row(
        ("no scenario", {"scenario": None}),
        ("an unknown scenario", {"scenario": "loud"}),
        ("no far end", {"farend_filepath": None}),
        ("a negative delay", {"delay_ms": -3}),
        first={"mic_filepath": "m.wav", "farend_filepath": "f.wav", "duration": 1.0, "scenario": "double_talk"},
    ),
    "image row that contradicts itself": second_row(
        ("unmarked, with a mask", {"mask_filepath": "m.png", "marked": False}),
        ("marked, without", {"marked": True}),
        ("marked: 1", {"marked": 1}),
        ("an unknown split", {"split": "dev"}),
        ("a source that is a list", {"source": [1]}),
        first={"image_filepath": "a.png"},
    ),
    "CSV with a wrong header": contents(
        ("none", b"a.wav,1.0\nb.wav,2.0\n"),
        ("other names", b"file,seconds\na.wav,1.0\n"),
        ("a name twice", b"audio_filepath,duration,duration\na.wav,1.0,1.0\n"),
        ("semicolons", b"audio_filepath;duration\na.wav;1.0\n"),
        ("no name", b"audio_filepath,,duration\na.wav,,1.0\n"),
        suffix="csv",
    ),
    "CSV with a wrong row": contents(
        ("too few fields", b"audio_filepath,duration\na.wav\n"),
        ("too many", b"audio_filepath,duration\na.wav,1.0,2.0\n"),
        ("an open quote", b'audio_filepath,duration\n"a.wav,1.0\n'),
        ("no number", b"audio_filepath,duration\na.wav,long\n"),
        ("an empty field", b"audio_filepath,duration\n,1.0\n"),
        suffix="csv",
    ),
    "manifest that is not there": not_there,
    "manifest of missing files": missing_files,
    "manifest for another system": for_another_system,
    "damaged manifest of an evaluation": of_an_evaluation,
}
