"""Archives and checkpoints between this framework and NeMo itself, which `make peers` installs."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.warm_start import Source, start_from_weights
from models import load
from models.nemo import read_nemo
from models.nest import NEST

PEERS = Path(__file__).parents[2] / ".peers" / "bin" / "python"
SMALL = {"d_model": 32, "n_layers": 2, "n_heads": 4, "subsampling_conv_channels": 8}
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two_books": {"num_books": 2, "encoder": SMALL | {"use_bias": False, "xscaling": False, "untie_biases": False}},
    "masked_after_subsampling": {"mask_position": "post_conv", "squeeze_single": True},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEERS.exists(), reason="NeMo is not installed: make peers"),
]


def network(name: str, seed: int) -> NEST:
    torch.manual_seed(seed)
    system = NEST(**{"num_classes": 16, "encoder": SMALL, **NETWORKS[name]}).eval()
    for weight in system.parameters():  # nothing that is 0 or 1 by chance
        weight.data += 0.02 * torch.randn_like(weight)
    return system


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What we write, and what NeMo makes of it."""
    folder = tmp_path_factory.mktemp("peer")
    for name in NETWORKS:
        network(name, 0).save_to(folder / f"{name}.nemo")
        given = {"audio": torch.randn(2, 32000), "length": torch.tensor([32000, 20000])}
        torch.save(given, folder / f"{name}.pt")
    script = Path(__file__).parent / "nemo_peer.py"
    done = subprocess.run([str(PEERS), str(script), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_nemo_restores_our_archive(name: str, folder: Path) -> None:
    """Names in order, every bit of the weights; the same encoder."""
    ours, given = network(name, 0), torch.load(folder / f"{name}.pt")
    seen = torch.load(folder / f"{name}_seen.pt")
    assert seen["names"] == list(ours.state_dict())
    assert all(torch.equal(weight, seen["state"][key]) for key, weight in ours.state_dict().items())
    with torch.no_grad():
        encoded, length = ours.encode(given["audio"], given["length"])
    assert torch.equal(length, seen["length"])
    print(f"{name}: largest difference of the encoder {float((encoded - seen['encoded']).abs().max()):.1e}")
    torch.testing.assert_close(encoded, seen["encoded"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_of_layers(name: str, folder: Path) -> None:
    """What predict writes is what NeMo's extractor gives; it counts layers from 0."""
    ours, given = load(folder / f"{name}.nemo"), torch.load(folder / f"{name}.pt")
    found = ours.predict(given["audio"][0], sample_rate=16000, layers=[1, 2])["features"]
    for number, theirs in enumerate(torch.load(folder / f"{name}_seen.pt")["layers"]):
        frames = found[number]  # (T', D)
        torch.testing.assert_close(frames, theirs[0].T[: len(frames)], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_we_read_what_nemo_writes(name: str, folder: Path) -> None:
    """Its archive, and Lightning's checkpoint with its configuration inside."""
    ours = network(name, 0).state_dict()
    for source in (
        Source("init_from_nemo_model", str(folder / f"{name}_again.nemo")),
        Source("init_from_ptl_ckpt", str(folder / f"{name}.ckpt")),
    ):
        other = network(name, 1)
        start_from_weights(other, source, strict=True)
        assert all(torch.equal(weight, ours[key]) for key, weight in other.state_dict().items()), source
    again = read_nemo(folder / f"{name}_again.nemo")["state_dict"]
    assert list(again) == list(ours)
