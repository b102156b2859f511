"""Recordings that cannot be used. Each is one among good ones: a training passes over it and says so."""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile

from data.manifest import write_manifest
from data.ssl import SelfSupervisedData
from tests.malformed.cases import Case, Kind, World, counted

RATE = 8000
FORMATS = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3", "opus": "OGG"}


def noise(num_frames: int = 4 * RATE, channels: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(num_frames).standard_normal((num_frames, channels)).astype(np.float32)


def good(folder: Path, suffix: str, *, rate: int = RATE) -> bytes:
    """The bytes of a recording of 4 s."""
    file = folder / f"good.{suffix}"
    if not file.exists():
        soundfile.write(file, noise(), rate, format=FORMATS[suffix], subtype="OPUS" if suffix == "opus" else None)
    return file.read_bytes()


def wav(
    samples: np.ndarray,
    *,
    rate: int = RATE,
    channels: int = 1,
    tag: int = 3,
    bits: int = 32,
    promised: int | None = None,
) -> bytes:
    """A WAV file with whatever is said in its header. *promised*: bytes of samples, by default those that there are."""
    content = samples.astype("<f4").tobytes()
    promised = len(content) if promised is None else promised
    align = channels * bits // 8 & 0xFFFF
    fmt = struct.pack("<HHIIHH", tag, channels, rate & 0xFFFFFFFF, rate * align & 0xFFFFFFFF, align, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", promised & 0xFFFFFFFF) + content
    return b"RIFF" + struct.pack("<I", (promised + 36) & 0xFFFFFFFF) + body


def one_bad(world: World, make: Callable[[Path], None], suffix: str, what: str, **row: float) -> Case:
    """A manifest of two good recordings and one that *make* makes."""
    folder = world.folder / f"audio{len(os.listdir(world.folder))}"
    folder.mkdir()
    (folder / "a.wav").write_bytes(good(world.folder, "wav"))
    bad = folder / f"bad.{suffix}"
    make(bad)
    rows = [{"audio_filepath": "a.wav", "offset": float(i)} for i in range(2)] + [{"audio_filepath": str(bad), **row}]
    write_manifest(folder / "m.jsonl", rows)
    section = {"manifest_filepath": str(folder / "m.jsonl"), "batch_size": 1, "sample_rate": RATE, "shuffle": False}
    return Case(what, lambda: counted(SelfSupervisedData(train_ds=section, loader={"num_workers": 0})), str(bad))


def bytes_of(world: World, files: Sequence[tuple[str, bytes]], what: str) -> Iterator[Case]:
    for suffix, content in files:
        yield one_bad(world, lambda bad, c=content: None if bad.write_bytes(c) else None, suffix, f"{what} .{suffix}")


def cut(suffix: str, *shares: float) -> Kind:
    def kind(world: World) -> Iterator[Case]:
        whole = good(world.folder, suffix)
        for share in shares:
            yield from bytes_of(world, [(suffix, whole[: int(share * len(whole))])], f"{share:.0%} of")

    return kind


def header_only(world: World) -> Iterator[Case]:
    sizes = {"wav": 44, "flac": 42, "ogg": 58, "mp3": 200, "opus": 47}
    yield from bytes_of(world, [(s, good(world.folder, s)[:size]) for s, size in sizes.items()], "the header of")


def empty(world: World) -> Iterator[Case]:
    yield from bytes_of(world, [(suffix, b"") for suffix in FORMATS], "0 bytes")


def random_bytes(world: World) -> Iterator[Case]:
    content = np.random.default_rng(0).bytes(5000)
    yield from bytes_of(world, [(suffix, content) for suffix in FORMATS], "random bytes as")


def wrong_magic(world: World) -> Iterator[Case]:
    files = [(suffix, b"XXXX" + good(world.folder, suffix)[4:]) for suffix in ("wav", "flac", "ogg")]
    yield from bytes_of(world, files, "no magic number in")


def not_finite(value: float) -> Kind:
    def kind(world: World) -> Iterator[Case]:
        for where in (slice(0, 1), slice(-1, None), slice(None)):
            samples = noise()
            samples[where] = value
            yield from bytes_of(world, [("wav", wav(samples))], f"{value} at {where}")

    return kind


def no_frames(world: World) -> Iterator[Case]:
    files = []
    for suffix in ("wav", "flac", "ogg"):
        file = world.folder / f"none.{suffix}"
        soundfile.write(file, noise(0), RATE, format=FORMATS[suffix])
        files.append((suffix, file.read_bytes()))
    yield from bytes_of(world, files, "no samples in")


def promises_more(world: World) -> Iterator[Case]:
    samples = noise(RATE)
    for promised in (samples.nbytes + 100, 10 * samples.nbytes, 2**31 - 1):
        yield from bytes_of(world, [("wav", wav(samples, promised=promised))], f"{promised} bytes promised by")


def absurd_rate(world: World) -> Iterator[Case]:
    for rate in (0, 1, 8009, 2**31 - 1, 2**32 - 8000):
        yield from bytes_of(world, [("wav", wav(noise(RATE), rate=rate))], f"{rate} Hz")


def absurd_channels(world: World) -> Iterator[Case]:
    for channels in (0, 1025, 65535):
        yield from bytes_of(world, [("wav", wav(noise(RATE), channels=channels))], f"{channels} channels in")


def unknown_coding(world: World) -> Iterator[Case]:
    for tag, bits in ((3, 0), (3, 7), (0x4242, 16), (1, 65535)):
        yield from bytes_of(world, [("wav", wav(noise(RATE), tag=tag, bits=bits))], f"coding {tag}, {bits} bits in")


def text(world: World) -> Iterator[Case]:
    files = [("wav", b"RIFF is not all\n"), ("flac", b"fLaC\n"), ("ogg", b"OggS?\n"), ("mp3", b"ID3 is a tag\n")]
    yield from bytes_of(world, files, "text as")


def lfs_pointer(world: World) -> Iterator[Case]:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 12345\n"
    yield from bytes_of(world, [(suffix, pointer) for suffix in ("wav", "flac")], "a Git-LFS pointer as")


def damaged_inside(world: World) -> Iterator[Case]:
    """Single recordings whose coded samples do not decode."""
    for suffix, at in (("flac", 0.1), ("flac", 0.5), ("ogg", 0.9)):
        content = bytearray(good(world.folder, suffix))
        first = int(at * len(content))
        content[first : first + 600] = bytes(600)
        yield from bytes_of(world, [(suffix, bytes(content))], f"600 zeros at {at:.0%} of")


def not_a_file(world: World) -> Iterator[Case]:
    yield one_bad(world, os.mkdir, "wav", "a folder as .wav")
    yield one_bad(world, os.mkfifo, "wav", "a pipe that nobody writes to as .wav")
    yield one_bad(world, lambda bad: os.symlink("/dev/zero", bad), "wav", "an endless device as .wav")


def not_readable(world: World) -> Iterator[Case]:
    """Root may read a file without permissions; this one nobody may."""
    for suffix in ("wav", "flac"):
        yield one_bad(world, lambda bad: os.symlink("/proc/self/mem", bad), suffix, f"no reading of .{suffix}")


def bad_link(world: World) -> Iterator[Case]:
    yield one_bad(world, lambda bad: os.symlink("nowhere.wav", bad), "wav", "a link to nothing")
    yield one_bad(world, lambda bad: os.symlink(bad.name, bad), "flac", "a link to itself")


def missing(world: World) -> Iterator[Case]:
    yield one_bad(world, lambda bad: None, "wav", "no file .wav")
    yield one_bad(world, lambda bad: None, "flac", "no file .flac")


def beyond_the_end(world: World) -> Iterator[Case]:
    def write(bad: Path) -> None:
        bad.write_bytes(good(world.folder, "wav"))

    for offset in (4.0, 1e6, 1e300):
        yield one_bad(world, write, "wav", f"from {offset} s on of", offset=offset)


KINDS: dict[str, Kind] = {
    "truncated WAV": cut("wav", 0.001, 0.3, 0.99),
    "truncated FLAC": cut("flac", 0.01, 0.3, 0.99),
    "truncated OGG": cut("ogg", 0.3, 0.6, 0.99),
    "truncated MP3": cut("mp3", 0.01, 0.5, 0.9),
    "truncated OPUS": cut("opus", 0.3, 0.6, 0.99),
    "recording of 0 bytes": empty,
    "recording cut after its header": header_only,
    "random bytes as a recording": random_bytes,
    "recording without its magic number": wrong_magic,
    "NaN samples": not_finite(float("nan")),
    "infinite samples": not_finite(float("inf")),
    "recording without samples": no_frames,
    "header that promises more samples": promises_more,
    "absurd sample rate": absurd_rate,
    "absurd number of channels": absurd_channels,
    "unknown coding of samples": unknown_coding,
    "text as a recording": text,
    "Git-LFS pointer as a recording": lfs_pointer,
    "recording damaged inside": damaged_inside,
    "no file but something else as a recording": not_a_file,
    "recording that may not be read": not_readable,
    "link that leads nowhere": bad_link,
    "missing recording": missing,
    "part beyond the end of a recording": beyond_the_end,
}
