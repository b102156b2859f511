"""What needs a CUDA device: precision that switches itself on, fp16 with its scaler, a resume."""

from pathlib import Path

import pytest
import torch

from models.checkpoint import read_checkpoint
from tests.conftest import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
GPU = [argument for argument in TINY if not argument.startswith("trainer.accelerator")]


@pytest.mark.parametrize("precision", ["null", "16-mixed"])
def test_trains_and_resumes(script, manifests: list[str], in_tmp: Path, precision: str) -> None:
    base = ["model=conv_tasnet", "debug=fast", *GPU, *manifests, f"trainer.precision={precision}", "trainer.devices=1"]
    done = script("train", [*base, "exp_manager.version=x"])
    assert done.code == 0, done.text
    done = script("train", [*base, "exp_manager.resume_if_exists=true", "trainer.max_steps=6"])
    assert done.code == 0, done.text
    content = read_checkpoint("runs/conv_tasnet/x/checkpoints/last.ckpt")
    assert content["global_step"] == 6
    machine = content["plan"]["machine"]
    expected = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    assert machine["accelerator"] == "CUDAAccelerator"
    assert machine["precision"] == (expected if precision == "null" else precision)
    assert all(torch.isfinite(weight).all() for weight in content["state_dict"].values())
