"""The pairs of benchmarks/peers.py: who is compared with whom, and how large networks and batches are."""

from typing import Any, NamedTuple


class Pair(NamedTuple):
    """Sides in the order in which they start; each of ours is compared with each of the others."""

    sides: tuple[str, ...]
    about: str
    sizes: dict[str, Any]
    quick: dict[str, Any]  # in place of some of these sizes
    times: int = 1  # jobs in a turn
    unit: str = "step"


FOREIGN = ("asteroid", "NeMo", "smp resnet18")  # sides that the Python of the peers runs
_DEEPVQE = {
    "batch": 1,
    "seconds": 4,
    "max_delay_ms": 1000.0,
    "mic_channels": [64, 128, 128, 128, 128],
    "far_channels": [32, 128],
    "decoder_channels": [128, 128, 128, 64],
    "gru_hidden": 512,
}
_QUICK_DEEPVQE = {
    "seconds": 0.5,
    "max_delay_ms": 100.0,
    "mic_channels": [4, 6, 6],
    "far_channels": [4],
    "decoder_channels": [6, 4],
    "gru_hidden": 8,
}
_LOADER = {"recordings": 12, "recording_s": 10.0, "batch": 8, "crop_s": 4.0}
_QUICK_LOADER = {"recordings": 4, "recording_s": 1.0, "batch": 2, "crop_s": 0.5}
_LOADERS = ("naive", "ours", "ours, nothing kept", "ours, nothing kept, 16 kHz copies")
PAIRS = {
    "conv_tasnet": Pair(
        ("torchaudio", "asteroid", "ours", "ours, compiled"),
        "512 filters of 16 samples, H 512, X 8, R 3, gLN, ReLU mask; 2 talkers at 8 kHz",
        {"batch": 2, "seconds": 2, "blocks": 8, "repeats": 3, "hidden": 512},
        {"seconds": 0.25, "blocks": 2, "repeats": 1, "hidden": 16},
    ),
    "nest": Pair(
        ("ours", "NeMo"),
        "experiment=nest_small, 16 kHz",
        {"batch": 8, "seconds": 12, "d_model": 176, "n_heads": 4, "n_layers": 16},
        {"batch": 2, "seconds": 3, "d_model": 32, "n_heads": 4, "n_layers": 1},
    ),
    "unet": Pair(
        ("plain UNet", "smp resnet18", "ours", "ours, compiled", "ours, bilinear"),
        "base 32, up=transposed as the plain UNet has it; bilinear is experiment=unet_base",
        {"batch": 4, "pixels": 256, "base": 32},
        {"batch": 1, "pixels": 64, "base": 8},
    ),
    "deepvqe": Pair(("ours", "literal"), "experiment=deepvqe_16k", _DEEPVQE, _QUICK_DEEPVQE),
    "deepvqe_alignment": Pair(
        ("ours", "literal"),
        "its soft alignment alone, forward and backward",
        {"batch": 1, "seconds": 4, "max_delay_ms": 1000.0, "channels": 128},
        {"seconds": 0.5, "max_delay_ms": 100.0, "channels": 8},
        times=3,
    ),
    "aec_loader": Pair(
        _LOADERS, "48 kHz recordings of 10 s to waveforms", _LOADER | {"spectra": False}, _QUICK_LOADER, 3, "example"
    ),
    "aec_loader_stft": Pair(_LOADERS, "the same, to spectra", _LOADER | {"spectra": True}, _QUICK_LOADER, 3, "example"),
}
