"""The golden cases of DeepVQE themselves: whatever is wrong in a file, each tensor of it, must show."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden_suite.suite import ROOT, collect, read_tensors, run

GOLDEN = ROOT / "tests" / "golden" / "deepvqe"
LOSSES, NETWORK = "08_losses", "04_aec_nfft512_tiny_scaled"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "deepvqe"
    path.mkdir()
    return path


def failures(folder: Path) -> dict[str, str]:
    """Id of each failed case -> what it says."""
    checks = {case.id.removeprefix("deepvqe-"): run(case) for case in collect(folder.parent, "deepvqe")}
    return {name: "\n".join(check.failures) for name, check in checks.items() if check.failures}


def put(folder: Path, stem: str, *, name: str = "file", change: dict[str, Tensor] | None = None, **metadata) -> None:
    tensors, header = read_tensors(GOLDEN / f"{stem}.safetensors")
    save_file(tensors | (change or {}), folder / f"{name}.safetensors", header | metadata)


def compared(stem: str) -> list[tuple[str, str]]:
    """Names of the tensors of a file that are results, not inputs."""
    tensors, _ = read_tensors(GOLDEN / f"{stem}.safetensors")
    inputs = ("in", "x", "near", "far", "noise", "rir")
    return [
        (stem, name)
        for name in tensors
        if ".sd." not in name and ".in" not in name and name.partition("_")[0] not in inputs or name == "far_nl"
    ]


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        *(pair for stem in ("01_blocks", "02_align", "07_stft", "09_mixing") for pair in compared(stem)),
        ("03_aec_nfft320_tiny", "grad.align_block.conv.1.weight"),
        ("03_aec_nfft320_tiny", "out.enh_trainmode"),
        (NETWORK, "act.mask27"),
        (NETWORK, "act.delay_dist"),
        ("05_ns_nfft512_tiny", "asrepo.out"),
        ("05_ns_nfft512_tiny", "asrepo.sd.deblock1.bn.running_mean"),
    ],
)
def test_a_wrong_value_fails(folder, stem, name):
    wrong = read_tensors(GOLDEN / f"{stem}.safetensors")[0][name].clone()
    wrong.view(-1)[-1] += 0.01 * (1 + wrong.abs().max())
    put(folder, stem, change={name: wrong})
    assert "is above the tolerance" in failures(folder)["file"]


@pytest.mark.parametrize("stem", ["01_blocks", NETWORK, LOSSES])
def test_a_tensor_that_nobody_compares_fails(folder, stem):
    put(folder, stem, change={"out.more": torch.zeros(1)})
    assert failures(folder)["file"].endswith("neither inputs nor compared: ['out.more'], expected []")


@pytest.mark.parametrize(
    ("stem", "name", "message"),
    [
        ("01_blocks", "attention.out", "no case knows the block attention"),
        ("02_align", "other.sd.conv.1.weight", "neither inputs nor compared"),
        (NETWORK, "act.more", "act.more is the output of no block of ours"),
        (NETWORK, "sd.dec1.more.weight", "Unexpected key"),
        ("07_stft", "X_512_256_hamming", "no case knows the window of X_512_256_hamming"),
    ],
)
def test_names_that_no_case_knows(folder, stem, name, message):
    put(folder, stem, change={name: torch.zeros(1)})
    assert message in failures(folder)["file"]


def test_a_file_of_no_kind(folder):
    save_file({"a": torch.zeros(1)}, folder / "12_other.safetensors")
    assert failures(folder) == {"12_other": f"{folder}/12_other.safetensors: no case knows what it holds: a"}


def test_results_of_losses(folder):
    """In the header or in a JSON file beside it; both must agree, and each must be known."""
    put(folder, LOSSES)
    results = json.loads(read_tensors(folder / "file.safetensors")[1]["results"])
    for change, message in (
        ({"richiejp_c0.3_total": results["richiejp_c0.3_total"] * 1.0001}, "is above the tolerance"),
        ({"cmy_perceptual": 1.0}, "cmy_perceptual is neither compared nor known not to be ours"),
    ):
        put(folder, LOSSES, results=json.dumps(results | change))
        assert message in failures(folder)["file"]
    (folder / "file.json").write_text(json.dumps(results))
    assert "results in header and file.json" in failures(folder)["file"]
    put(folder, LOSSES)
    assert failures(folder) == {}
    (folder / "file.safetensors").rename(folder / "moved.safetensors")
    assert failures(folder)["file"].startswith(f"{folder}/file.safetensors: cannot be read (")


def test_sizes_in_the_header(folder):
    put(folder, NETWORK, cfg=json.dumps({"far_channels": [2, 4, 9], "align_hidden": 5}))
    found = failures(folder)["file"]
    assert "far_channels in cfg: [4, 8], expected [4, 9]" in found
    assert "align_hidden in cfg: 4, expected 5" in found
