"""NEST's sections: NeMo's keys for every part, completed from one another and checked before anything is built."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from models.optim import is_number
from modules.block_masking import RandomBlockMasking
from modules.conformer import ConformerEncoder
from modules.mel import MelPreprocessor
from modules.quantizer import RandomProjectionVectorQuantizer
from modules.softmax_decoder import MultiSoftmaxDecoder

log = logging.getLogger(__name__)

PARTS: dict[str, type[nn.Module]] = {
    "preprocessor": MelPreprocessor,
    "masking": RandomBlockMasking,
    "quantizer": RandomProjectionVectorQuantizer,
    "encoder": ConformerEncoder,
    "decoder": MultiSoftmaxDecoder,
}
# What NeMo's classes take beside, and at which values it changes nothing here.
_ASKS_FOR_NOTHING = (
    ("reduction_factor", 1),
    ("subsampling_conv_chunking_factor", 1),
    ("use_torchaudio", False),
    ("global_tokens", 0),
    ("global_tokens_spacing", 1),
    ("global_attn_separate", False),
    ("conv_dual_mode", False),
    ("conv_context_style", "regular"),
    *((key, value) for key in ("sync_max_audio_length", "use_pytorch_sdpa") for value in (True, False)),
)


def _defaults(cls: type[nn.Module]) -> dict[str, Any]:
    """Of every argument; None of one that follows from other sections."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


_DEFAULTS: dict[str, dict[str, Any]] = {name: _defaults(cls) for name, cls in PARTS.items()} | {
    "spec_augment": {"freq_masks": 0, "time_masks": 0, "freq_width": 27, "time_width": 0.05},
    "loss": dict.fromkeys(("combine_time_steps", "num_decoders", "squeeze_single"))
    | {"mask_threshold": 0.8, "reduce": "global"},
}
_DEFAULTS["masking"] |= {"block_size": 40, "mask_prob": 0.01, "allow_overlap": True}  # of NEST, not of the class
_DEFAULTS["decoder"] |= {"use_bias": True}


def build_part(name: str, sections: dict[str, dict[str, Any]]) -> Any:
    """A part from its section; ValueError with the section's name in front."""
    try:
        return PARTS[name](**sections[name])
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def complete_sections(
    given: dict[str, dict[str, Any] | None],
    *,
    sample_rate: int,
    num_classes: int,
    num_books: int,
    code_dim: int,
    squeeze_single: bool,
    mask_position: str,
) -> dict[str, dict[str, Any]]:
    """Every part's section with all of its keys, what follows from other sections filled in. Counts mel frames.

    Raises ValueError for an unknown key, and for values that do not fit together.
    """
    sections = {name: _known(name, section or {}) for name, section in given.items()}
    if mask_position == "post_conv":
        sections = _as_before_nemo_rewrote_them(sections)
    features = sections["preprocessor"].get("features", _DEFAULTS["preprocessor"]["features"])
    encoder = _DEFAULTS["encoder"] | {"feat_in": features} | sections["encoder"]
    width, factor = encoder["d_model"], encoder["subsampling_factor"]
    if not isinstance(encoder["feat_out"] or -1, int):
        raise ValueError(f"encoder.feat_out must be a whole number, or -1 for d_model, got {encoder['feat_out']!r}")
    encoder["feat_out"] = encoder["feat_out"] or -1
    books = {"num_classes": num_classes, "squeeze_single": squeeze_single}
    follows: dict[str, dict[str, Any]] = {
        "preprocessor": {"sample_rate": sample_rate},
        "spec_augment": {},
        "masking": {"feat_in": features},
        "quantizer": books | {"feat_in": features, "code_dim": code_dim, "num_books": num_books},
        "encoder": {"feat_in": features},
        "decoder": books
        | {"feat_in": encoder["feat_out"] if encoder["feat_out"] > 0 else width, "num_decoders": num_books},
        "loss": {"combine_time_steps": factor, "squeeze_single": squeeze_single, "num_decoders": num_books},
    }
    if mask_position == "pre_conv":
        follows["quantizer"] |= {"combine_time_steps": factor}
    for name, values in follows.items():
        for key, value in values.items():
            if sections[name].get(key, value) != value:
                raise ValueError(f"{name}.{key}={sections[name][key]} does not fit the other sections: it is {value}")
    sections["encoder"] = encoder
    complete = {name: _DEFAULTS[name] | sections[name] | follows[name] for name in follows}
    if mask_position == "post_conv":  # NeMo does not follow here, and would join sub-sampled frames once more
        complete["quantizer"]["combine_time_steps"] = 1
    _check_loss(complete["loss"])
    if masks := [key for key in ("freq_masks", "time_masks") if complete["spec_augment"][key]]:
        log.warning("model.spec_augment.%s has no effect: NEST never applies it, in NeMo neither", masks[0])
    pad_to = complete["preprocessor"]["pad_to"]
    if mask_position == "pre_conv" and isinstance(pad_to, int) and (pad_to < 1 or pad_to % factor):
        raise ValueError(f"preprocessor.pad_to must be a multiple of encoder.subsampling_factor={factor}, got {pad_to}")
    if complete["quantizer"]["time_ahead"]:
        raise ValueError("quantizer.time_ahead must be false: features come with time last")
    return complete


def after_subsampling(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sections of a network that masks sub-sampled frames, counting those."""
    width, factor = sections["encoder"]["d_model"], sections["encoder"]["subsampling_factor"]
    block_size = max(1, sections["masking"]["block_size"] // factor)
    return sections | {
        "masking": sections["masking"] | {"feat_in": width, "block_size": block_size},
        "quantizer": sections["quantizer"] | {"feat_in": width},
        "loss": sections["loss"] | {"combine_time_steps": 1},
    }


def _as_before_nemo_rewrote_them(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """NeMo saves what `after_subsampling` makes (and rewrites it once more when it reads it)."""
    encoder = _DEFAULTS["encoder"] | sections["encoder"]
    if sections["loss"].get("combine_time_steps") != 1 or sections["masking"].get("feat_in") != encoder["d_model"]:
        return sections
    without = ("feat_in", "combine_time_steps")
    plain = {name: {k: v for k, v in section.items() if k not in without} for name, section in sections.items()}
    if "block_size" in plain["masking"]:
        plain["masking"]["block_size"] *= encoder["subsampling_factor"]
    return plain


def _known(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The section without `_target_` and what NeMo has and ours has not, as long as it asks for nothing."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a section with keys of its own, got {given!r}")
    known = _DEFAULTS[name]
    nothing = {key for key, value in given.items() if value is None or (key, value) in _ASKS_FOR_NOTHING}
    arguments = {key: value for key, value in given.items() if key in known or key not in {"_target_", *nothing}}
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"{name}.{unknown[0]}: no such key; {name} has {', '.join(known)}")
    return arguments


def _check_loss(loss: dict[str, Any]) -> None:
    if loss["reduce"] not in ("global", "local"):
        raise ValueError(f"loss.reduce must be global or local, got {loss['reduce']!r}")
    threshold = loss["mask_threshold"]
    if not is_number(threshold) or not 0 <= threshold < 1:
        raise ValueError(f"loss.mask_threshold must be a number from 0 to below 1, got {threshold!r}")
