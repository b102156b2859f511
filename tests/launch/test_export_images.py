"""Files of 8 bits: what is in them, what they are calibrated on, and how they are compared with the original."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from launch import export, quantise

CHANNELS = 4


def write_network(path: Path) -> None:
    """Three by three means of four mixtures of the colours, and from these a logit that is 0 at a brightness of 0.5."""
    rng = np.random.default_rng(0)
    mix = rng.uniform(0.2, 1, (CHANNELS, 3, 1, 1)) * 2.0 ** np.arange(CHANNELS)[:, None, None, None]  # of unlike size
    first = np.broadcast_to(mix / 9, (CHANNELS, 3, 3, 3)).astype(np.float32)
    gain = 20 / CHANNELS / mix.sum(1, keepdims=True).reshape(1, CHANNELS, 1, 1)
    weights = {"first": first, "second": gain.astype(np.float32), "bias": np.float32([-10])}
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["mixed"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["mixed"], ["positive"]),
        helper.make_node("Conv", ["positive", "second", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bright",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, path)


def batches(num: int = 3) -> list[dict[str, Any]]:
    """Of two photos with a bright rectangle, the second padded at the right."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(num):
        image = torch.randint(0, 100, (2, 3, 24, 40), generator=generator, dtype=torch.uint8)
        mask = torch.zeros(2, 1, 24, 40, dtype=torch.uint8)
        mask[:, :, 6:18, 8:30] = 1
        image = torch.where(mask == 1, image + 155, image)
        image[1, :, :, 32:], mask[1, :, :, 32:] = 255, 255
        made.append({"image": image, "mask": mask, "size": torch.tensor([[24, 40], [24, 32]])})
    return made


def test_examples_have_no_padding() -> None:
    found = list(quantise.examples(batches(1)))
    assert [image.shape for image, _ in found] == [(1, 3, 24, 40), (1, 3, 24, 32)]
    assert all(mask.shape == image.shape[2:] and mask.max() == 1 for image, mask in found)
    assert found[0][0].dtype == np.float32 and 0.9 < found[0][0].max() <= 1


def test_pieces_are_the_whole() -> None:
    mask = np.random.default_rng(0).integers(0, 2, (1025, 2050), dtype=np.uint8)
    image = np.stack([mask] * 3)[None]
    parts = list(quantise.pieces(image, mask))
    assert len(parts) == 6 and all(512 <= side <= 1024 for _, part in parts for side in part.shape)
    rows = [np.concatenate([part for _, part in parts[start : start + 3]], 1) for start in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows), mask)
    assert all((part[0] == own).all() for part, own in parts)
    assert len(list(quantise.pieces(image[..., :1024, :1024], mask[:1024, :1024]))) == 1


def test_eight_bits_keep_the_mask(tmp_path: Path) -> None:
    """Each channel has a scale of its own."""
    write_network(tmp_path / "x.onnx")
    quantise.write_int8(tmp_path / "x.onnx", tmp_path / "x.int8.onnx", quantise.examples(batches(2)))
    model = onnx.load(tmp_path / "x.int8.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert "QuantizeLinear" in kinds and "DequantizeLinear" in kinds
    stored = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    assert stored["first_quantized"].dtype == np.int8 and stored["first_scale"].shape == (CHANNELS,)
    assert np.abs(stored["first_quantized"]).max() <= 64, "7 bits: on CPUs without VNNI sums of 8 overflow"
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["n", "", "h", "w"]
    scores = [
        quantise.intersection_over_union(tmp_path / name, quantise.examples(batches()), threshold=0.5)
        for name in ("x.onnx", "x.int8.onnx")
    ]
    assert scores[0][1] == scores[1][1] == 6 and scores[0][0] > 0.8
    assert scores[1][0] == pytest.approx(scores[0][0], abs=0.02)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.int8.onnx", "x.onnx"], "nothing else is left"


def test_intersection_over_union_counts_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all images together, without those that are not known; from the threshold on, not above it."""
    logits = {1.0: [[-1, 0, 2, 2]], 0.0: [[2, -3, -3, -3]]}

    class Session:
        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name="image")]

        def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.float32(logits[float(inputs["image"].max())])[None, None]]

    monkeypatch.setattr(quantise, "_session", lambda path: Session())
    data = [
        (np.ones((1, 3, 1, 4), np.float32), np.uint8([[1, 1, 0, 255]])),
        (np.zeros((1, 3, 1, 4), np.float32), np.uint8([[1, 0, 0, 0]])),
    ]
    iou = quantise.intersection_over_union
    assert iou(tmp_path, data, threshold=0.5) == (2 / 4, 2)
    assert iou(tmp_path, data, threshold=0.6) == (1 / 4, 2)
    assert iou(tmp_path, data, threshold=0.0) == (3 / 7, 2) and iou(tmp_path, data, threshold=1.0) == (0, 2)
    assert iou(tmp_path, [(data[1][0], np.uint8([[0, 0, 0, 0]]))], threshold=1.0) == (1.0, 1)


def test_the_loss_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_network(tmp_path / "x.onnx")
    data = SimpleNamespace(val_dataloader=lambda: batches(2))
    with caplog.at_level("INFO", logger="launch"):
        export._write_int8(tmp_path / "x.onnx", data, num_images=3, threshold=0.5)  # type: ignore[arg-type]
    lines = [
        record.getMessage().replace(f"{tmp_path}/", "") for record in caplog.records if record.name == export.__name__
    ]
    assert lines[0].startswith("x.onnx: IoU 0.") and lines[0].endswith("on 4 validation images at threshold 0.50")
    assert lines[1].startswith("x.int8.onnx: IoU 0.") and len(lines) == 3
    scores = [float(line.split()[2]) for line in lines[:2]]
    assert float(lines[2].removeprefix("8 bits cost ").split()[0]) == pytest.approx(
        100 * (scores[0] - scores[1]), abs=0.011
    )
