"""The demo corpus: made once, small, then everything that can be wrong with it."""

import importlib.util
import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data import demo, demo_speech, prepare
from data.demo import DemoSize, check_demo, make_demo
from data.demo_sounds import NOISES, make_noise, make_room
from data.demo_speech import SAMPLE_RATE, Synthesiser, VoiceError, change_tract, trim
from data.demo_text import GRAMMAR, sentences
from data.demo_voices import choose_voices, family
from data.errors import DataError
from data.manifest import read_manifest

SMALL = DemoSize(voices=(2, 1, 2), utterances=(2, 1, 1), noises=(2, 1, 1), rooms=(1, 1, 1), mixtures=1)
SPLITS = ("train", "val", "test")

needs_synthesiser = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng-loader is not installed: pip install -r requirements-demo.txt",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    make_demo(folder, size=SMALL, jobs=1)
    return folder


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "corpus"))


def audio(folder: Path) -> dict[str, np.ndarray]:
    paths = [path for suffix in ("flac", "wav") for path in sorted(folder.rglob(f"*.{suffix}"))]
    return {str(path.relative_to(folder)): sf.read(path)[0] for path in paths}


# Speech ----------------------------------------------------------------------------------------------------------


@needs_synthesiser
def test_speech_is_level_unclipped_and_of_the_stated_length(made: Path) -> None:
    rows = [row for split in SPLITS for row in read_manifest(made / f"{split}.jsonl")]
    assert len(rows) == 2 * 2 + 1 + 2
    for row in rows:
        samples, sample_rate = sf.read(row["audio_filepath"])
        assert sample_rate == SAMPLE_RATE and samples.ndim == 1
        assert sf.info(row["audio_filepath"]).subtype == "PCM_16"
        assert row["duration"] == pytest.approx(len(samples) / sample_rate, abs=1e-3)
        assert 3.0 < row["duration"] < 7.0
        assert -27.5 < 10 * np.log10(np.mean(samples**2)) < -22.5
        assert np.abs(samples).max() < 0.98
        frames = samples[: len(samples) // 160 * 160].reshape(-1, 160).std(axis=1)
        loud = frames > frames.max() / 100
        assert loud[:10].any() and loud[-10:].any()  # trimmed at both ends
        assert row["text"].endswith(".")


@needs_synthesiser
def test_unknown_voice_is_an_error_and_the_synthesiser_goes_on() -> None:
    with Synthesiser() as synthesiser:
        with pytest.raises(VoiceError, match="no such voice"):
            synthesiser.speak("hello", voice="xx-none", rate=160, pitch=50, liveliness=50)
        assert len(synthesiser.speak("hello", voice="en-us", rate=160, pitch=50, liveliness=50)) > 1000


def test_missing_wheel_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = "import sys; sys.modules['espeakng_loader'] = None; from data.espeak import main; sys.exit(main())"
    monkeypatch.setattr(demo_speech, "COMMAND", [sys.executable, "-c", without])
    assert prepare.main(["demo", "--output", str(tmp_path / "corpus")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ") and "pip install -r requirements-demo.txt" in lines[0]
    assert not (tmp_path / "corpus").exists()


def test_synthesiser_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_speech, "COMMAND", ["false"])
    with pytest.raises(DataError, match="exit code 1"):
        Synthesiser()


# What is in the folder -------------------------------------------------------------------------------------------


@needs_synthesiser
def test_splits_share_no_voice_room_or_noise(made: Path) -> None:
    for prefix, key in (("", "speaker"), ("rir_", "room"), ("noise_", "audio_filepath")):
        owners = [{row[key] for row in read_manifest(made / f"{prefix}{split}.jsonl")} for split in SPLITS]
        assert all(owners)
        assert sum(map(len, owners)) == len(set.union(*owners))
    rooms = read_manifest(made / "rir_train.jsonl")
    assert [row["kind"] for row in rooms] == ["loudspeaker", "talker"]
    assert all(0.1 < row["rt60"] < 0.6 for row in rooms)


@needs_synthesiser
def test_mixture_is_the_sum_of_its_sources(made: Path) -> None:
    mixture, sample_rate = sf.read(made / "mixtures" / "test_01.wav", dtype="float32")
    sources = [sf.read(made / "mixture_sources" / f"test_01_{i}.wav", dtype="float32")[0] for i in (1, 2)]
    assert sample_rate == 8000 and len(mixture) == 4 * 8000
    assert np.array_equal(mixture, sources[0] + sources[1])
    assert [path.name for path in (made / "mixtures").iterdir()] == ["test_01.wav"]


@needs_synthesiser
def test_second_call_finds_the_corpus(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    make_demo(corpus, size=SMALL)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


@needs_synthesiser
def test_damage_is_mended_and_the_number_of_jobs_changes_nothing(
    corpus: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (*corpus.glob("rir/*"), *corpus.glob("speech/*/*"), *corpus.glob("noise/*")):
        path.unlink()
    make_demo(corpus, size=SMALL, jobs=3)
    assert "file(s) missing or damaged, making the corpus again" in capsys.readouterr().out
    first, second = audio(made), audio(corpus)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@needs_synthesiser
def test_other_parameters_replace_the_corpus_and_nothing_else(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "speech" / "mine.txt").write_text("keep me")
    description = json.loads((corpus / "corpus.json").read_text())
    (corpus / "corpus.json").write_text(json.dumps(description | {"complete": False}))
    assert "unfinished" in check_demo(corpus)[0]
    make_demo(corpus, size=replace(SMALL, noises=(1, 1, 1)), seed=1)
    assert "noises [2, 1, 1] (now [1, 1, 1]), seed 0 (now 1)" in capsys.readouterr().out
    assert check_demo(corpus) == []
    assert (corpus / "speech" / "mine.txt").read_text() == "keep me"
    assert len(list(corpus.glob("noise/*"))) == 3
    assert len([path for path in corpus.glob("speech/*") if path.is_dir()]) == 5  # none left of seed 0


def test_files_of_somebody_else_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "Synthesiser", nullcontext)
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match="train.jsonl: exists and is not part of a corpus"):
        make_demo(tmp_path, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    (tmp_path / "corpus.json").write_text("[]")
    with pytest.raises(DataError, match="corpus.json: not the description of a corpus"):
        make_demo(tmp_path, size=SMALL)


@needs_synthesiser
def test_check_finds_removed_and_truncated_files(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", "--check", "--output", str(corpus)]
    assert prepare.main(command) == 0
    gone, cut = sorted(corpus.glob("speech/*/01.flac"))[:2]
    gone.unlink()
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    assert prepare.main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == sorted(
        [
            f"error: {gone}: is missing",
            f"error: {cut}: has {len(content) // 2} bytes instead of {len(content)}",
        ]
    )


def test_check_of_an_empty_folder_says_how_to_make_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["demo", "--check", "--output", str(tmp_path)]) == 2
    assert "python -m data.prepare demo" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Its parts -------------------------------------------------------------------------------------------------------


def test_voices_are_a_function_of_the_seed_and_split_by_family() -> None:
    voices = choose_voices(seed=0, counts=(65, 8, 12))
    assert voices == choose_voices(seed=0, counts=(65, 8, 12))
    assert voices != choose_voices(seed=1, counts=(65, 8, 12))
    assert len({voice.name for voice in voices}) == 85
    families = {
        split: {family(voice.espeak.split("+")[1]) for voice in voices if voice.split == split} for split in SPLITS
    }
    assert not families["train"] & families["test"]
    assert not families["val"] & (families["train"] | families["test"])
    for split in SPLITS:
        pitches = [voice.pitch_hz for voice in voices if voice.split == split]
        assert min(pitches) < 100 and max(pitches) > 220


@pytest.mark.parametrize("language", sorted(GRAMMAR))
def test_sentences_fit_the_length(language: str) -> None:
    lengths = [len(sentences(np.random.default_rng(i), language=language, num_chars=75)) for i in range(30)]
    assert min(lengths) > 50 and max(lengths) < 100 and 65 < np.mean(lengths) < 85


def test_trim_cuts_silence_and_keeps_sound() -> None:
    tone = np.sin(np.arange(SAMPLE_RATE) * 0.3)
    padded = np.concatenate([np.zeros(8000), tone, np.zeros(12000)])
    assert len(trim(padded)) == pytest.approx(SAMPLE_RATE + 1600, abs=320)
    assert len(trim(np.zeros(5000))) == 0


def test_shorter_tract_raises_pitch_and_shortens() -> None:
    tone = np.sin(2 * np.pi * 400 * np.arange(22050) / 22050)
    moved = change_tract(tone, 22050, 1.25)
    assert len(moved) == pytest.approx(SAMPLE_RATE / 1.25, abs=20)
    peak_hz = np.abs(np.fft.rfft(moved)).argmax() * SAMPLE_RATE / len(moved)
    assert peak_hz == pytest.approx(500, abs=3)


@pytest.mark.parametrize("kind", sorted(NOISES))
def test_noise_is_level_and_depends_on_seed(kind: str) -> None:
    def make(seed: int) -> np.ndarray:
        return make_noise(kind, seed=seed, index=0, duration_s=2.0, speech=[])

    samples = make(0)
    assert samples.shape == (2 * SAMPLE_RATE,) and np.isfinite(samples).all()
    assert -35 < 20 * np.log10(samples.std()) < -24.9 and np.abs(samples).max() < 0.98
    assert np.array_equal(samples, make(0)) and not np.array_equal(samples, make(1))


def test_room_decays_within_its_reverberation_time() -> None:
    responses, rt60_s = make_room(seed=0, index=0)
    for response in responses.values():
        assert np.abs(response).max() == pytest.approx(0.9)
        energy_left_db = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response**2))
        assert energy_left_db[round(0.9 * rt60_s * SAMPLE_RATE)] < -30
    assert np.array_equal(responses["talker"], make_room(seed=0, index=0)[0]["talker"])
