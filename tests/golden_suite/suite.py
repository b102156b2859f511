"""The runner of golden cases: reference tensors of public implementations that ours must reproduce.

A golden folder holds one subfolder per system. `tests/golden_suite/<system>.py` has one function, `discover(folder)`,
which looks at file names only (a damaged file then fails its case, not the collection) and returns the cases. A file
that no case claims is a failure: a reference that nobody compares with proves nothing.
"""

import importlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ROOT = Path(__file__).parents[2]
SYSTEMS = ("deepvqe", "conv_tasnet", "nest", "unet")


class GoldenError(AssertionError):
    """A golden file that cannot be compared with; the message names the file."""


class Check:
    """Compares values, and remembers what was off and which came closest to its tolerance."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[str] = []
        self.worst: tuple[float, float, str] = (0.0, 1.0, "")  # error, tolerance, what

    def close(self, what: str, actual: Any, expected: Any, *, tolerance: float, relative: bool = False) -> None:
        """The largest difference of all elements; *relative*: of the largest expected magnitude."""
        actual, expected = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (actual, expected))
        self.count += 1
        if actual.shape != expected.shape:
            self.failures.append(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
            return
        error = (actual - expected).abs().max().item() if expected.numel() else 0.0
        if relative:
            error /= max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
        error = math.inf if math.isnan(error) else error
        if error / tolerance >= self.worst[0] / self.worst[1]:
            self.worst = (error, tolerance, what)
        if error > tolerance:
            self.failures.append(f"{what}: error {error:.1e} is above the tolerance {tolerance:.0e}")

    def equal(self, what: str, actual: Any, expected: Any) -> None:
        self.count += 1
        if actual != expected:
            self.failures.append(f"{what}: {actual}, expected {expected}")


@dataclass(frozen=True)
class Case:
    """One test. *file*: under which the summary counts it; *claims*: files of the system's subfolder that it reads."""

    id: str
    file: str = ""
    claims: tuple[str, ...] = ()
    run: Callable[[Check], None] | None = None
    skip: str | None = None  # why there is nothing to run


def collect(golden_dir: Path, only: str | None = None) -> list[Case]:
    """The cases of every system, or of `only` one."""
    present = {path.name for path in golden_dir.iterdir() if path.is_dir() and path.name[0] not in "._"}
    names = [only] if only else [*SYSTEMS, *sorted(present - set(SYSTEMS))]
    return [case for name in names for case in _cases_of(name, golden_dir / name)]


def _cases_of(system: str, folder: Path) -> list[Case]:
    if not (ROOT / "models" / f"{system}.py").is_file():
        if system not in SYSTEMS:
            message = f"{system}: there is neither models/{system}.py nor such a system"
            return [Case(f"{system}-unknown", system, run=partial(_fail, message))]
        return [Case(f"{system}-pending", skip=f"{system}: pending, models/{system}.py does not exist yet")]
    if not folder.is_dir():
        return [Case(f"{system}-absent", skip=f"{system}: no folder {folder}")]
    cases = []
    if (Path(__file__).parent / f"{system}.py").is_file():
        cases = importlib.import_module(f"tests.golden_suite.{system}").discover(folder)
    cases = [Case(f"{system}-{c.id}", f"{system}/{c.file}", c.claims, c.run, c.skip) for c in cases]
    return [*cases, Case(f"{system}-files", system, run=partial(_check_claims, folder, cases))]


def _check_claims(folder: Path, cases: list[Case], check: Check) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    claimed = {file for case in cases for file in case.claims}
    if not cases:
        raise GoldenError(f"{folder}: no case in this folder")
    unclaimed = sorted(file for file in files - claimed if Path(file).name != "README.md")
    check.equal(f"{folder}: files that no case claims", unclaimed, [])


def _fail(message: str, check: Check) -> None:
    raise GoldenError(message)


def run(case: Case) -> Check:
    """Runs a case; what keeps it from comparing becomes a failure of it."""
    check = Check()
    try:
        assert case.run is not None, f"{case.id} has nothing to run"
        case.run(check)
    except GoldenError as error:
        check.failures.append(str(error))
    if not check.count and not check.failures:
        check.failures.append(f"{case.file}: nothing was compared")
    return check


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise GoldenError(f"{path}: cannot be read ({error})") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GoldenError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: cannot be read ({error})") from error


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start so, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def summary(rows: Iterable[tuple[str, int, float, float, str]]) -> list[str]:
    """Lines with, per file, its cases and the error that came closest to its tolerance.

    *rows*: one per case that ran: file, number of comparisons, error, tolerance, what.
    """
    by_file: dict[str, list[tuple[str, int, float, float, str]]] = {}
    for row in rows:
        by_file.setdefault(row[0], []).append(row)
    lines = []
    for file, of_file in sorted(by_file.items()):
        _, _, error, tolerance, what = max(of_file, key=lambda row: row[2] / row[3])
        worst = f", largest error {error:.1e} of {tolerance:.0e} ({what})" if what else ""
        count = sum(row[1] for row in of_file)
        lines.append(f"golden {file}: {len(of_file)} cases, {count} comparisons{worst}")
    return lines
