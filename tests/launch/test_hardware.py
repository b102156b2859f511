"""What launchers say of processes and machines is taken from them."""

import pytest

from launch.errors import ConfigError
from launch.hardware import launched, resolve_hardware, restart_problems
from launch.run_dir import restarts

SECTION = {"accelerator": "cpu", "devices": "auto", "num_nodes": 1}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")


@pytest.fixture
def srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "8", "NNODES": "2", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_alone() -> None:
    assert launched() is None
    resolved = resolve_hardware(SECTION)
    assert (resolved["devices"], resolved["num_nodes"]) == (1, 1)
    assert resolve_hardware(SECTION | {"num_nodes": 2})["num_nodes"] == 2


@pytest.mark.parametrize(("launcher", "processes"), [("torchrun", 8), ("srun", 4)])
def test_a_launcher_knows(launcher: str, processes: int, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(launcher)
    assert launched() == (launcher, processes, 2)
    for typed in ({}, {"devices": processes}, {"devices": -1, "num_nodes": 2}):
        resolved = resolve_hardware(SECTION | typed)
        assert (resolved["devices"], resolved["num_nodes"]) == (processes, 2)
    for typed in ({"devices": 3}, {"num_nodes": 3}):
        with pytest.raises(ConfigError, match=rf"{launcher} has started {processes} process\(es\) on each of 2 mach"):
            resolve_hardware(SECTION | typed)


def test_an_interactive_job_of_slurm_starts_nothing(srun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert launched() is None


def test_a_restart_on_several_machines(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that did not fail count none: without further ado half of the processes would begin anew."""
    assert restart_problems(resumes=False) == []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for resumes in (False, True):
        (line,) = restart_problems(resumes=resumes)
        assert "exp_manager.resume_if_exists=true" in line and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in line
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert restart_problems(resumes=True) == []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert restart_problems(resumes=False) == [], "one machine: all are told"


def test_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert restarts() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert restarts() == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert restarts() == 2
