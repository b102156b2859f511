"""docs/adding_a_system.md, carried out: its files are written to an empty folder and its commands are run there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.pages import ROOT, blocks, commands, write_files

PAGE = blocks("adding_a_system.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files in a folder of their own, with a noisy tone to predict."""
    folder = tmp_path_factory.mktemp("fifth")
    write_files(PAGE, folder)
    rng = np.random.default_rng(0)
    clean = 0.3 * np.sin(2 * np.pi * 200 * np.arange(8000) / 8000)
    soundfile.write(folder / "noisy.wav", clean + 0.1 * rng.standard_normal(8000), 8000)
    soundfile.write(folder / "tone.wav", clean, 8000)
    return folder


def test_the_story_holds(folder: Path, script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command as a process of its own, as the page says; the others in this one, to save time."""
    monkeypatch.chdir(folder)
    (name, arguments), *others = commands(PAGE["commands"])
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *arguments],
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = [done.stdout]
    monkeypatch.syspath_prepend(folder)
    for name, arguments in others:
        finished = script(name, arguments)
        assert finished.code == 0, f"{name} {arguments}\n{finished.text}"
        outputs.append(finished.out)

    trained, resumed, evaluated, _ = outputs
    run = next((folder / "runs" / "denoise").iterdir())
    assert f"run directory: {run}" in trained
    assert resumed.splitlines()[0] == f"resuming {run / 'checkpoints' / 'last.ckpt'}"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 40
    assert "test_error_db" in evaluated

    tone, _ = soundfile.read(folder / "tone.wav")
    noisy, _ = soundfile.read(folder / "noisy.wav")
    clean, _ = soundfile.read(folder / "clean" / "noisy_clean.wav")
    assert np.square(clean - tone).mean() < 0.5 * np.square(noisy - tone).mean()


def test_a_class_that_is_not_allowed_is_refused(folder: Path, script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = script("train", ["--config-dir=config", "model=denoise"])
    assert done.code == 2
    assert "model._target_=denoise.system.Denoiser: not in an allowed package" in done.err
    assert "data._target_=denoise.data.ToneData" in done.err, "both in one message"
