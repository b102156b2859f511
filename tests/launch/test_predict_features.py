"""predict.py on NEST: the features of encoder layers, of each file alone, bit for bit those of the Python API."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open

from models import load
from models.nest import NEST
from modules.conformer_layer import ConformerLayer

ENCODER = {"d_model": 16, "n_heads": 2, "n_layers": 3, "subsampling_conv_channels": 4, "ff_expansion_factor": 2}


def build(**encoder: Any) -> NEST:
    torch.manual_seed(0)
    return NEST(num_classes=16, encoder=ENCODER | encoder).eval()


@pytest.fixture
def archive(in_tmp: Path) -> Path:
    build().save_to(in_tmp / "x.nemo")
    return in_tmp / "x.nemo"


def write(name: str, num_samples: int, rate: int = 16000) -> np.ndarray:
    samples = 0.1 * np.random.default_rng(num_samples).standard_normal(num_samples).astype(np.float32)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(name, samples, rate, subtype="FLOAT")
    return samples


def test_a_folder_of_lengths(archive: Path, script) -> None:
    """The longest comes first: what it leaves behind in the encoder must not be seen in the others."""
    signals = {name: write(f"in/{name}.wav", count) for name, count in (("a", 60000), ("b/b", 9000), ("c", 160))}
    write("in/rate.wav", 8000, 8000)
    write("in/short.wav", 159)
    write("in/empty.wav", 0)
    done = script("predict", [f"ckpt_path={archive}", "input=in", "output=out"])
    assert done.code == 2 and "4 of 6 done" in done.out, done.text
    lines = done.err.splitlines()
    assert len(lines) == 2 and "in/empty.wav" in lines[0], done.err
    assert lines[1] == "error: in/short.wav: the recording is too short for a single frame"
    for name, samples in signals.items():
        found = torch.from_numpy(np.load(f"out/{name}_features.npy"))
        system, audio = load(archive), torch.from_numpy(samples)
        assert found.shape == (-(-(len(samples) // 160) // 8), 16) and found.isfinite().all()
        assert torch.equal(found, system.predict(audio, sample_rate=16000)["features"])
        with torch.inference_mode():
            encoded, length = load(archive).encode(audio[None], torch.tensor([len(samples)]))
        assert torch.equal(found, encoded[0, :, : int(length)].T)
    assert np.load("out/rate_features.npy").shape == (13, 16), "1 s at 12.5 frames"


def test_a_recording_that_the_memory_is_too_small_for(archive: Path, script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of torch's allocator on a CPU; the other files are done."""

    def attend(self: Any, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return x if x.shape[1] < 20 else torch.empty(1 << 60)

    monkeypatch.setattr(ConformerLayer, "forward", attend)
    write("in/a.wav", 48000)
    write("in/b.wav", 1600)
    done = script("predict", [f"ckpt_path={archive}", "input=in", "output=out"])
    assert done.code == 2 and "1 of 2 done" in done.out
    assert (
        done.err.startswith("error: in/a.wav: the device's memory is not enough; ") and len(done.err.splitlines()) == 1
    )


def test_several_layers(archive: Path, script) -> None:
    audio = torch.from_numpy(write("x.wav", 9000))
    typed = [f"ckpt_path={archive}", "input=x.wav"]
    one, several = load(archive), load(archive).predict(audio, layers=[3, 0, -2])["features"]
    assert script("predict", [*typed, "output=a", "layers=[3,0,-2]"]).code == 0
    assert torch.equal(torch.from_numpy(np.load("a/x_features.npy")), several)
    assert script("predict", [*typed, "output=b", "layers=[3,0,-2]", "format=safetensors"]).code == 0
    with safe_open("b/x_features.safetensors", "pt") as file:
        assert file.metadata() == {"frame_rate_hz": "12.5", "sample_rate": "16000", "layers": "3,0,2"}
        for index, number in enumerate((3, 0, 2)):
            tensor = file.get_tensor(f"layer_{number}")
            assert torch.equal(tensor, several[index])
            assert torch.equal(tensor, one.predict(audio, layers=number)["features"])
    assert script("predict", [*typed, "output=c", "layers=all", "dtype=float16"]).code == 0
    assert np.load("c/x_features.npy").dtype == np.float16
    half = one.predict(audio, layers=[1, 2, 3])["features"].half()
    assert torch.equal(torch.from_numpy(np.load("c/x_features.npy")), half)


def test_how_layers_are_counted() -> None:
    """From 1, behind norm_out; 0 enters the first; out_proj is one more."""
    system, seen = build(feat_out=8), []
    for layer in system.encoder.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    audio = torch.randn(2, 16000)
    found = system.predict(audio, layers=[0, 1, 2, 3])["features"]
    assert found.shape == (2, 4, 13, 16)
    expected = [seen[0][0], *(output for _, output in seen)]
    assert all(torch.equal(found[:, number], output[:, :13]) for number, output in enumerate(expected))
    assert torch.equal(found[:, 1:], system.predict(audio, layers="all")["features"])
    last = system.predict(audio)["features"]
    with torch.inference_mode():
        assert last.shape == (2, 13, 8) and torch.equal(last, system(audio)[:, :, :13].transpose(1, 2))
    both = system.predict(audio[0], layers=[3, 4], format="safetensors")["features"]
    assert [tuple(tensor.shape) for tensor in both.tensors.values()] == [(13, 16), (13, 8)]
    with pytest.raises(ValueError, match="layer 4 has another width than the others: format=safetensors takes both"):
        system.predict(audio, layers=[3, -1])


def test_what_float16_cannot_hold() -> None:
    system, audio = build(), torch.randn(1600)
    system.encoder.pre_encode.out.bias.data.fill_(1e5)
    assert system.predict(audio, layers=0)["features"].isfinite().all()
    with pytest.raises(ValueError, match="larger than float16 can say: dtype=float32 can"):
        system.predict(audio, layers=0, dtype="float16")


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("layers=[1,7]", "layers=[1,7]: there is no layer 7, the encoder has 0 to 3, or -1 to -4"),
        ("layers=-5", "layers=-5: there is no layer -5, the encoder has 0 to 3, or -1 to -4"),
        ("layers=[3,-1]", "layers=[3,-1]: give at least one layer, and each once"),
        ("layers=[]", "layers=[]: give at least one layer, and each once"),
        ("layers=[0.5]", "layers must be a whole number or a list of whole numbers or one of all, got [0.5]"),
        ("dtype=int8", "dtype must be one of float32, float16, got 'int8'"),
        ("format=mat", "format must be one of npy, safetensors, got 'mat'"),
    ],
)
def test_what_there_is_not(archive: Path, script, typed: str, reason: str) -> None:
    for name in ("in/x.wav", "in/y.wav"):
        write(name, 1600)
    done = script("predict", [f"ckpt_path={archive}", "input=in", "output=out", typed])
    assert done.code == 2 and done.err == f"error: {reason}\n"
