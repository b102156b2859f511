"""The echo acceptance run on a tiny folder, with fakes in the contestants' places."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from benchmarks import accept_deepvqe
from benchmarks.accept import HERE, main
from benchmarks.accept_deepvqe import lead, start_ours, verdicts
from data.audio import write_audio
from data.manifest import read_manifest, write_manifest
from tests.conftest import synthetic_speech

ROOT = Path(__file__).parent.parent.parent
RATE = 16000
PROTOCOL = yaml.safe_load((HERE / "protocols" / "deepvqe.yaml").read_text())
LINES = {
    "syn1": "synthetic doubletalk",
    "syn2": "synthetic doubletalk",
    "fs": "real far-end single talk",
    "dt": "real doubletalk_with_movement",
    "ne": "real near-end single talk",
}


@pytest.fixture
def calls(in_tmp: Path) -> Path:
    """A folder laid out like the protocol's: the echo is half the far end."""
    rng = np.random.default_rng(0)  # synthetic_speech is made for another rate: here it is half as long and faster
    rows = []
    for index, (name, kind) in enumerate(LINES.items()):
        near, far = (torch.from_numpy(synthetic_speech(rng, 1.0, hz + 8 * index)).float() for hz in (100, 180))
        far = torch.zeros_like(far) if name == "ne" else far
        near = torch.zeros_like(near) if name == "fs" else near
        signals = {"mic": near + 0.5 * far, "farend": far} | ({"clean": near} if "syn" in name else {})
        for signal, samples in signals.items():
            write_audio(in_tmp / f"{name}_{signal}.wav", samples, RATE)
        paths = {f"{signal}_filepath": f"{name}_{signal}.wav" for signal in signals}
        rows.append({"id": name, "kind": kind, "duration": len(far) / RATE, **paths})
    write_manifest(in_tmp / "manifest_aec.jsonl", rows)
    return in_tmp


def test_a_checkpoint_is_scored_beside_all_others(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def oracle(mic: Tensor, far: Tensor) -> Tensor:
        return mic - 0.49 * far

    def late_and_quiet(mic: Tensor, far: Tensor) -> Tensor:
        return 0.5 * torch.nn.functional.pad(mic, (64, 0))[: len(mic)]

    monkeypatch.setattr(accept_deepvqe, "our_cancellers", lambda checkpoint, protocol: {"ours": oracle})
    fakes = {"AEC3": (late_and_quiet, "json", "json"), "speex": (oracle, "not_there", "not-there==1.0")}
    monkeypatch.setattr(accept_deepvqe, "BASELINES", fakes)
    monkeypatch.setattr(accept_deepvqe, "SCORERS", ("pesq",))
    checkpoint = calls / "x.ckpt"
    checkpoint.touch()
    assert main(["deepvqe", f"--data={calls}", f"--work={calls / 'work'}", f"--ckpt={checkpoint}"]) == 0

    printed = capsys.readouterr().out
    assert "speex: not installed, left out; pip install not-there==1.0" in printed
    assert "x.ckpt, trained elsewhere: no acceptance of the recipe" in printed
    assert "AEC3: output 64 samples late, taken out" in printed
    assert "within 2 dB: -0.00: PASS" in printed or "within 2 dB: +0.00: PASS" in printed
    assert printed.count(": reached") == 3 and "AECMOS degradation ahead of AEC3: +nan: not measured" in printed
    result = json.loads((calls / "work" / "deepvqe" / "result.json").read_text())
    assert result["ours"] == {"checkpoint": str(checkpoint)} and result["delay_samples"]["AEC3"] == 64
    assert set(result["clips"]) == {"ours", "AEC3", "unprocessed", "silence"}
    assert set(result["clips"]["ours"]) == {*LINES, "syn1_alone", "syn2_alone"}
    assert result["clips"]["silence"]["syn1"].get("pesq") is None, "no number in the place of a failed score"
    assert result["clips"]["unprocessed"]["fs"]["erle_late_db"] == 0
    assert result["scores"]["erle"]["ours"] == [pytest.approx(34, abs=0.1)]
    assert result["scores"]["level"]["AEC3"] == [pytest.approx(-6, abs=0.2)] * 3
    for name in ("ours/dt.wav", "AEC3/syn1_alone.wav", "silence/ne.wav"):
        assert (calls / "work" / "deepvqe" / "audio" / name).is_file()


def test_verdicts() -> None:
    goals = ("si_sdri", "pesq", "erle", "degradation")
    scores = {key: {"ours": [20.0, 22.0], "AEC3": [19.0, 19.0]} for key in goals}
    scores["worst_level"] = {"ours": [0.1, -2.5]}
    lines = verdicts(scores, PROTOCOL)
    assert lines[0].endswith("-2.50: FAIL") and all(line.endswith("reached") for line in lines[1:])
    assert lead(scores["pesq"]) == (2.0, 1.0), "paired"
    scores["worst_level"], scores["erle"] = {"ours": [1.9]}, {"ours": [14.0]}
    lines = verdicts(scores, PROTOCOL)
    assert lines[0].endswith("PASS") and lines[1].endswith("-1.00: missed")
    del scores["pesq"]["AEC3"]
    assert verdicts(scores, PROTOCOL)[3].endswith("not measured")


def test_an_output_that_is_not_a_number_does_not_pass() -> None:
    scores = {key: {"ours": [float("nan")], "AEC3": [1.0]} for key in ("si_sdri", "pesq", "erle", "degradation")}
    scores["worst_level"] = {"ours": [float("nan")]}
    assert all(line.endswith("not measured") for line in verdicts(scores, PROTOCOL))


def test_training_and_validation_share_no_talker(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speakers = [*PROTOCOL["val_speakers"], "a", "b"]
    rows = [{"audio_filepath": f"{name}.flac", "duration": 1.0, "speaker": name} for name in speakers]
    write_manifest(in_tmp / PROTOCOL["speech_manifest"], rows)
    given = {}
    for name in ("plan_training", "OurTraining"):
        monkeypatch.setattr(accept_deepvqe, name, lambda overrides, **options: given.update(options, typed=overrides))
    work = in_tmp / "work"
    start_ours(PROTOCOL, in_tmp, work)
    assert {row["speaker"] for row in read_manifest(work / "train.jsonl")} == {"a", "b"}
    assert {row["speaker"] for row in read_manifest(work / "val.jsonl")} == set(PROTOCOL["val_speakers"])
    assert "experiment=deepvqe_demo" in given["typed"] and given["cpu_minutes"] == 50
    examples = 50 // PROTOCOL["epochs"] * PROTOCOL["batch_size"]
    assert given["length"](50) == ["trainer.max_steps=50", f"data.train_examples={examples}"]
    assert all(f"data.{stage}rir_manifest=null" in given["typed"] for stage in ("", "val_", "test_"))
    write_manifest(in_tmp / PROTOCOL["speech_manifest"], rows[:9])
    with pytest.raises(SystemExit, match="manifest_speech.jsonl: fewer than two talkers for train"):
        start_ours(PROTOCOL, in_tmp, work)


def test_protocol_is_frozen() -> None:
    fixed = {"cpu_minutes": 50, "train_seed": 1, "sample_rate": 16000, "experiment": "deepvqe_demo"}
    assert {name: PROTOCOL[name] for name in fixed} == fixed
    assert ["syn00001", "syn00002"] in PROTOCOL["count_once"]
    assert PROTOCOL["must_hold"] == {"level_db": 2.0} and PROTOCOL["goals"] == {"erle_db": 15.0, "si_sdri_db": 4.0}


def test_only_deepvqe_takes_a_checkpoint(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in {
        ("conv_tasnet", "--ckpt=x.ckpt"): "--ckpt: conv_tasnet trains ours beside its peer",
        ("deepvqe", "--ckpt=x.ckpt"): "--ckpt: x.ckpt: no such file",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--data=."])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_acceptance_run(calls: Path) -> None:
    """The whole harness with a training, on tones that bear the protocol's names."""
    rng = np.random.default_rng(1)
    rows = []
    for index, speaker in enumerate([*PROTOCOL["val_speakers"], *(f"other{n}" for n in range(8))]):
        write_audio(calls / f"{speaker}.wav", synthetic_speech(rng, 10.0, 80 + 8 * index), RATE)
        rows.append({"audio_filepath": f"{speaker}.wav", "duration": 5.0, "speaker": speaker})
    write_manifest(calls / PROTOCOL["speech_manifest"], rows)
    write_audio(calls / "noise.wav", 0.01 * rng.standard_normal(10 * RATE).astype(np.float32), RATE)
    write_manifest(calls / PROTOCOL["noise_manifest"], [{"audio_filepath": "noise.wav", "duration": 10.0}])
    command = [sys.executable, "-m", "benchmarks.accept", "deepvqe", f"--data={calls}", f"--work={calls / 'work'}"]
    done = subprocess.run([*command, "--cpu-minutes=4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((calls / "work" / "deepvqe" / "result.json").read_text())
    assert {"ours", "untrained", "unprocessed", "silence"} <= set(result["clips"])
    assert 0 < result["ours"]["steps"] <= result["ours"]["planned_steps"]
