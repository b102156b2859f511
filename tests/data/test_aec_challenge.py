"""The AEC-Challenge through the command line of data.prepare, on a tiny copy of its layout, up to a training."""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from data import prepare
from data.audio import read_audio
from data.fixed_echo import FixedEchoDataset
from data.manifest import read_manifest
from tests.conftest import TINY_ECHO
from tests.data.challenge import SCALE, TESTED, write_challenge, write_real, write_table

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 320042\n"


@pytest.fixture(scope="module")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_challenge(tmp_path_factory.mktemp("challenge") / "AEC-Challenge").parent


@pytest.fixture
def own(challenge: Path, tmp_path: Path) -> Path:
    """A copy of `datasets` to spoil."""
    return Path(shutil.copytree(challenge / "datasets", tmp_path / "datasets"))


def prepared(source: Path, output: Path, *options: object) -> dict[str, list[dict]]:
    """The manifests that are written, by name."""
    arguments = ["aec_challenge", "--input", source, "--output", output, *options]
    assert prepare.main([str(argument) for argument in arguments]) == 0
    return {path.stem: read_manifest(path) for path in output.glob("*.jsonl")}


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert prepare.main(["aec_challenge", *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def scenarios(rows: list[dict]) -> Counter[str]:
    return Counter(row["scenario"] for row in rows)


def test_all_that_is_there_in_manifests_of_its_kind(
    challenge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "aec"
    options = ("--single-talk", 1, "--val-fraction", 0.3)
    splits = prepared(challenge, output, *options)
    printed = capsys.readouterr().out
    names = {"train", "val", "test", "train_far_end", "val_far_end", "train_no_target", "val_no_target"}
    assert splits.keys() == names | {"blind_test_set_icassp2023"}
    assert scenarios(splits["test"]) == {"double_talk": 2, "far_end": 2, "near_end": 2}
    assert scenarios(splits["train"] + splits["val"]) == {"double_talk": 9, "far_end": 15, "near_end": 9}
    assert scenarios(splits["train_far_end"] + splits["val_far_end"]) == {"far_end": 6}
    assert scenarios(splits["train_no_target"] + splits["val_no_target"]) == {"double_talk": 3, "near_end": 3}
    assert scenarios(splits["blind_test_set_icassp2023"]) == {"double_talk": 2, "far_end": 1, "near_end": 1}
    assert "test.jsonl: 2 double_talk, 2 far_end, 2 near_end, 0.00 hours" in printed
    assert "real: 4 sweep(s) left out" in printed and "4 real recording(s) left out: their devices" in printed
    assert not any(row.get("device") == TESTED for name in names for row in splits[name])
    for key in ("device", "speaker"):
        owners = [{row[key] for row in splits[name] if key in row} for name in ("train", "val")]
        assert all(owners) and not set.intersection(*owners)
    for rows in splits.values():
        ids = [row["id"] for row in rows]
        assert len(set(ids)) == len(ids)
    assert prepare.main(["aec_challenge", "--check", "--output", str(output)]) == 0
    before = {path: path.read_bytes() for path in output.iterdir()}
    prepared(challenge, output, *options)
    assert capsys.readouterr().out.count("unchanged") == 8 and before == {p: p.read_bytes() for p in output.iterdir()}


def test_the_items_are_what_the_challenge_means(challenge: Path, tmp_path: Path) -> None:
    splits = prepared(challenge, tmp_path / "aec", "--single-talk", 1)
    rows = {row["id"]: row for rows in splits.values() for row in rows}
    names = list(rows)
    items = dict(zip(names, FixedEchoDataset(list(rows.values()), sample_rate=16000), strict=False))
    for number in (0, 5):
        double, far, near = (items[f"synthetic_{number}{part}"] for part in ("", "_far_end", "_near_end"))
        clean = read_audio(rows[f"synthetic_{number}"]["clean_filepath"], sample_rate=16000)
        torch.testing.assert_close(double["target"], SCALE * clean[:-1])
        echo = double["mic"] - double["target"]
        torch.testing.assert_close(echo, far["mic"][:-1], atol=1e-4, rtol=0)
        assert torch.equal(far["far"][:-1], double["far"]) and not far["target"].any() and far["has_target"]
        assert torch.equal(near["mic"], clean) and torch.equal(near["target"], clean) and not near["far"].any()
    full = items["fullband_f00001"]
    assert full["delay_samples"] == pytest.approx(26 * 16) and full["has_target"]
    torch.testing.assert_close(full["mic"] - full["target"], items["fullband_f00001_far_end"]["mic"], atol=1e-3, rtol=0)
    assert items["fullband_f00001_near_end"]["delay_samples"] == -1
    real = {
        key: items[f"-aB_c_{key}"] for key in ("farend_singletalk_with_movement", "doubletalk", "nearend_singletalk")
    }
    assert [bool(item["has_target"]) for item in real.values()] == [True, False, False]
    tested = items[f"{TESTED}_doubletalk-with-movement"]
    assert tested["far"].any() and not tested["has_target"]


def test_a_share_of_single_talk(challenge: Path, tmp_path: Path) -> None:
    splits = prepared(challenge / "datasets" / "synthetic", tmp_path / "none", "--single-talk", 0)
    assert scenarios([row for rows in splits.values() for row in rows]) == {"double_talk": 8}
    assert splits.keys() == {"train", "val", "test"}
    half = prepared(challenge / "datasets" / "synthetic", tmp_path / "half")
    counts = scenarios([row for rows in half.values() for row in rows])
    assert counts["double_talk"] == 8 == counts["far_end"] + counts["near_end"]
    assert prepare.aec_challenge_rows(challenge) == prepare.aec_challenge_rows(challenge)


@pytest.mark.parametrize(
    ("root", "manifests"),
    [
        ("datasets", 8),
        ("datasets/synthetic_fullband", 2),
        ("datasets/real", 6),
        ("datasets/blind_test_set_icassp2023", 1),
        ("datasets/blind_test_set_icassp2023/doubletalk", 1),  # no training set, though it looks like one
    ],
)
def test_any_folder_of_it_will_do(challenge: Path, tmp_path: Path, root: str, manifests: int) -> None:
    splits = prepared(challenge / root, tmp_path / "aec")
    assert len(splits) == manifests
    if manifests == 1:
        assert splits.keys() == {"blind_test_set_icassp2023"}


def test_an_own_output_inside_is_not_taken_for_data(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        splits = prepared(own, own / "aec", "--convert", 16000)
        assert len(splits["test"]) == len({row["mic_filepath"] for row in splits["test"]})
    assert capsys.readouterr().out.count("unchanged") == 8


def spoil_table(path: Path, change: Callable[[dict], dict]) -> None:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    write_table(path, [change(row) for row in rows])


def spoil_files(pattern: str, how: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in sorted(folder.glob(pattern)):
            how(path)

    return spoil


def change_meta(place: str, **values: str | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        taken = {key for key, value in values.items() if value is None}
        spoil_table(
            folder / place / "meta.csv",
            lambda row: {key: value for key, value in (row | values).items() if key not in taken},
        )

    return spoil


def rewrite(seconds: float, rate: int) -> Callable[[Path], object]:
    return lambda path: sf.write(path, np.zeros(round(seconds * rate)), rate)


SPOILT = {
    "no meta.csv": (
        lambda folder: (folder / "synthetic" / "meta.csv").unlink(),
        "synthetic: meta.csv is missing; there is echo_signal, ",
    ),
    "a folder is missing": (
        lambda folder: shutil.rmtree(folder / "synthetic" / "echo_signal"),
        "synthetic: echo_signal is missing; there is farend_speech, ",
    ),
    "an empty table": (
        lambda folder: (folder / "synthetic" / "meta.csv").write_text("fileid,split,nearend_scale\n"),
        "meta.csv: lists no examples",
    ),
    "a column is missing": (
        change_meta("synthetic", nearend_scale=None),
        "the first: {folder}/synthetic/meta.csv, line 2: column nearend_scale is missing or empty; there is nearend_sp",
    ),
    "a scale that is no number": (
        change_meta("synthetic", nearend_scale="loud"),
        "nearend_scale must be a number, got",
    ),
    "a scale that is not finite": (
        change_meta("synthetic", nearend_scale="nan"),
        "nearend_scale must be a number, got",
    ),
    "a scale of zero": (change_meta("synthetic", nearend_scale="0"), "nearend_scale must be above 0, got 0"),
    "an unknown split": (change_meta("synthetic", split="dev"), "line 2: split must be train or test, got 'dev'"),
    "a file number that is none": (
        change_meta("synthetic", fileid="../7"),
        "fileid must be a whole number, got '../7'",
    ),
    "a table that is a pointer": (
        lambda folder: (folder / "synthetic" / "meta.csv").write_text(LFS),
        "meta.csv: is a Git-LFS pointer, not a table; run `git lfs pull`",
    ),
    "a delay that is no number": (change_meta("synthetic_fullband", echo_delay="late"), "echo_delay must be a number"),
    "a delay below zero": (change_meta("synthetic_fullband", echo_delay="-1"), "echo_delay must be 0 or more, got -1"),
    "no delays": (change_meta("synthetic_fullband", echo_delay=None), "column echo_delay is missing or empty"),
    "pointers": (
        spoil_files("synthetic/*/*.wav", lambda path: path.write_text(LFS)),
        "8 of 8 examples cannot be used, the first: {folder}/synthetic/nearend_mic_signal/nearend_mic_fileid_0.wav: is"
        " a Git-LFS pointer, not audio; run `git lfs pull`",
    ),
    "a partner of synthetic": (
        spoil_files("synthetic/echo_signal/*.wav", Path.unlink),
        "echo_fileid_0.wav: no such file",
    ),
    "a partner of fullband": (
        spoil_files("synthetic_fullband/*_target.wav", Path.unlink),
        "3 of 3 examples cannot be used, the first: {folder}/synthetic_fullband/f00000_target.wav: no such file",
    ),
    "no loopbacks": (
        spoil_files("real/*[!p]_lpb.wav", lambda path: "mic" in path.name or path.unlink()),
        "real/-aB_c_doubletalk_mic.wav: its partner -aB_c_doubletalk_lpb.wav is missing; fetch it too",
    ),
    "no microphones": (
        spoil_files("real/*_mic.wav", Path.unlink),
        "real/-aB_c_doubletalk_lpb.wav: its partner -aB_c_doubletalk_mic.wav is missing; fetch it too",
    ),
    "other lengths": (
        spoil_files("synthetic/farend_speech/*.wav", rewrite(0.4, 16000)),
        "farend_speech_fileid_0.wav: 0.40 s (6400 samples), but {folder}/synthetic/nearend_mic_signal/",
    ),
    "other rates": (
        spoil_files("synthetic/nearend_speech/*.wav", rewrite(0.5, 48000)),
        "nearend_speech_fileid_0.wav: 48000 Hz, but {folder}/synthetic/nearend_mic_signal/nearend_mic_fileid_0.wav has",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_used_is_one_line(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, says = SPOILT[case]
    spoil(own)
    if case == "no loopbacks":  # more than ten of them
        for number in range(8):
            sf.write(own / "real" / f"x{number}_doubletalk_mic.wav", np.zeros(800), 16000)
    if case == "no microphones":
        for path in (own / "real").glob("*nearend*"):
            path.unlink()
    message = fails(capsys, "--input", own, "--output", tmp_path / "aec")
    assert says.format(folder=own) in message
    assert not (tmp_path / "aec").exists()


def test_wrong_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "speech").mkdir(parents=True)
    sf.write(tmp_path / "other" / "speech" / "a.wav", np.zeros(800), 16000)
    for name, says in (("none", "none: no such folder"), ("empty", "there is nothing"), ("other", "there is speech")):
        assert says in fails(capsys, "--input", tmp_path / name, "--output", tmp_path / "aec")
    assert "--input is missing" in fails(capsys, "--output", tmp_path / "aec")
    assert "train.jsonl: no such manifest" in fails(capsys, "--check", "--output", tmp_path / "aec")
    with pytest.raises(SystemExit):
        prepare.main(["aec_challenge", "--output", "x", "--single-talk", "1.5"])
    assert "must be from 0 to 1, got 1.5" in capsys.readouterr().err


def test_a_few_bad_ones_are_left_out(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (own / "synthetic" / "echo_signal" / "echo_fileid_0.wav").write_text(LFS)
    (own / "real" / "b0_doubletalk_lpb.wav").unlink()
    (own / "synthetic_fullband" / "meta.csv").unlink()
    splits = prepared(own, tmp_path / "aec")
    assert "synthetic_0" not in {row["id"] for row in splits["test"]} and "1 of 8 examples left out" in caplog.text
    assert "left out: " in caplog.text and "b0_doubletalk_lpb.wav is missing" in caplog.text
    assert "nothing tells the delays of synthetic_fullband" in caplog.text
    assert not any("delay_ms" in row for row in splits["train"])


def test_check_finds_what_has_changed(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "aec"
    splits = prepared(own / "real", output)
    row = splits["train_no_target"][0]
    sf.write(row["mic_filepath"], np.zeros(4000), 16000)
    message = fails(capsys, "--check", "--output", output)
    assert f"{row['mic_filepath']}: lasts 0.25 s, its manifest says 0.50 s" in message
    write_real(own / "real")
    (output / "val_far_end.jsonl").write_text(json.dumps(row) + "\n")
    message = fails(capsys, "--check", "--output", output)
    assert f"val_far_end.jsonl: {row['device']} is also in train_far_end.jsonl" in message


def test_trained_on(challenge: Path, corpus: Path, in_tmp: Path, script: Callable) -> None:
    prepared(challenge, in_tmp / "aec", "--val-fraction", 0.3)
    named = [f"data.{split}_manifest=aec/{split}.jsonl" for split in ("train", "val", "test")]
    typed = ["debug=fast", "data.segment_s=0.3"]
    done = script("train", ["model=deepvqe", *TINY_ECHO, *named, *typed, "exp_manager.version=one"])
    assert done.code == 0, done.text
    summary = json.loads((in_tmp / "runs" / "deepvqe" / "one" / "summary.json").read_text())["metrics"]
    assert {"val_loss", "test_si_sdri_double_talk", "test_erle_far_end"} <= summary.keys(), summary
    typed += [f"data.train_manifest={corpus}/train.jsonl", "data.recorded_echo_manifest=aec/train_far_end.jsonl"]
    typed += [f"data.val_manifest={corpus}/val.jsonl", "data.val_recorded_echo_manifest=aec/val_far_end.jsonl"]
    done = script("train", ["model=deepvqe", *TINY_ECHO, *typed, "exp_manager.version=two"])
    assert done.code == 0, done.text
    summary = json.loads((in_tmp / "runs" / "deepvqe" / "two" / "summary.json").read_text())
    assert "val_loss" in summary["metrics"] and summary["bad_files"] == 0
