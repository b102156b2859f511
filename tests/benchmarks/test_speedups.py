"""benchmarks.speedups: its rows can be typed, its ratios and its choice are right, and it runs."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from benchmarks import speedups
from benchmarks.naive_systems import NaiveConvTasNet, NaiveDeepVQE, NaiveUNet
from benchmarks.speedup_report import markdown, write_trainer
from benchmarks.speedup_rows import ALL, FIRST, PLAIN, SYSTEMS, Row, base, rows_of
from benchmarks.speedups import Measured, combination, compare_losses, epoch_of, measured, summarise
from launch.command_line import keys
from models.conv_tasnet import ConvTasNet
from models.deepvqe import DeepVQE
from models.unet import UNet
from tests.conftest import TINY

RUN = Measured(examples_per_s=4.0, step_s=0.5, data_wait=0.1, peak_mb=100.0, losses=[1.0] * 4, validation_s=0.2)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_row_can_be_typed(system: str) -> None:
    """Without `+`, also those of a GPU; and each promised speed-up has a row, or a reason why it has none."""
    rows = rows_of(system, Path("copies.jsonl"))
    with initialize_config_dir(version_base="1.3", config_dir=str(speedups.ROOT / "config")):
        have = set(keys(compose("train", [f"experiment={system}_demo", "callbacks=[default,low_rank,dbc]"])))
    typed = {text for row in rows for text in (*base(system, [], row, 3), *row.overrides)}
    assert {text.partition("=")[0] for text in typed} <= have
    names = {row.name for row in rows}
    assert {FIRST, PLAIN, "workers", "bf16", "compile", "fused optimiser", "gradient checkpointing", "DBC"} <= names
    assert {"low rank from the start", "STFT cache", "channels_last", "validation every 5th epoch"} <= names
    assert {"pinned memory", "STFT on the device", "fp16", "8-bit Adam", "data kept on the device"} <= names
    assert {"compile, reduce-overhead", "compile, max-autotune", "fewer host syncs"} <= names


@pytest.mark.parametrize(
    ("naive", "ours", "arguments"),
    [
        (NaiveConvTasNet, ConvTasNet, {"num_filters": 8, "hidden_channels": 8, "num_blocks": 2, "num_repeats": 1}),
        (NaiveUNet, UNet, {"base_channels": 4, "depth": 3, "up": "transposed"}),
        (
            NaiveDeepVQE,
            DeepVQE,
            {"mic_channels": [4, 6, 6], "far_channels": [4], "decoder_channels": [6, 4], "gru_hidden": 8},
        ),
    ],
)
def test_the_first_scripts_networks_are_of_the_same_size(naive: Any, ours: Any, arguments: dict[str, Any]) -> None:
    first, own = (system(**arguments).network for system in (naive, ours))
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in (first, own)]
    assert sizes[0] == sizes[1] and type(first) is not type(own)


def test_the_second_half_counts() -> None:
    """Code is compiled in the first; a mean of rates is that over the time they took."""
    steps = [{"examples_per_s": str(rate), "step_s": str(1 / rate), "data_wait_share": "0.1"} for rate in (1, 1, 2, 6)]
    lines = [*steps, {"validation_step_timing in s": "0.25"}]
    found = measured([line | {"train_loss": "3.5"} for line in lines], {"peak_mem_mb": 7.0})
    assert found.examples_per_s == pytest.approx(3.0) and found.step_s == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert (found.losses, found.validation_s, found.peak_mb) == ([3.5] * 5, 0.25, 7.0)


def test_ratios_are_within_a_round() -> None:
    """Both rounds are twice as fast, however busy the machine was in the second."""
    found = {PLAIN: [RUN, RUN._replace(examples_per_s=1.0)], FIRST: [RUN] * 2}
    found["x"] = [RUN._replace(examples_per_s=8.0), RUN._replace(examples_per_s=2.0)]
    result = summarise(Row("x"), found, {})
    assert result["to_recipe"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    assert result["to_first"] == {"median": 1.25, "least": 0.5, "most": 2.0}
    found["v"] = [RUN._replace(validation_s=0.1), RUN._replace(validation_s=0.05)]
    assert summarise(Row("v", measures="validation"), found, {})["to_recipe"]["median"] == 3.0
    assert summarise(Row("x"), found, {"x": "why"})["failed"] == "why"


def test_losses_in_words() -> None:
    assert compare_losses([1.0, 2.0], [1.0, 2.0005], Row("x")) == "the same"
    assert compare_losses([1.0, 2.2], [1.0, 2.0], Row("x")) == "+6.7% at the end"
    assert compare_losses([9.0], [1.0], Row("x", losses="other batches")) == "other batches"
    assert compare_losses([], [1.0], Row("x")) == "not logged"


def test_what_paid_is_combined() -> None:
    """Of a kind the best; nothing that paid on average only, nothing that changes the network."""
    rows = [Row("a", ("w=1",), "loader"), Row("b", ("w=1", "p=8"), "loader"), Row("c", ("c=1",), "c")]
    rows += [Row("d", ("d=1",), "d"), Row("e", ("e=1",), "e", free=False)]
    ratios = {"a": (1.1, 1.05), "b": (1.2, 1.1), "c": (1.5, 1.4), "d": (1.3, 0.9), "e": (2.0, 1.9)}
    results = [{"row": n, "to_recipe": {"median": m, "least": least}} for n, (m, least) in ratios.items()]
    best = combination(rows, results)
    assert best == Row(ALL, ("c=1", "w=1", "p=8"))
    assert combination(rows, [{"row": "a", "failed": "x"}]) is None


def test_a_choice_for_the_trainer_group(tmp_path: Path) -> None:
    report = {"machine": "m", "recipe": ["experiment=unet_demo"]}
    write_trainer(report, ["trainer.precision=bf16-mixed", "model.compile=default"], tmp_path / "x.yaml")
    text = (tmp_path / "x.yaml").read_text()
    assert "precision: bf16-mixed   # was faster here\n" in text and "# With it: model.compile=default\n" in text
    assert "defaults: [default]\n" in text


def test_epochs_of_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert epoch_of(["experiment=conv_tasnet_demo"], "conv_tasnet") == (300, 15)
    assert epoch_of(["experiment=deepvqe_demo"], "deepvqe") == (400, 10)
    assert epoch_of(["experiment=unet_demo"], "unet") == (500, 96)
    manifest = tmp_path / "val.jsonl"
    manifest.write_text('{"audio_filepath": "a.wav", "duration": 1.0}\n' * 9)
    typed = ["experiment=nest_demo", f"model.validation_ds.manifest_filepath={manifest}"]
    assert epoch_of(typed, "nest") == (400, 2)


@pytest.mark.parametrize("typed", [[], ["model=x"], ["data.batch_size=2"]])
def test_a_recipe_is_needed(typed: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        speedups.main(typed)
    assert raised.value.code == 2 or "name a recipe" in str(raised.value)


def test_it_runs(script: Any, manifests: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The table, its files, and a row that does not run; train.py in this process, to save time."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        done = script("train", command[2:])
        return subprocess.CompletedProcess(command, done.code, done.out, done.err)

    monkeypatch.setattr(speedups.subprocess, "run", run)
    monkeypatch.setattr(speedups, "_PAYS", 0.0)  # so that something is combined on any machine
    monkeypatch.setitem(speedups.__dict__, "combination", lambda rows, results: rows[2]._replace(name=ALL))
    typed = ["model=conv_tasnet", *TINY, *manifests, "--rounds", "1", "--steps", "4", "--only", "DBC", "8-bit Adam"]
    assert speedups.main([*typed, "--output", "out", "--write", "this_machine.yaml"]) == 0
    report = json.loads(Path("out/speedups.json").read_text())
    assert [row["row"] for row in report["rows"]] == [FIRST, PLAIN, "DBC", ALL]
    plain = report["rows"][1]
    assert plain["to_recipe"] == {"median": 1.0, "least": 1.0, "most": 1.0} and plain["loss"] == "the same"
    assert report["not_here"] == {"8-bit Adam": "needs a CUDA device"}
    assert report["command"].endswith("callbacks=[default,dbc]")
    text = Path("out/speedups.md").read_text()
    assert text.startswith("`experiment=conv_tasnet_demo") and "| 8-bit Adam | | needs a CUDA device |" in text
    assert text.strip() == markdown(report).strip() and text in capsys.readouterr().out
    assert Path("out/speedups.png").read_bytes()[:4] == b"\x89PNG" and Path("this_machine.yaml").is_file()
