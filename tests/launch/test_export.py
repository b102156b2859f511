"""The exported file is compared with the original; one that differs is not kept."""

from pathlib import Path

import numpy as np
import pytest
import torch

from launch import export


def test_three_sizes() -> None:
    example = {"mic": torch.randn(1, 100), "far": torch.randn(1, 100)}
    sizes = export.of_three_sizes(example, (-1,))
    assert [{tuple(value.shape) for value in inputs.values()} for inputs in sizes] == [
        {(1, 33)},
        {(1, 100)},
        {(1, 133)},
    ]
    assert list(sizes[0]) == list(sizes[2]) == ["mic", "far"]
    images = export.of_three_sizes({"image": torch.randn(1, 3, 64, 96)}, (0, 2, 3))
    assert [tuple(i["image"].shape) for i in images] == [(1, 3, 21, 33), (1, 3, 64, 96), (2, 3, 85, 129)]


def test_a_file_that_differs_is_not_kept(trained: Path, script, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "x.onnx").write_text("of an earlier run")
    monkeypatch.setattr(export, "write_onnx", lambda system, example, path, **_: path.write_text("wrong"))
    monkeypatch.setattr(export, "largest_difference", lambda system, path, inputs: float("nan"))
    done = script("export", [f"ckpt_path={trained}", "output=x.onnx"])
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("failed: RuntimeError: x.onnx: not written, its results differ by") and "1 x 2667" in last
    assert [file.name for file in in_tmp.iterdir()] == ["x.onnx"]
    assert (in_tmp / "x.onnx").read_text() == "of an earlier run"


def test_difference_is_a_share_of_the_largest_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Session:
        def __init__(self, path: str, providers: list[str]) -> None: ...

        def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [inputs["x"] * 1.01]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    x = {"x": torch.tensor([[1e-6, -2e-6]])}
    assert export.largest_difference(torch.nn.Identity(), Path("x"), x) == pytest.approx(0.01, rel=1e-3)  # type: ignore[arg-type]
    assert export.largest_difference(torch.nn.Identity(), Path("x"), {"x": torch.zeros(1, 3)}) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("int8=true", "int8=true is for the segmentation of images and for echo cancellation, not for ConvTasNet"),
        ("output=model.bin", "output=model.bin: give a file that ends in .onnx"),
    ],
)
def test_what_cannot_be_done_is_said_first(trained: Path, script, in_tmp: Path, typed: str, expected: str) -> None:
    done = script("export", [f"ckpt_path={trained}", "output=x.onnx", typed])
    assert done.code == 2 and done.err == f"error: {expected}\n"
    assert not list(in_tmp.iterdir())
