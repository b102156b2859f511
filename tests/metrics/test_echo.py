"""Metrics of an echo canceller: known scalings give known dB, silence everywhere, and what every rank adds up to."""

import math
import pickle
import sys

import pytest
import torch
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as tm_si_sdr

from data import echo_scenarios
from losses import echo as losses
from metrics import perceptual
from metrics.echo import SCENARIOS, EchoMetrics, far_active_frames

DOUBLE_TALK, FAR_END, NEAR_END = range(3)
RATE_HZ, HOP = 16000, 160
T = 8000


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one(scenario: int, *, batch: int = 1, seed: int = 0) -> dict:
    """Clips of one scenario, output is the microphone."""
    near, far = noise(batch, T, seed=2 * seed), noise(batch, T, seed=2 * seed + 1)
    near = near * (scenario != FAR_END)
    far = far * (scenario != NEAR_END)
    mic = near + 0.5 * far.roll(HOP, -1)
    return {
        "output": mic.clone(),
        "mic": mic,
        "far": far,
        "target": near,
        "has_target": torch.ones(batch, dtype=torch.bool),
        "length": torch.full((batch,), T),
        "scenario": torch.full((batch,), scenario),
    }


def of_all(seed: int = 0) -> dict:
    """One clip of each scenario, with estimates that are noise 20 dB below."""
    items = [one(scenario, seed=seed) for scenario in range(3)]
    batch = {name: torch.cat([item[name] for item in items]) for name in items[0]}
    batch["output"] = batch["target"] + 0.1 * noise(3, T, seed=99 + seed)
    return batch


def metric(**options) -> EchoMetrics:
    return EchoMetrics(sample_rate=RATE_HZ, hop_samples=HOP, **options)


def values(of: EchoMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in of.compute().items()}


def scored(batch: dict, **options) -> dict[str, float]:
    made = metric(**options)
    made.update(**batch)
    return values(made)


@pytest.fixture
def pesq_of_four(monkeypatch: pytest.MonkeyPatch):
    """PESQ and AECMOS that take no time; a clip with a silent output has no PESQ."""

    def pesq(clip):
        perceptual._require_sound(clip, "target", "output")
        return {"pesq": 4.0}

    for name, function in (("pesq", pesq), ("aecmos", lambda _: {"aecmos_echo": 3.0, "aecmos_degradation": 2.0})):
        known = perceptual.SCORERS[name]
        fake = perceptual.Scorer(**vars(known) | {"score": function, "imports": ()})
        monkeypatch.setitem(perceptual.SCORERS, name, fake)


def test_scenarios_are_those_of_the_data():
    assert echo_scenarios.SCENARIOS == SCENARIOS


@pytest.mark.parametrize(("gain", "erle_db"), [(1.0, 0), (1e-3, 60), (0.0, 80), (1e-9, 80), (-0.1, 20), (2.0, -6.02)])
def test_erle_is_the_level_of_what_is_left(gain, erle_db):
    """Perfect cancellation is not doing nothing, and silence is the end of the scale."""
    batch = one(FAR_END)
    batch["output"] = gain * batch["mic"]
    found = scored(batch)
    assert found["erle_far_end"] == pytest.approx(erle_db, abs=0.01)
    assert found["erle_late_far_end"] == pytest.approx(erle_db, abs=0.01)
    assert found["level_db_far_end"] == pytest.approx(-erle_db, abs=0.01)


def test_late_erle_is_of_the_second_half():
    batch = one(FAR_END)
    batch["output"][:, T // 2 :] *= 0.01
    found = scored(batch)
    assert found["erle_late_far_end"] == pytest.approx(40, abs=0.01)
    assert found["erle_far_end"] == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("scenario", [DOUBLE_TALK, NEAR_END])
def test_no_erle_with_a_talker_in_the_room(scenario):
    found = scored(one(scenario))
    assert not any("erle" in name for name in found)
    assert found[f"num_{SCENARIOS[scenario]}"] == 1


def test_si_sdr_and_its_improvement():
    batch = one(DOUBLE_TALK, batch=3)
    batch["output"] = 0.3 * (batch["target"] + 0.1 * noise(3, T, seed=7))
    after = tm_si_sdr(batch["output"].double(), batch["target"].double(), zero_mean=True)
    before = tm_si_sdr(batch["mic"].double(), batch["target"].double(), zero_mean=True)
    found = scored(batch)
    assert found["si_sdr_double_talk"] == pytest.approx(after.mean().item(), abs=1e-4)
    assert found["si_sdri_double_talk"] == pytest.approx((after - before).mean().item(), abs=1e-4)
    assert found["si_sdri_double_talk"] == pytest.approx(14, abs=0.5)  # 20 dB after, 6 dB before


def test_a_clean_near_end_cannot_be_improved_but_can_be_kept():
    batch = one(NEAR_END)
    found = scored(batch)
    assert found["si_sdr_near_end"] == 80
    assert "si_sdri_near_end" not in found
    assert found["level_db_near_end"] == pytest.approx(0, abs=1e-6)


def test_silence_is_perfect_by_erle_only():
    batch = of_all()
    batch["output"] = torch.zeros_like(batch["output"])
    found = scored(batch)
    assert found["erle_far_end"] == 80
    assert found["si_sdr_double_talk"] == found["si_sdr_near_end"] == -80
    assert found["si_sdri_double_talk"] < -80
    assert [found[f"level_db_{scenario}"] for scenario in SCENARIOS] == [-80, -80, -80]


def test_a_silent_output_keeps_its_aecmos_and_shows_by_its_level(pesq_of_four):
    batch = one(DOUBLE_TALK)
    batch["output"] = torch.zeros_like(batch["output"])
    found = scored(batch, scores=["pesq", "aecmos"])
    assert found["aecmos_echo_double_talk"] == 3
    assert found["level_db_double_talk"] == -80
    assert found["num_failed_pesq"] == 1
    assert "pesq_double_talk" not in found


@pytest.mark.parametrize("scenario", range(3))
@pytest.mark.parametrize("silent", [("mic", "output", "target"), ("mic",), ("target",), ("far",)])
def test_silence_anywhere_is_left_out_or_counted(silent, scenario):
    batch = one(scenario)
    for name in silent:
        batch[name] = torch.zeros_like(batch[name])
    made = metric()
    made.update(**batch)
    found = values(made)
    assert all(math.isfinite(value) for value in found.values())
    if scenario == FAR_END:
        assert ("num_failed_erle" in found) == ("mic" in silent) == ("erle_far_end" not in found)
    else:
        assert ("num_failed_si_sdr" in found) == ("target" in silent) == (f"si_sdr_{SCENARIOS[scenario]}" not in found)
    assert (f"level_db_{SCENARIOS[scenario]}" in found) == ("mic" not in silent)


def test_unknown_targets_are_not_scored_and_not_failures():
    batch = one(DOUBLE_TALK, batch=2)
    batch["has_target"][:] = False
    batch["target"][:] = 0
    assert set(scored(batch)) == {"num_double_talk", "level_db_double_talk"}


def test_a_broken_network_shows():
    batch = of_all()
    batch["output"][:, 100] = torch.nan
    found = scored(batch)
    for name in ("erle_far_end", "si_sdr_double_talk", "si_sdri_double_talk", "level_db_near_end"):
        assert math.isnan(found[name])


def test_failures_are_counted_and_never_averaged(pesq_of_four):
    batch = one(NEAR_END, batch=3)
    batch["output"][1] = 0
    found = scored(batch, scores=["pesq"])
    assert found["pesq_near_end"] == 4.0
    assert found["num_failed_pesq"] == 1
    assert found["num_near_end"] == 3


def test_a_missing_package_leaves_its_score_out(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pesq", None)
    made = metric(scores=["pesq"])
    assert len(caplog.messages) == 1 and "pesq is left out" in caplog.text
    made.update(**one(NEAR_END))
    assert not any("pesq" in name for name in [*values(made), *made.rows()[0]])


def test_real_scores_reach_the_means():
    batch = one(NEAR_END)
    batch["output"] = batch["target"]
    found = scored(batch, scores=["stoi"])
    assert found["stoi_near_end"] == pytest.approx(1, abs=1e-3)
    batch["length"][:] = 3999  # shorter than any scorer takes
    found = scored(batch, scores=["stoi"])
    assert found["num_failed_stoi"] == 1 and "stoi_near_end" not in found


def test_samples_beyond_the_length_do_not_count():
    batch, lengths = of_all(), [8000, 6001, 5000]
    distribution = noise(3, 1 + T // HOP, 9).mul(50).softmax(-1)
    delays = torch.tensor([160.0, 160.0, -1.0])
    cut = metric()
    for item, length in enumerate(lengths):
        part = {
            name: value[item : item + 1, :length] if value.ndim == 2 else value[item : item + 1]
            for name, value in batch.items()
        }
        part |= {"length": torch.tensor([length]), "delay_samples": delays[item : item + 1]}
        cut.update(**part, delay_distribution=distribution[item : item + 1, : 1 + length // HOP])
    for name in ("output", "mic", "far", "target"):
        for item, length in enumerate(lengths):
            batch[name][item, length:] = 1e3
    batch["length"] = torch.tensor(lengths)
    whole = scored(batch | {"delay_samples": delays, "delay_distribution": distribution})
    assert whole == pytest.approx(values(cut), abs=1e-5)
    assert "delay_error_ms" in whole


def test_delay_of_known_distributions():
    batch = one(DOUBLE_TALK, batch=6)
    # 3, 2.56, 1.6, 5 frames, unknown, beyond the distribution
    true = torch.tensor([480.0, 410.0, 256.0, 800.0, -1.0, 5000.0])
    distribution = torch.full((6, 1 + T // HOP, 10), 0.05)
    distribution[..., 3] = 0.55
    made = metric()
    made.update(**batch, delay_samples=true, delay_distribution=distribution)
    rows = made.rows()
    assert [row["delay_ms"] for row in rows] == pytest.approx([30.0] * 6)
    errors = [0.0, 70 / 16, 14.0, 20.0, None, 4520 / 16]
    assert [row["delay_error_ms"] for row in rows] == [e if e is None else pytest.approx(e) for e in errors]
    found = values(made)
    assert found["delay_accuracy"] == pytest.approx(3 / 5)  # the first three of five
    assert found["delay_error_ms"] == pytest.approx(sum(e for e in errors if e is not None) / 5)


def test_the_delay_is_read_where_the_far_end_plays():
    batch = one(DOUBLE_TALK)
    batch["far"][:, : T // 2] = 0
    distribution = torch.zeros(1, 1 + T // HOP, 10)
    distribution[:, :24, 1] = 1.0  # most frames, all of them guesses
    distribution[:, 24:, 7] = 0.6
    distribution[:, 24:, 1] = 0.4
    made = metric()
    made.update(**batch, delay_samples=torch.tensor([1120.0]), delay_distribution=distribution)
    assert made.rows()[0]["delay_ms"] == pytest.approx(70)
    batch["far"][:] = 0
    made.update(**batch, delay_samples=torch.tensor([1120.0]), delay_distribution=distribution)
    assert made.rows()[0]["delay_ms"] is None


@pytest.mark.parametrize("num_samples", [100, 4000, 4001])
def test_far_end_frames_are_those_of_the_loss(num_samples):
    fades = noise(num_samples) * torch.logspace(0, -4, num_samples)
    num_frames = 1 + num_samples // HOP
    expected = losses.far_active_frames(fades[None], hop_samples=HOP, num_frames=num_frames)[0]
    assert torch.equal(far_active_frames(fades, hop_samples=HOP, num_frames=num_frames), expected)
    assert expected.any() and (num_samples == 100 or not expected.all())


def test_rows_are_a_table(pesq_of_four):
    made = metric(scores=["pesq", "aecmos"])
    assert made.rows() == []
    made.update(**of_all())
    rows = made.rows()
    columns = "scenario erle_db erle_late_db si_sdr_db si_sdri_db pesq aecmos_echo aecmos_degradation level_db"
    assert all(list(row) == [*columns.split(), "delay_ms", "delay_error_ms"] for row in rows)
    assert [row["scenario"] for row in rows] == list(SCENARIOS)
    assert [row["pesq"] for row in rows] == [4.0, None, 4.0]
    assert [row["aecmos_echo"] for row in rows] == [3.0, 3.0, None]
    assert [row["aecmos_degradation"] for row in rows] == [2.0, None, 2.0]
    assert [row["erle_db"] is None for row in rows] == [True, False, True]
    assert rows[1]["level_db"] == pytest.approx(-rows[1]["erle_db"])


def test_names_of_scenarios_that_did_not_come_are_absent(pesq_of_four):
    found = scored(one(FAR_END), scores=["pesq", "aecmos"])
    assert set(found) == {
        *("erle_far_end", "erle_late_far_end", "level_db_far_end", "aecmos_echo_far_end", "num_far_end")
    }


def test_ranks_add_up(pesq_of_four):
    """What DDP does: every state is summed over the ranks."""
    batches = [of_all(seed) for seed in range(3)]
    batches[1]["output"][2] = 0
    batches[2] = one(FAR_END, batch=2)  # a rank that sees one scenario only
    options = {"scores": ["pesq", "aecmos"]}
    together, ranks = metric(**options), [metric(**options) for _ in batches]
    for rank, batch in zip(ranks, batches, strict=True):
        frames = torch.eye(5)[torch.zeros(1, dtype=torch.int64)].expand(len(batch["mic"]), 1 + T // HOP, 5)
        delays = torch.full((len(batch["mic"]),), 200.0)
        for one_of_both in (together, rank):
            one_of_both.update(**batch, delay_samples=delays, delay_distribution=frames)
    first = ranks[0]
    for rank in ranks[1:]:
        first.merge_state(rank)
    found = values(first)
    assert found == pytest.approx(values(together), abs=1e-9)
    assert (found["num_far_end"], found["num_near_end"], found["num_failed_pesq"]) == (4, 2, 1)
    assert found["delay_accuracy"] == 1 and found["delay_error_ms"] == pytest.approx(12.5)
    assert all(state.dtype in (torch.float64, torch.int64) for state in first.metric_state.values())
    together.reset()
    assert values_of_nothing(together) == {}


def values_of_nothing(of: EchoMetrics) -> dict[str, float]:
    with pytest.warns(UserWarning, match="before the ``update``"):
        return values(of)


def test_forward_and_inference_mode_and_half_precision_and_pickle():
    made = metric()
    with torch.inference_mode():
        of_batch = made(**of_all(0))
        made(**of_all(1) | {"output": of_all(1)["output"].bfloat16()})
    assert of_batch["num_far_end"] == 1
    again = pickle.loads(pickle.dumps(made))
    assert values(again) == values(made)
    assert values(made)["num_far_end"] == 2
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in made.compute().values())


def test_shapes_must_agree():
    batch = of_all()
    with pytest.raises(ValueError, match=r"far must have shape \(3, 8000\), as the output has, got \(3, 7999\)"):
        metric().update(**batch | {"far": batch["far"][:, 1:]})
    with pytest.raises(ValueError, match=r"scenario must have shape \(3,\)"):
        metric().update(**batch | {"scenario": batch["scenario"][:2]})
