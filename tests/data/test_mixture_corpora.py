"""LibriMix and wsj0-mix through the command line of data.prepare, on tiny copies of their layouts."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data import prepare
from data.fixed_mixtures import FixedMixtureDataset
from data.manifest import read_manifest

LIBRI_IDS = {
    "train-100": ["103-1240-0000_1034-121119-0001", "103-1240-0002_1034-121119-0003"],
    "train-360": ["14-208-0001_16-122827-0002"],
    "dev": ["174-50561-0000_251-118436-0000"],
    "test": ["61-70968-0000_121-121726-0000"],
}
WSJ_IDS = {
    "tr": ["011a0101_1.9857_01ta020r_-1.9857", "01ta0201_0.5_011a010z_-0.5"],
    "cv": ["01ta0203_1.5_011a0105_-1.5"],
    "tt": ["050c0101_0.1_22ha010f_-0.1"],
}


def write_mixtures(base: Path, ids: dict[str, list[str]], *, mix="mix", num_sources=2, noise=False, rate=8000) -> None:
    """Mixtures of 0.2 s in the folders <part>/{<mix>,s1,s2,...,noise}."""
    rng = np.random.default_rng(0)
    for part, names in ids.items():
        for name in names:
            signals = {f"s{n + 1}": rng.uniform(-0.2, 0.2, rate // 5) for n in range(num_sources)}
            if noise:
                signals["noise"] = rng.uniform(-0.1, 0.1, rate // 5)
            signals[mix] = sum(signals.values())
            for folder, samples in signals.items():
                (base / part / folder).mkdir(parents=True, exist_ok=True)
                sf.write(base / part / folder / f"{name}.wav", samples, rate)


def write_metadata(base: Path, *, mix: str, stored: str, noise: bool) -> None:
    """LibriMix metadata with paths below `stored`, the folder of the machine on which the corpus was made."""
    (base / "metadata").mkdir()
    columns = {mix: "mixture_path", "s1": "source_1_path", "s2": "source_2_path"} | (
        {"noise": "noise_path"} if noise else {}
    )
    slash = "\\" if "\\" in stored else "/"
    for part, names in LIBRI_IDS.items():
        with open(base / "metadata" / f"mixture_{part}_{mix}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mixture_ID", *columns.values(), "length"])
            for name in names:
                writer.writerow(
                    [name, *(slash.join([stored, part, folder, f"{name}.wav"]) for folder in columns), 1600]
                )


def prepare_ok(*arguments: object) -> None:
    assert prepare.main([str(argument) for argument in arguments]) == 0


def prepare_fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert prepare.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


STORED = {"another machine": "/storage/Libri2Mix/wav8k/min", "Windows": "D:\\Libri2Mix\\wav8k\\min"}


@pytest.mark.parametrize(
    "metadata, noise", [(None, False), (None, True), ("another machine", True), ("Windows", False), ("here", False)]
)
def test_librimix(tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: str | None, noise: bool) -> None:
    base, output = tmp_path / "Libri2Mix" / "wav8k" / "min", tmp_path / "out"
    kind = "both" if noise else "clean"
    write_mixtures(base, LIBRI_IDS, mix=f"mix_{kind}", noise=noise)
    if metadata:
        write_metadata(base, mix=f"mix_{kind}", stored=STORED.get(metadata, str(base)), noise=noise)
    prepare_ok("librimix", "--input", tmp_path, "--output", output, "--type", kind)
    assert f"{output}/train.jsonl: 3 mixtures of 2, 0.00 hours" in capsys.readouterr().out
    rows = read_manifest(output / "train.jsonl")
    assert [row["id"] for row in rows] == LIBRI_IDS["train-100"] + LIBRI_IDS["train-360"]
    assert rows[0]["speakers"] == ["103", "1034"] and rows[0]["duration"] == 0.2
    assert rows[0]["s2_filepath"] == str(base / "train-100" / "s2" / f"{rows[0]['id']}.wav")
    assert ("noise_filepath" in rows[0]) == noise
    talkers = read_manifest(output / "train_talkers.jsonl", required=("audio_filepath", "duration", "speaker"))
    assert [row["speaker"] for row in talkers] == ["103", "1034"] * 2 + ["14", "16"]
    assert FixedMixtureDataset(rows, num_sources=2).has_noise == noise
    prepare_ok("librimix", "--check", "--output", output)


def test_a_second_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, output = tmp_path / "wav8k" / "min", tmp_path / "out"
    command = ["librimix", "--input", tmp_path, "--output", output]
    write_mixtures(base, LIBRI_IDS, mix="mix_clean")
    prepare_ok(*command)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}
    capsys.readouterr()
    prepare_ok(*command)
    assert len(before) == 6 and capsys.readouterr().out.count(", unchanged") == 6
    write_mixtures(base, {"dev": ["1-2-3_4-5-6"]}, mix="mix_clean")
    assert "val.jsonl: exists and says something else" in prepare_fails(capsys, *command)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()} == before


def test_librimix_single_is_one_talker_and_noise(tmp_path: Path) -> None:
    base = tmp_path / "Libri2Mix" / "wav16k" / "max"
    write_mixtures(base, LIBRI_IDS, mix="mix_single", num_sources=1, noise=True, rate=16000)
    (base / "train-100" / "s2").mkdir()
    command = ["librimix", "--sample-rate", 16000, "--mode", "max", "--type", "single"]
    prepare_ok(*command, "--input", tmp_path, "--output", tmp_path / "out")
    rows = read_manifest(tmp_path / "out" / "test.jsonl")
    assert rows[0]["speakers"] == ["61"] and "s2_filepath" not in rows[0] and "noise_filepath" in rows[0]
    prepare_ok("librimix", "--check", "--output", tmp_path / "out")


@pytest.mark.parametrize("num_sources", [2, 3])
def test_wsj0mix(tmp_path: Path, num_sources: int) -> None:
    base, output = tmp_path / f"{num_sources}speakers" / "wav8k" / "min", tmp_path / "out"
    third = "" if num_sources == 2 else "_40fc0101_0.0"
    ids = {part: [name + third for name in names] for part, names in WSJ_IDS.items()}
    write_mixtures(base, ids, num_sources=num_sources)
    prepare_ok("wsj0mix", "--input", tmp_path, "--output", output)
    rows = read_manifest(output / "train.jsonl")
    assert rows[0]["speakers"] == ["011", "01t", "40f"][:num_sources]
    assert FixedMixtureDataset(rows, num_sources=num_sources)[0]["sources"].shape == (num_sources, 1600)
    assert {row["speaker"] for row in read_manifest(output / "test_talkers.jsonl")} >= {"050", "22h"}
    # tr and cv share their talkers, tt must not; here the third talker of all three is the same.
    problems = prepare.check_splits(output, suffix="_talkers", shared=("train", "val"))
    assert len(problems) == num_sources - 2
    assert prepare.main(["wsj0mix", "--check", "--output", str(output)]) == (0 if num_sources == 2 else 2)


def test_only_what_is_there_is_written(tmp_path: Path) -> None:
    write_mixtures(tmp_path / "wav8k" / "min", {"tt": WSJ_IDS["tt"]})
    prepare_ok("wsj0mix", "--input", tmp_path, "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.jsonl", "test_talkers.jsonl"]
    prepare_ok("wsj0mix", "--check", "--output", tmp_path / "out")


def test_a_wrong_folder_is_named_with_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["wsj0mix", "--input", tmp_path, "--output", tmp_path / "out"]
    assert "looked for wav8k/min" in prepare_fails(capsys, *command)
    (tmp_path / "wav8k" / "min" / "train").mkdir(parents=True)
    assert "looked for tr, cv, tt, there is train" in prepare_fails(capsys, *command)
    (tmp_path / "wav8k" / "min" / "tr" / "mix").mkdir(parents=True)
    assert "tr: looked for mix, s1, s2 in it, there is mix" in prepare_fails(capsys, *command)
    for name in ("s1", "s2"):
        (tmp_path / "wav8k" / "min" / "tr" / name).mkdir()
    assert "tr/mix: no recordings in it" in prepare_fails(capsys, *command)
    assert "wav16k/min" in prepare_fails(capsys, *command, "--sample-rate", 16000)
    assert "none: no such folder" in prepare_fails(capsys, "librimix", "--input", "none", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spoil(path: Path, how: str) -> None:
    samples, rate = sf.read(path)
    if how == "missing":
        path.unlink()
    elif how == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif how == "short":
        sf.write(path, samples[:-10], rate)
    elif how == "rate":
        sf.write(path, samples, 2 * rate)


@pytest.mark.parametrize(
    "how, says",
    [
        ("missing", "no such file"),
        ("lfs", "is a Git-LFS pointer"),
        ("truncated", "truncated, 499 bytes are missing"),
        ("short", "has 1590 samples, its mixture"),
        ("rate", "has 16000 Hz, its folder says 8000 Hz"),
    ],
)
def test_a_mixture_that_cannot_be_used_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, how: str, says: str
) -> None:
    write_mixtures(tmp_path / "wav8k" / "min", WSJ_IDS)
    bad = tmp_path / "wav8k" / "min" / "tr" / "s2" / f"{WSJ_IDS['tr'][0]}.wav"
    spoil(bad, how)
    prepare_ok("wsj0mix", "--input", tmp_path, "--output", tmp_path / "out")
    assert [row["id"] for row in read_manifest(tmp_path / "out" / "train.jsonl")] == WSJ_IDS["tr"][1:]
    assert f"left out: {bad}: {says}" in caplog.text and "1 of 2 mixtures left out" in caplog.text
    spoil(bad.with_name(f"{WSJ_IDS['tr'][1]}.wav"), how)
    message = prepare_fails(capsys, "wsj0mix", "--input", tmp_path, "--output", tmp_path / "other")
    assert f"2 of 2 mixtures cannot be used, the first: {bad}: {says}" in message


def test_names_and_metadata_that_tell_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixtures(tmp_path / "wav8k" / "min", {"tr": ["7"]})
    message = prepare_fails(capsys, "wsj0mix", "--input", tmp_path, "--output", tmp_path / "out")
    assert "7.wav: its name does not tell the 2 talkers" in message
    metadata = tmp_path / "wav8k" / "min" / "metadata" / "mixture_dev_mix_clean.csv"
    metadata.parent.mkdir()
    for text, says in (
        ("mixture_ID,length\na_b,1600\n", "line 2: mixture_path and source_1_path are needed, there is mixture_ID"),
        ("mixture_ID,length\na_b,1600,7\n", "line 2: 3 fields, the header has 2"),
    ):
        metadata.write_text(text)
        message = prepare_fails(capsys, "librimix", "--input", tmp_path, "--output", tmp_path / "out")
        assert f"{metadata}, {says}" in message


def test_check_finds_a_talker_in_two_splits_and_sums_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = tmp_path / "wav8k" / "min", tmp_path / "out"
    ids = {"dev": LIBRI_IDS["dev"], "test": ["61-1-0_174-2-0"]}
    write_mixtures(base, ids, mix="mix_clean")
    prepare_ok("librimix", "--input", tmp_path, "--output", output)
    assert "test_talkers.jsonl: 174 is also in val_talkers.jsonl" in prepare_fails(
        capsys, "librimix", "--check", "--output", output
    )
    (output / "test_talkers.jsonl").unlink()
    prepare_ok("librimix", "--check", "--output", output)
    mixture = base / "test" / "mix_clean" / "61-1-0_174-2-0.wav"
    sf.write(mixture, 0.9 * sf.read(mixture)[0], 8000)
    assert f"{mixture}: differs by up to 0.0" in prepare_fails(capsys, "librimix", "--check", "--output", output)
    sf.write(mixture, np.zeros(1000), 8000)
    assert f"{mixture}: lasts 0.12 s, its manifest says 0.20 s" in prepare_fails_first(capsys, output)


def prepare_fails_first(capsys: pytest.CaptureFixture[str], output: Path) -> str:
    capsys.readouterr()
    assert prepare.main(["librimix", "--check", "--output", str(output)]) == 2
    return capsys.readouterr().err.splitlines()[0]
