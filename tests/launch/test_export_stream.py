"""The step of a live system in onnxruntime: equal to the whole recording at once, and what 8 bits of it cost."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch

import models
from launch import export_stream
from launch.onnx_stream import OnnxStream
from models.deepvqe import DeepVQE
from modules.stft import PRESETS

TINY = dict(mic_channels=[4, 6, 8], far_channels=[4, 6], decoder_channels=[6, 4], gru_hidden=16,
            align={"hidden_channels": 4, "max_delay_ms": 200.0})  # fmt: skip
SMALL = dict(mic_channels=[16, 40, 56, 24], far_channels=[8, 24], decoder_channels=[40, 32, 32], gru_hidden=183,
             residual="inner_decoder", align={"hidden_channels": 8})  # fmt: skip
INNER, LAST = "decoder.0.subpixel.conv.weight", "decoder.1.subpixel.conv.weight"
LENGTHS = (4001, 7999)  # samples


def build(preset: str, **arguments) -> DeepVQE:
    """A network in evaluation that does more than hand the microphone on."""
    torch.manual_seed(0)
    system = DeepVQE(stft=preset, sample_rate=PRESETS[preset][0], init_identity=False, **arguments).eval()
    for module in system.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return system


def sounds(num_samples: int, silence: int = 0) -> list[torch.Tensor]:
    """Noise between two silences."""
    generator, times = torch.Generator().manual_seed(num_samples), torch.arange(num_samples)
    loud = (times >= silence) & (times < num_samples - silence)
    return [0.1 * torch.randn(num_samples, generator=generator) * loud for _ in range(2)]


def assert_equal(system: DeepVQE, path: Path, *, waveform: bool) -> None:
    step, stream = system.streaming_step(waveform=waveform), OnnxStream(path)
    for num_samples in LENGTHS:
        mic, far = sounds(num_samples, silence=2 * system.stft.n_fft if waveform else 0)
        with torch.inference_mode():
            expected = system(mic[None], far[None])[0]
        assert expected.abs().max() > 0.01
        actual = export_stream.enhance(stream, step, [mic, far][: len(stream.signals)])
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("preset", "waveform"), [("n320", False), ("n512", True), ("n480", False)])
def test_equals_the_whole_recording(preset: str, waveform: bool, tmp_path: Path) -> None:
    system = build(preset, **TINY)
    export_stream.export(system.streaming_step(waveform=waveform), tmp_path / "model.onnx", opset=18)
    assert_equal(system, tmp_path / "model.onnx", waveform=waveform)
    stream = OnnxStream(tmp_path / "model.onnx")
    silence = np.zeros_like(next(iter(system.streaming_step(waveform=waveform).inputs.values())).numpy())
    for _ in range(5):  # torch's own optimisation of the graph would divide by zero
        assert not np.any(stream(silence, silence))
    assert all(np.isfinite(value).all() for value in stream.state.values())


@pytest.mark.slow
@pytest.mark.parametrize("waveform", [False, True], ids=["spectra", "samples"])
@pytest.mark.parametrize("preset", [*PRESETS, "DeepVQE-S"])
def test_equals_the_whole_recording_in_full_size(preset: str, waveform: bool, tmp_path: Path) -> None:
    system = build("n320", **SMALL) if preset == "DeepVQE-S" else build(preset)
    step = system.streaming_step(waveform=waveform)
    export_stream.export(step, tmp_path / "model.onnx", opset=18)
    assert_equal(system, tmp_path / "model.onnx", waveform=waveform)
    assert len(step.state) == (17 if preset == "DeepVQE-S" else 29) + 3 * waveform


def test_variants(tmp_path: Path) -> None:
    """Another order of bins, a masked start, which counts frames, no far end at all."""
    masked = build("n320", **TINY | {"align": TINY["align"] | {"mask_start": True}}, subpixel="concat", mask_norm=True)
    export_stream.export(masked.streaming_step(waveform=False), tmp_path / "masked.onnx", opset=18)
    assert_equal(masked, tmp_path / "masked.onnx", waveform=False)
    assert OnnxStream(tmp_path / "masked.onnx").state["num_frames"].dtype == np.int64
    deaf = build("n320", **TINY | {"far_channels": []})
    export_stream.export(deaf.streaming_step(waveform=True), tmp_path / "deaf.onnx", opset=18)
    assert OnnxStream(tmp_path / "deaf.onnx").signals == ["mic"]
    assert_equal(deaf, tmp_path / "deaf.onnx", waveform=True)


def test_a_difference_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_stream, "write_step", lambda step, path, *, opset: path.touch())
    monkeypatch.setattr(export_stream, "largest_difference", lambda *_: float("nan"))
    with pytest.raises(RuntimeError, match="model.onnx: not written, its results differ by nan"):
        export_stream.export(build("n320", **TINY).streaming_step(waveform=False), tmp_path / "model.onnx", opset=18)
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(script: Callable, trained_echo: Path, in_tmp: Path) -> None:
    """A file that says what it needs, one of 8 bits, and what that costs."""
    done = script(
        "export",
        [f"ckpt_path={trained_echo}/checkpoints/last.ckpt", "output=model.onnx", "int8=true", "calibration_examples=2"],
    )
    assert done.code == 0, done.text
    system = models.load(trained_echo / "checkpoints" / "last.ckpt")
    file = onnx.load("model.onnx")
    onnx.checker.check_model(file)
    assert [i.name for i in file.graph.input[:2]] == ["mic", "far"] and file.graph.output[0].name == "enhanced"
    facts = {entry.key: entry.value for entry in file.metadata_props}
    assert facts == {"sample_rate": "16000", "n_fft": "512", "hop_samples": "256", "window": "sqrt_hann",
                     "signals": "spectra"}  # fmt: skip
    assert_equal(system, Path("model.onnx"), waveform=False)
    assert re.search(r"model.onnx: \d+ tensors of state, [\d.]+ MB", done.text)
    assert re.search(r"erle_far_end: -?[\d.]+ dB, with 8 bits -?[\d.]+ dB \([+-][\d.]+ dB\)", done.text)
    assert re.search(r"model.int8.onnx: what 8 bits change is [\d.]+ dB below the output, on \d+ valid", done.text)
    eight = OnnxStream(Path("model.int8.onnx"))
    assert (
        eight.signals == ["mic", "far"] and Path("model.int8.onnx").stat().st_size < Path("model.onnx").stat().st_size
    )


def test_predict_frame_by_frame(script: Callable, trained_echo: Path, recordings: Path, in_tmp: Path) -> None:
    """The same as at once but for the ends, where a live system knows of no reflection; and how long it took."""
    typed = [f"ckpt_path={trained_echo}", f"input={recordings}/echo.jsonl"]
    for name, more in (("whole", []), ("live", ["streaming=true"])):
        done = script("predict", [*typed, f"output={name}", *more])
        assert done.code == 0, done.text
    assert len(re.findall(r"1\.0 s in [\d.]+ s on one core: real-time factor [\d.]+", done.text)) == 2
    for number in range(2):
        whole, live = (soundfile.read(f"{name}/{number}_enhanced.wav")[0] for name in ("whole", "live"))
        ends = 600  # samples at 8 kHz: two frames
        assert whole.shape == live.shape
        np.testing.assert_allclose(live[ends:-ends], whole[ends:-ends], atol=2e-2 * np.abs(whole).max())


def test_what_has_samples_anyway_is_told(script: Callable, trained: Path, in_tmp: Path) -> None:
    done = script("export", [f"ckpt_path={trained}", "output=model.onnx", "waveform=true"])
    assert done.code == 2 and "waveform=true is for echo cancellation and pre-training, not for ConvTasNet" in done.err
