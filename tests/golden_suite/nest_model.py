"""Whole models: names, the forward pass with and without a mask, three steps of training."""

import json
import re
from pathlib import Path
from unittest.mock import patch

import torch
from omegaconf import OmegaConf
from torch import Tensor

from models.nest import ARCHITECTURE, NEST
from models.optim import build_optimizer, build_schedule, parameter_groups
from tests.golden_suite.reference import Reference, close
from tests.golden_suite.suite import Check, GoldenError, read_json, read_tensors

FEATURES = 1e-6  # of log-mels, absolute plus relative
FILTERS = 1e-7
ENCODER, LOG_PROBS = 2e-5, 5e-5
LOSS = 1e-5
GRADIENT = 1e-3  # relative
PARAMETER = 1e-3  # after the steps: AdamW makes much of small differences
FLIPPED = 1e-3  # share of tokens: two codes may be as near
# Gradients that are nothing but rounding, such as that of a bias in front of batch norm, against that of all.
VANISHING = 1e-5


def build(path: Path, config: dict) -> NEST:
    """Our system of a `model:` section of NeMo's."""
    try:
        return NEST(**{key: config[key] for key in ARCHITECTURE if key in config})
    except (ValueError, TypeError) as error:
        raise GoldenError(f"{path}: {error}") from error


def load(path: Path, network: NEST, state: dict[str, Tensor]) -> NEST:
    """With all weights of a file, each under its name and in its type."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise GoldenError(f"{path}: {error}") from error
    return network


def read_config(path: Path) -> dict:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        assert isinstance(config, dict)
        return config["model"]
    except Exception as error:  # OmegaConf has many kinds
        raise GoldenError(f"{path}: cannot be read ({error})") from error


def read(path: Path) -> Reference:
    return Reference(path, *read_tensors(path))


def _untrained(folder: Path) -> NEST:
    return build(folder / "config.yaml", read_config(folder / "config.yaml"))


def _network(folder: Path) -> NEST:
    return load(folder, _untrained(folder), read_tensors(folder / "state_dict.safetensors")[0])


# Names


def names(folder: Path, check: Check) -> None:
    """Of the state dict in order, with shapes and types; of the parameters, and which are trained. And the window and
    the filters, which are no weights but follow from the configuration.
    """
    network, (stored, _) = _untrained(folder), read_tensors(folder / "state_dict.safetensors")
    for name in ("window", "fb"):
        expected = stored[f"preprocessor.featurizer.{name}"]
        check.close(f"featurizer.{name}", getattr(network.preprocessor.featurizer, name), expected, tolerance=FILTERS)
    load(folder, network, stored)
    check.equal("state dict", described(network), read_json(folder / "state_dict_keys.json"))
    parameters = {name: [list(p.shape), p.requires_grad] for name, p in network.named_parameters()}
    # As texts, since two dicts are equal whatever their order.
    check.equal("parameters", json.dumps(parameters), json.dumps(read_json(folder / "parameters.json")))
    types = {name: tensor.dtype for name, tensor in stored.items()}
    check.equal("types", {name: tensor.dtype for name, tensor in network.state_dict().items()}, types)


def described(network: NEST) -> list[list]:
    return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in network.state_dict().items()]


# Forward


def evaluation(folder: Path, check: Check) -> None:
    """The forward pass of evaluation: everything that the file has of it."""
    network, reference = _network(folder).eval(), read(folder / "eval.safetensors")
    with torch.no_grad():
        clean, noisy, length = _features(network, reference, check)
        layers: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: layers.update({name: output}))
            for name, module in network.encoder.named_modules()
        ]
        with patch.object(network.encoder, "contextualise", wraps=network.encoder.contextualise) as contextualise:
            log_probs, encoder_length, tokens, _ = network.predict_masked(
                clean, noisy, length, mask=reference["mask.time"]
            )
        frames, frames_length = contextualise.call_args.args
        for handle in handles:
            handle.remove()
        layers |= {"pre_encode.out": frames, "pos_enc.out": layers["dropout_pre_encoder"]}
        layers["pos_enc.pos_emb"] = network.encoder.positions(frames.shape[1], frames.device, frames.dtype)
        _compare_layers(reference, layers, check)
        check.close("encoder.outputs", layers["last"], reference["encoder.outputs"], tolerance=ENCODER)
        for what, actual in {"pre_encode.lengths": frames_length, "encoder.lengths": encoder_length}.items():
            check.equal(what, actual.tolist(), reference[what].tolist())
        compare_tokens(check, "quantizer.tokens", tokens, reference["quantizer.tokens"])
        check.close("decoder.log_probs", log_probs, reference["decoder.log_probs"], tolerance=LOG_PROBS)
        _compare_loss(network, reference, log_probs, tokens, check)
        encoded, _ = network.encode(reference["in.noisy"], reference["in.length"])
        check.close("nomask encoder", encoded, reference["nomask.encoder.outputs"], tolerance=ENCODER)
        check.close("nomask log_probs", network.decoder(encoded), reference["nomask.log_probs"], tolerance=LOG_PROBS)
    check.equal("tensors that are neither inputs nor compared", reference.unused(), [])


def _features(network: NEST, reference: Reference, check: Check) -> tuple[Tensor, Tensor, Tensor]:
    mels = []
    for name in ("clean", "noisy"):
        mel, length = network.preprocessor(reference[f"in.{name}"], reference["in.length"])
        close(check, f"mel.{name}", mel, reference[f"mel.{name}"], tolerance=FEATURES)
        check.equal(f"mel.length of {name}", length.tolist(), reference["mel.length"].tolist())
        mels.append(mel)
    return mels[0], mels[1], length


def _compare_layers(reference: Reference, layers: dict[str, Tensor], check: Check) -> None:
    """What the parts of the encoder give; leaves what the encoder gives under `last`."""
    numbers = [int(match[1]) for name in layers if (match := re.fullmatch(r"layers\.(\d+)", name))]
    out = layers.get("out_proj", layers[f"layers.{max(numbers)}"])
    layers["last"] = out.transpose(1, 2)  # (B, D, T')
    for name in [name for name in reference if name.startswith(("layer", "pre_encode.out", "pos_enc."))]:
        ours = re.sub(r"^layer(\d+)\.", r"layers.\1.", name)
        ours = ours.removesuffix(".out") if ours.startswith("layers.") else ours
        if ours not in layers:
            raise GoldenError(f"{reference.path}: {name} is the output of no part of ours")
        check.close(name, layers[ours], reference[name], tolerance=ENCODER)


def compare_tokens(check: Check, what: str, actual: Tensor, expected: Tensor) -> None:
    check.equal(f"{what}: shape and type", (actual.shape, actual.dtype), (expected.shape, expected.dtype))
    if actual.shape == expected.shape:
        check.close(f"{what}: share that differs", (actual != expected).double().mean(), 0.0, tolerance=FLIPPED)


def _compare_loss(network: NEST, reference: Reference, log_probs: Tensor, tokens: Tensor, check: Check) -> None:
    nll_sum, count, selected = network.masked_loss(log_probs, tokens, reference["mask.time"])
    check.equal("loss.frame_mask", selected.tolist(), reference["loss.frame_mask"].tolist())
    check.close("loss", (nll_sum / count)[None], reference["loss"], tolerance=LOSS)


# Training


def training(folder: Path, check: Check) -> None:
    """AdamW under Noam's schedule, batch norm with the statistics of the batch, everything in one group."""
    network, reference = _network(folder).train(), read(folder / "train.safetensors")
    inputs, config = read(folder / "eval.safetensors"), read_config(folder / "config.yaml")
    optimizer, scheduler = _optimizer(network, reference, config)
    losses, rates = [], []
    for step in range(len(reference["losses"])):
        mask = reference[f"step{step}.mask.time"]
        with torch.no_grad():
            clean, _ = network.preprocessor(inputs["in.clean"], inputs["in.length"])
            noisy, length = network.preprocessor(inputs["in.noisy"], inputs["in.length"])
        log_probs, _, tokens, _ = network.predict_masked(clean, noisy, length, mask=mask)
        nll_sum, count, _ = network.masked_loss(log_probs, tokens, mask)
        optimizer.zero_grad()
        (nll_sum / count).backward()
        if step == 0:
            check.close("step0.log_probs", log_probs, reference["step0.log_probs"], tolerance=LOG_PROBS)
            vanishing = _compare_gradients(network, folder, reference, check)
        losses.append((nll_sum / count).item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    check.close("losses", losses[:1], reference["losses"][:1], tolerance=LOSS)
    check.close("losses after steps", losses, reference["losses"], tolerance=PARAMETER)
    check.close("lrs", rates, reference["lrs"], tolerance=1e-12, relative=True)
    _compare_weights(network, folder, reference, vanishing, sum(rates), check)
    check.equal("tensors that are neither inputs nor compared", reference.unused(), [])


def _optimizer(network: NEST, reference: Reference, config: dict) -> tuple:
    said = reference.metadata
    optim = config["optim"] | {"lr": float(said["noam_lr"]), "weight_decay": float(said["weight_decay"])}
    optim["betas"] = [float(beta) for beta in said["betas"].split(",")]
    optimizer = build_optimizer(parameter_groups(network, {}, optim), optim)
    sched = config["optim"]["sched"] | {"warmup_steps": int(said["noam_warmup"])}
    schedule = build_schedule(optimizer, 500_000, **sched)
    assert schedule is not None
    return optimizer, schedule["scheduler"]


def _compare_gradients(network: NEST, folder: Path, reference: Reference, check: Check) -> set[str]:
    """Returns the parameters whose gradient is nothing but rounding."""
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    expected_names = read_json(folder / "grad_param_names.json")
    check.equal("parameters that have a gradient", list(gradients), expected_names)
    total = reference["step0.total_grad_norm"].item()
    norms = dict(zip(expected_names, reference["step0.grad_norms"].tolist(), strict=True))
    vanishing = {name for name, norm in norms.items() if norm < VANISHING * total}
    for name, norm in norms.items():
        scale = total * VANISHING / GRADIENT if name in vanishing else norm
        actual = gradients[name].double().norm().item() if name in gradients else float("nan")
        check.close(f"step0.grad_norms {name}", actual / scale, norm / scale, tolerance=GRADIENT)
    for name, expected in reference.group("step0.grad.").items():
        check.close(f"step0.grad.{name}", gradients[name], expected, tolerance=GRADIENT, relative=True)
    actual = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    check.close("step0.total_grad_norm", actual[None], [total], tolerance=GRADIENT, relative=True)
    return vanishing


def _compare_weights(
    network: NEST, folder: Path, reference: Reference, vanishing: set[str], moved: float, check: Check
) -> None:
    """After the steps. A weight without a true gradient may go anywhere within the sum of the rates, *moved*."""
    state = network.state_dict()
    expected_names = read_json(folder / "final_param_names.json")
    check.equal("names in final.norms", list(state), expected_names)
    for name, norm in zip(expected_names, reference["final.norms"].tolist(), strict=True):
        each = 2 * moved if name in vanishing else PARAMETER
        # The norm of differences is the most by which norms differ.
        check.close(
            f"final.norms {name}", state[name].double().norm(), norm, tolerance=each * state[name].numel() ** 0.5
        )
    for name, expected in reference.group("final.").items():
        if name != "norms":
            check.close(f"final.{name}", state[name], expected, tolerance=2 * moved if name in vanishing else PARAMETER)


# Case -> what runs it and its files; there is one if the folder has the last of them.
CASES = {
    "names": (names, ("config.yaml", "parameters.json", "state_dict_keys.json", "state_dict.safetensors")),
    "eval": (evaluation, ("config.yaml", "state_dict.safetensors", "eval.safetensors")),
    "train": (
        training,
        ("eval.safetensors", "grad_param_names.json", "final_param_names.json", "train.safetensors"),
    ),
}
