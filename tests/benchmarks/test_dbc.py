"""The comparison of factorisations works at small sizes, and says what it is meant to say."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import dbc


def test_table_of_small_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "dbc.json"
    assert dbc.main(["--sizes", "64x64", "2x60x40", "--repeats", "1", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["table"]
    assert [row["size"] for row in rows] == 6 * ["64x64"] + 6 * ["2x60x40"]
    errors = {row["name"]: row["error_over_best"] for row in rows[:6]}
    assert errors["full SVD"] == pytest.approx(1, abs=1e-4)
    for name in ("torch.svd_lowrank", "ours, rsvd", "ours, warm"):
        assert 0.9999 < errors[name] < 1.05, name
    assert errors["guide, first"] > 2 and errors["guide, second"] > 2
    printed = capsys.readouterr().out
    assert "| size | full SVD | torch.svd_lowrank | ours, rsvd |" in printed and "| 2x60x40 |" in printed


def test_times_are_told_against_the_full_svd() -> None:
    rows = [
        {"size": "8x8", "name": "full SVD", "ms": 4.0, "speed_up": 1.0, "error_over_best": 1.0},
        {"size": "8x8", "name": "ours", "ms": 0.5, "speed_up": 8.0, "error_over_best": 1.02},
    ]
    assert dbc.markdown(rows).splitlines()[-1] == "| 8x8 | 4 ms, 1.000 | 8.0x, 1.020 |"
    step = [{"name": "warm", "hook_s": 0.02, "step_s": 0.18, "share": 0.1, "every": 3}]
    assert dbc.step_markdown(step, 0.05).splitlines()[-1] == "| warm | 20 | 10.0% | 3 |"


def test_the_hook_is_timed_within_a_step() -> None:
    small = {"d_model": 64, "n_heads": 2, "n_layers": 1, "subsampling_conv_channels": 4}
    batch = {name: 0.1 * torch.randn(1, 16000) for name in ("audio", "noisy")}
    batch |= {name: torch.tensor([16000]) for name in ("length", "noisy_length")} | {"mask_seed": torch.tensor([1])}
    rows = dbc.measure_step(dbc.NEST(encoder=small, num_classes=16), batch, 1, 0.05)
    assert [row["name"] for row in rows] == list(dbc.VARIANTS)
    for row in rows:
        assert row["share"] == pytest.approx(row["hook_s"] / (row["hook_s"] + row["step_s"])) and row["every"] >= 1
