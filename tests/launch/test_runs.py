"""What a run directory says about its run, whatever state it is in."""

import json
import os
from pathlib import Path

import pytest

from launch import runs


def make_run(folder: Path, *, rows: str = "", summary: dict | None = None, mode: str = "max", age_s: float = 0) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(f"monitor:\n  metric: val_x\n  mode: {mode}\n")
    (folder / ".hydra" / "overrides.yaml").write_text("- model=unet\n- exp_manager.name=a\n- seed=3\n")
    (folder / "train.log").write_text("")
    if rows:
        (folder / "metrics.csv").write_text("epoch,step,train_loss,val_x\n" + rows)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    for file in folder.iterdir():
        os.utime(file, (1e9 - age_s, 1e9 - age_s))
    return folder


def test_status_steps_and_best(tmp_path: Path) -> None:
    rows = "0,4,1.0,\n0,9,0.5,2.5\n1,14,0.4,nan\n1,19,0.3,1.5\n"
    done = runs.read_run(make_run(tmp_path / "done", rows=rows, summary={"status": "completed", "steps": 20}))
    assert (done.status, done.steps, done.metric, done.best) == ("completed", 20, "val_x", 2.5)
    assert done.overrides == ["model=unet", "seed=3"] and done.seen_s == 1e9
    least = runs.read_run(make_run(tmp_path / "least", rows=rows, mode="min"))
    assert (least.status, least.steps, least.best) == ("unfinished", 20, 1.5)
    assert runs.read_run(make_run(tmp_path / "new")).best is None


def test_a_summary_of_before_a_resume_is_not_believed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", rows="0,29,1.0,\n", summary={"status": "stopped", "steps": 20})
    os.utime(folder / "train.log", (1e9 + 60, 1e9 + 60))
    assert runs.read_run(folder)[1:3] == ("unfinished", 30)


@pytest.mark.parametrize("name", ["summary.json", ".hydra/config.yaml", ".hydra/overrides.yaml"])
def test_damaged_files_hide_what_they_held_and_no_more(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "a", rows="0,4,1.0,2.0\n", summary={"status": "completed", "steps": 5})
    with (folder / "metrics.csv").open("a") as file:
        file.write("0,x,1.0,y\n")
    for content in ("{[", "3", "\0"):
        (folder / name).write_text(content)
        for file in (folder / "metrics.csv", folder / name):
            os.utime(file, (1e9, 1e9))
        found = runs.read_run(folder)
        assert found.steps == 5 and found.status == ("unfinished" if name == "summary.json" else "completed")


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs" / "a" / "old", rows="0,4,1.0,2.0\n", age_s=7200, summary={"status": "failed"})
    (tmp_path / "runs" / "a" / "old" / ".hydra" / "overrides.yaml").write_text("[model=unet, seed=3, lr=1]\n")
    make_run(tmp_path / "runs" / "b" / "sweep" / "0", age_s=60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "time", lambda: 1e9)
    assert runs.main([]) == 0
    header, first, second, shared = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["status", "steps", "best"]
    assert first.split() == ["failed", "5", "val_x", "2", "2", "h", "ago", "runs/a/old", "lr=1"]
    assert second.split() == ["unfinished", "-", "-", "1", "min", "ago", "runs/b/sweep/0"]
    assert shared == "typed for all: model=unet seed=3"
    assert runs.main(["runs/a"]) == 0 and capsys.readouterr().out.rstrip().endswith("model=unet seed=3 lr=1")
    assert runs.main(["nowhere"]) == 2 and "nowhere: no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert runs.main(["empty"]) == 0 and "empty: no runs" in capsys.readouterr().out
