"""Weights of three public DeepVQE implementations in the names of `modules.deepvqe.DeepVQE`.

* rong: Xiaobin-Rong/deepvqe, noise suppression only. Its last decoder block normalises the mask (`mask_norm`).
* cmy: chen-ming-yang/cmy-deepvqe, echo cancellation, alignment scores as they are.
* richiejp: richiejp/deepvqe-ggml, echo cancellation, scores divided by the root of the number of bins and by a
  temperature that its files do not hold.

All of them join the halves of the sub-pixel convolution end to end (`subpixel: concat`) and count the delay axis from
the longest delay down; ours counts up from none, so the kernel that slides over it is flipped here. Pure functions of
dictionaries: who reads a file does so with `torch.load(weights_only=True)`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# A peer's block -> ours. Blocks are numbered from 1; `-`: from the output inwards, ours from the deepest outwards.
BLOCKS: dict[str, dict[str, str]] = {
    "rong": {"enblock": "mic_encoder", "bottle": "bottleneck", "deblock": "-decoder"},
    "cmy": {
        "mic_enc": "mic_encoder",
        "ref_enc": "far_encoder",
        "align_block": "alignment",
        "bottle": "bottleneck",
        "dec": "decoder",
    },
    "richiejp": {
        "mic_enc": "mic_encoder",
        "far_enc": "far_encoder",
        "align": "alignment",
        "bottleneck": "bottleneck",
        "dec": "-decoder",
    },
}
# A layer within a block; the same words in all three.
LAYERS = {
    "conv": "conv",
    "bn": "norm",
    "resblock.conv": "residual.conv",
    "resblock.bn": "residual.norm",
    "skip_conv": "skip",
    "deconv.conv": "subpixel.conv",
    "pconv_mic": "mic_projection",
    "pconv_ref": "far_projection",
    "conv.1": "score_conv",
    "gru": "gru",
    "fc": "linear",
}
# What the source's code does and its weights do not show, as arguments of our network.
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "rong": {"subpixel": "concat"},
    "cmy": {"subpixel": "concat", "align_scale": False, "align_temperature": 1.0},
    "richiejp": {"subpixel": "concat", "align_scale": True},
}
# What only a network of this source holds.
MARKS = {"ours": "mic_encoder.0.", "rong": "enblock1.", "cmy": "align_block.", "richiejp": "far_enc1."}
WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIX = re.compile(r"^((module|model|network|_orig_mod)\.)+")  # of DataParallel, a LightningModule, torch.compile
_KINDS = ("weight", "bias")
_ADAPTER = re.compile(r"skip_adapt(\d+)\.(weight|bias)")


def convert(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Renames a public network's weights to ours, whichever public network it is.

    *content*: a state dict, or what holds one under `state_dict`, `model_state_dict` or `model`.

    Returns the state dict and its source: `rong`, `cmy`, `richiejp`, or `ours`, which loses its prefixes only. Left
    out are the norm of a last block that does not use it (cmy, richiejp) and constants of the mask. Names that the
    source does not have stay as they are, for the caller to report. Differentiable with respect to the weights.

    Raises ValueError in one line for another model, and for weights of another form.
    """
    state = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    state = {_PREFIX.sub("", str(name)): value for name, value in state.items()}
    source = _recognise(state)
    if wrong := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
        raise ValueError(f"{wrong} is a {type(state[wrong]).__name__}, not a tensor")
    if source == "ours":
        return state, source
    state = {name: tensor for name, tensor in state.items() if not name.startswith("ccm.")}
    last = number_of_decoders(state)
    if source != "rong":  # neither code uses the norm of its last block, though it may hold one
        unused = f"dec{last if source == 'cmy' else 1}.bn."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    if source == "cmy":
        state = _fold_adapters(state)
    converted = {_our_name(name, source, last): tensor for name, tensor in state.items()}
    kernel = "alignment.score_conv.weight"
    if kernel in converted:
        if converted[kernel].ndim != 4:
            raise ValueError(f"{kernel} has shape {tuple(converted[kernel].shape)}, not (1, heads, time, delay)")
        converted[kernel] = converted[kernel].flip(-1)
    return converted, source


def _recognise(state: Mapping[str, Any]) -> str:
    for source, mark in MARKS.items():
        if any(name.startswith(mark) for name in state):
            return source
    names = ", ".join(list(state)[:5]) or "none at all"
    raise ValueError(
        f"no weights of a DeepVQE of ours, Xiaobin-Rong, chen-ming-yang or richiejp; the first names are: {names}"
    )


def number_of_decoders(state: Mapping[str, Any]) -> int:
    """Of a peer's state dict."""
    return max((int(match[1]) for name in state if (match := re.match(r"(?:dec|deblock)(\d{1,4})\.", name))), default=0)


def _our_name(name: str, source: str, num_decoders: int) -> str:
    block, _, rest = name.partition(".")
    layer, _, tensor = rest.rpartition(".")
    ours = our_block(block, source, num_decoders)
    return name if ours is None or layer not in LAYERS else f"{ours}.{LAYERS[layer]}.{tensor}"


def our_block(block: str, source: str, num_decoders: int) -> str | None:
    """Our name of a peer's block such as dec2, None if the peer has no such block."""
    match = re.fullmatch(r"([a-z_]+?)(\d{0,4})", block)
    ours = BLOCKS[source].get(match[1]) if match else None
    if match is None or ours is None or not match[2]:
        return ours
    number = num_decoders - int(match[2]) if ours.startswith("-") else int(match[2]) - 1
    return f"{ours.removeprefix('-')}.{number}"


def _fold_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """cmy's 1x1 convolution before a skip path whose channels differ, multiplied into the 1x1 of the skip path.

    W (A x + a) + b = (W A) x + (W a + b), and ours has one convolution.
    """
    folded = {name: tensor for name, tensor in state.items() if not _ADAPTER.fullmatch(name)}
    for number in sorted({match[1] for name in state if (match := _ADAPTER.fullmatch(name))}):
        names = [f"{layer}.{kind}" for layer in (f"skip_adapt{number}", f"dec{number}.skip_conv") for kind in _KINDS]
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"{missing[0]} is missing beside skip_adapt{number}")
        adapt, adapt_bias, skip, skip_bias = (state[name] for name in names)
        try:
            folded[names[2]] = torch.einsum("oi...,ic...->oc...", skip, adapt)  # (out, in, 1, 1)
            folded[names[3]] = skip[..., 0, 0] @ adapt_bias + skip_bias
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"skip_adapt{number}.weight does not fit {names[2]}") from error
    return folded


def arguments_of(state: Mapping[str, Tensor], source: str = "ours") -> dict[str, Any]:
    """The arguments of our network that weights under our names and their source tell, as YAML has them.

    *state*, *source*: of `convert`. What no weight shows is missing: num_bins, compression, max_delay_frames, and the
    temperature of richiejp's alignment.

    Raises ValueError for weights of a network that has not all of its parts.
    """
    try:
        return _arguments_of(state) | SETTINGS[source]
    except KeyError as error:
        raise ValueError(f"weights of no whole DeepVQE: {error} is missing") from error
    except IndexError as error:
        raise ValueError("weights of no DeepVQE: one of them has too few axes") from error


def _arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    mic, far, decoder = (_blocks(state, name) for name in ("mic_encoder", "far_encoder", "decoder"))
    if not (mic and decoder):
        raise KeyError("decoder" if mic else "mic_encoder")
    subpixel = [state[f"{block}.subpixel.conv.weight"].shape[0] // 2 for block in decoder]
    arguments: dict[str, Any] = {
        "mic_channels": [state[f"{block}.conv.weight"].shape[0] for block in mic],
        "far_channels": [state[f"{block}.conv.weight"].shape[0] for block in far],
        "decoder_channels": subpixel[:-1],
        "gru_hidden": state["bottleneck.gru.weight_hh_l0"].shape[1],
        "residual": "all" if f"{mic[0]}.residual.conv.weight" in state else "inner_decoder",
        "mask_norm": f"{decoder[-1]}.norm.weight" in state,
    }
    if far:
        arguments["align_hidden"] = state["alignment.score_conv.weight"].shape[1]
    return arguments


def _blocks(state: Mapping[str, Tensor], name: str) -> list[str]:
    """Its blocks, were they numbered without a gap: a number of the file's own choice is no length of a list."""
    numbers = {match[1] for key in state if (match := re.match(rf"{name}\.(\d+)\.", key))}
    return [f"{name}.{number}" for number in range(len(numbers))]
