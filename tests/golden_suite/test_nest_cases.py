"""The golden cases of NEST themselves: whatever is wrong in a file, each tensor of it, must show."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden_suite.suite import ROOT, collect, read_tensors, run

GOLDEN = ROOT / "tests" / "golden" / "nest"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "nest"
    path.mkdir()
    return path


def put(folder: Path, name: str, *, new_name: str | None = None) -> Path:
    """A copy of one of the golden folders, under a name of its own."""
    return Path(shutil.copytree(GOLDEN / name, folder / (new_name or name)))


def change(file: Path, **tensors: Tensor) -> None:
    old, header = read_tensors(file)
    save_file(old | tensors, file, header)


def spoil(file: Path, name: str) -> None:
    """Make the last element of a tensor wrong; enough of the tokens."""
    tensor = read_tensors(file)[0][name].clone()
    if tensor.dtype == torch.bool:
        tensor = ~tensor
    elif tensor.is_floating_point():
        tensor.view(-1)[-1] += 0.05 * (1 + tensor.abs().max())
    else:
        tensor += 1
    change(file, **{name: tensor})


def failures(folder: Path, only: str = "") -> dict[str, str]:
    """Id of each failed case, of those in whose id *only* is -> what it says."""
    cases = {case.id.removeprefix("nest-"): case for case in collect(folder.parent, "nest")}
    checks = {name: run(case) for name, case in cases.items() if only in name}
    return {name: "\n".join(check.failures) for name, check in checks.items() if check.failures}


def results(name: str, *inputs: str) -> list[tuple[str, str]]:
    """The tensors of a file that are no inputs: (file, tensor)."""
    return [(name, tensor) for tensor in read_tensors(GOLDEN / name)[0] if not tensor.endswith(inputs)]


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        *results("frontend/frontend.safetensors", "in.wave", "in.length"),
        *results("nemo_archive/expected.safetensors", "in.wave", "in.length"),
        *results("units/quantizer.safetensors", "in", ".proj", ".codebooks"),
        *results("units/loss.safetensors", ".log_probs", ".targets", ".mask.time"),
        *results("units/augment.safetensors", "0.audio", "1.audio", "0.noise", "1.noise"),
        ("units/masking.safetensors", "nooverlap.mask.time"),
        ("units/masking.safetensors", "overlap_dense.masked_feats_sum"),
        ("encoder_variants/encoder_variants.safetensors", "att_ctx.outputs"),
    ],
)
def test_a_wrong_value_fails(folder, file, tensor):
    put(folder, file.partition("/")[0])
    spoil(folder / file, tensor)
    found = list(failures(folder, "" if "units" not in file else Path(file).stem).values())
    assert len(found) == 1
    assert "is above the tolerance" in found[0] or ", expected " in found[0]


@pytest.mark.parametrize("file", ["eval", "train"])
def test_every_result_of_a_model_is_compared(folder, file):
    """All at once: a file in which everything is wrong names everything."""
    model = put(folder, "small_postconv", new_name="other")
    inputs = ("mask.time",) if file == "train" else ("in.clean", "in.noisy", "in.length", "mask.time")
    names = [name for name in read_tensors(model / f"{file}.safetensors")[0] if not name.endswith(inputs)]
    for name in names:
        spoil(model / f"{file}.safetensors", name)
    found = failures(folder, f"other-{file}")
    unnamed = {"final.norms", "nomask.encoder.outputs", "nomask.log_probs", "step0.grad_norms"}
    assert [name for name in names if name not in found[f"other-{file}"] and name not in unnamed] == []
    more = ["nomask encoder", "nomask log_probs"] if file == "eval" else ["final.norms ", "step0.grad_norms "]
    assert all(name in found[f"other-{file}"] for name in more)


@pytest.mark.parametrize(
    ("name", "message"),
    [("layer0.more", "layer0.more is the output of no part of ours"), ("more", "nor compared: ['more'], expected []")],
)
def test_tensors_that_nobody_knows(folder, name, message):
    model = put(folder, "tiny_preconv")
    change(model / "eval.safetensors", **{name: torch.zeros(1)})
    assert failures(folder, "eval")["tiny_preconv-eval"].endswith(message)


def test_names(folder):
    model = put(folder, "tiny_preconv")
    for file, message in (("parameters", "parameters: "), ("state_dict_keys", "state dict: ")):
        content = json.loads((model / f"{file}.json").read_text())
        turned = dict(reversed(content.items())) if isinstance(content, dict) else content[::-1]
        (model / f"{file}.json").write_text(json.dumps(turned))
        assert message in failures(folder, "names")["tiny_preconv-names"]
    (model / "parameters.json").unlink()
    assert "parameters.json: is missing" in failures(folder, "names")["tiny_preconv-names"]


def test_tables(folder):
    stats, sched = put(folder, "stats"), put(folder, "sched")
    (stats / "state_dict_large.json").write_text("[]")
    (stats / "param_counts.json").write_text('{"small": {"total": 1}}')
    file = stats / "mask_stats_nemo3.0.0.json"
    table = json.loads(file.read_text())["default_T200"]
    table |= {"mean_fraction": table["mean_fraction"] + 0.02}
    file.write_text(json.dumps({"default_T200": table}))
    file = sched / "noam_tiny.csv"
    file.write_text(file.read_text().replace("2,0.00125", "2,0.001251"))
    found = failures(folder)
    wrong = {"mask_stats_nemo3.0.0", "param_counts", "state_dict_large"}
    assert found.keys() == {"sched-noam_tiny", *(f"stats-{name}" for name in wrong)}
    assert found["stats-mask_stats_nemo3.0.0"].startswith("default_T200: mean_fraction in standard errors: error")
    assert found["sched-noam_tiny"].startswith("rate of step 2: error 8.0e-04")


def test_a_file_that_no_case_claims(folder):
    put(folder, "sched")
    (folder / "sched" / "more.json").write_text("{}")
    assert "['sched/more.json'], expected []" in failures(folder)["files"]
