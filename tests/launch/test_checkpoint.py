"""Checkpoints: plain, atomic, refused when hostile or damaged; the three ways to go on from one."""

import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchaudio

from launch.checkpoint import RunCheckpointIO, newest_readable, remove_leftovers
from launch.errors import ConfigError
from launch.resume import refuse_other_network, to_continue
from launch.warm_start import Source, start_from_weights
from models import load
from models.checkpoint import CheckpointError, read_checkpoint, read_plain
from models.conv_tasnet import ConvTasNet
from models.nemo import write_nemo
from models.nest import NEST
from tests.conftest import TINY

SMALL_NEST: dict[str, Any] = {
    "num_classes": 4,
    "encoder": {"d_model": 8, "n_heads": 2, "n_layers": 1, "subsampling_conv_channels": 4},
}
GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoint_v1.ckpt"


class Attack:
    """Unpickling this would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def last(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


def test_content_of_format_1(last: Path) -> None:
    content = torch.load(last, weights_only=True)
    assert content["format_version"] == 1
    assert content["system"]["name"] == "models.conv_tasnet.ConvTasNet"
    assert content["system"]["arguments"]["num_filters"] == 16
    assert content["structure"] == []
    for section in ("data", "trainer", "callbacks", "model"):
        assert content["config"][section], section
    assert content["config"]["data"]["segment_s"] == 0.25
    assert "debug=fast" in content["overrides"]
    assert {"python", "torch", "pytorch_lightning"} <= set(content["versions"])
    assert "machine" in content["plan"]
    assert content["git"] is not None
    assert any("SeparationData" in key for key in content), "the data position"
    assert any("RngState" in key for key in content["callbacks"])


def test_format_1_loads_for_ever() -> None:
    """Written by the first version; the result is that of then."""
    system = load(GOLDEN)
    time = torch.arange(4000)
    signal = torch.sin(time / 7) * 0.1 + torch.cos(time**2 / 9000) * 0.05
    with torch.inference_mode():
        sources = system(signal[None])[0]
    expected = torch.load(GOLDEN.with_suffix(".expected.pt"), weights_only=True)
    torch.testing.assert_close(sources, expected, atol=1e-5, rtol=1e-4)


def test_an_archive_holds_no_state_of_a_training(script, in_tmp: Path) -> None:
    write_nemo(in_tmp / "x.nemo", {"encoder": {}}, {"w": torch.ones(1)})
    (in_tmp / "in.jsonl").write_text("")
    line = "x.nemo: an archive of weights without a training state: train.py model.restore_from=x.nemo goes on from its"
    for name, typed in {"train": ["model=nest", "model.train_ds.manifest_filepath=in.jsonl"], "evaluate": []}.items():
        done = script(name, [*typed, "ckpt_path=x.nemo"])
        assert done.code == 2 and done.err.splitlines() == [f"error: {line} weights"], done.text


def test_python_api(last: Path) -> None:
    system = load(last)
    assert not system.training
    signal = torch.randn(2, 3000)
    assert system.predict(signal, sample_rate=8000)["sources"].shape == (2, 2, 3000)
    assert system.predict(mixture=signal[0], sample_rate=16000)["sources"].shape == (2, 3000)


@pytest.mark.parametrize("script_name", ["train", "evaluate", "predict", "export"])
@pytest.mark.parametrize("damage", ["half", "empty", "text", "pickle", "hostile archive", "newer", "foreign"])
def test_unusable_checkpoint(
    script, last: Path, manifests: list[str], in_tmp: Path, script_name: str, damage: str
) -> None:
    bad, trap = in_tmp / "bad.ckpt", in_tmp / "trap"
    content = last.read_bytes()
    if damage == "half":
        bad.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        bad.touch()
    elif damage == "text":
        bad.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "pickle":
        bad.write_bytes(pickle.dumps(Attack(trap)))
    elif damage == "hostile archive":
        torch.save({**torch.load(last, weights_only=True), "extra": Attack(trap)}, bad)
    elif damage == "newer":
        torch.save({**torch.load(last, weights_only=True), "format_version": 99}, bad)
    else:
        with zipfile.ZipFile(bad, "w") as archive:
            archive.writestr("readme.txt", "nothing")
    extra = {
        "train": ["model=conv_tasnet", *TINY, *manifests],
        "evaluate": [],
        "predict": [f"input={bad}", "output=out"],
        "export": ["output=x.onnx"],
    }[script_name]
    done = script(script_name, [f"ckpt_path={bad}", *extra])
    assert done.code == 2, done.text
    assert done.err.startswith(f"error: {bad}: ") and done.err.count("\n") == 1, done.err
    assert not trap.exists(), "something in the file was run"


def test_a_class_named_by_a_checkpoint_must_be_allowed(last: Path, in_tmp: Path) -> None:
    content = torch.load(last, weights_only=True)
    content["system"]["name"] = "subprocess.Popen"
    content["config"]["packages"] = ["subprocess"]
    torch.save(content, "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad.ckpt: subprocess.Popen: not in an allowed package"):
        load("bad.ckpt")


def test_a_checkpoint_cannot_allow_packages(script, last: Path, in_tmp: Path) -> None:
    content = torch.load(last, weights_only=True)
    content["config"]["data"]["_target_"] = "evil.Data"
    content["config"]["packages"] = ["evil"]
    torch.save(content, "bad.ckpt")
    (in_tmp / "evil.py").write_text("raise SystemExit('evil was imported')")
    done = script("evaluate", ["ckpt_path=bad.ckpt"])
    assert done.code == 2
    assert "data._target_=evil.Data: not in an allowed package" in done.err


def test_written_whole_or_not_at_all(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = RunCheckpointIO({"git": ""}), in_tmp / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)

    def full_disk(content, file) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    def killed(content, file) -> None:
        file.write(b"half of it")
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")  # torch raises it anywhere

    monkeypatch.setattr(torch, "save", full_disk)
    io.save_checkpoint({"state_dict": {"w": torch.zeros(3)}}, path)
    assert str(io.failure).startswith("checkpoints/last.ckpt could not be written (No space left on device): ")
    assert "the one before has 0.0 MiB" in str(io.failure)
    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        io.save_checkpoint({"state_dict": {"w": torch.zeros(3)}}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)["state_dict"]["w"].sum() == 3, "the earlier one is still valid"
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    (path.parent / "best.ckpt.tmp").write_bytes(b"of a killed run")
    remove_leftovers(path.parent)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_an_archive_that_does_not_fit_costs_no_checkpoint(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    def half(path: Path) -> None:
        path.with_name(path.name + ".tmp").write_bytes(b"half")
        raise OSError(122, "Disk quota exceeded")

    io = RunCheckpointIO({"git": ""}, half)
    io.save_checkpoint({"state_dict": {}}, in_tmp / "checkpoints" / "best.ckpt")
    assert io.failure is None and "checkpoints/best.nemo could not be written (Disk quota exceeded)" in caplog.text
    assert [file.name for file in (in_tmp / "checkpoints").iterdir()] == ["best.ckpt"]


def test_resume_takes_the_newest_that_opens(last: Path, in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = in_tmp / "checkpoints"
    folder.mkdir()
    whole = last.read_bytes()
    (folder / "best-step=3.ckpt").write_bytes(whole)
    (folder / "last.ckpt").write_bytes(whole[:1000])
    assert newest_readable(in_tmp) == folder / "best-step=3.ckpt"
    assert "skipped" in caplog.text and "last.ckpt" in caplog.text


def test_three_ways_to_go_on(script, manifests: list[str], trained: Path, in_tmp: Path) -> None:
    last = trained / "checkpoints" / "last.ckpt"
    base = ["model=conv_tasnet", "debug=fast", "test=false", *TINY, *manifests]

    done = script(
        "train", [*base, f"ckpt_path={last}", "trainer.max_steps=5", "model.optim.lr=0.5", "data.snr_db=[0,1]"]
    )
    assert done.code == 0, done.text
    first, *_ = done.out.splitlines()
    assert first.startswith(f"continuing from {last}")
    assert "model.optim.lr=0.5 is NOT taking effect: the checkpoint's 0.001 goes on" in done.out
    assert "changed since the checkpoint: data.snr_db=[0, 1]" in done.out
    (run,) = (in_tmp / "runs" / "conv_tasnet").iterdir()
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 5
    assert content["config"]["model"]["optim"]["lr"] == 0.001, "what the record says is what was in force"

    done = script("train", [*base, "exp_manager.resume_if_exists=true", "trainer.max_steps=6", "model.optim.lr=0.5",
                            "resume_override=[optim.lr]"])  # fmt: skip
    assert done.code == 0, done.text
    assert done.out.splitlines()[0] == f"resuming {run / 'checkpoints' / 'last.ckpt'}"
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 6
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5

    done = script("train", [*base, "exp_manager.resume_if_exists=true", "trainer.max_steps=6"])
    assert "nothing left to train: already at trainer.max_steps or max_epochs (step 6)" in done.out

    done = script("train", [*base, f"init_from={last}", "trainer.max_steps=1", "model.num_blocks=3",
                            "init_exclude=[encoder]", "exp_manager.version=warm"])  # fmt: skip
    assert done.code == 0, done.text
    assert "weights taken" in done.out and "missing: network.encoder.weight" in done.out
    assert read_checkpoint(in_tmp / "runs/conv_tasnet/warm/checkpoints/last.ckpt")["global_step"] == 1

    done = script("train", [*base, f"ckpt_path={last}", "model.num_filters=32"])
    assert done.code == 2
    assert "model.num_filters=32 (checkpoint: 16); init_from= takes what fits" in done.err

    done = script("train", [*base, f"ckpt_path={last}", "resume_override=[num_filters]"])
    assert done.code == 2
    assert "resume_override=num_filters: only values of the optimiser" in done.err


def test_weights_of_torchaudio_start_a_training(in_tmp: Path) -> None:
    sizes = {"num_sources": 3, "enc_num_feats": 8, "msk_num_feats": 6, "msk_num_hidden_feats": 10, "msk_num_layers": 2}
    peer = torchaudio.models.ConvTasNet(**sizes, msk_num_stacks=1, msk_activate="relu").eval()
    torch.save(peer.state_dict(), "peer.pth")
    channels = {"bottleneck_channels": 6, "skip_channels": 6, "hidden_channels": 10}
    system = ConvTasNet(num_sources=3, num_filters=8, num_blocks=2, num_repeats=1, **channels).eval()
    start_from_weights(system, Source("init_from", "peer.pth"))
    mixture = torch.randn(1, 321)
    torch.testing.assert_close(system(mixture), peer(mixture[:, None]))


def test_weights_of_nobody_are_one_line(in_tmp: Path) -> None:
    torch.save({"layer.weight": torch.zeros(1)}, "other.pth")
    with pytest.raises(ConfigError, match=r"init_from=other.pth: no weights of a Conv-TasNet .*layer.weight"):
        start_from_weights(ConvTasNet(), Source("init_from", "other.pth"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"state_dict": [1]}, "state_dict in it is a list, not names with tensors"),
        ({"state_dict": {"w": "x"}}, "'w' in its state_dict is a str, not a tensor"),
        ({"state_dict": {5: torch.ones(1)}}, "5 in its state_dict"),
        ({"state_dict": {}, "format_version": "1"}, "format_version in it is a str"),
        ({"state_dict": {}, "system": [1]}, "system in it is a list, not keys with values"),
        ({"state_dict": {}, "system": {"arguments": 5}}, "arguments in it is a int"),
        ({"state_dict": {}, "config": {"model": [1]}}, "model in it is a list"),
    ],
)
def test_content_of_another_form_is_one_line(content: dict[str, Any], reason: str, in_tmp: Path) -> None:
    torch.save({"format_version": 1} | content, "bad.ckpt")
    for use in (read_checkpoint, lambda path: start_from_weights(ConvTasNet(), Source("init_from", path))):
        with pytest.raises(CheckpointError) as raised:
            use("bad.ckpt")
        assert str(raised.value).startswith(f"bad.ckpt: {reason}") and "\n" not in str(raised.value)


def test_imported_weights_are_tensors(in_tmp: Path) -> None:
    """Of another implementation, whose file need not be a checkpoint of ours."""
    torch.save({"state_dict": {"network.encoder.weight": "x", "network.masker.bias": 5}}, "bad.pth")
    with pytest.raises(CheckpointError, match=r"^bad.pth: '.*' in its state_dict is a .*, not a tensor$"):
        start_from_weights(NEST(**SMALL_NEST), Source("init_from", "bad.pth"))


def test_a_run_directory_continues_from_its_last_checkpoint(trained: Path) -> None:
    assert to_continue(trained) == to_continue(trained.parent) == trained / "checkpoints" / "last.ckpt"
    assert to_continue(trained / "x.ckpt") == trained / "x.ckpt"
    with pytest.raises(CheckpointError, match="a directory without a checkpoint in it that can be read"):
        to_continue(trained / "checkpoints")


def test_files_of_other_kinds_say_what_to_do(tmp_path: Path) -> None:
    contents = {
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer; run `git lfs pull`"),
        "renamed.pth": (b"\x28" + bytes(7) + b'{"w":{"dtype":"F32"}}', "is a safetensors file; convert it"),
        "x.safetensors": (b"", "is a safetensors file; convert it"),
        "text.pth": (b"no weights at all", "refused, it holds more than plain data (Unsupported operand 110)"),
    }
    for name, (content, expected) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            read_plain(tmp_path / name)
        line = str(raised.value)
        assert line.startswith(f"{tmp_path / name}: {expected}") and "\n" not in line
        assert "Please file an issue" not in line


def test_only_what_shapes_a_network_is_named(tmp_path: Path) -> None:
    old = {"gru_hidden": 8, "dropout": 0, "loss": {"delay_weight": 0}, "optim": {"lr": 1}, "scores": []}
    new = {"gru_hidden": 9, "dropout": 1, "loss": {"delay_weight": 1}, "optim": {"lr": 2}, "scores": ["pesq"]}
    with pytest.raises(ConfigError) as raised:
        refuse_other_network(tmp_path, {"model": old}, {"model": new}, SimpleNamespace(of_training=("dropout",)))  # type: ignore[arg-type]
    assert str(raised.value).endswith(
        "of another shape: model.gru_hidden=9 (checkpoint: 8); init_from= takes what fits"
    )


def test_weights_that_were_trained_for_something_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"num_filters": 8, "bottleneck_channels": 4, "hidden_channels": 8, "num_blocks": 1, "num_repeats": 1}
    trained = ConvTasNet(**small, mask="sigmoid", level_db=None, optim={"lr": 1.0})
    content: dict = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(content)
    torch.save(content, tmp_path / "x.ckpt")
    for mask, expected in (("relu", ["init_from: trained with model.mask=sigmoid; here it is relu"]), ("sigmoid", [])):
        caplog.clear()
        start_from_weights(ConvTasNet(**small, mask=mask), Source("init_from", str(tmp_path / "x.ckpt")))
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == expected


def test_each_system_says_what_concerns_its_training_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = NEST(**SMALL_NEST, masking={"mask_prob": 0.5, "mask_value": 0.0}, preprocessor={"dither": 0.0})
    content: dict = {"state_dict": trained.state_dict()}
    trained.on_save_checkpoint(content)
    torch.save(content, tmp_path / "x.ckpt")
    here = NEST(**SMALL_NEST, masking={"mask_prob": 0.1, "mask_value": 1.0}, preprocessor={"dither": 1.0})
    start_from_weights(here, Source("init_from", str(tmp_path / "x.ckpt")))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["init_from: trained with model.masking.mask_value=0.0; here it is 1.0"]
