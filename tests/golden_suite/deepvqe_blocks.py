"""Golden cases of DeepVQE's parts: `<block>.{in,out,sd.*}`, the alignment, the STFT, the mixing of an example.

Blocks are Xiaobin-Rong's, the alignment is also chen-ming-yang's (`plain`) and richiejp's (`scaled_t<temperature>`).
Their delay axis runs from the longest delay to none.
"""

import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.echo_levels import gain_for_ratio_db, rms
from data.echo_path import convolve, delay
from data.loudspeaker import hard_clip, sigmoid_distortion
from models.importers.deepvqe import LAYERS
from modules.alignment import SoftAlignment
from modules.complex_mask import complex_convolving_mask
from modules.deepvqe import Bottleneck, DecoderBlock, EncoderBlock, ResidualBlock, SubpixelConv, compress_spectrum
from modules.stft import STFT
from tests.golden_suite.reference import Kind, Reference, close
from tests.golden_suite.suite import Check, GoldenError

BLOCK = 1e-5  # absolute plus relative
Module = TypeVar("Module", bound=nn.Module)
WINDOWS = {"sqrthann": "sqrt_hann", "hann": "hann"}


def _load(module: Module, peer: dict[str, Tensor]) -> Module:
    """A module of ours with a peer's weights."""
    state = {}
    for name, tensor in peer.items():
        layer, _, leaf = name.rpartition(".")
        state[f"{LAYERS.get(layer, layer)}.{leaf}"] = tensor.flip(-1) if name == "conv.1.weight" else tensor
    own = {name: tensor for name, tensor in module.state_dict().items() if name == "temperature"}
    try:
        module.load_state_dict(state | own)
    except RuntimeError as error:
        raise GoldenError(f"{type(module).__name__}: {error}") from error
    return module.eval()


# Blocks


@torch.no_grad()
def _blocks(reference: Reference, check: Check) -> None:
    for name in sorted({key.partition(".out")[0] for key in reference if key.endswith(".out")}):
        # Of one block or mask there may be several outputs: subpixel_interleave and subpixel, ccm_tap0 and ccm.
        kind = next((kind for kind in BLOCKS if name.startswith(kind)), None)
        if kind is None:
            raise GoldenError(f"{reference.path}: no case knows the block {name}")
        close(check, name, BLOCKS[kind](reference, name), reference[f"{name}.out"], tolerance=BLOCK)


def _features(reference: Reference, name: str) -> Tensor:
    return compress_spectrum(reference[f"{name}.in"], float(name.removeprefix("fe_c")))


def _residual(reference: Reference, name: str) -> Tensor:
    x = reference[f"{name}.in"]
    return _load(ResidualBlock(x.shape[1]), reference.group(f"{name}.sd."))(x)


def _encoder(reference: Reference, name: str) -> Tensor:
    x, peer = reference[f"{name}.in"], reference.group(f"{name}.sd.")
    return _load(EncoderBlock(x.shape[1], peer["conv.weight"].shape[0]), peer)(x)


def _bottleneck(reference: Reference, name: str) -> Tensor:
    x, peer = reference[f"{name}.in"], reference.group(f"{name}.sd.")
    return _load(Bottleneck(x.shape[1] * x.shape[3], peer["gru.weight_hh_l0"].shape[1]), peer)(x)


def _subpixel(reference: Reference, name: str) -> Tensor:
    subpixel = "interleave" if name.endswith("_interleave") else "concat"
    weights = name.removesuffix("_interleave")
    x, peer = reference[f"{weights}.in"], reference.group(f"{weights}.sd.")
    return _load(SubpixelConv(x.shape[1], peer["conv.weight"].shape[0] // 2, subpixel=subpixel), peer)(x)


def _decoder(reference: Reference, name: str) -> Tensor:
    x, skip = reference[f"{name}.in"], reference[f"{name}.in_skip"]
    peer = reference.group(f"{name}.sd.")
    if last := name.endswith("_last"):  # holds a norm that it does not use
        peer = {key: tensor for key, tensor in peer.items() if not key.startswith("bn.")}
    channels = peer["deconv.conv.weight"].shape[0] // 2
    block = DecoderBlock(x.shape[1], channels, skip_channels=skip.shape[1], subpixel="concat", norm=not last)
    return _load(block, peer)(x, skip)


def _mask(reference: Reference, name: str) -> Tensor:
    spectrum = reference["ccm.in_x"][: reference[f"{name}.out"].shape[0]]
    if f"{name}.in_mask" in reference:
        mask = reference[f"{name}.in_mask"]
    else:  # ccm_tap<channel>: 1 in that channel
        batch, num_bins, num_frames, _ = spectrum.shape
        mask = torch.zeros(batch, 27, num_frames, num_bins)
        mask[:, int(name.removeprefix("ccm_tap"))] = 1
    return complex_convolving_mask(mask, spectrum)


BLOCKS = {
    "fe_c": _features,
    "residual": _residual,
    "encoder": _encoder,
    "bottleneck": _bottleneck,
    "subpixel": _subpixel,
    "decoder": _decoder,
    "ccm": _mask,
}


# Alignment


@torch.no_grad()
def _alignment(reference: Reference, check: Check) -> None:
    distribution = next((name for name in reference if name.endswith(".delay_dist")), None)
    if distribution is None:
        raise GoldenError(f"{reference.path}: no delay_dist, whose last axis is the number of delays")
    num_delays = reference[distribution].shape[-1]
    for variant in sorted({name.partition(".out")[0] for name in reference if name.endswith(".out")}):
        # Variants of one network share its weights.
        weights = next((name for name in (variant, "plain") if f"{name}.sd.conv.1.weight" in reference), None)
        if weights is None:
            raise GoldenError(f"{reference.path}: no weights for {variant}")
        peer = reference.group(f"{weights}.sd.")
        temperature = re.search(r"_t([\d.]+)$", variant)
        num_frames = reference[f"{variant}.out"].shape[2]
        mic, far = (reference[name][:, :, :num_frames] for name in ("in_mic", "in_far"))
        block = SoftAlignment(
            mic_channels=mic.shape[1],
            far_channels=far.shape[1],
            hidden_channels=peer["pconv_mic.weight"].shape[0],
            max_delay_frames=num_delays,
            scale=variant.startswith("scaled"),
            temperature=float(temperature[1]) if temperature else 1.0,
        )
        outputs = _align(_load(block, peer), mic, far)
        for name, actual in outputs.items():
            if f"{variant}.{name}" in reference:
                close(check, f"{variant}.{name}", actual, reference[f"{variant}.{name}"], tolerance=BLOCK)


def _align(block: SoftAlignment, mic: Tensor, far: Tensor) -> dict[str, Tensor]:
    """Everything that a file may hold of an alignment, its delays from the longest to none."""
    seen: dict[str, Any] = {}
    handle = block.score_conv.register_forward_hook(
        lambda _module, inputs, output: seen.update({"scores": inputs[0], "logits": output})
    )
    aligned, distribution = block(mic, far)
    handle.remove()
    return {
        "out": aligned,
        "delay_dist": distribution.flip(-1),
        "logit": seen["logits"][:, 0, : mic.shape[2]].flip(-1),  # without the frames that padding adds behind
        "score_bhtd": seen["scores"].flip(-1),
    }


# STFT


def _stft(reference: Reference, check: Check) -> None:
    x = reference["x"]
    for name in [name for name in reference if name.startswith("X_")]:
        n_fft, hop_samples, window = name.removeprefix("X_").split("_")
        if window not in WINDOWS:
            raise GoldenError(f"{reference.path}: no case knows the window of {name}")
        stft = STFT(n_fft=int(n_fft), hop_samples=int(hop_samples), window=WINDOWS[window])
        close(check, name, stft(x), reference[name], tolerance=BLOCK)
        if (back := name.replace("X_", "rt_", 1)) in reference:
            close(check, back, stft.inverse(reference[name], x.shape[-1]), reference[back], tolerance=BLOCK)


# Mixing


def _mixing(reference: Reference, check: Check) -> None:
    """A loudspeaker, a room, a delay, and the levels of echo and noise against the near end, RMS over the whole clip.

    Relative to the peak: the peer's convolution by FFT in float32 is off by that everywhere.
    """
    names = ("far", "rir", "near", "noise")
    far, rir, near, noise = (reference[name].double().numpy() for name in names)
    what = reference.metadata.get("what", "")
    share, gain = (re.search(pattern, what) for pattern in (r"clip\(([\d.]+)", r"gain ([\d.]+)"))
    played = sigmoid_distortion(hard_clip(far, float(share[1]) if share else 0.8), float(gain[1]) if gain else 4.0)
    late = delay(convolve(reference["far_nl"].double().numpy(), rir), float(reference.metadata["delay_samples"]))
    ser_db, snr_db = (float(reference.metadata[name]) for name in ("ser_db", "snr_db"))
    echo = late * gain_for_ratio_db(near, late, ratio_db=ser_db, level=rms)
    scaled_noise = noise * gain_for_ratio_db(near, noise, ratio_db=snr_db, level=rms)
    for name, actual in {
        "far_nl": played,
        "echo_delayed": late,
        "echo_scaled": echo,
        "noise_scaled": scaled_noise,
        "mic": near + echo + scaled_noise,
    }.items():
        check.close(name, torch.from_numpy(actual), reference[name], tolerance=BLOCK, relative=True)


KINDS = (
    Kind(lambda names: "in_mic" in names and "in_far" in names, _alignment),
    Kind(lambda names: any(re.fullmatch(r"X_\d+_\d+_\w+", name) for name in names), _stft),
    Kind(lambda names: "rir" in names, _mixing),
    Kind(lambda names: any(name.startswith(kind) for name in names for kind in BLOCKS), _blocks),
)
