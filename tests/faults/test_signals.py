"""However a process of a run ends, the run ends: at the step, with the right code, and with nothing left behind.

The moments are named by what a run shows: a library that a process is loading, a line of its output. At the end
the table of all cells is printed.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from models.checkpoint import read_checkpoint
from tests.conftest import TINY

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parent.parent.parent
RUN = Path("runs/conv_tasnet/x")
LAST = RUN / "checkpoints" / "last.ckpt"
CHANGED = ("data.val_mixtures", "data.loader.num_workers")
BASE = ["model=conv_tasnet", *(o for o in TINY if not o.startswith(CHANGED)), "data.loader.num_workers=1",
        "trainer.max_steps=4000", "trainer.max_epochs=-1", "trainer.accumulate_grad_batches=1",
        "trainer.val_check_interval=20", "trainer.check_val_every_n_epoch=null", "trainer.num_sanity_val_steps=0",
        "data.val_mixtures=1000", "data.eval_batch_size=1", "callbacks.progress.every_n_steps=1", "test=false",
        "callbacks.figures=null", "exp_manager.version=x"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
LAUNCH = {"single": [], "two": ["trainer.devices=2"], "torchrun": TORCHRUN}
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
GONE_S = 20.0  # after the first process: loader workers look for their parent every five seconds


@dataclass
class Launched:
    """A run in a session and process group of its own, and what it printed so far."""

    process: subprocess.Popen
    output: str = ""
    seen: dict[int, psutil.Process] = field(default_factory=dict)  # all processes that ever belonged to it

    def read(self) -> None:
        assert self.process.stdout is not None
        while chunk := self.process.stdout.read(65536):
            self.output += chunk.decode()
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self.seen |= {member.pid: member for member in family}

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"^epoch \d+  step (\d+)/", self.output, re.MULTILINE)]

    def ranks(self) -> list[psutil.Process]:
        """Processes that a launcher has started below the first one, by what they were told. Not loader workers, and
        no helper that is about to be executed: both look like the process they were forked from."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if "LOCAL_RANK" in child.environ():
                        found.append(child)
        return found

    def demand(self, held: bool, otherwise: str) -> None:
        """What does not hold ends the processes, too: the tests to come need the machine."""
        if not held:
            for member in self.alive():
                member.kill()
            raise AssertionError(f"{otherwise}:\n{self.output}")

    def wait_until(self, reached: "Callable[[Launched], bool]", limit_s: float = 120) -> None:
        until = time.monotonic() + limit_s
        while not reached(self):
            self.read()
            self.demand(self.process.poll() is None, "ended before the moment")
            self.demand(time.monotonic() < until, "the moment did not come")
            time.sleep(0.002)
        self.read()

    def tell(self, number: int, who: str) -> None:
        """*who*: the `main` process, its whole `group`, or `rank 1` alone."""
        if who == "rank 1":
            self.wait_until(rank_begins)  # it has no name at the moment at which its program is loaded
        with contextlib.suppress(ProcessLookupError):  # a second signal may find nobody
            if who == "group":
                os.killpg(self.process.pid, number)
            else:
                os.kill(self.ranks()[0].pid if who == "rank 1" else self.process.pid, number)

    def end(self, limit_s: float = 60) -> tuple[int, float, list[psutil.Process]]:
        """The exit code, the seconds until all was gone, and who is left."""
        began = time.monotonic()
        while self.process.poll() is None:
            self.read()
            self.demand(time.monotonic() - began < limit_s, "hangs")
            time.sleep(0.02)
        while (left := self.alive()) and time.monotonic() - began < limit_s + GONE_S:
            time.sleep(0.05)
        took_s = time.monotonic() - began
        self.read()
        return self.process.returncode, took_s, left

    def alive(self) -> list[psutil.Process]:
        members = list(self.seen.values()) + [p for p in psutil.process_iter() if _session(p) == self.process.pid]
        return [p for p in members if p.is_running() and _status(p) != psutil.STATUS_ZOMBIE]


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def _status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def start(kind: str, manifests: list[str], *more: str, script: str = "train.py", **environment: str) -> Launched:
    first = [word for word in LAUNCH[kind] if kind == "torchrun"]
    then = [word for word in LAUNCH[kind] if kind != "torchrun"]
    arguments = [*BASE, *manifests] if script == "train.py" else []
    process = subprocess.Popen(
        [sys.executable, *first, str(ROOT / script), *arguments, *then, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return Launched(process)


# Moments


def _loads(pid: int, library: str) -> bool:
    try:
        return library in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def imports(run: Launched) -> bool:
    """The first process is loading torch."""
    return _loads(run.process.pid, "libtorch_cpu")


def builds(run: Launched) -> bool:
    return "run directory:" in run.output


def rank_begins(run: Launched) -> bool:
    """The second process exists: the interpreter starts, or Hydra is imported; the first one waits for it in C++."""
    return bool(run.ranks())


def rank_imports(run: Launched) -> bool:
    return any(_loads(rank.pid, "libtorch_cpu") for rank in run.ranks())


def trains(run: Launched) -> bool:
    return len(run.steps) >= 5


def validates(run: Launched) -> bool:
    return 20 in run.steps and time.sleep(0.4) is None  # the line was printed just before it


# Cells: launch, who is told, what, when

STARTING = (imports, builds, rank_begins, rank_imports)
TWICE = "SIGINT twice"
CELLS = [
    *[("single", "main", number, imports) for number in (TERM, USR1, INT)],
    ("single", "main", TERM, builds),
    *[("single", "main", number, trains) for number in (TERM, USR1, INT, TWICE)],
    *[("single", "main", number, validates) for number in (TERM, USR1, INT, TWICE)],
    ("two", "main", TERM, rank_begins),
    ("two", "main", INT, rank_imports),
    *[("two", "main", number, trains) for number in (TERM, USR1, INT, TWICE)],
    *[("two", "main", number, validates) for number in (TERM, TWICE)],
    *[("two", "group", number, rank_begins) for number in (INT, USR1)],
    *[("two", "group", number, rank_imports) for number in (TERM, TWICE)],
    *[("two", "group", number, trains) for number in (TERM, USR1, INT, TWICE)],
    *[("two", "group", number, validates) for number in (TERM, INT)],
    *[("two", "rank 1", TERM, moment) for moment in (rank_begins, rank_imports, trains)],
    ("torchrun", "main", TERM, rank_imports),
    *[("torchrun", "main", number, trains) for number in (TERM, INT)],
    *[("torchrun", "group", number, trains) for number in (USR1, TWICE)],
    ("torchrun", "group", TERM, validates),
]


def cell_name(cell: tuple) -> str:
    launch, who, what, moment = cell
    return f"{launch}, {who}, {what if what == TWICE else what.name}, {moment.__name__}"


def expected_code(launch: str, number: int) -> int:
    if launch == "torchrun":  # which knows nothing of SIGUSR1 itself; its processes hear of its end
        return -USR1 if number == USR1 else 1
    return 128 + number


@pytest.mark.parametrize("cell", CELLS, ids=cell_name)
def test_told(cell: tuple, manifests: list[str], in_tmp: Path, record_property: Any) -> None:
    launch, who, what, moment = cell
    number = INT if what == TWICE else what
    run = start(launch, manifests)
    run.wait_until(moment)
    run.tell(number, who)
    if what == TWICE:
        time.sleep(1.2)  # within a second it would be taken for the same
        run.tell(number, who)
    code, took_s, left = run.end()
    step = read_checkpoint(LAST)["global_step"] if LAST.exists() else None
    record_property("cell", f"{cell_name(cell):<44} {code:>4} {step or '-':>5} {len(left):>5} {took_s:>13.1f}")
    assert code == expected_code(launch, number), run.output
    assert not left, f"left behind: {left}\n{run.output}"
    assert not list(Path.cwd().rglob("*.tmp"))
    lines = run.output.splitlines()
    ours = run.output if launch != "torchrun" else "\n".join(line for line in lines if "train.py" in line)
    assert "Traceback" not in ours and ", line " not in ours and "Error" not in ours, run.output
    if moment in STARTING:
        assert step is None
        assert sum(line.endswith(": stopped") for line in lines) == 1, run.output
    else:
        assert step == run.steps[-1], run.output
        assert run.output.count(f"saved checkpoints/last.ckpt at step {step}\n") == 1, run.output
        assert moment is trains or step == 20, run.output


@pytest.mark.parametrize("who", ["main", "rank 1"])
@pytest.mark.parametrize("moment", [rank_imports, trains, validates], ids=lambda moment: moment.__name__)
def test_killed(moment: Callable, who: str, manifests: list[str], in_tmp: Path, record_property: Any) -> None:
    """As the system does when memory runs out: the others end too."""
    run = start("two", manifests)
    run.wait_until(moment)
    run.tell(signal.SIGKILL, who)
    code, took_s, left = run.end()
    name = f"two, {who}, SIGKILL, {moment.__name__}"
    record_property("cell", f"{name:<44} {code:>4} {'-':>5} {len(left):>5} {took_s:>13.1f}")
    assert not left, f"left behind: {left}\n{run.output}"
    assert "Traceback" not in run.output
    if who == "main":
        assert code == -signal.SIGKILL
    else:
        last = run.output.strip().splitlines()[-1]
        assert code == 1 and last.startswith("failed: rank 1 was killed (SIGKILL") and "resume_if_exists" in last


FAILING = """
import time
import pytorch_lightning as pl
from data.errors import DataError

class Failing(pl.Callback):
    def __init__(self, *, rank: int, how: str) -> None:
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 5 and trainer.global_rank == self.rank:
            if self.how == "hangs":
                time.sleep(600)
            raise DataError("x.wav: is empty") if self.how == "mistake" else RuntimeError("the cause")
"""


def start_failing(rank: int, how: str, manifests: list[str]) -> Launched:
    Path("failing.py").write_text(FAILING)
    callback = f"+callbacks.failing={{_target_:failing.Failing,rank:{rank},how:{how}}}"
    return start("two", manifests, "packages=[failing]", callback, PYTHONPATH=str(Path.cwd()))


@pytest.mark.parametrize(
    ("rank", "how", "code", "last"),
    [
        (1, "mistake", 2, "error: x.wav: is empty"),
        (1, "error", 1, "failed: RuntimeError: the cause"),
        (0, "error", 1, "failed: RuntimeError: the cause"),
    ],
)
def test_one_rank_fails(rank: int, how: str, code: int, last: str, manifests: list[str], in_tmp: Path) -> None:
    """Its message is the last line, not that of the other one, which lost its connection."""
    run = start_failing(rank, how, manifests)
    run.wait_until(lambda run: run.process.poll() is not None or run.steps[-1:] == [5])
    ended, _, left = run.end()
    assert ended == code and not left, run.output
    assert run.output.strip().splitlines()[-1] == last
    assert "gloo" not in run.output.partition("Starting with 2 processes")[2]


def test_twice_where_one_rank_hangs(manifests: list[str], in_tmp: Path) -> None:
    """The first process waits for the other one in C++, where no handler is called."""
    run = start_failing(1, "hangs", manifests)
    run.wait_until(lambda run: run.steps[-1:] == [5])
    run.tell(INT, "main")
    time.sleep(1.5)
    assert run.process.poll() is None
    run.tell(INT, "main")
    code, _, left = run.end(limit_s=30)
    assert code == 130 and not left, run.output


def test_told_in_the_test(manifests: list[str], in_tmp: Path) -> None:
    """Training is over and saved; what is left is ended at once."""
    run = start("two", manifests, "trainer.max_steps=6", "trainer.limit_val_batches=2", "data.test_mixtures=4000",
                "test=true", "data.loader.num_workers=0")  # fmt: skip
    run.wait_until(lambda _: (RUN / "summary.json").exists())
    time.sleep(1)
    run.tell(TERM, "main")
    code, _, left = run.end()
    assert code == 143 and not left, run.output
    assert "Traceback" not in run.output and run.output.strip().splitlines()[-1] == "SIGTERM: stopped"
    assert read_checkpoint(LAST)["global_step"] == 6


def test_told_in_evaluation(trained: Path, in_tmp: Path) -> None:
    run = start("single", [], f"ckpt_path={trained}", "data.test_mixtures=20000", "data.loader.num_workers=1",
                "output=scores.json", script="evaluate.py")  # fmt: skip
    run.wait_until(lambda run: bool(run.seen))
    time.sleep(1)
    run.tell(TERM, "main")
    code, _, left = run.end()
    assert code == 143 and not left, run.output
    assert "Traceback" not in run.output and not list(Path.cwd().iterdir())


def test_told_in_prediction(trained: Path, corpus: Path, in_tmp: Path) -> None:
    Path("mixtures").mkdir()
    for number in range(500):
        shutil.copy(corpus / "speech" / "talker0" / "0.wav", f"mixtures/{number}.wav")
    run = start("single", [], f"ckpt_path={trained}", "input=mixtures", "output=separated", script="predict.py")
    run.wait_until(lambda _: any(Path("separated").glob("*.wav")))
    run.tell(INT, "main")
    code, _, left = run.end()
    assert code == 130 and not left, run.output
    assert "Traceback" not in run.output
    written = list(Path("separated").iterdir())
    assert 0 < len(written) < 1000 and {file.suffix for file in written} == {".wav"}
    assert len({file.stat().st_size for file in written}) == 1, "none is half written"
