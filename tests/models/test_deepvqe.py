import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from losses.echo import compressed_spectral_loss, level_gain
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
    """Also of the means: which terms mean something for which items does not depend on how they are batched."""
    system = build(loss=ALL_TERMS).eval()
    plain = make_batch()
    waveforms = [name for name, value in plain.items() if value.ndim > 1]
    padded = plain | {name: torch.nn.functional.pad(plain[name], (0, 500)) for name in waveforms}
    alone, together = system.step(plain), system.step(padded)
    torch.testing.assert_close(together["enhanced"][:, :4096], alone["enhanced"])
    assert not together["enhanced"][:, 4096:].any()
    torch.testing.assert_close(together["delay_distribution"], alone["delay_distribution"])
    for name in ("loss", "loss_spectral", "loss_si_snr", "loss_snr", "loss_delay"):
        torch.testing.assert_close(together[name], alone[name])


def test_recordings_of_several_lengths_share_a_batch() -> None:
    system, batch = build().eval(), make_batch()
    batch["length"] = torch.tensor([4096, 3000, 4096, 2000, 1500, 3001])
    output = system.step(batch)
    for i, n in enumerate(batch["length"].tolist()):
        item = {name: v[i : i + 1, :n] if v.ndim > 1 else v[i : i + 1] for name, v in batch.items()}
        torch.testing.assert_close(output["enhanced"][i : i + 1, :n], system.step(item)["enhanced"])


@pytest.mark.parametrize(
    ("arguments", "reach", "value"),
    [
        ({"align": {"temperature": 0.5}}, lambda s: s.network.alignment.temperature.item(), 0.5),
        ({"align": {"mask_start": True}}, lambda s: s.network.alignment.mask_start, True),
        ({"align": {"scale": False}}, lambda s: s.network.alignment.scale, False),
        ({"align": {"hidden_channels": 5}}, lambda s: s.network.alignment.mic_projection.out_channels, 5),
        ({"compression": 0.5}, lambda s: s.network.compression, 0.5),
        ({"mask_norm": True, "init_identity": False}, lambda s: s.network.decoder[-1].norm is not None, True),
        ({"residual": "inner_decoder"}, lambda s: s.network.mic_encoder[0].residual, None),
        ({"subpixel": "concat"}, lambda s: s.network.decoder[0].subpixel.subpixel, "concat"),
        ({"init_identity": False}, lambda s: bool(s.network.decoder[-1].subpixel.conv.weight.any()), True),
        ({"window": "hann"}, lambda s: s.stft.window[128].item(), pytest.approx(0.5)),
        ({"scores": ["stoi"]}, lambda s: (s.make_metric("test").scores, s.make_metric("val").scores), (("stoi",), ())),
    ],
)
def test_every_argument_arrives(arguments: dict[str, Any], reach: Any, value: Any) -> None:
    assert reach(build(**arguments)) == value != reach(build())


def test_the_spectral_term_is_that_of_its_options_at_one_level() -> None:
    batch = make_batch()
    options = {"compression": 0.5, "complex_weight": 0.8}
    system = build(loss=options).eval()
    gain = level_gain(batch["mic"])
    spectra = (system.stft(batch[name] * gain) for name in ("mic", "target"))  # untrained, it is a wire
    expected = compressed_spectral_loss(*spectra, **options).mean()
    torch.testing.assert_close(system.step(batch)["loss"], expected, rtol=1e-4, atol=0)
    quiet = {
        name: 0.1 * value if value.is_floating_point() and value.ndim > 1 else value for name, value in batch.items()
    }
    torch.testing.assert_close(system.step(quiet)["loss"], expected, rtol=1e-3, atol=0)


def test_ratios_leave_silent_targets_out_and_the_delay_paths_that_change() -> None:
    system, batch = build(loss=ALL_TERMS).eval(), make_batch()
    before = system.step(batch)
    changed = batch | {"path_change_sample": torch.tensor([2000, -1, -1, -1, -1, -1])}
    unknown = batch | {"delay_samples": torch.tensor([-1.0, *batch["delay_samples"][1:]])}
    loss_delay = system.step(changed)["loss_delay"]
    assert loss_delay != before["loss_delay"]
    torch.testing.assert_close(loss_delay, system.step(unknown)["loss_delay"])
    louder = batch | {"mic": batch["mic"].clone()}
    louder["mic"][1] = noise(4096, seed=8)  # far-end single talk: its target is silence
    for name in ("loss_si_snr", "loss_snr"):
        torch.testing.assert_close(system.step(louder)[name], before[name])


def test_figures_leave_an_unknown_target_out() -> None:
    system, batch = build().eval(), make_batch()
    delays = f"delays_up_to_{system.reach_ms:.0f}_ms"
    assert set(system.figures(batch, system.step(batch))) == {"mic", "far", "enhanced", "target", delays}
    batch["has_target"][0] = False
    assert set(system.figures(batch, system.step(batch))) == {"mic", "far", "enhanced", delays}


def test_figure_of_the_delays() -> None:
    """Time to the right, no delay at the bottom, of the recording without its padding; squares are probabilities."""
    system, batch = build().eval(), make_batch()
    with torch.no_grad():
        output = system.step(batch)
    batch["length"][0] = 10 * system.hop_samples
    figure = system.figures(batch, output)[f"delays_up_to_{system.reach_ms:.0f}_ms"]
    distribution = output["delay_distribution"][0]
    assert figure.shape == (distribution.shape[1], 11)
    torch.testing.assert_close(figure.square().flip(0).T, distribution[:11])
    torch.testing.assert_close(figure.square().sum(0), torch.ones(11))


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


def lively(**arguments: Any) -> DeepVQE:
    """A network that does something, as after training."""
    system = build(init_identity=False, **arguments)
    for module in system.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
    return system.eval()


def test_predict_is_forward_at_the_own_rate_and_nearly_so_in_chunks() -> None:
    system = lively()
    mic, far = noise(50001), noise(50001, seed=1)
    whole = system.predict(mic=mic, far=far)["enhanced"]
    with torch.no_grad():
        torch.testing.assert_close(whole, system(mic[None], far[None])[0])
    chunked = system.predict(mic=mic, far=far, chunk_s=1.5, overlap_s=1.0)["enhanced"]
    assert (chunked - whole).square().mean() < 1e-2 * whole.square().mean()


def test_a_chunk_hears_what_was_played_before_it() -> None:
    """A network that only delays the far end: at the seams nothing is missing."""
    system = build()
    system._enhance = lambda mic, far: (torch.nn.functional.pad(far, (4000, 0))[:, : far.shape[1]], None)  # type: ignore[method-assign]
    far = noise(80000)
    enhanced = system.predict(mic=noise(80000, seed=1), far=far, chunk_s=2.0, overlap_s=1.0)["enhanced"]
    torch.testing.assert_close(enhanced[4000:], far[:-4000])


def test_the_last_partial_hop_is_no_louder_than_the_rest() -> None:
    system = lively()
    with torch.no_grad():
        for num_samples in (4097, 4100, 4351):
            enhanced = system(noise(1, num_samples), noise(1, num_samples, seed=1))[0]
            assert enhanced[4096:].abs().max() < 5 * enhanced[:4096].abs().max()


def test_predict_without_a_far_end() -> None:
    """Zeros, as for a recording in which nobody else is on the line."""
    enhanced = build().eval().predict(mic=noise(4000), far=torch.zeros(4000))["enhanced"]
    assert torch.isfinite(enhanced).all()


def test_predict_refuses_signals_of_different_length() -> None:
    for mic, far in ((4000, 3999), (0, 0)):
        with pytest.raises(ValueError, match=rf"mic has shape \({mic},\), far \({far},\)"):
            build().predict(mic=noise(mic), far=noise(far))


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
        assert "400 ms" in lines[0] and "80 ms" in lines[0]  # six frames: delays of 0 to 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stft": "n640"}, "model.stft=n640: no such preset; choose from n320, n512, n480"),
        ({"stft": "n480"}, "set model.sample_rate=24000"),
        ({"align": {"max_delay": 100}}, "model.align has no max_delay; it has hidden_channels, max_delay_ms"),
        ({"loss": {"delay": 1}}, "model.loss has no delay; it has compression"),
        ({"scores": ["psq"]}, "scores must be a list of pesq, stoi, aecmos, dnsmos, got 'psq'"),
        ({"scores": "pesq"}, "scores must be a list of pesq, stoi, aecmos, dnsmos, got 'pesq'"),
        ({"mic_channels": 4}, "mic_channels must be a list of whole numbers, got 4"),
        ({"init_identity": 3}, "init_identity must be true or false, got 3"),
        ({"align": {"scale": "abc"}}, "align.scale must be true or false, got 'abc'"),
        ({"far_channels": [], "loss": {"delay_weight": 1}}, "loss.delay_weight needs far_channels"),
        ({"loss": {"compression": 0}}, "model.loss.compression=0: give a number from 0.01 to 1"),
        ({"loss": {"snr_weight": None}}, "model.loss.snr_weight=None: give a number"),
        ({"align": {"max_delay_ms": float("nan")}}, "model.align.max_delay_ms=nan: give a number"),
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
