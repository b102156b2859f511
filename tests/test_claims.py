"""docs/CLAIMS.md: every claim of the guides has a row, and no row a figure without a command that can be run."""

import importlib.util
import re
import shlex
from typing import NamedTuple

import pytest

from tests.pages import ROOT

PAGE = (ROOT / "docs" / "CLAIMS.md").read_text()
NOT_MEASURED = "not measured"
# What the guides promise, in words of their rows.
CLAIMS = """
workers; pinned memory, persistent workers, prefetching; STFT cached; STFT on the GPU; mixed precision;
accumulation; compile; two GPUs; validation every 5 epochs; cudnn.benchmark; TensorRT; in all; stability; SVD;
first optimisation; second optimisation; scheme 1; scheme 2; scheme 3; scheme 4; larger batch; fused AdamW;
8-bit Adam; host syncs; data on the GPU; gradient checkpointing; memory manager; adaptive batch; loader
settings; batched predictor; quantisation; architecture; dynamic mixing; AISHELL-3; real-time; 100 % aligned
"""


class Row(NamedTuple):
    claim: str
    promised: str
    measured: str
    command: str


ROWS = [
    Row(*(cell.strip() for cell in line.strip("|").split("|")))
    for line in PAGE.splitlines()
    if line.startswith("| ") and line.count("|") == 5 and not line.startswith(("| claim", "|---"))
]


@pytest.mark.parametrize("claim", [" ".join(claim.split()) for claim in CLAIMS.split(";")])
def test_every_claim_has_a_row(claim: str) -> None:
    assert [row for row in ROWS if claim in row.claim]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.claim)
def test_no_figure_without_a_command(row: Row) -> None:
    """And where nothing was measured, what it would take."""
    assert row.measured and row.command
    if row.measured == NOT_MEASURED:
        assert not row.command.startswith("`python -m benchmarks") or "GPU" in row.command
        return
    commands = re.findall(r"`([^`]+)`", row.command)
    assert commands, "a figure needs its command"
    for command in commands:
        words = shlex.split(command)
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, command
        elif words[0] == "pytest":
            files = [word.partition("::")[0] for word in words if word.startswith("tests/")]
            assert files and all((ROOT / file).exists() for file in files), command
        elif words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        else:
            assert words[0] == "python" and (ROOT / words[1]).is_file(), command
