"""The demo corpus: synthetic talkers, noises, room responses and manifests, made offline in under a minute.

    <output>/speech/<voice>/<nn>.flac   16 kHz mono, about 5 s each  train.jsonl        val.jsonl   test.jsonl
    <output>/noise/<kind>_<nn>.flac     10 s each                    noise_train.jsonl  ...
    <output>/rir/room_<nn>_<kind>.flac  loudspeaker and talker       rir_train.jsonl    ...
    <output>/mixtures/test_<nn>.wav     8 kHz, two test talkers, to listen to; mixture_sources/ holds what was mixed

Decisions that are not obvious
* Every split has its own voices, families of near-copy voices, noise clips and rooms, and one manifest of
  each sort: a manifest key of a configuration then names a split, as it does for a corpus from elsewhere.
* Everything is a function of the seed and of an item's index; the number of jobs changes nothing.
* Threads, not processes: the work is in the synthesiser's process and in C code that releases the GIL.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly

from data.audio import write_audio
from data.corpus import SPLITS, begin_corpus, check_splits, damaged_files, finish_corpus, is_finished, read_corpus
from data.demo_sounds import NOISE_KINDS, make_noise, make_room
from data.demo_speech import SAMPLE_RATE, Synthesiser, VoiceError, utterances
from data.demo_voices import Voice, choose_voices
from data.errors import AudioError, DataError
from data.manifest import write_manifest

FORMAT = 1
MIXTURE_RATE, MIXTURE_S = 8000, 4.0
NOISE_S = 10.0
MAX_FAILED_VOICES = 0.1  # as a fraction; more means that the synthesiser is not the one that was pinned

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much of everything, for train, val and test."""

    voices: tuple[int, int, int] = (65, 8, 12)
    utterances: tuple[int, int, int] = (12, 8, 8)
    noises: tuple[int, int, int] = (12, 4, 4)
    rooms: tuple[int, int, int] = (30, 4, 6)
    mixtures: int = 6


def make_demo(output: str | os.PathLike[str], *, seed: int = 0, jobs: int = 2, size: DemoSize | None = None) -> None:
    """Make the corpus in the folder `output`, or find that it is there already; says on stdout what it does.

    Raises DataError: the synthesiser is missing, the folder holds other files under the names that are
    needed, or something cannot be written.
    """
    folder, size = Path(output), size or DemoSize()
    voices = choose_voices(seed=seed, counts=size.voices)
    planned = _planned_files(voices, size)
    made_by = {"corpus": "demo", "format": FORMAT, "seed": seed, **asdict(size)}
    if is_finished(folder, made_by=made_by):
        print(f"{folder}: the demo corpus is complete ({len(planned)} files, seed {seed}), nothing to do")
        return
    with Synthesiser():  # it is missing more often than not, so this comes before anything is written
        begin_corpus(folder, made_by=made_by, planned=planned)
    speech = _make_speech(folder, voices, size, seed=seed, jobs=jobs)
    _make_noises(folder, speech, size, seed=seed, jobs=jobs)
    _make_rooms(folder, size, seed=seed, jobs=jobs)
    _make_mixtures(folder, speech["test"], seed=seed, count=size.mixtures)
    finish_corpus(folder, made_by=made_by, planned=planned)
    _print_table(folder, speech)


def check_demo(output: str | os.PathLike[str]) -> list[str]:
    """What is wrong with the corpus in `output`, one line per problem; writes nothing.

    Every file must be there in its size, every recording must last as long as its manifest says, and no
    voice, room or recording may be in two splits.
    """
    folder = Path(output)
    corpus = read_corpus(folder)
    if corpus is None:
        return [f"{folder}: no demo corpus here; make it with: python -m data.prepare demo --output {folder}"]
    if not corpus.complete or corpus.made_by.get("format") != FORMAT:
        return [f"{folder}: the corpus is unfinished or of another version; run the same command without --check"]
    problems = damaged_files(folder, corpus)
    if problems:  # what the manifests say about these files would repeat it
        return problems
    owners = {"": "speaker", "noise_": "audio_filepath", "rir_": "room"}
    return [line for prefix, owner in owners.items() for line in check_splits(folder, prefix=prefix, owner=owner)]


def _planned_files(voices: list[Voice], size: DemoSize) -> list[str]:
    num_utterances = dict(zip(SPLITS, size.utterances, strict=True))
    files = [_speech_file(voice, index) for voice in voices for index in range(num_utterances[voice.split])]
    files += [_noise_file(kind, index) for index, kind, _split in _noise_plan(size)]
    files += [_rir_file(index, kind) for index in range(sum(size.rooms)) for kind in ("loudspeaker", "talker")]
    files += [name for index in range(size.mixtures) for name in _mixture_files(index)]
    return files + [f"{prefix}{split}.jsonl" for prefix in ("", "noise_", "rir_") for split in SPLITS]


def _speech_file(voice: Voice, index: int) -> str:
    return f"speech/{voice.name}/{index + 1:02d}.flac"


def _noise_file(kind: str, index: int) -> str:
    return f"noise/{kind}_{index + 1:02d}.flac"


def _rir_file(index: int, kind: str) -> str:
    return f"rir/room_{index + 1:02d}_{kind}.flac"


def _mixture_files(index: int) -> list[str]:
    name = f"test_{index + 1:02d}"
    return [f"mixtures/{name}.wav", f"mixture_sources/{name}_1.wav", f"mixture_sources/{name}_2.wav"]


def _noise_plan(size: DemoSize) -> list[tuple[int, str, str]]:
    """(index over all clips, kind, split); each split begins with babble, the kind that matters most."""
    plan: list[tuple[int, str, str]] = []
    for split, count in zip(SPLITS, size.noises, strict=True):
        start = len(plan)
        plan += [(start + i, NOISE_KINDS[i % len(NOISE_KINDS)], split) for i in range(count)]
    return plan


def _write_flac(path: Path, samples: np.ndarray) -> float:
    """Write 16 kHz mono 16-bit FLAC; return the duration in seconds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, samples, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    except (OSError, sf.SoundFileError) as error:
        raise AudioError(f"{path}: cannot be written ({error})") from error
    return round(len(samples) / SAMPLE_RATE, 4)


def _make_speech(folder: Path, voices: list[Voice], size: DemoSize, *, seed: int, jobs: int) -> dict[str, list[Row]]:
    """Speak everything and write the manifests; returns the rows of each split."""
    num_utterances = dict(zip(SPLITS, size.utterances, strict=True))
    by_voice: dict[str, list[Row]] = {}
    failed: dict[str, str] = {}

    def work(voice: Voice) -> None:
        with Synthesiser() as synthesiser:
            clips = utterances(synthesiser, voice, seed=seed, count=num_utterances[voice.split])
            try:
                by_voice[voice.name] = [_write_clip(folder, voice, index, *clip) for index, clip in enumerate(clips)]
            except VoiceError as error:
                failed[voice.name] = str(error)

    with ThreadPoolExecutor(jobs) as pool:
        for num_done, _ in enumerate(pool.map(work, voices), start=1):
            if num_done % 20 == 0:
                print(f"  speech: {num_done} of {len(voices)} voices", flush=True)
    if failed:
        print(f"  left out {len(failed)} voices: {'; '.join(sorted(failed.values()))}")
    if len(failed) > MAX_FAILED_VOICES * len(voices):
        raise DataError(f"{len(failed)} of {len(voices)} voices failed; pip install -r requirements-demo.txt")
    speech: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for voice in voices:
        speech[voice.split] += by_voice.get(voice.name, [])
    for split, rows in speech.items():
        write_manifest(folder / f"{split}.jsonl", rows)
    return speech


def _write_clip(folder: Path, voice: Voice, index: int, text: str, samples: np.ndarray) -> Row:
    name = _speech_file(voice, index)
    duration_s = _write_flac(folder / name, samples)
    return {"audio_filepath": name, "duration": duration_s, "speaker": voice.name, "text": text}


def _make_noises(folder: Path, speech: dict[str, list[Row]], size: DemoSize, *, seed: int, jobs: int) -> None:
    def work(item: tuple[int, str, str]) -> Row:
        index, kind, split = item
        talkers = np.random.default_rng([seed, 6, index]).permutation(len(speech[split]))[:6]
        paths = [folder / speech[split][talker]["audio_filepath"] for talker in talkers]
        clips = [sf.read(path, dtype="float32")[0] for path in paths] if kind == "babble" else []
        samples = make_noise(kind, seed=seed, index=index, duration_s=NOISE_S, speech=clips)
        name = _noise_file(kind, index)
        return {"audio_filepath": name, "duration": _write_flac(folder / name, samples), "kind": kind}

    plan = _noise_plan(size)
    rows = _in_threads(work, plan, jobs)
    for split in SPLITS:
        in_split = [row for row, item in zip(rows, plan, strict=True) if item[2] == split]
        write_manifest(folder / f"noise_{split}.jsonl", in_split)
    print(f"  noise: {len(plan)} clips", flush=True)


def _make_rooms(folder: Path, size: DemoSize, *, seed: int, jobs: int) -> None:
    def work(index: int) -> list[Row]:
        responses, rt60_s = make_room(seed=seed, index=index)
        rows = []
        for kind, response in responses.items():
            name = _rir_file(index, kind)
            rows.append({"audio_filepath": name, "duration": _write_flac(folder / name, response)})
            rows[-1] |= {"room": f"room_{index + 1:02d}", "kind": kind, "rt60": round(rt60_s, 3)}
        return rows

    rooms = _in_threads(work, range(sum(size.rooms)), jobs)
    start = 0
    for split, count in zip(SPLITS, size.rooms, strict=True):
        write_manifest(folder / f"rir_{split}.jsonl", [row for rows in rooms[start : start + count] for row in rows])
        start += count
    print(f"  rooms: {len(rooms)}, two responses each", flush=True)


def _make_mixtures(folder: Path, rows: list[Row], *, seed: int, count: int) -> None:
    """Two test talkers at a time, to try a trained separator on."""
    talkers = sorted({row["speaker"] for row in rows})
    for index in range(count):
        rng = np.random.default_rng([seed, 7, index])
        sources = []
        for talker in rng.choice(talkers, size=2, replace=False):
            paths = [folder / row["audio_filepath"] for row in rows if row["speaker"] == talker]
            samples = resample_poly(sf.read(paths[rng.integers(len(paths))], dtype="float32")[0], 1, 2)
            clip = np.zeros(round(MIXTURE_S * MIXTURE_RATE), dtype=np.float32)
            clip[: len(samples)] = samples[: len(clip)]
            sources.append(clip * np.float32(10 ** (rng.uniform(-1.5, 1.5) / 20)))
        gain = np.float32(0.9 / np.abs(sources[0] + sources[1]).max())
        sources = [source * gain for source in sources]
        for name, samples in zip(_mixture_files(index), [sources[0] + sources[1], *sources], strict=True):
            write_audio(folder / name, samples, MIXTURE_RATE)


def _in_threads(work: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> list[Any]:
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, items))


def _print_table(folder: Path, speech: dict[str, list[Row]]) -> None:
    print(f"{'split':6} {'voices':>6} {'utterances':>10} {'hours':>6}  manifest")
    for split, rows in speech.items():
        hours = sum(row["duration"] for row in rows) / 3600
        num_voices = len({row["speaker"] for row in rows})
        print(f"{split:6} {num_voices:6} {len(rows):10} {hours:6.2f}  {folder / split}.jsonl")
    print(f"noises and rooms: {folder / 'noise'}, {folder / 'rir'} (noise_*.jsonl, rir_*.jsonl)")
    print(f"mixtures to listen to: {folder / 'mixtures'}")
    print("The voices are synthetic (espeak-ng, altered timbre): generated audio, free of any recording's licence.")
    print("It is enough to watch a system learn; figures measured on it say little about recorded speech.")
