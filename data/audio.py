"""Recordings in, recordings out: the only place that opens audio files.

Decisions that are not obvious
* A crop is read with seek + read, never as a whole file. When it is resampled, the read starts on the common
  grid of both rates and carries a margin as long as the filter, so a crop equals the same slice of the whole
  resampled file: no edge effects, and what an item holds does not depend on how it was read.
* MP3 is the exception: in a file of variable bit rate a seek ends beside the place, by a second or more. So it is
  decoded from its beginning on, hundreds of times faster than it plays; convert recordings of an hour to FLAC.
* A file is opened inside the call and closed before it returns: no handle ever crosses a fork.
* A header that promises more samples than the file holds is an error. libsndfile would shorten a cut-off WAV,
  OGG or OPUS file without a word, so their containers are looked at here. A cut-off FLAC or MP3 file is found when
  its missing part is read.
* The length of an MP3 file stands in its Xing or Info header. Without one (rare) a constant bit rate is assumed:
  right for such a file, though a cut then shows only in a shorter duration; a file of variable bit rate comes out
  too long or too short, write it again.
"""

import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torchaudio
from torch import Tensor

from data.errors import AudioError

FULL_SCALE = 32768
"""Steps of 16 bits from 0 to full scale."""

AUDIO_SUFFIXES = (".flac", ".mp3", ".ogg", ".opus", ".wav")
"""Suffixes (lower case) that a folder scan takes for recordings."""

PathLike = str | os.PathLike[str]

LFS_HEAD = b"version https://git-lfs"
"""How the file begins that Git LFS leaves in place of one that was not fetched."""

_UNKNOWN_FRAMES = 2**62  # libsndfile reports about 2**63 for streams without a length
_OGG_HEADER = 27  # bytes of a page before its table of segment sizes; the last one counts the segments
_MAX_OGG_PAGE = _OGG_HEADER + 255 + 255 * 255
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 1_000_000  # Hz; what a header states beyond is damage
_MAX_FILTERS = 10_000_000  # of a resampling whose rates have little in common: more takes seconds for each read
_LENGTH_TOLERANCE_S = 0.02  # AEC-Challenge's far ends have one sample more than its microphones
_FILTER_WIDTH = 6  # torchaudio's default lowpass_filter_width and rolloff, fixed here because the margin
_ROLLOFF = 0.99  # of a crop is computed from them


@dataclass(frozen=True)
class AudioInfo:
    """What a recording's header says: `sample_rate` in Hz, `num_frames` per channel, `duration_s` seconds."""

    sample_rate: int
    num_frames: int
    num_channels: int
    duration_s: float


def audio_info(path: PathLike) -> AudioInfo:
    """Read the header of a recording.

    Raises:
        AudioError: the file is missing, a folder, empty, truncated, a Git-LFS pointer or no audio.
    """
    with _open(path) as file:
        return AudioInfo(file.samplerate, file.frames, file.channels, file.frames / file.samplerate)


def read_audio(
    path: PathLike,
    *,
    sample_rate: int,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    channel: int | None = None,
) -> Tensor:
    """Read a recording, or a part of it, as mono at `sample_rate`.

    A part is `round(duration_s * sample_rate)` samples from sample
    `round(offset_s * sample_rate)` on; where the file ends earlier, what there is.

    Args:
        path: any file that libsndfile reads (WAV, FLAC, OGG, OPUS, MP3).
        sample_rate: rate of the result in Hz.
        offset_s: start of the part in seconds.
        duration_s: length of the part in seconds, None for all that follows.
        channel: the channel to read, from 0; None: the mean of all.

    Shape:
        Returns float32 `(T,)`.

    Raises:
        AudioError: as `audio_info`; also an offset beyond the end, no such channel, or samples that are NaN or
            infinite.
    """
    if sample_rate <= 0:
        raise ValueError(f"sample_rate must be positive, got {sample_rate}")
    if offset_s < 0 or (duration_s is not None and duration_s <= 0):
        raise AudioError(f"{path}: cannot read {duration_s} s from {offset_s} s on: negative or empty part")
    start = round(offset_s * sample_rate)
    count = None if duration_s is None else round(duration_s * sample_rate)
    with _open(path) as file:
        native_rate, num_frames = file.samplerate, file.frames
        if native_rate * sample_rate > _MAX_FILTERS * math.gcd(native_rate, sample_rate) ** 2:
            raise AudioError(
                f"{path}: {native_rate} Hz cannot be resampled to {sample_rate} Hz, their common divisor is"
                f" {math.gcd(native_rate, sample_rate)} Hz; write it again at a usual rate"
            )
        if channel is not None and not 0 <= channel < file.channels:
            raise AudioError(f"{path}: has {file.channels} channel(s), no channel {channel} (they count from 0)")
        first, stop, skip = _native_span(start, count, native_rate, sample_rate)
        if start * native_rate >= num_frames * sample_rate:
            raise AudioError(f"{path}: offset {offset_s:g} s lies beyond the end ({num_frames / native_rate:g} s)")
        stop = num_frames if stop is None else min(stop, num_frames)
        mono = _read_frames(file, path, first, stop - first, channel)
    samples = torch.from_numpy(mono)
    if native_rate != sample_rate:
        samples = torchaudio.functional.resample(
            samples, native_rate, sample_rate, lowpass_filter_width=_FILTER_WIDTH, rolloff=_ROLLOFF
        )
    return samples[skip:] if count is None else samples[skip : skip + count]


def common_length(recordings: Sequence[tuple[PathLike, int, int]]) -> int:
    """Samples that recordings of one moment have in common, such as a microphone and what its loudspeaker played.

    Args:
        recordings: path, sample rate in Hz and number of samples of each. They may differ by 20 ms at their ends.

    Raises:
        AudioError: they differ in sample rate, or by more in length; the first is held to be right.
    """
    first, rate, length = recordings[0]
    for path, own_rate, own_length in recordings[1:]:
        if own_rate != rate:
            raise AudioError(f"{path}: {own_rate} Hz, but {first} has {rate} Hz; bring both to one rate")
        if abs(own_length - length) > _LENGTH_TOLERANCE_S * rate:
            raise AudioError(
                f"{path}: {own_length / rate:.2f} s ({own_length} samples), but {first} has {length / rate:.2f} s"
                f" ({length} samples); cut both to the same part"
            )
    return min(samples for _, _, samples in recordings)


def write_audio(path: PathLike, samples: Tensor | np.ndarray, sample_rate: int, *, sixteen_bits: bool = False) -> bool:
    """Write a 32-bit float WAV; levels above 1 are kept, nothing is clipped.

    The file appears whole or not at all; missing folders are made.

    Args:
        path: a name that ends in .wav.
        samples: the signal.
        sample_rate: in Hz.
        sixteen_bits: write 16-bit integers where no sample passes full scale. A 16-bit recording that was read at its
            own rate is written as it was, bit for bit.

    Returns:
        Whether floats were written.

    Shape:
        `samples` is `(T,)` or `(C, T)`.

    Raises:
        AudioError: the name does not end in .wav, or the file cannot be written.
    """
    if Path(path).suffix.lower() != ".wav":
        raise AudioError(f"{path}: recordings are written as WAV, give a name that ends in .wav")
    array = samples.detach().cpu().float().numpy() if isinstance(samples, Tensor) else np.asarray(samples, np.float32)
    if array.ndim not in (1, 2):
        raise ValueError(f"samples must be (T,) or (C, T), got shape {tuple(array.shape)}")
    steps = np.rint(array * FULL_SCALE)
    fits = sixteen_bits and bool((steps >= -FULL_SCALE).all() and (steps < FULL_SCALE).all())
    try:
        with atomic_path(path) as temporary:
            if fits:
                sf.write(temporary, steps.astype(np.int16).T, sample_rate, subtype="PCM_16", format="WAV")
            else:
                sf.write(temporary, array.T, sample_rate, subtype="FLOAT", format="WAV")
    except (OSError, sf.SoundFileError) as error:
        raise AudioError(f"{path}: cannot be written ({_reason(error)})") from error
    return not fits


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A name beside `path` to write to; it replaces `path` when the block ends well, else it is removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _open(path: PathLike) -> Iterator[sf.SoundFile]:
    """The recording, opened; every way in which that fails becomes one AudioError."""
    head, size = _head(path)
    try:
        file = sf.SoundFile(path)
    except UnicodeEncodeError:
        raise AudioError(f"{str(path)!r}: its name is not UTF-8 text; rename it") from None
    except (sf.SoundFileError, OSError, TypeError) as error:
        raise AudioError(f"{path}: not a readable recording ({_reason(error)}); replace or remove it") from error
    with file:
        if not _LOWEST_RATE <= file.samplerate <= _HIGHEST_RATE:
            raise AudioError(f"{path}: its header states {file.samplerate} Hz, no rate of a recording; write it again")
        if file.frames == 0:
            raise AudioError(f"{path}: holds no samples; remove it from the data")
        if file.frames > _UNKNOWN_FRAMES:
            raise AudioError(f"{path}: its header states no length; write it again with a complete header")
        missing = _missing_riff_bytes(head, size) or _missing_ogg_bytes(path, head, size)
        if missing:
            raise AudioError(f"{path}: truncated, {missing} bytes are missing at its end; fetch it again")
        yield file


def _head(path: PathLike) -> tuple[bytes, int]:
    """First bytes and size of a file that exists, is a file and is no Git-LFS pointer."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # a pipe would be waited for
        raise AudioError(f"{path}: is a pipe or a device, a file is needed")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file; check the path (a manifest's are relative to its folder)") from None
    except IsADirectoryError:
        raise AudioError(f"{path}: is a folder, a recording is needed") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise AudioError(f"{str(path)!r}: cannot be opened ({_reason(error)})") from error
    if not head:
        raise AudioError(f"{path}: is empty (0 bytes); fetch it again")
    if head.startswith(LFS_HEAD):
        raise AudioError(f"{path}: is a Git-LFS pointer, not audio; run `git lfs pull` where it came from")
    return head, size


def _missing_riff_bytes(head: bytes, size: int) -> int:
    """How many bytes a RIFF header promises beyond the end of the file; 0 for other formats."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return 0
    (promised,) = struct.unpack("<I", head[4:8])
    if promised in (0, 0xFFFFFFFF):  # written to a pipe: the writer could not go back to fill it in
        return 0
    return max(0, promised + 8 - size - 1)  # writers differ about the pad byte


def _missing_ogg_bytes(path: PathLike, head: bytes, size: int) -> int:
    """How many bytes the last page of an OGG or OPUS file lacks (at least 1 if its header is cut); 0 for others."""
    if head[:4] != b"OggS":
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, size - _MAX_OGG_PAGE))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < _OGG_HEADER or len(page) < _OGG_HEADER + page[_OGG_HEADER - 1]:
        return 1
    num_segments = page[_OGG_HEADER - 1]
    return max(0, _OGG_HEADER + num_segments + sum(page[_OGG_HEADER : _OGG_HEADER + num_segments]) - len(page))


def _read_frames(file: sf.SoundFile, path: PathLike, first: int, count: int, channel: int | None) -> np.ndarray:
    """`count` frames from frame `first` on, of one channel or averaged over all, float32 `(count,)`."""
    try:
        passed = first if file.format == "MP3" else 0
        file.seek(first - passed)
        frames = file.read(passed + count, dtype="float32", always_2d=True)  # (passed + count, C)
    except sf.SoundFileError as error:
        raise AudioError(f"{path}: cannot be decoded ({_reason(error)}); replace or remove it") from error
    if len(frames) < passed + count:
        raise AudioError(
            f"{path}: truncated, {first - passed + len(frames)} of {file.frames} frames can be read; fetch it again"
        )
    frames = frames[passed:]
    several = channel is None and frames.shape[1] > 1
    mono = frames.mean(axis=1, dtype=np.float32) if several else frames[:, channel or 0]
    if not np.isfinite(mono).all():
        raise AudioError(f"{path}: holds NaN or infinite samples; replace or remove it")
    return np.ascontiguousarray(mono)


def _native_span(start: int, count: int | None, native_rate: int, rate: int) -> tuple[int, int | None, int]:
    """Frames to read for `count` output samples from output sample `start` on.

    Returns the first frame, the frame to stop before (None: the end) and how many resampled samples to drop
    in front. With coprime `orig` and `new`, output sample k * new coincides with frame k * orig, so the
    read starts on such a block. It begins and ends one filter length earlier and later than needed.
    """
    if native_rate == rate:
        return start, None if count is None else start + count, 0
    divisor = math.gcd(native_rate, rate)
    orig, new = native_rate // divisor, rate // divisor
    reach = math.ceil(_FILTER_WIDTH * orig / (min(orig, new) * _ROLLOFF))  # frames on each side of an output sample
    margin = math.ceil(reach / orig) + 1  # blocks
    first_block = max(0, start // new - margin)
    skip = start - first_block * new
    if count is None:
        return first_block * orig, None, skip
    return first_block * orig, (math.ceil((start + count) / new) + margin) * orig, skip


def _reason(error: BaseException) -> str:
    """The cause without the path, which the message already names."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".") or type(error).__name__
