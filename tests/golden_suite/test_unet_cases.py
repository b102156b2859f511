"""The golden cases of the U-Net themselves: other sizes and names are understood, whatever is wrong must show."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from modules.unet import UNet
from tests.golden_suite import unet, unet_tables
from tests.golden_suite.suite import ROOT, collect, read_tensors, run

GOLDEN = ROOT / "tests" / "golden" / "unet"
LOSSES = "losses_metrics"
ABOVE = "is above the tolerance"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "unet"
    path.mkdir()
    return path


def failures(folder: Path) -> dict[str, list[str]]:
    """Id of each failed case -> what it says."""
    checks = {case.id.removeprefix("unet-"): run(case) for case in collect(folder.parent, "unet")}
    return {name: check.failures for name, check in checks.items() if check.failures}


def write(folder: Path, name: str, tensors: dict[str, Tensor], content: dict[str, Any] | None = None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{name}.safetensors")
    if content is not None:
        (folder / f"{name}.json").write_text(json.dumps(content))


def put(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(GOLDEN / name, folder / name)


# Networks


def make_network(*, base: int, bilinear: bool, size: tuple[int, int], in_channels: int = 3, classes: int = 1):
    """Tensors and claims as in the golden files, of a network of ours with random weights and statistics."""
    torch.manual_seed(base)
    up = "bilinear" if bilinear else "transposed"
    network = UNet(base_channels=base, in_channels=in_channels, num_classes=classes, up=up)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    x, target = torch.rand(2, in_channels, *size), torch.randint(2, (2, classes, *size)).float()

    def named(tensors: Any) -> dict[str, Tensor]:
        return {name.replace(".norm", ".bn"): tensor.detach().clone() for name, tensor in tensors}

    tensors = {f"w.{name}": x for name, x in named(network.state_dict().items()).items() if "tracked" not in name}
    shapes: dict[str, list[int]] = {}
    for name, module in network.named_children():
        if name not in ("head", "dropout"):
            module.register_forward_hook(lambda _m, _x, y, name=name: shapes.update({name: list(y.shape)}))
    with torch.no_grad():
        tensors |= {"x": x, "target": target, "eval.logits": network.eval()(x)}
    logits = network.train()(x)
    loss = binary_cross_entropy_with_logits(logits, target)
    loss.backward()
    gradients = named((name, parameter.grad) for name, parameter in network.named_parameters())
    buffers = named(network.named_buffers())
    tensors |= {"train.logits": logits.detach(), "grad.head.bias": gradients["head.bias"]}
    tensors["after_train.dec1.bn2.running_var"] = buffers["dec1.bn2.running_var"]
    claims = {"kind": "unet", "bilinear": bilinear, "base": base, "in_channels": in_channels, "classes": classes}
    claims |= {"input": list(x.shape), "feature_shapes": shapes, "train_bce_mean": loss.item()}
    claims |= {"params": sum(p.numel() for p in network.parameters())}
    claims |= {"grad_l2": {name: gradient.norm().item() for name, gradient in gradients.items()}}
    return tensors, claims


def test_networks_of_other_sizes_and_names(folder: Path) -> None:
    write(folder, "one", *make_network(base=3, bilinear=False, size=(18, 35), in_channels=1))
    write(folder, "two", *make_network(base=6, bilinear=True, size=(33, 16), classes=2))
    assert failures(folder) == {}


@pytest.mark.parametrize(
    "name",
    ["eval.logits", "train.logits", "grad.head.bias", "after_train.dec1.bn2.running_var", "w.dec2.conv1.weight"],
)
def test_a_wrong_tensor_of_a_network_fails(folder: Path, name: str) -> None:
    tensors, claims = make_network(base=2, bilinear=True, size=(16, 17))
    tensors[name].view(-1)[-1] += 0.01 * (1 + tensors[name].abs().max())
    write(folder, "file", tensors, claims)
    assert any(ABOVE in failure for failure in failures(folder)["file"])


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            {"params": 1, "input": [2, 3, 20, 18], "train_bce_mean": 0.5, "grad_l2": {"head.bias": 0.5}, "more": 1},
            ["params: ", "input: ", "train_bce_mean: error", "names in grad_l2: ", "grad_l2 head.bias: error", "more"],
        ),
        ({"feature_shapes": {}}, ["feature_shapes: "]),
        ({"bilinear": False}, ["Missing key(s)"]),
        ({"base": "2"}, ["base_channels must be"]),
    ],
)
def test_a_wrong_claim_of_a_network_fails(folder: Path, change: dict[str, Any], messages: list[str]) -> None:
    tensors, claims = make_network(base=2, bilinear=True, size=(16, 17))
    write(folder, "file", tensors, claims | change)
    found = failures(folder)["file"]
    assert len(found) == len(messages)
    assert all(message in failure for message, failure in zip(messages, found, strict=True))


def test_tensors_of_a_network_that_no_case_knows(folder: Path) -> None:
    tensors, claims = make_network(base=2, bilinear=True, size=(16, 17))
    messages = {
        "more": "neither inputs nor compared: ['more'], expected []",
        "eval.more": "eval.more is the output of no block of ours",
        "grad.more": "more is in no block of ours",
        "w.more": "Unexpected key",
    }
    for name in messages:
        write(folder, name, tensors | {name: torch.zeros(1)}, claims)
    write(folder, "other", tensors)
    found = failures(folder)
    assert found.pop("other") == [f"{folder}/other.json: is missing"]
    assert found.keys() == messages.keys() and all(messages[name] in found[name][-1] for name in messages)


# Losses and metrics


def some_losses(*cases: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of the golden file, these cases only."""
    tensors, _ = read_tensors(GOLDEN / f"{LOSSES}.safetensors")
    content = json.loads((GOLDEN / f"{LOSSES}.json").read_text())
    chosen = {key: {case: content[key][case] for case in cases} for key in ("losses", "metrics", "torchmetrics")}
    return {name: x for name, x in tensors.items() if name.partition(".")[0] in cases}, chosen


def changed(value: Any) -> Any:
    """Every number in it, by a ten-thousandth; what counts pixels, by one."""
    if isinstance(value, dict):
        return {key: changed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [changed(inner) for inner in value]
    return value + 1 if isinstance(value, int) else 1.0002 * value


def num_values(values: dict[str, Any]) -> int:
    return sum(len(value) if isinstance(value, dict) else 1 for value in values.values())


def test_every_changed_value_of_losses_and_metrics_fails(folder: Path) -> None:
    tensors, content = some_losses("random")
    wrong = {key: changed(content[key]) for key in ("losses", "metrics", "torchmetrics")}
    tensors = {name: 1.0002 * x if ".grad." in name else x for name, x in tensors.items()}
    write(folder, "file", tensors, content | wrong)
    found = failures(folder)["file"]
    expected = sum(num_values(content[key]["random"]) for key in wrong)
    expected += sum(".grad." in name for name in tensors)
    names = {failure.split(":")[0] for failure in found}
    own = {f"random.{theirs} {ours}" for theirs, ours in [("iou_score", "iou"), ("iou_score", "iou_per_image")]}
    own |= {f"random.f1_score {ours}" for ours in ("dice", "dice_per_image")}
    own |= {f"random.{name} {name}" for name in ("precision", "recall", "accuracy", "specificity")}
    assert len(names - own) == expected and names > own


def test_ignored_pixels(folder: Path) -> None:
    tensors = {
        name: x for name, x in read_tensors(GOLDEN / f"{LOSSES}.safetensors")[0].items() if name[:7] == "ignore."
    }
    values = json.loads((GOLDEN / f"{LOSSES}.json").read_text())["ignore_index_255"]
    write(folder, "file", tensors, {"ignore_index_255": values})
    assert failures(folder) == {}
    write(folder, "file", tensors, {"ignore_index_255": changed(values)})
    assert len(failures(folder)["file"]) == len(values)


def test_values_that_are_no_numbers(folder: Path) -> None:
    tensors, content = some_losses("empty_target_negative_pred")
    metrics = content["metrics"]["empty_target_negative_pred"]
    assert metrics["iou_score"]["micro|zd=1.0"] == "nan"
    for name, value in (("micro|zd=1.0", 1.0), ("macro|zd=1.0", "nan")):
        wrong = metrics | {"iou_score": metrics["iou_score"] | {name: value}}
        write(folder, "file", tensors, content | {"metrics": {"empty_target_negative_pred": wrong}})
        assert any("not a number: " in failure for failure in failures(folder)["file"])


def test_losses_with_other_numbers_in_their_names(folder: Path) -> None:
    """Against formulas of their own, in float64."""
    torch.manual_seed(0)
    logits, target = 2 * torch.randn(2, 1, 9, 11), (torch.rand(2, 1, 9, 11) > 0.8).to(torch.uint8)
    z, t = logits.double(), target.double()
    p, bce = z.sigmoid(), -(t * logsigmoid(z) + (1 - t) * logsigmoid(-z))
    tp, fp, fn = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()

    def index(alpha: float, beta: float, smooth: float = 0.0) -> Tensor:
        return (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)

    def focal(gamma: float, alpha: float) -> Tensor:
        return ((alpha * t + (1 - alpha) * (1 - t)) * (1 - (-bce).exp()) ** gamma * bce).mean()

    soft = 0.8 * t + 0.2 * (1 - t)
    values = {
        "bce_pos_weight2.5": (-2.5 * t * logsigmoid(z) - (1 - t) * logsigmoid(-z)).mean(),
        "softbce_smooth0.2": (-soft * logsigmoid(z) - (1 - soft) * logsigmoid(-z)).mean(),
        "dice_smooth0.5": 1 - index(0.5, 0.5, 0.5),
        "jaccard_smooth2_log": -index(1, 1, 2).log(),
        "tversky_a0.6_b0.2": 1 - index(0.6, 0.2),
        "focal_tversky_a0.2_b0.8_g2": (1 - index(0.2, 0.8)) ** 2,
        "focal_tversky_a0.2_b0.8_g1.667": (1 - index(0.2, 0.8)) ** (5 / 3),
        "focal_g3_a0.4": focal(3, 0.4),
        "bce0.2_tversky0.7(a.4,b.6)_focal0.1(a.3,g1.5)": (
            0.2 * bce.mean() + 0.7 * (1 - index(0.4, 0.6)) + 0.1 * focal(1.5, 0.3)
        ),
        "jaccard1_plus_bce2": 1 - index(1, 1) + 2 * bce.mean(),
    }
    tensors = {"some.logits": logits, "some.target": target}
    content = {"shape": [2, 1, 9, 11], "losses": {"some": {name: float(value) for name, value in values.items()}}}
    write(folder, "other", tensors, content)
    assert failures(folder) == {}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("losses", name) for name in ("hausdorff", "dice_gamma2", "bce0.5_hausdorff0.5", "dice_smooth1x")),
        *(("losses", name) for name in ("bce0.3_focal0.2(x.25)", "lovasz0.5(a1)_bce0.5", "")),
        ("metrics", "cohen_kappa"),
        ("torchmetrics", "BinaryCohenKappa"),
    ],
)
def test_values_that_no_case_knows(folder: Path, key: str, name: str) -> None:
    tensors, content = some_losses("single_pixel")
    content[key]["single_pixel"] |= {name: 1.0}
    write(folder, "file", tensors, content)
    assert "neither compared nor known not to be ours" in failures(folder)["file"][-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": {"more": {}}}, "more.logits is missing"),
        ({"more": 1}, "no case knows what more is"),
        ({"shape": [3, 1, 12, 15]}, "single_pixel: shape: [3, 1, 12, 14], expected [3, 1, 12, 15]"),
        ({"ignore_index_0": {}}, "no case knows what ignore_index_0 is"),
        ({"ignore_index_255": {}}, "ignore.logits is missing"),
    ],
)
def test_what_else_a_file_of_losses_may_get_wrong(folder: Path, change: dict[str, Any], message: str) -> None:
    tensors, _ = some_losses("single_pixel")
    write(folder, "file", tensors, change)
    assert any(message in failure for failure in failures(folder)["file"])


# Tables and images


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("adaptive_batch", lambda case: case["expected"].__setitem__(-1, 3)),
        ("adaptive_batch", lambda case: case["params"].update(cur=5)),
        ("adaptive_batch", lambda case: case["params"].update(more=5)),
        ("adaptive_batch", lambda case: case["events"].append({"cpu": 0.5})),
        ("threshold", lambda case: case["rows"][3].__setitem__(2, 1)),
        ("threshold", lambda case: case["rows"][3].__setitem__(5, 0.5)),
        ("threshold", lambda case: case["rows"][3].__setitem__(0, 0.123)),
        ("threshold", lambda case: case.update(best_threshold_f1=0.15)),
        ("threshold", lambda case: case.update(best_f1=0.15)),
        ("tiling_steps", lambda case: case["expected"][0].append(9)),
        ("tiling_steps", lambda case: case.update(more=9)),
    ],
)
def test_a_changed_table_fails(folder: Path, file: str, spoil: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((GOLDEN / f"{file}.json").read_text())
    spoil(content["cases"][0])
    (folder / "other.json").write_text(json.dumps(content))
    assert set(failures(folder)) == {"other"}


def test_a_changed_number_of_parameters_fails(folder: Path) -> None:
    counts = {"base8_bilinear=False_in3_classes1": 486553, "base16_bilinear=True_in3_classes=1": 1080929}
    (folder / "counts.json").write_text(json.dumps(changed(counts)))
    assert len(failures(folder)["counts"]) == len(counts)
    (folder / "counts.json").write_text(json.dumps({"base8_norm=group": 1}))
    assert "base8_norm=group is neither compared" in failures(folder)["counts"][0]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        *(
            (file, name)
            for file in ("blend", "tiling_gauss")
            for name in read_tensors(GOLDEN / f"{file}.safetensors")[0]
        ),
        ("blend", "more"),
        ("tiling_gauss", "more"),
    ],
)
def test_a_changed_image_fails(folder: Path, file: str, name: str) -> None:
    """By two levels of 255, of Pillow's too; a coverage by enough to be seen."""
    tensors, _ = read_tensors(GOLDEN / f"{file}.safetensors")
    wrong = tensors.get(name, torch.zeros(1)).clone()
    if wrong.is_floating_point():
        wrong.view(-1)[-1] += 1e-4
    else:
        wrong.view(-1)[-1] += 60 if name in ("I", "W", "coverage") else 3
    write(folder, "other", tensors | {name: wrong})
    assert set(failures(folder)) == {"other"}


# Files


def test_files_of_no_kind(folder: Path) -> None:
    write(folder, "tensors", {"a": torch.zeros(1)})
    for name, content in (("number", 1), ("names", {"a": 1}), ("network", {"kind": "unet"}), ("damaged", "{")):
        (folder / f"{name}.json").write_text(content if name == "damaged" else json.dumps(content))
    put(folder, "blend.safetensors")
    (folder / "blend.json").write_text('{"rule": ""}')
    found = {name: failure for name, (failure,) in failures(folder).items()}
    assert found.pop("damaged").startswith(f"{folder}/damaged.json: cannot be read (")
    assert found == {
        "tensors": f"{folder}/tensors.safetensors: no case knows what it holds: a",
        "number": f"{folder}/number.json: is no table of names",
        "names": f"{folder}/names.json: no case knows what it holds: a",
        "network": f"{folder}/network.safetensors: is missing",
        "blend": f"{folder}/blend.safetensors: no case knows what it holds: I, J_float_op0.0, J_float_op0.1, "
        "J_float_op0.25, J_float_op0.5",
    }


class _FakeSmp(nn.Linear):
    """What smp builds for a name: 6 parameters, or a refusal."""

    def __init__(self, *, name: str, in_channels: int, num_classes: int) -> None:
        if name == "Unet/tu-tf_mobilenetv3_small_100":
            raise ValueError("cannot be built: no such encoder")
        super().__init__(in_channels, num_classes)


def test_numbers_of_smp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case of their own, which says when it cannot be made."""
    refused = "smp0.6.0 Unet timm-mobilenetv3_small_100"
    counts = {
        "smp0.6.0 Unet resnet18 in5 classes1": 6,
        refused: "error: no such encoder",
        "base8_bilinear=True_in3_classes1": 270897,
    }
    (folder / "counts.json").write_text(json.dumps(counts))
    monkeypatch.setattr(unet, "find_spec", lambda name: object())
    monkeypatch.setattr(unet_tables, "SmpNetwork", _FakeSmp)
    assert failures(folder) == {}
    wrong = {"smp0.6.0 Unet resnet18 in5 classes1": 7, refused: "error: another", "smp0.7.0 Unet resnet18": 1}
    (folder / "counts.json").write_text(json.dumps(wrong))
    found = failures(folder)["counts-smp"]
    assert [failure.split(":")[0] for failure in found[:2]] == ["smp0.6.0 Unet resnet18 in5 classes1", refused]
    assert "smp0.7.0 Unet resnet18 is of a version that no case knows" in found[2]
    monkeypatch.setattr(unet, "find_spec", lambda name: None)
    case = next(case for case in collect(folder.parent, "unet") if case.id == "unet-counts-smp")
    assert case.skip is not None and "segmentation_models_pytorch is not installed" in case.skip
