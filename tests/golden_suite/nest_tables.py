"""Tables and archives of NeMo's: learning rates, statistics of masks, sizes and names of the networks, `.nemo`."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from models.checkpoint import CheckpointError, read_plain
from models.nest import ARCHITECTURE, NEST
from models.optim import build_schedule
from modules.block_masking import RandomBlockMasking
from tests.golden_suite.nest_model import LOG_PROBS, build, compare_tokens, described, load, read
from tests.golden_suite.suite import ROOT, Check, GoldenError, read_json

STANDARD_ERRORS = 4.0
MOST_ABOVE = 14  # items; as likely as four standard errors
MAX_DRAWS = 1_000_000  # random numbers per line of a table

# Learning rates


def schedule(path: Path, check: Check) -> None:
    """A first line that ends in the arguments as JSON, then step and rate."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    try:
        said = json.loads(first[first.index("{") :])
    except ValueError as error:
        raise GoldenError(f"{path}: no arguments in the first line ({error})") from error
    if "warmup" in said:
        said["warmup_steps"] = said.pop("warmup")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=said.pop("lr"))
    built = build_schedule(optimizer, said.pop("max_steps", 500_000), name="NoamAnnealing", **said)
    assert built is not None
    scheduler, now = built["scheduler"], 0
    for step, rate in (line.split(",") for line in lines if line.strip()):
        if int(step) > now:
            scheduler.last_epoch = int(step) - 1  # the rate is a function of the step alone
            optimizer.step()
            scheduler.step()
            now = int(step)
        check.close(f"rate of step {step}", optimizer.param_groups[0]["lr"] / float(rate), 1.0, tolerance=1e-9)


# Masks


def mask_statistics(path: Path, check: Check) -> None:
    """Our own draws against NeMo's, within four standard errors of the difference."""
    for name, expected in read_json(path).items():
        _compare_masks(name, _draw(expected, expected["cfg"]), expected, check)


def old_mask_statistics(path: Path, check: Check) -> None:
    """Those of NeMo 2.5-dev, by what they differ from ours, which are 3.0.0's.

    With overlap, the last frame that has room for a block starts none there: as if items were a frame shorter. And of
    items of up to a block and a quarter always the first eight frames are masked; ours have no mask with the
    probability that no frame starts a block. Without overlap there is no difference.
    """
    for name, expected in read_json(path).items():
        settings, num_frames = expected["cfg"], expected["T"]
        if settings["allow_overlap"] and settings["block_size"] >= 0.8 * num_frames:
            check.close(f"{name}: eight frames", expected["mean_fraction"], 8 / num_frames, tolerance=1e-6)
            check.equal(f"{name}: none without a mask", expected["frac_unmasked_samples"], 0.0)
            num_starts = max(0, num_frames - settings["block_size"] + 1)
            unmasked = ~_draw(expected, settings).any(1)
            share = (1 - settings["mask_prob"]) ** num_starts
            error = math.sqrt(share * (1 - share) / len(unmasked))
            _within(check, f"{name}: ours without a mask", unmasked.double().mean().item(), share, error)
        else:
            shorter = 1 if settings["allow_overlap"] else 0
            _compare_masks(name, _draw(expected, settings, shorter=shorter), expected, check)


def _draw(expected: dict[str, Any], settings: dict[str, Any], *, shorter: int = 0) -> Tensor:
    num_frames = expected["T"]
    num_items = min(expected["samples"], MAX_DRAWS // num_frames)
    length = torch.full((num_items,), num_frames - shorter)
    return RandomBlockMasking(feat_in=1, **settings).draw(num_frames, length, torch.arange(num_items))


def _compare_masks(name: str, mask: Tensor, expected: dict[str, Any], check: Check) -> None:
    fraction = mask.double().mean(1)
    exact = expected["stderr"] < 1e-6  # each item has the same
    ours = fraction.std().item() / math.sqrt(len(mask))
    _within(
        check, f"{name}: mean_fraction", fraction.mean().item(), expected["mean_fraction"], expected["stderr"], ours
    )
    _compare_share(check, f"{name}: frac_unmasked_samples", fraction == 0, expected["frac_unmasked_samples"], expected)
    if "std_fraction" in expected:
        # The standard error of a standard deviation, from the fourth moment of ours.
        centred, spread = fraction - fraction.mean(), fraction.std().item()
        error = 0.0 if exact else (((centred**4).mean().item() - spread**4) / (4 * spread**2 * len(mask))) ** 0.5
        theirs = error * math.sqrt(len(mask) / expected["samples"])
        _within(check, f"{name}: std_fraction", spread, expected["std_fraction"], theirs, error)
    if exact:
        check.close(f"{name}: max_fraction", fraction.max(), expected["mean_fraction"], tolerance=1e-6)
    elif "max_fraction" in expected:
        # With no more items than theirs, that k of ours are above their largest has a probability of at most 2^-k.
        num_above = (fraction > expected["max_fraction"] + 1e-6).sum()
        check.close(f"{name}: number of items above max_fraction", num_above, 0.0, tolerance=MOST_ABOVE)
    for position, share in expected.get("per_position_prob", {}).items():
        _compare_share(check, f"{name}: frame {position}", mask[:, int(position)], share, expected)


def _compare_share(check: Check, what: str, ours: Tensor, share: float, expected: dict[str, Any]) -> None:
    actual = ours.double().mean().item()
    pooled = (actual * len(ours) + share * expected["samples"]) / (len(ours) + expected["samples"])
    spread = math.sqrt(max(0.0, pooled * (1 - pooled)))
    _within(check, what, actual, share, spread / math.sqrt(expected["samples"]), spread / math.sqrt(len(ours)))


def _within(check: Check, what: str, actual: float, expected: float, *errors: float) -> None:
    tolerance = max(STANDARD_ERRORS * math.hypot(*errors), 1e-6)  # 1e-6: of numbers that were stored in float32
    check.close(
        f"{what} in standard errors", STANDARD_ERRORS * (actual - expected) / tolerance, 0.0, tolerance=STANDARD_ERRORS
    )


# Sizes


def parameter_counts(path: Path, check: Check) -> None:
    """Of our experiments of the same names, built without memory."""
    for size, expected in read_json(path).items():
        network = _experiment(path, size)
        encoder = network.encoder
        state = network.state_dict()
        parts = {
            "encoder": encoder,
            "pre_encode": encoder.pre_encode,
            "decoder": network.decoder,
            "quantizer": network.quantizer,
            "mask": network.mask_processor,
            "per_layer": encoder.layers[0],
        }
        actual = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        actual |= {
            "total": sum(p.numel() for p in network.parameters()),
            "trainable": sum(p.numel() for p in network.parameters() if p.requires_grad),
            "n_state_dict_entries": len(state),
            "state_dict_numel": sum(tensor.numel() for tensor in state.values()),
        }
        check.equal(size, actual, expected)


def state_dict_names(path: Path, check: Check) -> None:
    """`state_dict_<size>.json`: name, shape and type of every entry, in order."""
    expected = [[name, shape, f"torch.{dtype.removeprefix('torch.')}"] for name, shape, dtype in read_json(path)]
    check.equal("state dict", described(_experiment(path, path.stem.removeprefix("state_dict_"))), expected)


def _experiment(path: Path, size: str) -> NEST:
    file = ROOT / "config" / "experiment" / f"nest_{size}.yaml"
    if not file.is_file():
        raise GoldenError(f"{path}: {size}: there is no {file.relative_to(ROOT)}")
    config = OmegaConf.merge(_default_config(), OmegaConf.load(file))
    section = {key: config.model[key] for key in ARCHITECTURE}
    plain = {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in section.items()
    }
    with torch.device("meta"):
        return build(file, plain)


@cache
def _default_config() -> DictConfig | ListConfig:
    return OmegaConf.load(ROOT / "config" / "model" / "nest.yaml")


# Archives


def archive(path: Path, check: Check) -> None:
    """Written by NeMo, read by us: tokens and log-probabilities of clean speech, nothing masked."""
    try:
        content = read_plain(path)
    except CheckpointError as error:
        raise GoldenError(str(error)) from error
    network = load(path, build(path, content["model_config"]), content["state_dict"]).eval()
    reference = read(path.with_name("expected.safetensors"))
    with torch.no_grad():
        wave, length = reference["in.wave"], reference["in.length"]
        features, _ = network.preprocessor(wave, length)
        encoded, encoder_length = network.encode(wave, length)
        check.equal("encoder.lengths", encoder_length.tolist(), reference["encoder.lengths"].tolist())
        check.close("log_probs", network.decoder(encoded), reference["log_probs"], tolerance=LOG_PROBS)
        compare_tokens(check, "tokens", network.quantizer(features), reference["tokens"])
    check.equal("tensors that are neither inputs nor compared", reference.unused(), [])
