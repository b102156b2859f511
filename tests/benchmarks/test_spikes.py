"""DBC against clipping on a training that spikes: what is counted, and what is said of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contest, spikes
from benchmarks.contest import load_protocol
from benchmarks.spikes import NEITHER, count_spikes, measured, over_seeds, table, verdict
from tests.conftest import TINY


def test_a_spike_stands_above_the_steps_before_it() -> None:
    calm = [float(n % 3) for n in range(20)]
    assert count_spikes(calm, window=5, margin=3.0) == 0
    assert count_spikes([*calm, 50.0, *calm], window=5, margin=3.0) == 1
    assert count_spikes([*calm, math.nan, math.inf, *calm], window=5, margin=3.0) == 2, "not finite: a spike each"
    assert count_spikes([math.nan] * 10, window=5, margin=3.0) == 5
    assert count_spikes([50.0, *calm], window=5, margin=3.0) == 0, "the first are not judged"
    assert count_spikes([*calm, *[50.0] * 20], window=5, margin=3.0) == 3, "a new level is none for long"
    shifted = [loss - 100 for loss in [*calm, 50.0, *calm]]
    assert count_spikes(shifted, window=5, margin=3.0) == 1, "decibels have no zero"


def test_what_is_kept_of_a_run(in_tmp: Path) -> None:
    protocol = {"window": 2, "margin": 3.0, "metric": "m", "diverged": -30.0}
    (in_tmp / "summary.json").write_text(json.dumps({"steps": 6, "cpu_s": 4.0, "wall_s": 5.0, "dbc": {"every": 2}}))
    lines = ["0,0,1,,", "0,1,1,,", "0,2,9,1.5,3.0", "0,3,1,,", "0,4,1,,"]
    file = in_tmp / "metrics.csv"
    file.write_text("\n".join(["epoch,step,train_loss,m,cpu_s", *lines, "0,5,nan,2.5,4.0", ""]))
    row = measured(in_tmp, protocol)
    assert (row["spikes"], row["spikes_per_100"], row["metric"]) == (2, 50.0, 2.5)
    assert row["dbc"] == {"every": 2} and row["steps"] == 6
    file.write_text("\n".join(["epoch,step,train_loss,m,cpu_s", *lines, "0,5,nan,nan,4.0", ""]))
    assert measured(in_tmp, protocol)["metric"] == -30.0


def test_differences_are_paired_and_help_needs_two_errors() -> None:
    def row(spikes_per_100: float, metric: float) -> dict[str, Any]:
        return {"spikes_per_100": spikes_per_100, "metric": metric, "cpu_s": 10.0}

    seeds = {
        seed: {
            NEITHER: row(20.0 + seed, 1.0),
            "dbc": row(10.0 + seed + seed % 2, 1.0),
            "worse": row(seed, -2.0 + seed % 2),
            "same": row(20.0 + 2 * seed, 1.0 + seed % 2),
        }
        for seed in (1, 2, 3, 4)
    }
    found = over_seeds(seeds, NEITHER)
    assert found["dbc"]["spikes_per_100_minus"] == (pytest.approx(-9.5), pytest.approx((1 / 3 / 4) ** 0.5))
    assert found[NEITHER]["metric_minus"] == (0, 0)
    ends = {name: verdict(found, name, NEITHER, 2.0).rsplit(": ", 1)[1] for name in found}
    assert ends == {NEITHER: "does not help", "dbc": "helps", "worse": "does not help", "same": "does not help"}
    text = table(found, "val_si_sdri", NEITHER)
    assert "| dbc | 13.000 ± " in text and "| -9.500 ± 0.289 |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_protocol_is_frozen() -> None:
    protocol = load_protocol("spikes")
    assert protocol["seeds"] == [1, 2, 3, 4, 5] and protocol["cpu_minutes"] == 2
    assert (protocol["window"], protocol["margin"], protocol["errors"]) == (30, 0.5, 2.0)
    assert list(protocol["contestants"]) == [NEITHER, "clipping", "dbc", "dbc and clipping"]
    assert protocol["rival"] in protocol["contestants"]


@pytest.mark.slow
def test_a_small_run_of_all_contestants(corpus: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, reported, and not trained again."""
    recipe = ["model=conv_tasnet", *TINY, "trainer.max_steps=8", "trainer.log_every_n_steps=1"]
    recipe += ["trainer.val_check_interval=4", "trainer.accumulate_grad_batches=1"]
    keys = ["data.train_manifest", "data.val_manifest"]
    protocol = load_protocol("spikes") | {"recipe": recipe, "manifest_keys": keys, "metric": "val_si_sdri", "window": 3}
    monkeypatch.setattr(spikes, "load_protocol", lambda name: protocol)
    typed = ["--data", str(corpus), "--work", str(in_tmp / "w"), "--seeds", "1"]
    assert spikes.main(typed) == 0
    file = in_tmp / "w" / "result.json"
    rows = json.loads(file.read_text())["seeds"]["1"]
    assert list(rows) == list(protocol["contestants"])
    assert all(row["steps"] == len(row["losses"]) == 8 and len(row["curve"]) == 2 for row in rows.values())
    assert rows["dbc"]["dbc"]["method"] == "warm" and rows[NEITHER]["dbc"] is None
    assert rows[NEITHER]["losses"][0] == rows["dbc"]["losses"][0], "the same start"
    monkeypatch.setattr(contest, "train", None)
    assert spikes.main(typed) == 0 and json.loads(file.read_text())["seeds"]["1"] == rows
