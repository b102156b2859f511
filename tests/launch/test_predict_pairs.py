"""Predictions from two signals, by a system that takes half of the far end away."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf

from data.errors import ManifestError
from data.manifest import write_manifest
from launch.errors import ConfigError
from launch.predict import run

SYSTEM = """
import logging

from models.base import System


class HalfOff(System):
    inputs = {"mic": "audio", "far": "audio"}
    outputs = {"enhanced": "audio"}

    def __init__(self, *, optim=None):
        super().__init__(optim=optim)

    def step(self, batch):
        return {}

    def predict(self, *, mic, far, sample_rate):
        if not far.any():
            logging.getLogger("models").warning("%d %% silent", 100)
        return {"enhanced": mic - 0.5 * far}
"""
SECOND = 8000


@pytest.fixture(autouse=True)
def checkpoint(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """half_off.ckpt, of the system above."""
    Path("half_off.py").write_text(SYSTEM)
    monkeypatch.syspath_prepend(in_tmp)
    described = {"name": "half_off.HalfOff", "arguments": {}}
    torch.save({"format_version": 1, "system": described, "state_dict": {}, "config": {}}, "half_off.ckpt")


def predict(**typed: str) -> None:
    defaults = {"ckpt_path": "half_off.ckpt", "packages": ["half_off"], "output": "out", "device": "cpu", "far": None}
    run(OmegaConf.create(defaults | typed))


def write(name: str, seed: int, samples: int = SECOND, rate: int = SECOND) -> np.ndarray:
    signal = np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(name, signal, rate, subtype="FLOAT")
    return signal


def check(name: str, expected: np.ndarray) -> None:
    found, rate = soundfile.read(f"out/{name}_enhanced.wav", dtype="float32")
    assert rate == SECOND
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_pairs_that_fit_are_done_and_the_others_named(script) -> None:
    """As a shell sees it."""
    good = write("mics/good_mic.wav", 0), write("far/good_lpb.wav", 1)
    nearly = write("mics/nearly_mic.wav", 2, SECOND - 160), write("far/nearly_lpb.wav", 3)  # 20 ms
    more = write("mics/more.wav", 4, SECOND + 1), write("far/more.wav", 5)
    write("mics/long_mic.wav", 6), write("far/long_lpb.wav", 7, SECOND + 161)
    write("mics/rate_mic.wav", 8), write("far/rate_lpb.wav", 9, rate=16000)
    write("mics/lfs_mic.wav", 10)
    Path("far/lfs_lpb.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 320042\n")
    typed = "ckpt_path=half_off.ckpt packages=[half_off] input=mics/ far=far/ output=out"
    done = script("predict", typed)
    assert done.code == 2 and "3 of 6 done" in done.out and "Traceback" not in done.text
    lines = {line.removeprefix("error: ").partition(": ")[0]: line for line in done.err.splitlines()}
    assert sorted(lines) == ["far/lfs_lpb.wav", "far/long_lpb.wav", "far/rate_lpb.wav"]
    assert "1.02 s (8161 samples), but mics/long_mic.wav has 1.00 s (8000 samples)" in lines["far/long_lpb.wav"]
    assert "16000 Hz, but mics/rate_mic.wav has 8000 Hz" in lines["far/rate_lpb.wav"]
    assert "run `git lfs pull`" in lines["far/lfs_lpb.wav"]
    for name, (mic, far) in {"good": good, "nearly": nearly, "more": more}.items():
        length = min(len(mic), len(far))
        check(name, mic[:length] - 0.5 * far[:length])
    assert len(list(Path("out").iterdir())) == 3


def test_one_folder_and_results_of_an_earlier_run_in_it() -> None:
    mic, far = write("rec/x_mic.wav", 0), write("rec/x_lpb.wav", 1)
    for _ in range(2):
        predict(input="rec/", far="rec/", output="rec/out")
    found, _ = soundfile.read("rec/out/x_enhanced.wav", dtype="float32")
    np.testing.assert_allclose(found, mic - 0.5 * far, atol=1e-6)
    for output in ("out", "rec", "rec"):  # whether the results lie below the inputs or beside them
        predict(input="rec/", far="rec/", output=output)
    assert sorted(p.as_posix() for p in Path("rec").rglob("*.wav")) == [
        "rec/out/x_enhanced.wav",
        "rec/x_enhanced.wav",
        "rec/x_lpb.wav",
        "rec/x_mic.wav",
    ]
    check("x", mic - 0.5 * far)


def test_no_far_end_is_silence(caplog: pytest.LogCaptureFixture) -> None:
    mic, _ = write("rec/x_mic.wav", 0), write("rec/x_lpb.wav", 1)
    predict(input="rec/", far="none")
    check("x", mic)
    assert "rec/x_mic.wav: 100 % silent" in caplog.messages, "a system's warning says which file it is about"
    with pytest.raises(ConfigError, match="^set far=….*far=none"):
        predict(input="rec/")


def test_a_manifest_of_echo_recordings() -> None:
    mic, far, near = write("a/x_mic.wav", 0), write("a/x_lpb.wav", 1), write("a/n_mic.wav", 2)
    row = {"mic_filepath": "a/x_mic.wav", "farend_filepath": "a/x_lpb.wav"}
    part = row | {"offset": 0.25, "duration": 0.5}
    write_manifest("m.jsonl", [row, part, {"mic_filepath": "a/n_mic.wav", "scenario": "near_end"}])
    predict(input="m.jsonl")
    check("x", mic - 0.5 * far)
    check("x_0.25s", (mic - 0.5 * far)[2000:6000])
    check("n", near)
    write_manifest("m.jsonl", [row, {"mic_filepath": "a/n_mic.wav"}])
    with pytest.raises(ManifestError, match="m.jsonl, line 2: key 'farend_filepath' is missing"):
        predict(input="m.jsonl")
    predict(input="m.jsonl", far="none")
    check("x", mic)
