"""Dense against progressive low rank: what is made of validation curves, and what a results file spares."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contest, low_rank
from benchmarks.contest import (
    Contest,
    Point,
    add_result,
    curve,
    load_protocol,
    points_of,
    read_results,
    running_best,
    talkers,
)
from benchmarks.low_rank import DENSE, SMALL, compare, equal_width, over_seeds, step_cpu_s, time_to, value_at, verdict
from data.manifest import read_manifest, write_manifest
from models.conv_tasnet import ConvTasNet
from tests.conftest import TINY

LINE = [Point(10, 20.0, 1.0), Point(20, 30.0, 3.0), Point(30, 40.0, 2.0), Point(40, 50.0, 4.0)]


def row(points: list[Point], **facts: Any) -> dict[str, Any]:
    return (
        {"parameters": 100, "flops": 1e9, "steps": points[-1].step, "switches": [], "step_cpu_s": 1.0}
        | facts
        | {"curve": [list(point) for point in points]}
    )


def faster(points: list[Point], factor: float, gain: float = 0.0) -> list[Point]:
    return [Point(step, cpu_s / factor, value + gain) for step, cpu_s, value in points]


def test_times_and_values_lie_on_straight_lines_between_bests() -> None:
    assert [point.value for point in running_best(LINE)] == [1, 3, 3, 4]
    assert [point.value for point in running_best([Point(1, 1.0, math.nan), LINE[0]])] == [-math.inf, 1]
    assert time_to(LINE, 2.0) == 25.0 and time_to(LINE, 3.5) == 45.0 and time_to(LINE, 4.0) == 50.0
    assert time_to(LINE, 0.5) == 20.0 and time_to(LINE, 4.1) is None
    assert value_at(LINE, 25.0) == 2.0 and value_at(LINE, 35.0) == 3.0 and value_at(LINE, 60.0) == 4.0
    assert math.isnan(value_at(LINE, 10.0))
    assert [str(point.value) for point in points_of({"curve": [[10, 20.0, None], [20, 30.0, 1.5]]})] == ["nan", "1.5"]
    assert time_to([Point(1, 5.0, math.nan), *LINE], 1.0) == 20.0, "no line from what is not finite"
    for target in (1.2, 2.9, 3.3):
        found = time_to(LINE, target)
        assert found is not None and value_at(LINE, found) == pytest.approx(target), "one is the other's inverse"


def test_a_step_costs_what_the_second_half_took() -> None:
    assert step_cpu_s([Point(10, 90.0, 0.0), Point(20, 100.0, 0.0), Point(30, 104.0, 0.0)]) == pytest.approx(14 / 20)
    assert step_cpu_s([Point(n, 0.5 * n, 0.0) for n in (10, 20, 30, 40, 41)]) == pytest.approx(0.5)
    assert math.isnan(step_cpu_s(LINE[:1]))


def test_twice_as_fast_is_a_speed_up_of_two() -> None:
    found = compare(row(LINE), row(faster(LINE, 2.0)), within=1.0)
    sure = {"target": 4.0, "reached": True, "reached_near": True}
    assert found == sure | {"speedup": 2.0, "speedup_near": 2.0, "gain": pytest.approx(2.0)}  # at 25 CPU-s: 4 - 2
    assert compare(row(LINE), row(LINE), within=0.5) == sure | {"speedup": 1.0, "speedup_near": 1.0, "gain": 0.0}
    worse = compare(row(LINE), row(faster(LINE, 1.25, gain=-1.0)), within=2.0)
    assert not worse["reached"] and worse["speedup"] == 50 / 40, "at most: what a hit at its very end would give"
    # Dense has 4 - 2 after 30 s, and the other one, which has 2 + 1 of its own, after 40 / 1.25.
    assert worse["reached_near"] and worse["speedup_near"] == pytest.approx(
        time_to(LINE, 2.0) / time_to(LINE, 3.0) * 1.25
    )


def test_statistics_over_seeds_table_and_goal() -> None:
    goals = {"speedup": 1.3, "within": 0.1}
    seeds = {
        seed: {DENSE: row(LINE), "fast": row(faster(LINE, factor), switches=[{"step": 7}]), "never": row(LINE[:2])}
        for seed, factor in ((1, 1.4), (2, 1.6))
    }
    found = over_seeds(seeds, within=0.1)
    assert found["fast"]["speedup"] == (pytest.approx(1.5), pytest.approx(0.1))
    assert found["fast"]["switched_at"] == [7, 7] and found[DENSE]["gain"] == (0, 0)
    text = low_rank.table(found, "val_si_sdri", within=0.1)
    fast, never = (next(line for line in text.splitlines() if line.startswith(f"| {n} |")) for n in ("fast", "never"))
    assert fast.count("1.50 ± 0.10 | 1.40 to 1.60") == 2 and "| < 1.67 ± 0.00 |" in never
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert verdict("fast", found["fast"], goals).endswith("reached")
    assert verdict("never", found["never"], goals).endswith("missed"), "its speed-up is only a bound"
    assert verdict(DENSE, found[DENSE], goals).endswith("missed")
    slower = found["fast"] | {"gain": (-0.2, 0.0)}
    assert verdict("fast", slower, goals).endswith("missed")


def test_a_network_as_small_as_the_switched_one() -> None:
    arguments = {"num_filters": 64, "bottleneck_channels": 32, "hidden_channels": 64, "num_blocks": 2, "num_repeats": 1}

    def parameters(hidden: int) -> int:
        network = ConvTasNet(**{**arguments, "hidden_channels": hidden})
        return sum(parameter.numel() for parameter in network.parameters())

    for wanted in (parameters(20), parameters(21) - 1):
        assert equal_width(arguments, wanted) == 20
    assert equal_width(arguments, parameters(64)) == 64 and equal_width(arguments, 0) == 1


def test_a_results_file_is_whole_and_spares_trainings(
    corpus: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[list[str]] = []

    def fake(typed: list[str]) -> Path:
        trained.append(typed)
        return in_tmp

    monkeypatch.setattr(contest, "train", fake)
    protocol = load_protocol("low_rank")

    def result(name: str, seed: int, **changes: Any) -> dict[str, Any]:
        made = Contest(protocol | changes, data=corpus, work=in_tmp / "w", measure=lambda run: {"value": math.nan})
        return made.result(name, seed, protocol["contestants"][name])

    first = result(DENSE, 1)
    assert result(DENSE, 1)["key"] == first["key"] and len(trained) == 1
    result(DENSE, 2)
    result("progressive auto", 1)
    result(DENSE, 1, cpu_minutes=2)
    assert len(trained) == 4 and len(read_results(in_tmp / "w" / "results.jsonl")) == 4
    assert all(json.loads(line) for line in (in_tmp / "w" / "results.jsonl").read_text().splitlines())
    names = {next(text for text in typed if text.startswith("exp_manager.name=")) for typed in trained}
    assert len(names) == 4, "no two share a checkpoint to go on from"
    assert "seed=2" in trained[1] and "callbacks.budget.cpu_minutes=2" in trained[3]
    assert (
        "callbacks=[default,ema,low_rank]" in trained[2]
        and f"data.train_manifest={corpus / 'train.jsonl'}" in trained[2]
    )
    add_result(in_tmp / "new" / "r.jsonl", {"a": math.inf})
    assert read_results(in_tmp / "new" / "r.jsonl") == [{"a": None}] and read_results(in_tmp / "none") == []


def test_talkers_of_the_test_are_not_heard(in_tmp: Path) -> None:
    protocol = load_protocol("low_rank")
    spared = load_protocol("conv_tasnet")["test_speakers"]
    names = [*spared[:3], *(f"x{n}" for n in range(30))]
    rows = [{"audio_filepath": f"{name}.wav", "duration": 1.0, "speaker": name} for name in names]
    write_manifest(in_tmp / "manifest_speech.jsonl", rows)
    train, val, _ = talkers(protocol, in_tmp, in_tmp / "w")
    heard = [[entry["speaker"] for entry in read_manifest(file)] for file in (train, val)]
    assert heard == [names[3:13], names[13:]] and len(heard[1]) == protocol["num_val_speakers"]
    write_manifest(in_tmp / "manifest_speech.jsonl", rows[:20])
    with pytest.raises(SystemExit, match=r"17 talkers are too few, 17 of them validate"):
        talkers(protocol, in_tmp, in_tmp / "w")
    with pytest.raises(SystemExit, match="nowhere/manifest_speech.jsonl: no such manifest; --data names"):
        talkers(protocol, Path("nowhere"), in_tmp / "w")


def test_the_curve_of_a_run(in_tmp: Path) -> None:
    (in_tmp / "metrics.csv").write_text(
        "epoch,step,train_loss,m,cpu_s\n0,4,1.5,,\n0,9,1.0,-3.5,12.5\n0,19,nan,2.0,15\n"
    )
    assert curve(in_tmp, "m") == [(10, 12.5, -3.5), (20, 15.0, 2.0)]
    assert len(contest.logged(in_tmp, "train_loss")) == 3
    with pytest.raises(SystemExit, match=r"metrics.csv: no validation with cpu_s and other"):
        curve(in_tmp, "other")


def test_protocol_is_frozen() -> None:
    protocol = load_protocol("low_rank")
    assert (protocol["seeds"], protocol["cpu_minutes"]) == ([1, 2, 3], 4) and protocol["metric"] == "val_si_sdri"
    assert protocol["goals"] == {"speedup": 1.3, "within": 0.1} and protocol["small_like"] in protocol["contestants"]
    assert next(iter(protocol["contestants"])) == DENSE and SMALL not in protocol["contestants"]


def test_a_size_adds_to_the_recipe(corpus: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {}

    def one_seed(made: Contest, seed: int) -> dict[str, Any]:
        recipes[seed] = made.protocol["recipe"]
        return {DENSE: row(LINE)}

    monkeypatch.setattr(low_rank, "run_seed", one_seed)
    for seed, size in ((1, "medium"), (2, "wide")):
        assert low_rank.main(["--data", str(corpus), "--work", "w", "--seeds", str(seed), "--size", size]) == 0
    protocol = load_protocol("low_rank")
    assert recipes[1] == protocol["recipe"] and recipes[2] == protocol["recipe"] + protocol["sizes"]["wide"]
    assert protocol["sizes"]["medium"] == [] and protocol["sizes"]["wide"]


@pytest.mark.slow
def test_a_small_run_of_all_contestants(corpus: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, reported, and not trained again."""
    switch = ["callbacks=[default,low_rank]", "callbacks.low_rank.rank_by=ratio", "callbacks.low_rank.min_speedup=0"]
    switch += ["callbacks.low_rank.min_energy=0"]
    auto = ["callbacks.low_rank.watch_every_n_steps=2", "callbacks.low_rank.window=2", "callbacks.low_rank.slope=9"]
    protocol = load_protocol("low_rank") | {
        "sizes": {"medium": []},
        "recipe": ["model=conv_tasnet", *TINY, "trainer.max_steps=10", "trainer.val_check_interval=2"]
        + ["trainer.accumulate_grad_batches=1"],
        "contestants": {
            DENSE: [],
            "progressive auto": [*switch, *auto],
            "progressive fixed": [*switch, "callbacks.low_rank.switch_step=4"],
        },
    }
    monkeypatch.setattr(low_rank, "load_protocol", lambda name: protocol)
    typed = ["--data", str(corpus), "--work", str(in_tmp / "w"), "--seeds", "1"]
    assert low_rank.main(typed) == 0
    file = in_tmp / "w" / "result.json"
    result = json.loads(file.read_text())
    found, seed = result["contestants"], result["seeds"]["1"]
    assert list(found) == [DENSE, "progressive auto", "progressive fixed", SMALL]
    assert found["progressive auto"]["switched_at"] == [2] and found["progressive fixed"]["switched_at"] == [4]
    assert found["progressive fixed"]["parameters"] < found[DENSE]["parameters"]
    assert found["progressive fixed"]["flops"] < found[DENSE]["flops"]
    assert found[SMALL]["parameters"] <= found["progressive auto"]["parameters"]
    assert seed[DENSE]["curve"][0] == pytest.approx([2, seed[DENSE]["curve"][0][1], seed[DENSE]["curve"][0][2]])
    assert seed["progressive fixed"]["curve"][0][2] == seed[DENSE]["curve"][0][2], "the same until the switch"
    assert len(result["verdicts"]) == 2
    monkeypatch.setattr(contest, "train", None)
    assert low_rank.main(typed) == 0 and json.loads(file.read_text())["seeds"] == result["seeds"]
