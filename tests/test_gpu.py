"""What needs a CUDA device: precision that switches itself on, fp16 with its scaler, a resume."""

from pathlib import Path

import pytest
import torch

from models.checkpoint import load, read_checkpoint
from tests.conftest import TINY, TINY_ECHO, TINY_NEST, TINY_UNET

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
TINY_OF = {
    "conv_tasnet": TINY,
    "deepvqe": [*TINY_ECHO, "model.loss.snr_weight=0.02", "model.loss.delay_weight=0.02"],
    "nest": TINY_NEST,
    "unet": TINY_UNET,
}


@pytest.mark.parametrize("system", TINY_OF)
@pytest.mark.parametrize("precision", ["null", "16-mixed"])
def test_trains_and_resumes(
    script, corpus: Path, manifests: list[str], photos: Path, in_tmp: Path, precision: str, system: str
) -> None:
    if system == "nest":
        parts = {"train": "train", "val": "validation", "test": "test"}
        manifests = [f"model.{ds}_ds.manifest_filepath={corpus / f'{part}.jsonl'}" for part, ds in parts.items()]
    if system == "unet":
        manifests = [f"data.{part}_manifest={photos / f'{part}.jsonl'}" for part in ("train", "val", "test")]
    tiny = [argument for argument in TINY_OF[system] if not argument.startswith("trainer.accelerator")]
    options = [f"model={system}", "debug=fast", f"trainer.precision={precision}", "trainer.devices=1"]
    base = [*options, *tiny, *manifests]
    done = script("train", [*base, "exp_manager.version=x"])
    assert done.code == 0, done.text
    done = script("train", [*base, "exp_manager.resume_if_exists=true", "trainer.max_steps=6"])
    assert done.code == 0, done.text
    content = read_checkpoint(f"runs/{system}/x/checkpoints/last.ckpt")
    assert content["global_step"] == 6
    machine = content["plan"]["machine"]
    expected = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    assert machine["accelerator"] == "CUDAAccelerator"
    assert machine["precision"] == (expected if precision == "null" else precision)
    assert all(torch.isfinite(weight).all() for weight in content["state_dict"].values())


def test_the_batch_of_tiles_follows_the_memory(trained_unet: Path) -> None:
    system = load(trained_unet / "checkpoints" / "last.ckpt", map_location="cuda")
    photo = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    options = {"tile": 64, "whole_up_to": 64, "outputs": ["probability"]}
    single = system.predict(photo, batch_size=1, max_batch_size=1, precision="32", **options)["probability"]
    adapted = system.predict(photo, batch_size=2, max_batch_size=32, precision="32", **options)["probability"]
    torch.testing.assert_close(single, adapted, atol=1e-4, rtol=0)
    half = system.predict(photo, **options)["probability"]
    torch.testing.assert_close(single, half, atol=0.05, rtol=0)
