"""Scores as a table, as JSON and example by example."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.manifest import read_manifest, write_manifest
from launch.evaluate import Examples, in_turn, write_rows
from models.conv_tasnet import ConvTasNet
from tests.conftest import TINY


def test_means_are_those_of_the_examples(trained: Path, script, in_tmp: Path) -> None:
    done = script("evaluate", [f"ckpt_path={trained}", "output=a/scores.json", "per_file=a/scores.csv"])
    assert done.code == 0, done.text
    rows = list(csv.DictReader((in_tmp / "a/scores.csv").open()))
    content = json.loads((in_tmp / "a/scores.json").read_text())
    assert list(rows[0]) == ["name", "si_sdr", "si_sdri", "sdr", "status", "seconds"]
    assert len(rows) == 4 and len({row["name"] for row in rows}) == 4
    assert {row["status"] for row in rows} == {"ok"} and {row["seconds"] for row in rows} == {"0.5"}
    for name in ("si_sdr", "si_sdri", "sdr"):
        values = torch.tensor([float(row[name]) for row in rows])
        assert content["metrics"][f"test_{name}"] == pytest.approx(values.mean().item(), abs=1e-4)
        assert content["metrics"][f"test_{name}_stderr"] == pytest.approx(values.std().item() / 2, abs=1e-4)
        assert f"test_{name} " in done.out and " +- " in done.out
    assert content["num_bad_files"] == 0 and content["bad_files"] == {} and content["checkpoint"].endswith(".ckpt")


def test_files_that_could_not_be_used_are_named(trained: Path, script, in_tmp: Path, corpus: Path) -> None:
    rows = read_manifest(corpus / "test.jsonl")
    (in_tmp / "empty.wav").touch()
    write_manifest("test.jsonl", [rows[0] | {"audio_filepath": str(in_tmp / "empty.wav")}, *rows])
    done = script("evaluate", [f"ckpt_path={trained}", "output=x.json", "data.test_manifest=test.jsonl"])
    assert done.code == 0, done.text
    assert "1 files could not be used: other examples stand in for theirs" in done.text
    bad_files = json.loads((in_tmp / "x.json").read_text())["bad_files"]
    assert list(bad_files) == [str(in_tmp / "empty.wav")]
    done = script("evaluate", [f"ckpt_path={trained}", "data.test_manifest=test.jsonl", "data.max_bad_files=0"])
    assert done.code == 2 and f"{in_tmp / 'empty.wav'}: is empty" in done.err


def test_a_run_on_a_folder_without_validation(script, in_tmp: Path, corpus: Path) -> None:
    """Its checkpoint is scored on a typed manifest, which takes the folder's place."""
    own = ["data.val_mixtures=0", f"data.speech_dir={corpus / 'speech'}", "exp_manager.version=x", "test=false"]
    done = script("train", ["model=conv_tasnet", "debug=fast", *TINY, *own])
    assert done.code == 0 and "no validation, train_loss decides" in done.text, done.text
    typed = [f"data.test_manifest={corpus / 'test.jsonl'}", "data.test_mixtures=2"]
    done = script("evaluate", ["ckpt_path=runs/conv_tasnet/x/checkpoints/last.ckpt", *typed])
    assert done.code == 0 and "test_si_sdri" in done.text, done.text


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("data.sample_rate=16000", "data.sample_rate=16000 differs from the system's 8000: set model.sample_rate"),
        ("+model.mask=sigmoid", "error: model.mask: belongs to the checkpoint"),
        ("data.test_mixtures=0", "data.test_mixtures=0: set data.test_manifest=…"),
    ],
)
def test_data_that_does_not_fit(trained: Path, script, in_tmp: Path, typed: str, expected: str) -> None:
    done = script("evaluate", [f"ckpt_path={trained}", typed])
    assert done.code == 2 and expected in done.err


def test_a_folder_is_no_file_to_write(trained: Path, script, in_tmp: Path) -> None:
    done = script("evaluate", [f"ckpt_path={trained}", "output=.", f"per_file={in_tmp}"])
    assert done.code == 2
    assert "output=.: is a folder" in done.err and f"per_file={in_tmp}: is a folder" in done.err


def test_rows_of_several_processes_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process collects its share; a repeated example at the end is left out."""
    system = ConvTasNet(num_filters=8, bottleneck_channels=4, hidden_channels=8, num_blocks=1, num_repeats=1)
    shares = {0: ["a", "c", "e"], 1: ["b", "d", "a"]}
    gathered: list = []
    for rank, names in shares.items():
        collected = Examples()
        loader = SimpleNamespace(dataset=range(5))
        trainer = SimpleNamespace(world_size=2, global_rank=rank, test_dataloaders=loader)
        collected.on_test_start(trainer, system)
        for name in names:
            batch = {"name": [name], "length": torch.tensor([4000])}
            collected.on_test_batch_end(trainer, system, {"example_scores": [{"si_sdr": 1.0}]}, batch, 0)
        gathered.append(collected._own)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), gathered)
    )
    collected.on_test_end(trainer, system)
    assert [row["name"] for row in collected.rows] == ["a", "b", "c", "d", "e"]
    assert collected.rows[0] == {"name": "a", "si_sdr": 1.0, "seconds": 0.5}
    assert in_turn([[0], []], 5) == [0]


def test_what_is_not_known_is_left_empty(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "x.csv", [{"name": "a,b", "sdr": math.nan, "n": 2}, {"name": "c", "sdr": None, "n": 1.23456789}]
    )
    assert (tmp_path / "x.csv").read_text() == 'name,sdr,n\n"a,b",,2\nc,,1.23457\n'


def test_rows_of_a_system_without_example_scores(script, trained_nest: Path, in_tmp: Path) -> None:
    done = script("evaluate", [f"ckpt_path={trained_nest}", "per_file=rows.csv"])
    assert done.code == 2 and "error: per_file=rows.csv: NEST has no values for single examples\n" in done.err, (
        done.text
    )
