"""export.py on NEST: the encoder with open sizes, from features or from samples; padding and silence harm nobody."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from launch.export import largest_difference, write_network
from models import load
from models.nest import NEST
from modules.low_rank import restructure

TINY = {"d_model": 16, "n_heads": 2, "n_layers": 1, "subsampling_conv_channels": 4, "ff_expansion_factor": 2}


def build(encoder: dict[str, Any] | None = None, **arguments: Any) -> NEST:
    """With statistics and position biases as a training leaves them."""
    torch.manual_seed(0)
    system = NEST(num_classes=16, encoder=TINY | (encoder or {}), **arguments).eval()
    for module in system.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if hasattr(module, "pos_bias_u"):
            module.pos_bias_u.data.normal_()
            module.pos_bias_v.data.normal_()
    return system


def runner(path: Path) -> Callable[..., list[np.ndarray]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> list[np.ndarray]:
        return session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})

    run.session = session  # type: ignore[attr-defined]
    return run


def test_from_features(script, in_tmp: Path) -> None:
    """Of an archive; the example has 100 frames: here are a single one and far more, alone and together."""
    build({"att_context_size": [12, 6], "use_bias": False, "conv_norm_type": "layer_norm"}).save_to("x.nemo")
    done = script("export", ["ckpt_path=x.nemo", "output=x.onnx"])
    assert done.code == 0 and "x.onnx: input of 3 x 80 x 333, largest difference from the original" in done.out, (
        done.text
    )
    system, run = load("x.nemo"), runner(Path("x.onnx"))
    assert [o.name for o in run.session.get_outputs()] == ["encoded", "encoded_length"]  # type: ignore[attr-defined]
    assert [i.shape for i in run.session.get_inputs()] == [["batch", 80, "frames"], ["batch"]]  # type: ignore[attr-defined]
    facts = run.session.get_modelmeta().custom_metadata_map  # type: ignore[attr-defined]
    assert facts == {"sample_rate": "16000", "frame_rate_hz": "12.5"}
    length = torch.tensor([1, 3000, 700])
    features = torch.randn(3, 80, 3000)
    together, num_frames = run(features, length)
    assert num_frames.tolist() == [1, 375, 88]
    for index, own in enumerate(length.tolist()):
        alone, _ = run(features[index : index + 1, :, :own], length[index : index + 1])
        with torch.inference_mode():
            expected, _ = system.encoder(features[index : index + 1, :, :own], length[index : index + 1])
        np.testing.assert_allclose(alone, expected, atol=2e-5)
        np.testing.assert_allclose(together[index : index + 1, :, : num_frames[index]], alone, atol=2e-5)


def test_from_samples(tmp_path: Path) -> None:
    """With layers of low rank. Silence has no level to be normalised to, yet what comes out is finite."""
    system = build({"subsampling_factor": 2})
    restructure(system, {"encoder.layers.0.feed_forward1.linear1": 3, "encoder.layers.0.conv.pointwise_conv1": 2})
    for name, weight in system.named_parameters():
        if name.endswith((".u", ".v")):
            weight.data.normal_(0, 0.3)
    network = system.exported_network(waveform=True)
    write_network(network, tmp_path / "x.onnx", opset=18)
    assert all(largest_difference(network.module, tmp_path / "x.onnx", inputs) < 1e-5 for inputs in network.sizes)
    run = runner(tmp_path / "x.onnx")
    audio, length = 0.1 * torch.randn(2, 70001), torch.tensor([70001, 9000])
    encoded, num_frames = run(audio, length)
    for index, own in enumerate(length.tolist()):
        expected = system.predict(audio[index, :own])["features"].T
        np.testing.assert_allclose(encoded[index, :, : num_frames[index]], expected, atol=2e-5)
    silence, _ = run(torch.zeros(1, 16000), torch.tensor([16000]))
    assert np.isfinite(silence).all()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("int8=true", "int8=true is for the segmentation of images and for echo cancellation, not for NEST"),
        ("waveform=3", "waveform must be true or false, got 3"),
    ],
)
def test_what_cannot_be_done(script, in_tmp: Path, typed: str, expected: str) -> None:
    build().save_to("x.nemo")
    done = script("export", ["ckpt_path=x.nemo", "output=x.onnx", typed])
    assert done.code == 2 and done.err == f"error: {expected}\n"
    assert not Path("x.onnx").exists()


def test_weights_that_one_file_cannot_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("launch.export._MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="its weights have 0.0 GB, an ONNX file holds 2"):
        write_network(build().exported_network(waveform=False), tmp_path / "x.onnx", opset=18)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "arguments"),
    [
        ({"att_context_size": [4, 1], "att_context_style": "chunked_limited", "conv_context_size": "causal"}, {}),
        ({"causal_downsampling": True, "subsampling_factor": 4, "untie_biases": False, "feat_out": 8}, {}),
        ({"conv_norm_type": "instance_norm", "xscaling": False}, {"preprocessor": {"normalize": "all_features"}}),
        ({"conv_norm_type": "group_norm4", "subsampling_factor": 1}, {"preprocessor": {"pad_to": "max"}}),
        ({"conv_norm_type": "fused_batch_norm"}, {"preprocessor": {"exact_pad": True, "window": "blackman"}}),
        ({}, {"mask_position": "post_conv", "preprocessor": {"pad_to": 0}}),
        ({"d_model": 512, "n_heads": 8, "n_layers": 17, "subsampling_conv_channels": 256}, {}),
    ],
    ids=["chunked", "causal", "instance_norm", "group_norm", "exact_pad", "post_conv", "default"],
)
@pytest.mark.parametrize("waveform", [False, True])
def test_other_networks(encoder: dict[str, Any], arguments: dict[str, Any], waveform: bool, tmp_path: Path) -> None:
    network = build(encoder, **arguments).exported_network(waveform=waveform)
    write_network(network, tmp_path / "x.onnx", opset=18)
    for inputs in network.sizes:
        assert largest_difference(network.module, tmp_path / "x.onnx", inputs) < 1e-4
