"""Frame by frame against the whole spectra at once."""

import pytest
import torch

from modules import low_rank
from modules.deepvqe import DeepVQE
from modules.deepvqe_stream import DeepVQEStream, WaveformStream, enhance_stream
from modules.stft import STFT

TINY = dict(
    num_bins=17, mic_channels=(3, 4, 5), far_channels=(2, 4), decoder_channels=(4, 3), gru_hidden=6, align_hidden=3,
    max_delay_frames=5, init_identity=False,
)  # fmt: skip
CASES = {
    "all": {},
    "inner decoder": {"residual": "inner_decoder"},
    "concat, norm on the mask": {"subpixel": "concat", "mask_norm": True},
    "masked start": {"align_mask_start": True},
    "temperature, no scale": {"align_temperature": 0.5, "align_scale": False, "compression": 0.5},
    "one far block, even bins": {"num_bins": 16, "far_channels": (4,)},
    "no far end": {"far_channels": ()},
    "a single delay": {"max_delay_frames": 1},
}
PRESETS = {
    "n320": {"num_bins": 161},
    "n512": {"num_bins": 257, "max_delay_frames": 63},
    "n480": {"num_bins": 241},
    "DeepVQE-S": {
        "num_bins": 161, "mic_channels": (16, 40, 56, 24), "far_channels": (8, 24), "decoder_channels": (40, 32, 32),
        "align_hidden": 8, "residual": "inner_decoder", "gru_hidden": 183,
    },
}  # fmt: skip


def build(dtype: torch.dtype = torch.float64, **arguments) -> DeepVQE:
    """A network in evaluation whose weights and statistics leave nothing at its default."""
    torch.manual_seed(0)
    network = DeepVQE(**arguments)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor += 0.3 * torch.randn_like(tensor)
            module.running_var.uniform_(0.5, 2)
    return network.to(dtype).eval()


def spectra(network: DeepVQE, num_frames: int, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    dtype = network.bottleneck.gru.weight_ih_l0.dtype
    return [torch.randn(batch, network.num_bins, num_frames, 2, dtype=dtype) for _ in range(2)]


def streamed(network: DeepVQE, mic: torch.Tensor, far: torch.Tensor | None) -> torch.Tensor:
    stream, frames = DeepVQEStream(network), []
    state = stream.initial_state(len(mic))
    for index in range(mic.shape[2]):
        frame, state = stream(mic[:, :, index], state, None if far is None else far[:, :, index])
        frames.append(frame)
    return torch.stack(frames, 2)


@torch.inference_mode()
@pytest.mark.parametrize("num_frames", [1, 13])
@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_of_the_whole(name: str, num_frames: int) -> None:
    network = build(**TINY | CASES[name])
    mic, far = spectra(network, num_frames)
    expected, _ = network(mic, far)
    torch.testing.assert_close(streamed(network, mic, far), expected, atol=1e-10, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("name", PRESETS)
def test_presets_in_float32(name: str) -> None:
    """As many frames as an odd length of a recording gives; 1e-4 on spectra of a standard deviation of one."""
    network = build(torch.float32, init_identity=False, **PRESETS[name])
    mic, far = spectra(network, 23, batch=1)
    expected, _ = network(mic, far)
    torch.testing.assert_close(streamed(network, mic, far), expected, atol=1e-4, rtol=0)
    num_convolutions = sum("conv" in state for state in DeepVQEStream(network).initial_state())
    assert num_convolutions == (12 if name == "DeepVQE-S" else 24)


@torch.inference_mode()
def test_state_is_what_later_frames_need() -> None:
    stream = DeepVQEStream(build(**TINY))
    state = stream.initial_state(3)
    assert {name: tuple(value.shape[1:]) for name, value in state.items()} == {
        "mic_encoder.0.conv": (2, 3, 17),
        "mic_encoder.0.residual.conv": (3, 3, 9),
        "mic_encoder.1.conv": (3, 3, 9),
        "mic_encoder.1.residual.conv": (4, 3, 5),
        "mic_encoder.2.conv": (8, 3, 5),
        "mic_encoder.2.residual.conv": (5, 3, 3),
        "far_encoder.0.conv": (2, 3, 17),
        "far_encoder.0.residual.conv": (2, 3, 9),
        "far_encoder.1.conv": (2, 3, 9),
        "far_encoder.1.residual.conv": (4, 3, 5),
        "decoder.0.residual.conv": (5, 3, 3),
        "decoder.0.subpixel.conv": (5, 3, 3),
        "decoder.1.residual.conv": (4, 3, 5),
        "decoder.1.subpixel.conv": (4, 3, 5),
        "decoder.2.residual.conv": (3, 3, 9),
        "decoder.2.subpixel.conv": (3, 3, 9),
        "alignment.key": (3, 4, 5),
        "alignment.far": (4, 20),
        "alignment.scores": (3, 4, 5),
        "bottleneck": (6,),
        "spectrum": (17, 2, 2),
    }
    before = {name: value.clone() for name, value in state.items()}
    mic, far = (signal[:, :, 0] for signal in spectra(stream.network, 1, batch=3))
    _, after = stream(mic, state, far)
    torch.testing.assert_close(state, before, atol=0, rtol=0)
    assert list(after) == list(state) and all(after[name].shape == value.shape for name, value in state.items())


@torch.inference_mode()
def test_switched_layers_run_too() -> None:
    network = build(**TINY)
    expected_names = list(DeepVQEStream(network).initial_state())
    for name in ("mic_encoder.1.conv", "decoder.1.residual.conv", "decoder.0.subpixel.conv", "bottleneck.linear"):
        low_rank.replace_layer(network, name, low_rank.factorised(network.get_submodule(name), 2))
    assert list(DeepVQEStream(network).initial_state()) == expected_names
    mic, far = spectra(network, 9)
    torch.testing.assert_close(streamed(network, mic, far), network(mic, far)[0], atol=1e-10, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("window", ["sqrt_hann", "hann"])
@pytest.mark.parametrize("name", ["all", "no far end"])
def test_samples_are_those_of_the_whole_recording(name: str, window: str) -> None:
    """Where it begins and ends with silence, which is its own reflection. Any length."""
    network, stft = build(torch.float32, **TINY | CASES[name]), STFT(n_fft=32, hop_samples=16, window=window)
    torch.manual_seed(1)
    for num_samples in (1, 48, 233):
        talks = (torch.arange(num_samples) > 16) & (torch.arange(num_samples) < num_samples - 17)
        signals = [torch.randn(2, num_samples) * talks for _ in range(1 if network.alignment is None else 2)]
        missing = -num_samples % 16
        spectrum, _ = network(*(stft(torch.nn.functional.pad(signal, (0, missing))) for signal in signals))
        expected = stft.inverse(spectrum, num_samples + missing)[:, :num_samples]
        actual = enhance_stream(network, stft, *signals)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_frames_of_two_hops_only() -> None:
    with pytest.raises(ValueError, match="frames of two hops, got 32 and 8"):
        WaveformStream(build(**TINY), STFT(n_fft=32, hop_samples=8))
