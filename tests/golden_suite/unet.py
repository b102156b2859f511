"""Golden cases of the text-watermark U-Net. A file is known by what it holds, whatever its name.

* Networks: `w.*`, `x`, `target` and what comes of them; their sizes in a JSON file of the same stem.
* Losses and metrics (unet_losses.py, unet_metrics.py): `<case>.logits`, `<case>.target`, `<case>.grad.*`; the values in
  a JSON file of the same stem.
* unet_tables.py: JSON files with rules and numbers; blended images and windows.

Each tensor of a file, and each entry of a JSON file, is an input or compared; one that is neither fails its case. Only
the numbers of parameters of segmentation_models_pytorch's networks need that package: a case of its own, which says so.
"""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losses.overlap import binary_cross_entropy
from modules.unet import UNet
from tests.golden_suite import unet_losses, unet_metrics, unet_tables
from tests.golden_suite.reference import Reference
from tests.golden_suite.suite import Case, Check, GoldenError, read_json, read_tensors

NETWORK = 1e-5  # absolute, of everything that a network gives but its logits in training
# Of the largest magnitude: there norms divide by the deviation of as few as a dozen values, and the peer's float32 is
# itself up to 1.7e-5 from the same in float64, where logits reach 3.
TRAINING = 2e-5


def discover(folder: Path) -> list[Case]:
    cases = []
    for stem in sorted({path.stem for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}):
        claims = tuple(name for name in (f"{stem}.safetensors", f"{stem}.json") if (folder / name).is_file())
        cases.append(Case(stem, claims[0], claims, partial(_file, folder / stem)))
    missing = None if find_spec("segmentation_models_pytorch") else "segmentation_models_pytorch is not installed"
    for path in sorted(path for path in folder.glob("*.json") if re.search(rb'"smp\d', path.read_bytes())):
        skip = missing and f"unet: {path.name}: its numbers of smp are not compared, {missing}"
        cases.append(Case(f"{path.stem}-smp", path.name, (path.name,), partial(_smp, path), skip))
    return cases


def _smp(path: Path, check: Check) -> None:
    unet_tables.smp_parameter_counts(path, read_json(path), check)


def _file(stem: Path, check: Check) -> None:
    """`<stem>.safetensors`, `<stem>.json`, or both."""
    tensors, listed = (stem.with_name(stem.name + suffix) for suffix in (".safetensors", ".json"))
    if not tensors.is_file():
        _table(listed, read_json(listed), check)
        return
    reference = Reference(tensors, *read_tensors(tensors))
    if any(name.startswith("w.") for name in reference):
        _network(reference, read_json(listed), check)
    elif any(name.endswith(".logits") for name in reference):
        _losses_and_metrics(reference, read_json(listed), check)
    else:
        kinds = [kind for kind in unet_tables.KINDS if kind.mark(reference)]
        if not kinds or listed.is_file():
            raise GoldenError(f"{tensors}: no case knows what it holds: {', '.join(list(reference)[:5])}")
        for kind in kinds:
            kind.run(reference, check)
    check.equal(f"{tensors.name}: tensors that are neither inputs nor compared", reference.unused(), [])


def _table(path: Path, content: Any, check: Check) -> None:
    if not isinstance(content, dict):
        raise GoldenError(f"{path}: is no table of names")
    if "cases" in content:
        unet_tables.table(path, content, check)
    elif any(name.startswith(("base", "smp")) for name in content):
        unet_tables.parameter_counts(path, content, check)
    else:
        if "losses" in content or "kind" in content:
            raise GoldenError(f"{path.with_suffix('.safetensors')}: is missing")
        raise GoldenError(f"{path}: no case knows what it holds: {', '.join(list(content)[:5])}")


# Losses and metrics


def _losses_and_metrics(reference: Reference, content: dict[str, Any], check: Check) -> None:
    cases = {name.removesuffix(".logits") for name in reference if name.endswith(".logits")}
    for case in sorted(cases):
        unet_losses.compare_gradients(reference, case, check)
    for key, values in content.items():
        if key == "shape":
            for case in sorted(cases):
                check.equal(f"{case}: shape", list(reference[f"{case}.logits"].shape), values)
        elif key in COMPARED:
            # Where pixels are unknown, which is 255 here as there, there is one case.
            for case, of_case in {"ignore": values}.items() if key == IGNORED else values.items():
                if case not in cases:
                    raise GoldenError(f"{reference.path}: {case}.logits is missing")
                COMPARED[key](reference, case, of_case, check)
        elif key not in ("torch", "smp"):  # versions of the peers
            raise GoldenError(f"{reference.path.with_suffix('.json')}: no case knows what {key} is")


IGNORED = "ignore_index_255"
COMPARED = {
    IGNORED: unet_losses.compare,
    "losses": unet_losses.compare,
    "metrics": unet_metrics.compare_smp,
    "torchmetrics": unet_metrics.compare_torchmetrics,
}


# Networks


def _network(reference: Reference, claims: dict[str, Any], check: Check) -> None:
    """In evaluation, then one training step's forward and backward pass of the mean cross-entropy."""
    claims = dict(claims)
    network = _build(reference, claims, check)
    outputs = _record(network)
    image, target = reference["x"], reference["target"]
    check.equal("input", list(image.shape), claims.pop("input"))
    with torch.no_grad():
        outputs["logits"] = network.eval()(image)
    for name, expected in reference.group("eval.").items():
        if name not in outputs:
            raise GoldenError(f"{reference.path}: eval.{name} is the output of no block of ours")
        check.close(f"eval.{name}", outputs[name], expected, tolerance=NETWORK)
    shapes = {name: list(outputs[name].shape) for name in outputs if name.startswith(("enc", "dec"))}
    check.equal("feature_shapes", shapes, claims.pop("feature_shapes"))

    logits = network.train()(image)
    loss = binary_cross_entropy(logits, target)
    loss.backward()
    check.close("train.logits", logits, reference["train.logits"], tolerance=TRAINING, relative=True)
    check.close("train_bce_mean", loss, claims.pop("train_bce_mean"), tolerance=NETWORK)
    gradients = {_theirs(name): p.grad for name, p in network.named_parameters() if p.grad is not None}
    for name, expected in reference.group("grad.").items():
        check.close(f"grad.{name}", _known(reference, gradients, name), expected, tolerance=NETWORK)
    norms = claims.pop("grad_l2")
    check.equal("names in grad_l2", sorted(norms), sorted(gradients))
    for name in norms.keys() & gradients.keys():
        check.close(f"grad_l2 {name}", gradients[name].norm(), norms[name], tolerance=NETWORK)
    statistics = {_theirs(name): buffer for name, buffer in network.named_buffers()}
    for name, expected in reference.group("after_train.").items():
        check.close(f"after_train.{name}", _known(reference, statistics, name), expected, tolerance=NETWORK)
    check.equal(f"{reference.path.stem}.json: entries that no case knows", sorted(claims), [])


def _build(reference: Reference, claims: dict[str, Any], check: Check) -> UNet:
    """Our network with a peer's weights; takes what it uses out of `claims`."""
    weights = {_ours(name): tensor for name, tensor in reference.group("w.").items()}
    try:
        check.equal("kind", claims.pop("kind"), "unet")
        network = UNet(
            in_channels=claims.pop("in_channels"),
            num_classes=claims.pop("classes"),
            base_channels=claims.pop("base"),
            depth=len({name.partition(".")[0] for name in weights if name.startswith("enc")}) - 1,
            up="bilinear" if claims.pop("bilinear") else "transposed",
        )
        counters = {name: x for name, x in network.state_dict().items() if name.endswith("num_batches_tracked")}
        network.load_state_dict(counters | weights)  # strict: every name of ours, and no other
    except (ValueError, RuntimeError, KeyError) as error:
        raise GoldenError(f"{reference.path}: {error}") from error
    check.equal("params", sum(parameter.numel() for parameter in network.parameters()), claims.pop("params"))
    return network


def _record(network: nn.Module) -> dict[str, Tensor]:
    """Where the blocks' outputs of the first pass will be."""
    outputs: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _inputs: Any, output: Tensor, *, name: str) -> None:
        outputs.setdefault(name, output)

    for name, module in network.named_children():
        if name.startswith(("enc", "dec")):
            module.register_forward_hook(partial(keep, name=name))
    return outputs


def _known(reference: Reference, ours: dict[str, Tensor], name: str) -> Tensor:
    if name not in ours:
        raise GoldenError(f"{reference.path}: {name} is in no block of ours")
    return ours[name]


def _ours(name: str) -> str:
    return name.replace(".bn", ".norm")


def _theirs(name: str) -> str:
    return name.replace(".norm", ".bn")
