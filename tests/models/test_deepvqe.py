import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.deepvqe import DeepVQE

TINY: dict[str, Any] = {
    "stft": "n512",
    "mic_channels": [4, 6, 6],
    "far_channels": [4],
    "decoder_channels": [6, 6],
    "gru_hidden": 8,
    "align": {"hidden_channels": 4, "max_delay_ms": 96.0},
    "optim": {"name": "adam", "lr": 1e-3},
}
ALL_TERMS = {"si_snr_weight": 0.05, "snr_weight": 0.05, "delay_weight": 0.1, "echo_weight": 1.0}


def build(seed: int = 0, **arguments: Any) -> DeepVQE:
    torch.manual_seed(seed)
    return DeepVQE(**(TINY | arguments))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(num_samples: int = 4096, *, seed: int = 0) -> dict[str, Tensor]:
    """Double talk, far end, near end with and without far end, silence everywhere, a clipped microphone."""
    far, near, background = (noise(6, num_samples, seed=3 * seed + i) for i in range(3))
    delay = 300
    echo = 0.7 * torch.nn.functional.pad(far, (delay, 0))[:, :num_samples]
    near[1], echo[2], echo[3], far[3] = 0, 0, 0, 0
    for signal in (far, near, echo, background):
        signal[4] = 0
    background = 0.01 * background
    mic = near + echo + background
    mic[5] = (20 * mic[5]).clamp(-1, 1)
    with_echo = torch.tensor([True, True, False, False, False, True])
    return {
        "mic": mic,
        "far": far,
        "target": near,
        "near": near,
        "echo": echo,
        "noise": background,
        "has_target": torch.ones(6, dtype=torch.bool),
        "length": torch.full((6,), num_samples),
        "scenario": torch.tensor([0, 1, 2, 2, 1, 0]),
        "delay_samples": torch.where(with_echo, float(delay), -1.0),
        "path_change_sample": torch.full((6,), -1),
        "ser_db": torch.zeros(6),
        "snr_db": torch.zeros(6),
    }


def test_begins_as_a_wire() -> None:
    system = build().eval()
    batch = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(system(batch["mic"], batch["far"]), batch["mic"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "num_steps"),
    [
        (None, 200),
        (torch.bfloat16, 20),
        pytest.param(torch.bfloat16, 200, marks=pytest.mark.slow),  # without hardware for it twice as slow
    ],
)
def test_trains_without_a_nan(dtype: torch.dtype | None, num_steps: int) -> None:
    """All scenarios, silence and clipping in each batch, all terms of the loss."""
    system = build(stft="n320", mic_channels=[4, 4], decoder_channels=[4], loss=ALL_TERMS).train()
    optimizer = torch.optim.Adam(system.parameters(), lr=3e-3)
    losses = []
    for step in range(num_steps):
        batch = make_batch(1024, seed=step % 4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            loss = system.step(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(system.parameters(), 5.0)
        assert torch.isfinite(loss) and torch.isfinite(norm), step
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(value).all() for value in system.state_dict().values())
    assert sum(losses[-8:]) < 0.97 * sum(losses[:8])


@pytest.mark.parametrize("term", ["si_snr", "snr", "delay"])
def test_every_term_changes_the_loss_by_its_weight(term: str) -> None:
    batch = make_batch()
    without, with_term = (build(loss={f"{term}_weight": weight}).eval().step(batch) for weight in (0.0, 0.5))
    expected = without["loss"] + 0.5 * with_term[f"loss_{term}"]
    torch.testing.assert_close(with_term["loss"], expected)
    assert with_term[f"loss_{term}"] != 0 and "loss_spectral" not in without


def test_louder_echo_weighs_more() -> None:
    batch = make_batch()
    plain, weighted = (build(loss={"echo_weight": weight}).eval().step(batch)["loss"] for weight in (0.0, 2.0))
    assert weighted > plain


def test_echo_weight_needs_the_components() -> None:
    """Recordings have none: they count without it."""
    batch = {name: value for name, value in make_batch().items() if name not in ("near", "echo", "noise")}
    plain, weighted = (build(loss={"echo_weight": weight}).eval().step(batch)["loss"] for weight in (0.0, 2.0))
    torch.testing.assert_close(weighted, plain)


def test_items_without_target_do_not_count() -> None:
    batch = make_batch()
    known = batch | {"has_target": torch.tensor([True, False, True, False, False, False])}
    other = known | {"target": torch.where(known["has_target"][:, None], batch["target"], noise(6, 4096, seed=9))}
    system = build().eval()
    torch.testing.assert_close(system.step(known)["loss"], system.step(other)["loss"])
    assert system.step(batch | {"has_target": torch.zeros(6, dtype=torch.bool)})["loss"].item() == 0


def test_padding_changes_nothing_in_evaluation() -> None:
    system = build(loss=ALL_TERMS).eval()
    batch, lengths = make_batch(), torch.tensor([4096, 3000, 4096, 2000, 1500, 3001])
    for name in ("mic", "far", "target", "near", "echo", "noise"):
        batch[name] = batch[name] * (torch.arange(4096) < lengths[:, None])
    batch["length"] = lengths
    together = system.step(batch)
    alone = []
    for i, n in enumerate(lengths.tolist()):
        item = {name: v[i : i + 1, :n] if v.ndim > 1 else v[i : i + 1] for name, v in batch.items()}
        alone.append(system.step(item))
        torch.testing.assert_close(together["enhanced"][i : i + 1, :n], alone[-1]["enhanced"])
        assert not together["enhanced"][i, n:].any()
        frames = alone[-1]["delay_distribution"].shape[1]
        torch.testing.assert_close(together["delay_distribution"][i : i + 1, :frames], alone[-1]["delay_distribution"])
    torch.testing.assert_close(together["loss"], torch.stack([output["loss"] for output in alone]).mean())


def test_validation_reports_each_scenario() -> None:
    system, batch = build().eval(), make_batch()
    metric = system.make_metric("val")
    with torch.no_grad():
        system.update_metric(metric, batch, system.step(batch))
    values = metric.compute()
    assert {"erle_far_end", "si_sdri_double_talk", "si_sdr_near_end", "delay_accuracy"} <= set(values)
    assert len(system.example_scores(metric)) == 6


def test_predict_keeps_rate_length_and_shape() -> None:
    system = build().eval()
    for shape, rate in (((5001,), 16000), ((2, 7001), 8000), ((6000,), 48000)):
        mic, far = noise(*shape), noise(*shape, seed=1)
        enhanced = system.predict(mic=mic, far=far, sample_rate=rate)["enhanced"]
        assert enhanced.shape == mic.shape and torch.isfinite(enhanced).all()


def test_predict_is_forward_at_the_own_rate_and_in_chunks_nearly_so() -> None:
    system = build().eval()
    mic, far = noise(30000), noise(30000, seed=1)
    whole = system.predict(mic=mic, far=far)["enhanced"]
    with torch.no_grad():
        torch.testing.assert_close(whole, system(mic[None], far[None])[0])
    chunked = system.predict(mic=mic, far=far, chunk_s=1.0, overlap_s=0.5)["enhanced"]
    assert (chunked - whole).square().mean() < 1e-3 * whole.square().mean()


def test_predict_without_a_far_end() -> None:
    """Zeros, as for a recording in which nobody else is on the line."""
    enhanced = build().eval().predict(mic=noise(4000), far=torch.zeros(4000))["enhanced"]
    assert torch.isfinite(enhanced).all()


def test_predict_refuses_signals_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"mic has shape \(4000,\), far \(3999,\)"):
        build().predict(mic=noise(4000), far=noise(3999))


@pytest.mark.parametrize(("delay_ms", "warns"), [(50, False), (400, True)])
def test_predict_warns_of_a_delay_beyond_its_reach(
    delay_ms: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    far = noise(48000, seed=1)
    mic = torch.nn.functional.pad(far, (16 * delay_ms, 0))[:48000]
    with caplog.at_level(logging.WARNING):
        build().eval().predict(mic=mic, far=far)
    lines = [record.getMessage() for record in caplog.records if "max_delay_ms" in record.getMessage()]
    assert bool(lines) == warns
    if warns:
        assert "400 ms" in lines[0] and "96 ms" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stft": "n640"}, "model.stft=n640: no such preset; choose from n320, n512, n480"),
        ({"stft": "n480"}, "set model.sample_rate=24000"),
        ({"align": {"max_delay": 100}}, "model.align has no max_delay; it has hidden_channels, max_delay_ms"),
        ({"loss": {"delay": 1}}, "model.loss has no delay; it has compression"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_max_delay_is_in_milliseconds() -> None:
    """32 frames of 16 ms are 512 ms, not 320."""
    assert build(align={"max_delay_ms": 512.0}).network.alignment.max_delay_frames == 32
    assert build(stft="n320", align={"max_delay_ms": 512.0}).network.alignment.max_delay_frames == 52


def test_example_input_runs() -> None:
    system = build().eval()
    assert system(**system.example_input()).shape == (1, 16000)


def test_imports_public_weights(caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(__file__).parents[1] / "golden" / "deepvqe"
    content = load_file(next(folder.glob("*_aec_nfft320_tiny.safetensors")))
    state = {name.removeprefix("sd."): value for name, value in content.items() if name.startswith("sd.")}
    arguments: dict[str, Any] = {
        "stft": "n320",
        "mic_channels": [4, 8, 8, 8, 8],
        "far_channels": [4, 8],
        "decoder_channels": [8, 8, 8, 4],
        "gru_hidden": 16,
        "subpixel": "concat",
        "align": {"hidden_channels": 4, "max_delay_ms": 120.0, "scale": False},
    }
    system = build(**arguments).eval()
    with caplog.at_level(logging.WARNING):
        report = system.load_weights(system.import_weights({"state_dict": state}))
    assert not report["unexpected"] and not report["mismatched"]
    assert report["missing"] == ["network.alignment.temperature"]
    assert "taken for stft=n320" in caplog.text
    with torch.no_grad():
        enhanced, _ = system.network(content["in.mic"], torch.zeros_like(content["in.mic"]))
    torch.testing.assert_close(enhanced, content["out.enh_far_zero"], atol=1e-4, rtol=1e-4)
    other = build(**(arguments | {"gru_hidden": 8, "subpixel": "interleave"}))
    with pytest.raises(ValueError, match=r"set model\.gru_hidden=16 model\.subpixel=concat"):
        other.import_weights({"state_dict": state})
