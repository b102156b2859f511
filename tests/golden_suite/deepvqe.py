"""Golden cases of DeepVQE. A file is known by what it holds, whatever its name.

* Networks: `sd.*`, `in.*`, `out*`, and for some `act.*` (what blocks give), `grad.*`, `loss.*`. Several networks on one
  input each have a prefix.
* tests/golden_suite/deepvqe_blocks.py: single blocks, the alignment, the STFT, mixing.
* tests/golden_suite/deepvqe_losses.py: losses, their values in the header or in a JSON file of the same stem.

Each tensor of a file is an input or compared; one that is neither fails its case.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.hooks import RemovableHandle

from models.importers.deepvqe import arguments_of, convert, number_of_decoders, our_block
from modules.deepvqe import DeepVQE
from tests.golden_suite import deepvqe_blocks, deepvqe_losses
from tests.golden_suite.reference import Reference, close
from tests.golden_suite.suite import Case, Check, GoldenError, read_tensors

NETWORK = 1e-4  # of outputs and what layers give, absolute plus relative
GRADIENT = 1e-3  # of the largest magnitude in a tensor
# Gradients that are nothing but rounding, such as that of a bias before a softmax, against the largest of all.
VANISHING = 1e-6
# Several networks on one input: prefix -> whether the mask is normalised. The paper's is not; Rong's weights hold the
# norm all the same.
MASK_NORM = {"asrepo.": True, "paper_last.": False}


def discover(folder: Path) -> list[Case]:
    cases = []
    for path in sorted(folder.glob("*.safetensors")):
        claims = (path.name, *([path.with_suffix(".json").name] if path.with_suffix(".json").is_file() else []))
        cases.append(Case(path.stem, path.name, claims, partial(_file, path)))
    for path in sorted(folder.glob("*.json")):
        if not path.with_suffix(".safetensors").is_file():
            cases.append(Case(path.stem, path.name, (path.name,), partial(_file, path.with_suffix(".safetensors"))))
    return cases


def _file(path: Path, check: Check) -> None:
    reference = Reference(path, *read_tensors(path))
    if prefixes := sorted({name.partition("sd.")[0] for name in reference if _is_of_network(name, reference)}):
        for prefix in prefixes:
            _network(reference, prefix, check)
    else:
        kinds = [kind for kind in (*deepvqe_blocks.KINDS, *deepvqe_losses.KINDS) if kind.mark(reference)]
        if not kinds:
            raise GoldenError(f"{path}: no case knows what it holds: {', '.join(list(reference)[:5])}")
        for kind in kinds:
            kind.run(reference, check)
    check.equal(f"{path.name}: tensors that are neither inputs nor compared", reference.unused(), [])


def _is_of_network(name: str, reference: Reference) -> bool:
    return "in.mic" in reference and (name.startswith("sd.") or ".sd." in name)


# Networks


def _network(reference: Reference, prefix: str, check: Check) -> None:
    peer = reference.group(f"{prefix}sd.")
    if not MASK_NORM.get(prefix, True):
        peer = {name: tensor for name, tensor in peer.items() if not name.startswith("deblock1.bn.")}
    network, source = _build(reference, prefix, peer, check)
    inputs = {"in.mic": reference["in.mic"], "in.far": reference.get("in.far")}
    # Derivatives are taken with respect to the peer's weights, through their translation into ours.
    leaves = {name: x.requires_grad_() for name, x in (peer | inputs).items() if f"{prefix}grad.{name}" in reference}
    state = convert(peer)[0] | _temperature(network)
    handles, layers = _record(network)
    enhanced, _ = functional_call(network, state, tuple(inputs.values()), strict=True)
    for handle in handles:
        handle.remove()
    for name, expected in reference.group(f"{prefix}act.").items():
        actual = _activation(name, source, number_of_decoders(peer), layers, expected)
        close(check, f"{prefix}act.{name}", actual, expected, tolerance=NETWORK)
    if f"{prefix}loss.mse" in reference:
        loss = mse_loss(enhanced, reference["in.near"])
        close(check, f"{prefix}loss.mse", loss, reference[f"{prefix}loss.mse"], tolerance=NETWORK)
        _compare_gradients(check, prefix, leaves, loss, reference)
    mic, far = inputs.values()
    for name, run in {
        "out": lambda: enhanced,
        "out.enh": lambda: enhanced,
        "out.enh_far_zero": lambda: functional_call(network, state, (mic, torch.zeros_like(mic)))[0],
        "out.enh_trainmode": lambda: functional_call(network.train(), state, (mic, far))[0],  # moves the statistics
    }.items():
        if prefix + name in reference:
            with torch.no_grad():
                close(check, prefix + name, run(), reference[prefix + name], tolerance=NETWORK)


def _record(network: nn.Module) -> tuple[list[RemovableHandle], dict[str, Any]]:
    """Hooks, and where they put what each module gives."""
    outputs: dict[str, Any] = {}
    return [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
        for name, module in network.named_modules()
    ], outputs


def _build(reference: Reference, prefix: str, peer: dict[str, Tensor], check: Check) -> tuple[DeepVQE, str]:
    """Our network with a peer's weights, and whose they are. Tensors tell its sizes, the header tells the rest."""
    cfg = reference.metadata | json.loads(reference.metadata.get("cfg", "{}"))
    try:
        state, source = convert(peer)
        arguments = arguments_of(state, source)
        arguments["num_bins"] = reference["in.mic"].shape[1]
        arguments["compression"] = float(cfg.get("fe_compress", cfg.get("power_law_c", 0.3)))
        if "align_hidden" in arguments:
            delays = reference.get(f"{prefix}act.delay_dist")
            arguments["max_delay_frames"] = int(cfg["dmax"]) if delays is None else delays.shape[-1]
        if "temperature" in cfg:
            arguments["align_temperature"] = float(cfg["temperature"])
        network = DeepVQE(**arguments, init_identity=False).eval()
        network.load_state_dict(state | _temperature(network))  # strict: every name of ours, and no other
    except (ValueError, RuntimeError, KeyError) as error:
        raise GoldenError(f"{reference.path}: {error}") from error
    _compare_sizes(check, prefix, arguments, cfg)
    return network, source


def _compare_sizes(check: Check, prefix: str, arguments: dict[str, Any], cfg: dict[str, Any]) -> None:
    """What the importer read from the tensors against what the peer was built with, as far as the header says."""
    far = cfg.get("ref_channels", cfg.get("far_channels"))  # richiejp's channels begin with the two of the input
    for name, value in {
        "mic_channels": cfg.get("mic_channels"),
        "far_channels": far,
        "decoder_channels": cfg["dec_channels"][:-1] if "dec_channels" in cfg else None,
        "gru_hidden": cfg.get("gru_hidden"),
        "align_hidden": cfg.get("align_hidden"),
    }.items():
        actual = arguments.get(name)
        if isinstance(value, list):
            value = value[len(value) - len(actual or []) :]
        if value is not None:
            check.equal(f"{prefix}{name} in cfg", actual, value)


def _temperature(network: nn.Module) -> dict[str, Tensor]:
    """The one tensor of ours that no peer's weights hold."""
    return {name: tensor for name, tensor in network.state_dict().items() if name == "alignment.temperature"}


def _activation(name: str, source: str, num_decoders: int, outputs: dict[str, Any], expected: Tensor) -> Tensor:
    """What we give where the peer has its block *name*. Its delay axis runs from the longest delay to none."""
    if name == "delay_dist":
        return outputs["alignment"][1].flip(-1)
    if name == "mask27":
        return outputs[f"decoder.{num_decoders - 1}"][..., : expected.shape[-1]]
    block, _, rest = name.partition(".")
    ours = our_block(block, source, num_decoders)
    if ours == "alignment" and rest == "conv":  # (B, 1, frames, D), without the frames that its padding adds behind
        return outputs["alignment.score_conv"][:, :, : expected.shape[2]].flip(-1)
    if ours == "alignment":
        return outputs[ours][0]
    if ours not in outputs or rest:
        raise GoldenError(f"act.{name} is the output of no block of ours")
    return outputs[ours]


def _compare_gradients(
    check: Check, prefix: str, leaves: dict[str, Tensor], loss: Tensor, reference: Reference
) -> None:
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    expected = reference.group(f"{prefix}grad.")
    check.equal(f"{prefix}names of gradients", sorted(gradients), sorted(expected))
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    for name in gradients.keys() & expected.keys():
        if expected[name].abs().max() < VANISHING * scale:
            check.close(f"{prefix}grad.{name}", gradients[name] / scale, expected[name] / scale, tolerance=VANISHING)
        else:
            check.close(f"{prefix}grad.{name}", gradients[name], expected[name], tolerance=GRADIENT, relative=True)
