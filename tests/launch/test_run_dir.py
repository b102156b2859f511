"""One directory for a run, whoever starts it; what is in it."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.errors import ConfigError
from launch.run_dir import discard_if_unused, find_run, log_name, run_dir, sweep_dir


def manager(**values):
    section = {"exp_dir": None, "name": "x", "version": None, "resume_if_exists": False}
    return OmegaConf.create({**section, "use_datetime_version": True, "explicit_log_dir": None, **values})


def holding(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    return folder


def test_one_stamp_for_all_ranks(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_dir(manager())
    assert first == run_dir(manager()), "the stamp is taken once and handed to children"
    assert first.startswith("runs/x/")
    Path(first).mkdir(parents=True)
    monkeypatch.delenv("RUN_STAMP")
    assert run_dir(manager()) != first, "two runs within a second are two runs"
    monkeypatch.delenv("RUN_STAMP")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run_dir(manager()) == "runs/x/77"
    monkeypatch.delenv("RUN_STAMP")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("SLURM_JOB_ID")
    from_parent = run_dir(manager())
    assert from_parent != "runs/x/none"
    Path(from_parent).mkdir()
    monkeypatch.delenv("RUN_STAMP")
    assert run_dir(manager()) == from_parent, "ranks of one launcher share a directory that is there already"


def test_one_log_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_name("train") == "train.log"
    monkeypatch.setenv("RANK", "3")
    assert log_name("train") == "train_rank3.log"
    assert log_name("train_ddp_process_3") == "train_ddp_process_3.log"


def test_version_and_sweep(in_tmp: Path) -> None:
    assert run_dir(manager(version="a", exp_dir="elsewhere")) == "elsewhere/x/a"
    assert sweep_dir(manager(version="a")) == "runs/x/sweep-a"
    with pytest.raises(ConfigError, match="plain folder name"):
        run_dir(manager(name="../x"))


def test_a_name_is_needed_least(in_tmp: Path) -> None:
    assert run_dir(manager(name=None, version="a")) == "runs/default/a", "as in NeMo"


def test_numbered_versions(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever reads dates badly; ranks of a launcher keep the name that they have in common."""
    for expected in ("version_0", "version_1"):
        assert run_dir(manager(use_datetime_version=False)) == f"runs/x/{expected}"
        Path(f"runs/x/{expected}").mkdir(parents=True)
        assert run_dir(manager(use_datetime_version=False)) == f"runs/x/{expected}", "handed to children"
        monkeypatch.delenv("RUN_STAMP")
    Path("runs/x/version_9").mkdir()
    Path("runs/x/version_old").mkdir()
    assert run_dir(manager(use_datetime_version=False)) == "runs/x/version_10"
    monkeypatch.delenv("RUN_STAMP")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run_dir(manager(use_datetime_version=False)) == "runs/x/77"


def test_an_explicit_directory(in_tmp: Path) -> None:
    """Whatever the other keys say; it is looked at alone for something to resume."""
    own = manager(explicit_log_dir="here", version="a", exp_dir="elsewhere", resume_if_exists=True)
    holding(Path("here/b"))
    assert run_dir(own) == run_dir(own, "nemo") == "here"
    assert find_run(own) is None
    holding(Path("here"))
    assert find_run(own) == Path("here")
    Path("file").touch()
    with pytest.raises(ConfigError, match="exp_manager.explicit_log_dir=file/x: file is a file, not a folder"):
        run_dir(manager(explicit_log_dir="file/x"))


def test_the_run_to_resume(in_tmp: Path) -> None:
    assert find_run(manager()) is None
    holding(Path("runs/x/1"))
    newest = holding(Path("runs/x/0"))
    Path("runs/x/2").mkdir()  # killed at start-up
    Path("runs/x/3/checkpoints").mkdir(parents=True)
    Path("runs/x/3/checkpoints/last.ckpt.tmp").touch()  # killed in its first checkpoint
    assert find_run(manager()) == newest
    assert find_run(manager(version="1")) == Path("runs/x/1")
    assert find_run(manager(version="2")) is None
    assert run_dir(manager(resume_if_exists=True)) == "runs/x/0"
    itself = holding(Path("runs/x"))
    assert find_run(manager()) == itself


def test_nemos_layout(in_tmp: Path) -> None:
    """Without a stamp where a run may be continued; below it with a version, or when each run is a new one."""
    resuming = {"resume_if_exists": True}
    assert run_dir(manager(**resuming), "nemo") == "nemo_experiments/x"
    assert run_dir(manager(**resuming, version="v", exp_dir="e"), "nemo") == "e/x/v"
    assert run_dir(manager(), "nemo").startswith("nemo_experiments/x/2")
    assert sweep_dir(manager(version="v"), "nemo") == "nemo_experiments/x/sweep-v"
    holding(Path("nemo_experiments/x/v"))
    assert run_dir(manager(**resuming), "nemo") == "nemo_experiments/x/v"
    holding(Path("nemo_experiments/x"))
    assert run_dir(manager(**resuming), "nemo") == "nemo_experiments/x"


def test_what_is_discarded(in_tmp: Path) -> None:
    """A run that never began, and the folders made for it; not the current folder, however empty."""
    for folder in (in_tmp / "runs/x/1", in_tmp / "nemo_experiments/x"):
        (folder / ".hydra").mkdir(parents=True)
        (folder / "train.log").touch()
        discard_if_unused(folder)
        assert in_tmp.is_dir() and not any(in_tmp.iterdir())
    began = holding(in_tmp / "nemo_experiments/x")
    (began / ".hydra").mkdir()
    discard_if_unused(began)
    assert (began / ".hydra").is_dir()


def test_everything_of_a_run_is_in_its_directory(trained: Path) -> None:
    names = {file.relative_to(trained).as_posix() for file in trained.rglob("*")}
    wanted = """train.log checkpoints/last.ckpt metrics.csv summary.json plan.json
                command.sh environment.txt .hydra/config.yaml .hydra/overrides.yaml"""
    for name in wanted.split():
        assert name in names, name
    assert any(name.startswith("checkpoints/best-step=") for name in names)
    assert any("events.out.tfevents" in name for name in names)
    assert any(name.startswith("listen/") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert "step 4" in (trained / "train.log").read_text()
    assert "train.py" in (trained / "command.sh").read_text()
    assert "torch==" in (trained / "environment.txt").read_text()

    summary = json.loads((trained / "summary.json").read_text())
    frozen = {"metrics", "best_checkpoint", "steps", "wall_s", "cpu_s", "examples_per_s", "data_wait_share",
              "peak_mem_mb", "versions"}  # fmt: skip
    assert frozen <= set(summary), "keys may be added, never renamed"
    assert {"val_si_sdri", "test_si_sdri"} <= set(summary["metrics"])
    assert summary["steps"] == 4
    assert (trained / summary["best_checkpoint"]).is_file()


def test_a_refused_run_that_made_no_step_is_discarded(in_tmp: Path) -> None:
    def begun(name: str, steps: int | None = None) -> Path:
        folder = in_tmp / "runs" / "x" / name
        (folder / ".hydra").mkdir(parents=True)
        for file in ("train.log", "command.sh", "environment.txt", "events.out.tfevents.1.host"):
            (folder / file).touch()
        (folder / "summary.json").write_text(json.dumps({"steps": steps}))
        return folder

    for steps in (0, None):
        discard_if_unused(begun("1", steps), refused=True)
        assert not any(in_tmp.iterdir())
    kept = [begun("2", 3), holding(begun("3")), begun("4")]
    (kept[2] / "notes.txt").touch()
    for folder in kept:
        discard_if_unused(folder, refused=True)
    failed = begun("5")
    discard_if_unused(failed)
    assert all(folder.is_dir() for folder in [*kept, failed]), "what another wrote, and the log of a failure, stay"


def test_a_mistake_in_any_manifest_leaves_no_directory(script, corpus: Path, in_tmp: Path) -> None:
    named = [f"data.{part}_manifest={corpus / part}.jsonl" for part in ("train", "val", "test")]
    done = script("train", ["model=conv_tasnet", *named, "data.val_noise_manifest=none.jsonl"])
    assert done.code == 2 and "none.jsonl: no such manifest" in done.err
    assert not any(in_tmp.iterdir())
