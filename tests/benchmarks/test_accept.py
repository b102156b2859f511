"""The acceptance harness: its arithmetic, and a small run of it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from benchmarks.accept import HERE, main, mean_and_error, summarise, table
from data.manifest import write_manifest
from tests.conftest import RATE, synthetic_speech

ROOT = Path(__file__).parent.parent.parent
PROTOCOL = yaml.safe_load((HERE / "protocols" / "conv_tasnet.yaml").read_text())


def test_mean_error_and_paired_difference() -> None:
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_and_error([])[0]) and math.isnan(mean_and_error([1.0])[1])
    ours, peer = summarise({"ours": [3.0, 5.0, 7.0], "peer": [1.0, 3.0, 5.0]})
    assert (peer["gain"], peer["gain_error"]) == (2.0, 0.0), "paired: a constant lead has no error"
    assert ours["gain"] == 0.0
    assert "+2.00 +- 0.00" in table([ours, peer], "dB")


def test_protocol_is_frozen() -> None:
    assert len(PROTOCOL["test_speakers"]) == len(set(PROTOCOL["test_speakers"])) == 21
    fixed = {"num_mixtures": 60, "segment_s": 4.0, "seed": 5, "sample_rate": 8000, "cpu_minutes": 16}
    assert {name: PROTOCOL[name] for name in fixed} == fixed


def test_missing_data_is_one_line(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["conv_tasnet", "--data", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere/manifest_speech.jsonl: no such manifest")


@pytest.mark.slow
def test_a_small_acceptance_run(in_tmp: Path) -> None:
    """The whole harness on tones that bear the protocol's names."""
    rng = np.random.default_rng(0)
    rows = []
    for index, speaker in enumerate([*PROTOCOL["test_speakers"], *(f"other{n}" for n in range(9))]):
        file = in_tmp / "speech" / f"{speaker}.wav"
        file.parent.mkdir(exist_ok=True)
        soundfile.write(file, synthetic_speech(rng, 4.0, 80 + 8 * index), RATE)
        rows.append({"audio_filepath": str(file), "duration": 4.0, "speaker": speaker})
    write_manifest(in_tmp / "manifest_speech.jsonl", rows)
    command = [
        sys.executable,
        "-m",
        "benchmarks.accept",
        "conv_tasnet",
        f"--data={in_tmp}",
        f"--work={in_tmp / 'work'}",
    ]
    done = subprocess.run([*command, "--cpu-minutes=1.5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((in_tmp / "work" / "conv_tasnet" / "result.json").read_text())
    assert {row["name"] for row in result["rows"]} == {
        "ours", "plain torchaudio loop", "untrained network", "ours, all masks one", "unprocessed", "silence",
    }  # fmt: skip
    assert all(len(values) == 60 for values in result["scores"].values())
    assert result["facts"]["ours"]["steps"] > 0
