"""The runner of golden cases itself: what is wrong in a folder of golden files must show, and how."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.golden_suite import suite
from tests.golden_suite.suite import Case, Check, collect, run, summary
from tests.golden_suite.test_golden import test_golden as golden_test

GOLDEN = suite.ROOT / "tests" / "golden" / "conv_tasnet"
TORCHAUDIO, METRICS, STEPS = "ta_relu_2spk_oddlen", "metrics_degenerate", "trainstep_2spk"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "conv_tasnet"
    path.mkdir()
    return path


def put(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(GOLDEN / name, folder / name)


def failures(folder: Path) -> dict[str, str]:
    """Id of each failed case -> what it says."""
    checks = {case.id.removeprefix("conv_tasnet-"): run(case) for case in collect(folder.parent, "conv_tasnet")}
    return {name: "\n".join(check.failures) for name, check in checks.items() if check.failures}


def test_any_stem_and_readme(folder: Path) -> None:
    shutil.copy(GOLDEN / f"{TORCHAUDIO}.safetensors", folder / "ta_other.safetensors")
    (folder / "README.md").touch()
    assert failures(folder) == {}


def test_file_without_case(folder: Path) -> None:
    put(folder, f"{TORCHAUDIO}.safetensors")
    (folder / "more").mkdir()
    (folder / "more" / "ta_deep.safetensors").touch()
    (folder / "tb_relu.safetensors").touch()
    unclaimed = ["more/ta_deep.safetensors", "tb_relu.safetensors"]
    assert failures(folder) == {"files": f"{folder}: files that no case claims: {unclaimed}, expected []"}


def test_folder_without_case(folder: Path) -> None:
    assert failures(folder) == {"files": f"{folder}: no case in this folder"}


def test_truncated_file(folder: Path) -> None:
    content = (GOLDEN / f"{TORCHAUDIO}.safetensors").read_bytes()
    file = folder / "ta_cut.safetensors"
    for size in (0, 5, len(content) // 2):
        file.write_bytes(content[:size])
        found = failures(folder)
        assert set(found) == {"ta_cut-float64", "ta_cut-float32", "ta_cut-parameters"}
        assert all(text.startswith(f"{file}: cannot be read (") and "\n" not in text for text in found.values())


def test_missing_and_damaged_json(folder: Path) -> None:
    put(folder, f"{STEPS}.safetensors", f"{METRICS}.safetensors")
    assert failures(folder) == {
        STEPS: f"{folder / STEPS}.json: is missing",
        f"{METRICS}-degenerate": f"{folder / 'metrics.json'}: is missing",
    }
    (folder / "metrics.json").write_text("{")
    assert f"{folder / 'metrics.json'}: cannot be read (" in failures(folder)[f"{METRICS}-degenerate"]


def test_json_without_its_tensors(folder: Path) -> None:
    put(folder, f"{STEPS}.json", "metrics.json")
    found = failures(folder)
    assert found[STEPS].startswith(f"{folder / STEPS}.safetensors: cannot be read (")
    assert f"the file of entry degenerate, {METRICS}.safetensors, is there: False" in found["metrics.json"]


def test_renamed_metrics(folder: Path) -> None:
    put(folder, "metrics.json")
    shutil.copy(GOLDEN / f"{METRICS}.safetensors", folder / "metrics_Z.safetensors")
    assert failures(folder)["metrics_Z-float64"] == f"{folder / 'metrics.json'}: no entry for metrics_Z.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "case"),
    [
        ("output_f64", 1e-8, "float64"),
        ("inter.block1.res", 1e-4, "float64"),
        ("output_f32", 1e-4, "float32"),
        ("state_dict.mask_generator.conv_layers.0.skip_out.bias", 1e-4, "float64"),
    ],
)
def test_a_wrong_value_fails(folder: Path, name: str, change: float, case: str) -> None:
    tensors, metadata = suite.read_tensors(GOLDEN / f"{TORCHAUDIO}.safetensors")
    tensors[name][..., 0] += change
    save_file(tensors, folder / "ta_wrong.safetensors", metadata)
    found = failures(folder)
    assert "is above the tolerance" in found[f"ta_wrong-{case}"]
    assert "ta_wrong-parameters" not in found


def test_arguments_from_the_index(folder: Path) -> None:
    """Where a header has none; entries of files that are elsewhere do no harm."""
    tensors, metadata = suite.read_tensors(GOLDEN / f"{TORCHAUDIO}.safetensors")
    save_file(tensors, folder / "ta_bare.safetensors")
    assert "index.json: is missing" in failures(folder)["ta_bare-float64"]
    entries = [{"file": "here/ta_bare.safetensors", "cfg": json.loads(metadata["cfg"])}, {"file": "here/ta_more"}]
    (folder / "index.json").write_text(json.dumps(entries))
    assert failures(folder) == {}


def test_unknown_values_in_the_metrics(folder: Path) -> None:
    put(folder, f"{METRICS}.safetensors")
    entry = {"est==target": {"float64.tm.pesq": 4.5}}
    (folder / "metrics.json").write_text(json.dumps({"degenerate": entry}))
    message = "est==target float64.tm.pesq is neither compared nor known not to be ours"
    assert failures(folder) == {f"{METRICS}-degenerate": message}


def test_unused_parameters_of_the_peer(folder: Path) -> None:
    tensors, metadata = suite.read_tensors(GOLDEN / f"{TORCHAUDIO}.safetensors")
    save_file(tensors | {"state_dict.gain": torch.ones(1)}, folder / "ta_more.safetensors", metadata)
    assert "Unexpected key(s)" in failures(folder)["ta_more-parameters"]


def test_systems(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "README.md").touch()
    (folder.parent / "fifth").mkdir()
    cases = {case.id: case for case in collect(folder.parent)}
    assert set(cases) >= {"conv_tasnet-files", "fifth-unknown"}
    assert run(cases["fifth-unknown"]).failures == ["fifth: there is neither models/fifth.py nor such a system"]
    folder.joinpath("README.md").unlink()
    folder.rmdir()
    (absent,) = collect(folder.parent, "conv_tasnet")
    assert absent.skip == f"conv_tasnet: no folder {folder}"
    monkeypatch.setattr(suite, "ROOT", folder.parent)
    (pending,) = collect(folder.parent, "conv_tasnet")
    assert pending.skip == "conv_tasnet: pending, models/conv_tasnet.py does not exist yet"


def skip(check: Check) -> None:
    pytest.skip("no library")


def compare_nothing(check: Check) -> None:
    pass


@pytest.mark.parametrize(
    ("runner", "message"), [(skip, "must not be skipped: no library"), (compare_nothing, "x: nothing was compared")]
)
def test_a_case_that_did_not_compare_fails(runner, message) -> None:
    with pytest.raises(pytest.fail.Exception, match=message):
        golden_test(Case("x", "x", run=runner), lambda name, row: None)


def test_summary_names_the_error_nearest_to_its_tolerance() -> None:
    check = Check()
    check.close("near", 1.0, 1.0 + 5e-10, tolerance=1e-9)
    check.close("far", torch.tensor([100.0, 0.0]), torch.tensor([100.0, 1e-3]), tolerance=1e-2, relative=True)
    check.close("not a number", torch.nan, 1.0, tolerance=1e-9)
    assert check.failures == ["not a number: error inf is above the tolerance 1e-09"]
    rows = [("b", 2, 5e-10, 1e-9, "near"), ("b", 1, 1e-5, 1e-2, "far"), ("a", 1, 0.0, 1.0, "")]
    assert summary(rows) == [
        "golden a: 1 cases, 1 comparisons",
        "golden b: 2 cases, 3 comparisons, largest error 5.0e-10 of 1e-09 (near)",
    ]
