"""What NEST is trained with, one by one: tokens, loss, masks, noise."""

import random
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import pad

from data.noise_augmentation import MultiSpeakerNoiseAugmentation, augmented_noise
from data.ssl import SpeechNoiseDataset
from data.ssl_settings import SpeechSettings
from losses.masked_prediction import masked_nll, selected_frames
from modules.block_masking import RandomBlockMasking
from modules.quantizer import RandomProjectionVectorQuantizer
from tests.golden_suite.nest_model import FLIPPED, compare_tokens, read
from tests.golden_suite.reference import Reference
from tests.golden_suite.suite import Check, read_json

LOSS = 1e-6
SAMPLES = 1e-6  # of waveforms


def _read(path: Path) -> tuple[dict, Reference]:
    return read_json(path), read(path.with_suffix(".safetensors"))


def _finish(reference: Reference, check: Check) -> None:
    check.equal(f"{reference.path.name}: tensors that are neither inputs nor compared", reference.unused(), [])


# Tokens


def quantizer(path: Path, check: Check) -> None:
    variants, reference = _read(path)
    for variant, settings in variants.items():
        part = RandomProjectionVectorQuantizer(**settings)
        state = {"proj.weight": reference[f"{variant}.proj"], "codebooks": reference[f"{variant}.codebooks"]}
        part.load_state_dict(state)
        features = reference["in"]
        tokens = part(features.transpose(1, 2) if settings.get("time_ahead") else features)
        compare_tokens(check, f"{variant}.tokens", tokens, reference[f"{variant}.tokens"])
        _compare_codes(reference, variant, settings, tokens, check)
    _finish(reference, check)


def _compare_codes(reference: Reference, variant: str, settings: dict, tokens: Tensor, check: Check) -> None:
    """`xq`, the codes themselves, which nothing uses and ours does not return: that each token stands for NeMo's code.

    NeMo mixes up the axes where there are several books; here alike.
    """
    codebooks, expected = reference[f"{variant}.codebooks"], reference[f"{variant}.xq"]
    tokens = tokens.unsqueeze(2) if tokens.ndim == 2 else tokens  # (B, T', N)
    num_books, _, code_dim = codebooks.shape
    codes = torch.stack([codebooks[book][tokens[..., book]] for book in range(num_books)], 1)  # (B, N, T', dim)
    codes = codes.reshape(*tokens.shape[:2], code_dim, num_books)
    if not settings.get("time_ahead"):
        codes = codes.transpose(1, 2)  # (B, dim, T', N)
    codes = codes.squeeze(3) if expected.ndim == 3 else codes
    check.equal(f"{variant}.xq: shape", codes.shape, expected.shape)
    if codes.shape == expected.shape:
        differs = ((codes - expected).abs() > 1e-6).double().mean()
        check.close(f"{variant}.xq: share that differs", differs, 0.0, tolerance=FLIPPED)


# Loss


def loss(path: Path, check: Check) -> None:
    variants, reference = _read(path)
    for variant, settings in variants.items():
        if variant == "empty_selection":
            _compare_empty(reference, check)
            continue
        log_probs, targets = reference[f"{variant}.log_probs"], reference[f"{variant}.targets"]
        sizes = {key: settings[key] for key in ("combine_time_steps", "mask_threshold")}
        selected = selected_frames(reference[f"{variant}.mask.time"], **sizes)
        nll_sum, count = masked_nll(log_probs, targets, selected)
        check.equal(f"{variant}: n_masked", int(count), settings["n_masked"])
        check.close(f"{variant}.loss", (nll_sum / count)[None], reference[f"{variant}.loss"], tolerance=LOSS)
    _finish(reference, check)


def _compare_empty(reference: Reference, check: Check) -> None:
    """Where nothing is masked NeMo's loss is NaN and its gradients are 0; ours is a sum of 0, with the same gradients,
    of a count of 0.
    """
    name = next(name for name in reference if name.endswith(".log_probs"))
    log_probs = reference[name].clone().requires_grad_()
    targets = reference[name.replace("log_probs", "targets")]
    nll_sum, count = masked_nll(log_probs, targets, torch.zeros(log_probs.shape[:2], dtype=torch.bool))
    nll_sum.backward()
    assert log_probs.grad is not None
    check.equal("empty selection", (nll_sum.item(), int(count), log_probs.grad.abs().max().item()), (0.0, 0, 0.0))


# Masks


def masking(path: Path, check: Check) -> None:
    """From the random numbers that NeMo drew to its masks, and what masked features then are."""
    variants, reference = _read(path)
    for variant, settings in variants.items():
        drawn = [reference[f"{variant}.rand{number}"] for number in range(settings["n_rand"])]
        check.equal(f"{variant}: rand_shapes", [list(draw.shape) for draw in drawn], settings["rand_shapes"])
        arguments = {key: value for key, value in settings.items() if key not in ("n_rand", "rand_shapes")}
        embedding, expected = reference[f"{variant}.mask_embedding"], reference[f"{variant}.mask.time"]
        part = RandomBlockMasking(feat_in=len(embedding), **arguments)
        if "mask_value" in settings:
            check.equal(f"{variant}: mask_embedding", part.mask_embedding.tolist(), embedding.tolist())
        part.load_state_dict({"mask_embedding": embedding})
        with patch("torch.rand", side_effect=drawn) as rand:
            mask = part.draw(expected.shape[1], reference["lengths"])
        check.equal(
            f"{variant}: draws", [list(torch.Size(call.args)) for call in rand.call_args_list], settings["rand_shapes"]
        )
        check.equal(f"{variant}.mask.time", mask.tolist(), expected.tolist())
        _compare_masked_features(reference, variant, arguments, mask, check)
    _finish(reference, check)


def _compare_masked_features(reference: Reference, variant: str, arguments: dict, mask: Tensor, check: Check) -> None:
    """The file has sums over the features, not these: they are normal numbers drawn right after the embedding, from the
    seed that gives it.
    """
    expected, embedding = reference[f"{variant}.masked_feats_sum"], reference[f"{variant}.mask_embedding"]
    for seed in range(1000):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            part = RandomBlockMasking(feat_in=len(embedding), **arguments)
            if not torch.allclose(part.mask_embedding, embedding, atol=1e-6):
                continue
            features = torch.randn(len(mask), len(embedding), mask.shape[1])
        masked = part.hide(features, mask).sum((1, 2)).detach()
        if abs(masked[-1] - expected[-1]) < 1e-2:
            check.close(f"{variant}.masked_feats_sum", masked, expected, tolerance=1e-6, relative=True)
            return
    check.equal(f"{variant}: a seed below 1000 that gives the file's embedding and features", None, "one")


# Noise


def augmentation(path: Path, check: Check) -> None:
    """Batches under `nemo_compat`, with Python's generator in NeMo's order; without an augmentor first."""
    variants, reference = _read(path)
    num_items = sum(name.startswith("item") and name.endswith(".audio") for name in reference)
    items = [{kind: reference[f"item{item}.{kind}"] for kind in ("audio", "noise")} for item in range(num_items)]
    _compare_batch(reference, "collate", items, None, 0, check)
    audio, length = reference["collate.audio"], reference["collate.audio_len"]
    noise = torch.stack([pad(item["noise"], (0, audio.shape[1]))[: audio.shape[1]] for item in items])
    noise_len = torch.tensor([len(item["noise"]) for item in items])
    check.close("collate.noise", noise, reference["collate.noise"], tolerance=SAMPLES)
    check.equal("collate.noise_len", noise_len.tolist(), reference["collate.noise_len"].tolist())
    for variant, said in variants.items():
        seed = said["python_random_seed"]
        settings = MultiSpeakerNoiseAugmentation(**{k: v for k, v in said.items() if k != "python_random_seed"})
        added, added_len = augmented_noise(
            audio, length, noise, noise_len,
            settings=settings, rngs=[random.Random(seed)] * len(items), nemo_compat=True,
        )  # fmt: skip
        check.close(f"aug.{variant}.noise", added, reference[f"aug.{variant}.noise"], tolerance=SAMPLES)
        check.equal(f"aug.{variant}.noise_len", added_len.tolist(), reference[f"aug.{variant}.noise_len"].tolist())
        _compare_batch(reference, f"aug.{variant}", items, settings, seed, check)
    _finish(reference, check)


def _compare_batch(
    reference: Reference,
    name: str,
    items: list[dict[str, Tensor]],
    augmentor: MultiSpeakerNoiseAugmentation | None,
    seed: int,
    check: Check,
) -> None:
    dataset = SpeechNoiseDataset([], settings=SpeechSettings(batch_augmentor=augmentor), nemo_compat=True)
    more = {"augmentation_seed": seed, "mask_seed": 0, "name": "", "bad_files": []}
    batch = dataset.collate([item | more for item in items])
    for ours, theirs in {"audio": "audio", "noisy": "noisy_audio"}.items():
        if f"{name}.{theirs}" in reference:
            check.close(f"{name}.{theirs}", batch[ours], reference[f"{name}.{theirs}"], tolerance=SAMPLES)
            lengths = batch["length" if ours == "audio" else "noisy_length"]
            check.equal(f"{name}.{theirs}_len", lengths.tolist(), reference[f"{name}.{theirs}_len"].tolist())
