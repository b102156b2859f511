"""The batch script of docs/clusters.md, run with stand-ins for srun and scontrol."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
(SCRIPT,) = re.findall(r"```bash title=train.sbatch\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)


@pytest.fixture
def submit(in_tmp: Path):
    """Starts the script; srun notes its arguments and ends with a code, scontrol notes that it was called."""
    (in_tmp / "train.sbatch").write_text(SCRIPT)

    def start(code: int, wait: str = "") -> subprocess.Popen:
        for name, ending in (("srun", f"{wait}\nexit {code}"), ("scontrol", "")):
            stub = in_tmp / "bin" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {in_tmp}/{name}.txt\n{ending}\n')
            stub.chmod(0o755)
        environment = {"PATH": f"{in_tmp}/bin:{os.environ['PATH']}", "SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "77"}
        return subprocess.Popen(["bash", "train.sbatch", "model.optim.lr=1e-4"], env=environment)

    return start


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (1, False), (2, False), (130, False), (138, True), (143, True)]
)
def test_stopped_runs_get_another_turn(submit, code: int, again: bool) -> None:
    assert submit(code).wait(30) == code
    assert Path("scontrol.txt").exists() is again
    assert not again or Path("scontrol.txt").read_text().split() == ["requeue", "77"]
    command = Path("srun.txt").read_text().split()
    assert command[:2] == ["python", "train.py"] and command[-1] == "model.optim.lr=1e-4"
    assert {"exp_manager.version=name", "exp_manager.resume_if_exists=true"} <= set(command)


def test_the_shell_waits_for_the_tasks(submit) -> None:
    """Told by SIGTERM itself, as in a preemption."""
    script = submit(143, wait="while [ ! -e saved ]; do sleep 0.01; done")
    while not Path("srun.txt").exists():
        assert script.poll() is None
    script.send_signal(signal.SIGTERM)
    Path("saved").touch()
    assert script.wait(30) == 143
    assert Path("scontrol.txt").exists()
