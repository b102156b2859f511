"""Golden cases of Conv-TasNet.

* `ta_*`, `ast_*`: a network of torchaudio or asteroid, its weights, input, outputs and what its layers give.
* `trainstep_*` with a JSON file of the same stem: three training steps.
* `metrics_*` with metrics.json: tests/golden_suite/conv_tasnet_metrics.py.
* index.json: what the files' headers say, collected; a copy that may name more or fewer files than there are.

Tensors that come from a float64 run but are stored in float32 are compared relative to their largest magnitude.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losses.pit import pairwise_neg_si_sdr, permutation_invariant_loss
from models.importers.conv_tasnet import asteroid_arguments, convert, torchaudio_arguments
from models.optim import build_optimizer
from modules.conv_tasnet import ConvTasNet
from tests.golden_suite import conv_tasnet_metrics
from tests.golden_suite.suite import Case, Check, GoldenError, read_json, read_tensors, with_prefix

FLOAT64, FLOAT32 = 1e-9, 2e-5  # of outputs; the peers' own float32 is off by 1.5e-6 at most
STORED_IN_FLOAT32 = 1e-6  # relative
# What a file calls a layer's output -> our module.
LAYERS = {
    "enc": "encoder",
    "in_norm": "separator.input_norm",
    "bottleneck": "separator.bottleneck",
    "mask_conv": "separator.mask_conv",
    "mask_act": "separator",  # without the axis of sources
    "mask": "separator",
    "dec": "decoder",
}
BLOCK_LAYERS = {
    "stage0": "expand",
    "stage1": "expand_prelu",
    "stage2": "expand_norm",
    "stage3": "depthwise",
    "stage4": "depthwise_prelu",
    "stage5": "depthwise_norm",
    "res": "residual",
    "skip": "skip",
}


def discover(folder: Path) -> list[Case]:
    cases = []
    for path in sorted([*folder.glob("ta_*.safetensors"), *folder.glob("ast_*.safetensors")]):
        for name, function in {
            "float64": _float64,
            "float32": _float32,
            "parameters": _parameters,
        }.items():
            cases.append(Case(f"{path.stem}-{name}", path.name, (path.name,), partial(function, path)))
    for stem in sorted({path.stem for path in folder.glob("trainstep_*") if path.suffix in (".safetensors", ".json")}):
        files = (f"{stem}.safetensors", f"{stem}.json")
        cases.append(Case(stem, files[0], files, partial(_train_steps, folder / files[0], folder / files[1])))
    if (index := folder / "index.json").is_file():
        cases.append(Case("index", index.name, (index.name,), partial(_index, index)))
    return [*cases, *conv_tasnet_metrics.discover(folder)]


# Networks


def _read_network(path: Path) -> tuple[ConvTasNet, dict[str, Tensor], dict[str, str]]:
    """Our network with the file's weights, the file's tensors, its metadata."""
    tensors, metadata = read_tensors(path)
    if "cfg" not in metadata:
        entries = read_json(path.with_name("index.json"))
        metadata = next((_header(entry) for entry in entries if Path(entry.get("file", "")).name == path.name), {})
    if "cfg" not in metadata:
        raise GoldenError(f"{path}: neither its header nor index.json says cfg, the arguments of the peer's network")
    return _build(path, json.loads(metadata["cfg"]), with_prefix(tensors, "state_dict.")), tensors, metadata


def _header(entry: dict[str, Any]) -> dict[str, str]:
    """An entry of index.json in the form of a header, which has only texts."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in entry.items()}


def _build(path: Path, cfg: dict[str, Any], peer_state: dict[str, Tensor]) -> ConvTasNet:
    try:
        arguments = asteroid_arguments(cfg) if "n_src" in cfg else torchaudio_arguments(cfg)
        network = ConvTasNet(**arguments).eval()
        network.load_state_dict(convert(peer_state)[0])  # strict: every name of ours, and no other
    except (ValueError, RuntimeError) as error:
        raise GoldenError(f"{path}: {error}") from error
    return network


def _float64(path: Path, check: Check) -> None:
    """The output, and every stored output of a layer; only a residual branch that nothing reads may be missing."""
    network, tensors, _ = _read_network(path)
    outputs: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
    with torch.inference_mode():
        output = network.double()(tensors["input"][:, 0].double())
    check.close("output_f64", output, tensors["output_f64"], tolerance=FLOAT64)
    last = len(network.separator.blocks) - 1
    unread = f"block{last}.res" if network.separator.blocks[last].residual is None else None
    for name, expected in with_prefix(tensors, "inter.").items():
        match = re.fullmatch(r"block(\d+)\.(\w+)", name)
        layer = f"separator.blocks.{match[1]}.{BLOCK_LAYERS.get(match[2])}" if match else LAYERS.get(name)
        if layer in outputs:
            output = outputs[layer]
            output = output.reshape(expected.shape) if output.numel() == expected.numel() else output
            check.close(name, output, expected, tolerance=STORED_IN_FLOAT32, relative=True)
        elif name != unread:
            raise GoldenError(f"{path}: inter.{name} is the output of no layer of ours")


def _float32(path: Path, check: Check) -> None:
    network, tensors, _ = _read_network(path)
    with torch.inference_mode():
        check.close("output_f32", network(tensors["input"][:, 0]), tensors["output_f32"], tolerance=FLOAT32)


def _parameters(path: Path, check: Check) -> None:
    """The peer's weights are all in use; the last residual branch beside a skip path is not used there either."""
    network, tensors, metadata = _read_network(path)
    peer_state = with_prefix(tensors, "state_dict.")
    count = sum(tensor.numel() for tensor in peer_state.values())
    unused = sorted(peer_state.keys() - _consumed(peer_state))
    last = len(network.separator.blocks) - 1
    allowed = [f"masker.TCN.{last}.res_conv.{kind}" for kind in ("bias", "weight")]
    check.equal("unused parameters", unused, allowed if unused else [])
    left_out = sum(peer_state[name].numel() for name in unused)
    check.equal("number of parameters", sum(p.numel() for p in network.parameters()) + left_out, count)
    if "n_params" in metadata:
        check.equal("n_params", str(count), metadata["n_params"])


def _consumed(peer_state: dict[str, Tensor]) -> set[str]:
    """The peer's names that reach our state dict: each is marked by a number of its own."""
    names = list(peer_state)
    marked = {name: torch.full_like(peer_state[name], number) for number, name in enumerate(names)}
    return {names[int(tensor.flatten()[0])] for tensor in convert(marked)[0].values()}


# Training


def _train_steps(tensors_path: Path, json_path: Path, check: Check) -> None:
    """Adam at 1e-3, gradients clipped to a norm of 5, the mean over the batch of the PIT loss, all in float64."""
    expected = read_json(json_path)
    tensors, _ = read_tensors(tensors_path)
    network = _build(tensors_path, expected["cfg"], with_prefix(tensors, "state_dict0.")).double().train()
    optimizer = build_optimizer(network.parameters(), {"name": "adam", "lr": 1e-3})
    mixture, targets = tensors["mix"].double().flatten(1), tensors["target"].double()  # (B, T), (B, C, T)
    for number, step in enumerate(expected["steps"]):
        per_item, permutation = permutation_invariant_loss(pairwise_neg_si_sdr(network(mixture), targets))
        optimizer.zero_grad()
        per_item.mean().backward()
        if number == 0:
            _compare_named(check, "grad0", _gradients(network), convert(with_prefix(tensors, "grad0."))[0])
        norm = nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        check.close(f"step {number} loss", per_item.mean(), step["loss"], tolerance=FLOAT64)
        check.close(f"step {number} per_item", per_item, step["per_item"], tolerance=FLOAT64)
        check.equal(f"step {number} perm", permutation.tolist(), step["perm"])
        check.close(
            f"step {number} gradient norm", norm, step["grad_norm_before_clip"], tolerance=FLOAT64, relative=True
        )
    after = f"state_dict{len(expected['steps'])}"
    _compare_named(check, after, network.state_dict(), convert(with_prefix(tensors, f"{after}."))[0])


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def _compare_named(check: Check, what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    check.equal(f"names in {what}", sorted(actual), sorted(expected))
    for name in actual.keys() & expected.keys():
        check.close(f"{what} {name}", actual[name], expected[name], tolerance=STORED_IN_FLOAT32, relative=True)


# Index


def _index(path: Path, check: Check) -> None:
    entries = read_json(path)
    check.equal("index.json lists files by name", all(isinstance(entry.get("file"), str) for entry in entries), True)
    for entry in entries:
        file = path.with_name(Path(entry["file"]).name)
        if file.is_file():
            _, metadata = read_tensors(file)
            header = _header(entry)
            for name in sorted(metadata.keys() & header.keys()):
                values = [
                    json.loads(text) if text.startswith(("{", "[")) else text for text in (header[name], metadata[name])
                ]
                check.equal(f"{file.name}: {name} in index.json and header", *values)
