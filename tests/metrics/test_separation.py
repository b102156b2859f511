"""Separation metrics: against torchmetrics item by item, cases without meaning, lengths, and merging of ranks."""

import math
import pickle

import pytest
import torch
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as tm_si_sdr
from torchmetrics.functional.audio import signal_distortion_ratio as tm_sdr

from metrics.separation import SeparationMetrics, sdr, si_sdr


def random_batch(batch: int = 4, num_sources: int = 2, num_samples: int = 2000, seed: int = 0) -> dict:
    """Estimates in reversed order, 10 to 13 dB above their noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = 0.1 * torch.randn(batch, num_sources, num_samples, generator=generator)
    noise = 0.1 * torch.randn(targets.shape, generator=generator)
    snr_db = 10 + torch.arange(batch, dtype=torch.float32)[:, None, None]
    return {
        "estimates": (targets + 10 ** (-snr_db / 20) * noise).flip(1),
        "targets": targets,
        "mixture": targets.sum(1),
        "length": torch.full((batch,), num_samples),
    }


def expected_scores(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    targets = batch["targets"].double()
    after = tm_si_sdr(batch["estimates"].double().flip(1), targets, zero_mean=True)
    before = tm_si_sdr(batch["mixture"].double()[:, None].expand_as(targets), targets, zero_mean=True)
    return after.mean(-1), (after - before).mean(-1)


def values(metric: SeparationMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("num_sources", [1, 2, 3])
def test_means_and_standard_error(num_sources):
    batch = random_batch(num_sources=num_sources)
    if num_sources == 1:  # with one talker and no noise the mixture would be perfect
        batch["mixture"] = batch["mixture"] + 0.1 * torch.randn(4, 2000)
    metric = SeparationMetrics()
    metric.update(**batch)
    si_sdr, improvement = expected_scores(batch)
    result = values(metric)
    assert result["si_sdr"] == pytest.approx(si_sdr.mean().item(), abs=1e-4)
    assert result["si_sdri"] == pytest.approx(improvement.mean().item(), abs=1e-4)
    assert result["si_sdri_stderr"] == pytest.approx(improvement.std().item() / 2, abs=1e-4)
    assert (result["num_mixtures"], result["num_silent"], result["num_perfect"]) == (4, 0, 0)
    per_mixture = metric.per_mixture()
    torch.testing.assert_close(per_mixture[0].double(), si_sdr, atol=1e-4, rtol=0)
    torch.testing.assert_close(per_mixture[1].double(), improvement, atol=1e-4, rtol=0)
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in metric.compute().values())


def test_the_mixture_itself_improves_nothing():
    batch = random_batch()
    batch["estimates"] = batch["mixture"][:, None].expand_as(batch["targets"])
    metric = SeparationMetrics()
    metric.update(**batch)
    assert values(metric)["si_sdri"] == pytest.approx(0, abs=1e-9)


def test_samples_beyond_the_length_do_not_count():
    batch = random_batch()
    lengths = [2000, 1500, 700, 1]
    whole, cut = SeparationMetrics(), SeparationMetrics()
    for item, length in enumerate(lengths[:3]):
        one = {name: value[item : item + 1, ..., :length] for name, value in batch.items() if name != "length"}
        cut.update(**one, length=torch.tensor([length]))
    batch["length"] = torch.tensor(lengths)
    for name in ("estimates", "targets", "mixture"):
        for item, length in enumerate(lengths):
            batch[name][item, ..., length:] = 1e3
    whole.update(**{name: value[:3] for name, value in batch.items()})
    assert values(whole) == pytest.approx(values(cut), abs=1e-6)


def test_silent_and_perfect_mixtures_are_counted_not_averaged():
    batch = random_batch(batch=7)
    expected = expected_scores(batch)[1][4:].mean().item()
    batch["targets"][0, 1] = 0
    batch["targets"][1, 0] = 0.5  # a constant is silence too
    batch["length"][2] = 0
    batch["estimates"][3] = 3 * batch["targets"][3].flip(0)
    metric = SeparationMetrics()
    metric.update(**batch)
    result = values(metric)
    assert (result["num_mixtures"], result["num_silent"], result["num_perfect"]) == (7, 3, 1)
    assert result["si_sdri"] == pytest.approx(expected, abs=1e-4)
    si_sdr, _ = metric.per_mixture()
    assert si_sdr[:3].isnan().all()
    assert si_sdr[3] > 100


def test_silent_estimates_are_counted_not_averaged():
    batch = random_batch()
    expected = expected_scores(batch)[1][2:].mean().item()
    batch["estimates"][0, 1] = 0
    batch["estimates"][1, 0] = 0.1  # a constant says nothing
    batch["estimates"][2:] *= 1e-6  # a network may choose any scale
    metric = SeparationMetrics()
    metric.update(**batch)
    result = values(metric)
    assert (result["num_silent_estimates"], result["num_silent"]) == (2, 0)
    assert result["si_sdri"] == pytest.approx(expected, abs=1e-3)


def test_rows_say_what_became_of_each_mixture():
    batch = random_batch(batch=5)
    batch["targets"][0, 1] = 0
    batch["estimates"][1] = batch["targets"][1]
    batch["estimates"][2, 0] = 0
    batch["estimates"][3, 0, 0] = torch.inf
    metric = SeparationMetrics(sdr=True)
    metric.update(**batch)
    rows = metric.rows()
    assert [row["status"] for row in rows] == ["silent", "perfect", "silent_estimate", "not_finite", "ok"]
    assert all(list(row) == ["si_sdr", "si_sdri", "sdr", "status"] for row in rows)
    assert math.isnan(rows[0]["si_sdr"]) and rows[1]["si_sdr"] > 100 and rows[2]["sdr"] is None
    assert rows[4]["sdr"] == pytest.approx(rows[4]["si_sdr"], abs=1.5)  # white noise: the filter gains little
    assert list(SeparationMetrics().rows()) == []


def test_sdr_against_torchmetrics():
    batch = random_batch(num_sources=3)
    metric = SeparationMetrics(sdr=True)
    metric.update(**batch)
    scores = tm_sdr(batch["estimates"].flip(1).double(), batch["targets"].double())
    assert values(metric)["sdr"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert values(metric)["sdr_stderr"] == pytest.approx(scores.mean(-1).std().item() / 2, abs=1e-4)
    assert "sdr" not in SeparationMetrics().columns


def test_sdr_forgives_a_filter_and_si_sdr_does_not():
    target = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    echo = target + 0.5 * target.roll(100) * (torch.arange(8000) >= 100)
    assert sdr(echo, target).item() > 25
    assert si_sdr(echo, target).item() == pytest.approx(20 * math.log10(2), abs=0.5)
    assert si_sdr(7 * target + 0.1 * echo + 3, target).item() > 40  # neither scale nor offset counts


def test_a_mixture_too_short_for_sdr_is_scored_without():
    batch = random_batch()
    batch["length"][0] = 511
    metric = SeparationMetrics(sdr=True)
    metric.update(**batch)
    result = values(metric)
    assert (result["num_short"], result["num_mixtures"]) == (1, 4)
    assert metric.rows()[0]["sdr"] is None and metric.rows()[0]["status"] == "ok"
    assert math.isfinite(result["sdr"])


def test_a_good_estimate_is_not_perfect():
    batch = random_batch()
    batch["estimates"] = batch["targets"] + 1e-4 * batch["targets"].flip(-1)  # 80 dB
    metric = SeparationMetrics()
    metric.update(**batch)
    assert values(metric)["num_perfect"] == 0
    assert values(metric)["si_sdr"] == pytest.approx(80, abs=0.5)


def test_nothing_to_average():
    metric = SeparationMetrics()
    with pytest.warns(UserWarning, match="before the ``update``"):
        result = values(metric)
    assert result["num_mixtures"] == 0
    assert all(math.isnan(result[name]) for name in ("si_sdr", "si_sdri", "si_sdri_stderr"))
    metric.update(**random_batch(batch=1))
    result = values(metric)
    assert math.isfinite(result["si_sdri"])
    assert math.isnan(result["si_sdri_stderr"])


@pytest.mark.parametrize("num_sources", [2, 3])
def test_a_broken_network_shows(num_sources):
    batch = random_batch(num_sources=num_sources)
    batch["estimates"][1, 0, 3] = torch.nan
    metric = SeparationMetrics()
    metric.update(**batch)
    result = values(metric)
    assert math.isnan(result["si_sdr"])
    assert result["num_perfect"] == 0


def test_ranks_add_up():
    """What DDP does: every state is summed over the ranks."""
    batches = [random_batch(seed=seed) for seed in range(3)]
    batches[2]["targets"][0] = 0
    together, ranks = SeparationMetrics(), [SeparationMetrics() for _ in batches]
    for rank, batch in zip(ranks, batches, strict=True):
        together.update(**batch)
        rank.update(**batch)
    first = ranks[0]
    for rank in ranks[1:]:
        first.merge_state(rank)
    assert values(first) == pytest.approx(values(together), abs=1e-9)
    assert (values(first)["num_mixtures"], values(first)["num_silent"]) == (12, 1)
    together.reset()
    assert together.num_of.sum() == 0


def test_inference_mode_and_half_precision_and_pickle():
    batch = random_batch()
    batch["estimates"] = batch["estimates"].bfloat16()
    metric = SeparationMetrics()
    with torch.inference_mode():
        metric.update(**batch)
    again = pickle.loads(pickle.dumps(metric))
    assert values(again) == values(metric)


def test_shapes_must_agree():
    batch = random_batch()
    with pytest.raises(ValueError, match=r"estimates must have shape \(4, 2, 2000\)"):
        SeparationMetrics().update(**batch | {"estimates": batch["estimates"][:, :1]})
