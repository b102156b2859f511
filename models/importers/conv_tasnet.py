"""Weights and constructor arguments of two public Conv-TasNets in the names of `modules.conv_tasnet.ConvTasNet`.

* torchaudio: `torchaudio.models.ConvTasNet`, 2.x.
* asteroid: `asteroid.models.ConvTasNet`, 0.7, and the packages that its `serialize` writes.

Pure functions of dictionaries: who reads a file does so with `torch.load(weights_only=True)`. The peers' defaults
stand here because they are not ours: both mask with a sigmoid unless told otherwise.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# A peer's module -> ours; * is the number of a block.
MODULES: dict[str, dict[str, str]] = {
    "torchaudio": {
        "encoder": "encoder",
        "mask_generator.input_norm": "separator.input_norm",
        "mask_generator.input_conv": "separator.bottleneck",
        "mask_generator.conv_layers.*.conv_layers.0": "separator.blocks.*.expand",
        "mask_generator.conv_layers.*.conv_layers.1": "separator.blocks.*.expand_prelu",
        "mask_generator.conv_layers.*.conv_layers.2": "separator.blocks.*.expand_norm",
        "mask_generator.conv_layers.*.conv_layers.3": "separator.blocks.*.depthwise",
        "mask_generator.conv_layers.*.conv_layers.4": "separator.blocks.*.depthwise_prelu",
        "mask_generator.conv_layers.*.conv_layers.5": "separator.blocks.*.depthwise_norm",
        "mask_generator.conv_layers.*.res_out": "separator.blocks.*.residual",
        "mask_generator.conv_layers.*.skip_out": "separator.blocks.*.skip",
        "mask_generator.output_prelu": "separator.mask_prelu",
        "mask_generator.output_conv": "separator.mask_conv",
        "decoder": "decoder",
    },
    "asteroid": {
        "encoder.filterbank": "encoder",
        "masker.bottleneck.0": "separator.input_norm",
        "masker.bottleneck.1": "separator.bottleneck",
        "masker.TCN.*.shared_block.0": "separator.blocks.*.expand",
        "masker.TCN.*.shared_block.1": "separator.blocks.*.expand_prelu",
        "masker.TCN.*.shared_block.2": "separator.blocks.*.expand_norm",
        "masker.TCN.*.shared_block.3": "separator.blocks.*.depthwise",
        "masker.TCN.*.shared_block.3.0": "separator.blocks.*.depthwise",  # causal: a cut follows it there
        "masker.TCN.*.shared_block.4": "separator.blocks.*.depthwise_prelu",
        "masker.TCN.*.shared_block.5": "separator.blocks.*.depthwise_norm",
        "masker.TCN.*.res_conv": "separator.blocks.*.residual",
        "masker.TCN.*.skip_conv": "separator.blocks.*.skip",
        "masker.mask_net.0": "separator.mask_prelu",
        "masker.mask_net.1": "separator.mask_conv",
        "decoder.filterbank": "decoder",
    },
}
TENSORS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "_filters": "weight"}
# What only a network of this source holds.
MARKS = {"torchaudio": "mask_generator.conv_layers.", "asteroid": "masker.TCN.", "ours": "separator.blocks."}
_PREFIX = re.compile(r"^((module|model)\.)+")  # of DataParallel, of a LightningModule
_BLOCK = re.compile(r"(?<=mask_generator\.conv_layers\.)\d+|(?<=masker\.TCN\.)\d+")

TORCHAUDIO_DEFAULTS: dict[str, Any] = {
    "num_sources": 2, "enc_kernel_size": 16, "enc_num_feats": 512, "msk_kernel_size": 3, "msk_num_feats": 128,
    "msk_num_hidden_feats": 512, "msk_num_layers": 8, "msk_num_stacks": 3, "msk_activate": "sigmoid",
}  # fmt: skip
ASTEROID_DEFAULTS: dict[str, Any] = {
    "n_src": None, "out_chan": None, "n_blocks": 8, "n_repeats": 3, "bn_chan": 128, "hid_chan": 512,
    "skip_chan": 128, "conv_kernel_size": 3, "norm_type": "gLN", "mask_act": "sigmoid", "in_chan": None,
    "causal": False, "fb_name": "free", "kernel_size": 16, "n_filters": 512, "stride": 8,
    "encoder_activation": None, "sample_rate": 8000, "who_is_pinv": None, "padding": 0, "output_padding": 0,
}  # fmt: skip
ASTEROID_NORMS = {"gLN": "global", "cgLN": "cumulative", "cLN": "per_frame"}
MASKS = {name: name for name in ("relu", "sigmoid", "softmax", "linear")}


def convert(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Renames a public network's weights to ours, whichever public network it is.

    *content*: a state dict, or what holds one under `state_dict` (asteroid's package, a Lightning checkpoint).

    Returns the state dict and its source: `torchaudio`, `asteroid`, or `ours`, which passes through as it is. The
    last block's residual branch, which asteroid stores and never uses beside a skip path, is left out. Names that
    the source does not have stay as they are, for the caller to report.

    Raises ValueError in one line for another model, and for names of no source.
    """
    state = content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content
    if (model := content.get("model_name", "ConvTasNet")) != "ConvTasNet":
        raise ValueError(f"weights of a {model}; only those of a ConvTasNet can be imported")
    source = _recognise(state)
    if source == "ours":
        return dict(state), source
    converted = {}
    for name, tensor in state.items():
        ours = _our_name(str(name), MODULES[source])
        if ours is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, not a tensor")
        converted[ours or name] = tensor if ours is None else _reshape(ours, tensor)
    return _without_unused_residual(converted), source


def _recognise(state: Mapping[str, Any]) -> str:
    for source, mark in MARKS.items():
        if any(mark in str(name) for name in state):
            return source
    names = ", ".join(str(name) for name in list(state)[:5]) or "none at all"
    raise ValueError(f"no weights of a Conv-TasNet of ours, torchaudio or asteroid; the first names are: {names}")


def _our_name(name: str, modules: Mapping[str, str]) -> str | None:
    module, _, tensor = _PREFIX.sub("", name).rpartition(".")
    block = _BLOCK.search(module)
    ours = modules.get(_BLOCK.sub("*", module))
    if ours is None or tensor not in TENSORS:
        return None
    return f"{ours.replace('*', block[0] if block else '')}.{TENSORS[tensor]}"


def _reshape(name: str, tensor: Tensor) -> Tensor:
    """Without the axes of length one that other versions carry: a gain of (1, C, 1), filters of (N, 1, 1, L)."""
    if name in ("encoder.weight", "decoder.weight") and tensor.ndim > 1:
        return tensor.reshape(tensor.shape[0], 1, -1)  # (N, 1, L)
    if name.endswith(".bias") or "norm." in name or "prelu." in name:
        return tensor.reshape(-1)  # (channels,)
    return tensor


def _without_unused_residual(state: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = [int(match[1]) for name in state if (match := re.match(r"separator\.blocks\.(\d+)\.skip\.", name))]
    unused = f"separator.blocks.{max(blocks)}.residual." if blocks else None
    return {name: tensor for name, tensor in state.items() if unused is None or not name.startswith(unused)}


def torchaudio_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our network that equals torchaudio's `ConvTasNet(**arguments)`.

    Raises ValueError that names the argument and the value that has no counterpart.
    """
    given = _with_defaults("torchaudio", arguments, TORCHAUDIO_DEFAULTS)
    if given["msk_kernel_size"] != 3:
        raise ValueError(
            f"torchaudio's ConvTasNet: msk_kernel_size {given['msk_kernel_size']!r} cannot be imported, "
            "its padding there fits a kernel of 3 only"
        )
    return {
        "num_sources": given["num_sources"],
        "num_filters": given["enc_num_feats"],
        "kernel_size": given["enc_kernel_size"],
        "stride": None,
        "bottleneck_channels": given["msk_num_feats"],
        "hidden_channels": given["msk_num_hidden_feats"],
        "skip_channels": given["msk_num_feats"],
        "block_kernel_size": given["msk_kernel_size"],
        "num_blocks": given["msk_num_layers"],
        "num_repeats": given["msk_num_stacks"],
        "norm": "global",
        "mask": _translate("torchaudio", given, "msk_activate", {"relu": "relu", "sigmoid": "sigmoid"}),
        "causal": False,
        "padding": "centered",
        "encoder_activation": "linear",
    }


def asteroid_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of our network that equals asteroid's `ConvTasNet(**arguments)`.

    `sample_rate` is left out: it changes nothing in the network. A causal network with a norm that looks ahead gets
    `cLN`, as asteroid does.

    Raises ValueError that names the argument and the value that has no counterpart.
    """
    given = _with_defaults("asteroid", arguments, ASTEROID_DEFAULTS)
    free = {name: name for name in ("free", "FreeFB")}  # learned filters, as typed and as serialised
    unchanged = {None: None, given["n_filters"]: given["n_filters"]}
    for key, known in {
        "fb_name": free, "in_chan": unchanged, "out_chan": unchanged, "who_is_pinv": {None: None},
        "padding": {0: 0}, "output_padding": {0: 0},
    }.items():  # fmt: skip
        _translate("asteroid", given, key, known)
    norm = _translate("asteroid", given, "norm_type", ASTEROID_NORMS)
    return {
        "num_sources": given["n_src"],
        "num_filters": given["n_filters"],
        "kernel_size": given["kernel_size"],
        "stride": given["stride"] or None,
        "bottleneck_channels": given["bn_chan"],
        "hidden_channels": given["hid_chan"],
        "skip_channels": given["skip_chan"] or None,
        "block_kernel_size": given["conv_kernel_size"],
        "num_blocks": given["n_blocks"],
        "num_repeats": given["n_repeats"],
        "norm": "per_frame" if given["causal"] and norm == "global" else norm,
        "mask": _translate("asteroid", given, "mask_act", MASKS),
        "causal": bool(given["causal"]),
        "padding": "valid",
        "encoder_activation": _translate(
            "asteroid", given, "encoder_activation", {None: "linear", "linear": "linear", "relu": "relu"}
        ),
    }


def _with_defaults(peer: str, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(arguments) - set(defaults)):
        named = ", ".join(f"{key}={arguments[key]!r}" for key in unknown)
        raise ValueError(f"{peer}'s ConvTasNet: no counterpart of {named}; known are {', '.join(defaults)}")
    given = {**defaults, **arguments}
    if given.get("n_src", 1) is None:
        raise ValueError(f"{peer}'s ConvTasNet: n_src is missing")
    return given


def _translate(peer: str, given: Mapping[str, Any], key: str, known: Mapping[Any, Any]) -> Any:
    if given[key] not in list(known):  # of the mapping itself, a list would be a TypeError
        allowed = ", ".join(str(value) for value in known)
        raise ValueError(f"{peer}'s ConvTasNet: {key} {given[key]!r} has no counterpart; known are {allowed}")
    return known[given[key]]
