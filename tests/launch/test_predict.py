"""Files in, files out, as a user has them: any rate, level and length, and some that cannot be read."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.conftest import synthetic_speech


def speech(seconds: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(0)
    return synthetic_speech(rng, seconds, 100.0) + synthetic_speech(rng, seconds, 173.0)


def sum_of_sources(stem: Path) -> tuple[np.ndarray, int]:
    tracks = [soundfile.read(f"{stem}_source{number}.wav", dtype="float32") for number in (1, 2)]
    assert soundfile.info(f"{stem}_source1.wav").subtype == "FLOAT"
    return tracks[0][0] + tracks[1][0], tracks[0][1]


def test_a_folder_as_users_have_it(trained: Path, script, in_tmp: Path) -> None:
    mixture = speech()
    recordings = {
        "a/x.wav": (mixture, 8000),
        "b/x.wav": (50 * mixture, 8000),  # far beyond full scale
        "stereo.wav": (np.stack([mixture, 0.5 * mixture], 1), 8000),
        "rate.wav": (mixture, 11127),
        "silent.wav": (np.zeros(3000), 44100),
        "short.wav": (mixture[:1], 16000),
        "nan.wav": (np.full(100, np.nan), 8000),
    }
    for name, (samples, rate) in recordings.items():
        (in_tmp / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(in_tmp / "in" / name, samples, rate, subtype="FLOAT")
    (in_tmp / "in" / "empty.wav").touch()
    arguments = [f"ckpt_path={trained}", "input=in", "output=in/out", "chunk_s=0.2", "overlap_s=0.05"]
    (in_tmp / "in/out/a").mkdir(parents=True)
    (in_tmp / "in/out/a/x_source1.wav").write_text("of an earlier run")
    done = script("predict", arguments)
    assert done.code == 2 and "Traceback" not in done.text
    assert "6 of 8 done" in done.out and "1 of them with several channels" in done.out
    assert [line.partition(":")[2].split(":")[0] for line in done.err.splitlines()] == [" in/empty.wav", " in/nan.wav"]

    for name, (samples, rate) in recordings.items():
        if name != "nan.wav":
            expected = samples if samples.ndim == 1 else samples.mean(1)
            found, found_rate = sum_of_sources(in_tmp / "in/out" / name.removesuffix(".wav"))
            assert found_rate == rate and found.shape == expected.shape and np.isfinite(found).all()
            # Levels restored: in each chunk no gain on their sum would explain the mixture better.
            assert len(found) == 1 or found @ expected == pytest.approx(found @ found, rel=0.35, abs=1e-9), name
    loud, _ = sum_of_sources(in_tmp / "in/out/b/x")
    quiet, _ = sum_of_sources(in_tmp / "in/out/a/x")
    np.testing.assert_allclose(loud / 50, quiet, atol=1e-5)
    assert not [file for file in (in_tmp / "in/out").rglob("*") if file.name.startswith(".")], "no leftovers"
    assert "6 of 8 done" in script("predict", arguments).out, "earlier results are not taken for recordings"


def test_part_of_a_file_and_one_that_would_be_lost(trained: Path, script, in_tmp: Path) -> None:
    soundfile.write(in_tmp / "x.wav", speech(), 8000)
    (in_tmp / "x_source2.wav").write_bytes((in_tmp / "x.wav").read_bytes())
    (in_tmp / "part.jsonl").write_text('{"audio_filepath": "x.wav", "offset": 0.125, "duration": 0.25}\n')
    assert script("predict", [f"ckpt_path={trained}", "input=part.jsonl", "output=out"]).code == 0
    assert len(sum_of_sources(in_tmp / "out/x_0.125s")[0]) == 2000
    done = script("predict", [f"ckpt_path={trained}", "input=*.wav", "output=."])
    assert done.code == 2
    assert "x_source2.wav: this input would be replaced by a result; choose another output folder" in done.err


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["output=out", "chunk_s=0.2", "overlap_s=0.3"], "overlap_s=0.3: the overlap of chunks must be between 0"),
        (["output=x.wav"], "output=x.wav: is a file, the name of a folder is needed"),
    ],
)
def test_what_cannot_be_used_is_said_once(trained: Path, script, in_tmp: Path, typed: list[str], expected: str) -> None:
    soundfile.write(in_tmp / "x.wav", speech(), 8000)
    done = script("predict", [f"ckpt_path={trained}", "input=x.wav", *typed])
    assert done.code == 2 and expected in done.err
    assert len(done.err.splitlines()) == 1


def test_results_beside_their_recordings_are_no_recordings(trained: Path, script, in_tmp: Path) -> None:
    (in_tmp / "in").mkdir()
    for name in ("x", "speaker_source1"):  # the second has a name of that kind, but there is no speaker.wav
        soundfile.write(in_tmp / "in" / f"{name}.wav", speech(), 8000)
    for _ in range(2):
        done = script("predict", [f"ckpt_path={trained}", "input=in", "output=in"])
        assert done.code == 0 and "2 of 2 done" in done.out, done.text
    assert len(list((in_tmp / "in").iterdir())) == 6
    assert "4 files are left out as results of an earlier run, such as in/speaker_source1_source1.wav" in done.out
