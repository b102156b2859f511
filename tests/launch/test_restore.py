"""model.restore_from: architecture and weights of another run; what is typed against it; what a resume makes of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from launch.command_line import CONFIG_DIR
from launch.errors import ConfigError
from launch.restore import Restored, take_architecture
from launch.warm_start import Source, start_from_weights
from models.checkpoint import CheckpointError, read_checkpoint, read_plain
from models.nemo import write_nemo
from models.nest import NEST
from tests.conftest import TINY_NEST, Finished

OWN = [key for key in TINY_NEST if not key.startswith(("model.encoder", "model.num_classes"))]
OWN.append("--config-name=nest_fast-conformer")


@pytest.fixture
def archive(nest_run: Finished, nest_folder: Path) -> Path:
    assert nest_run.code == 0, nest_run.text
    return next((nest_folder / "checkpoints").glob("*.nemo"))


def nest() -> DictConfig:
    return OmegaConf.create({"model": OmegaConf.load(CONFIG_DIR / "model" / "nest.yaml").model})


def test_what_follows_from_the_architecture_follows(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cfg = nest()
    model = {"num_classes": 32, "preprocessor": {"features": 40}, "encoder": {"d_model": 24, "dropout": 0.3}}
    take_architecture(cfg, model, "x.nemo", set())
    assert cfg.model.quantizer.num_classes == cfg.model.decoder.num_classes == 32
    assert cfg.model.masking.feat_in == 40 and cfg.model.optim.sched.d_model == 24
    assert cfg.model.encoder.n_layers == 17, "what it does not say stays"
    told = "x.nemo: its architecture is taken, model.num_classes=32, model.preprocessor.features=40, "
    assert told + "model.encoder.d_model=24, model.encoder.dropout=0.3" in caplog.text


def test_typed_keys() -> None:
    """Against the architecture: refused, all in one message; of training: they win."""
    cfg = nest()
    cfg.model.encoder.n_layers, cfg.model.encoder.dropout, cfg.model.masking.mask_prob = 3, 0.0, 0.5
    typed = {"model.encoder.n_layers", "model.encoder.dropout", "model.masking.mask_prob", "model.code_dim"}
    model = {"code_dim": 8, "encoder": {"n_layers": 2, "dropout": 0.3, "d_model": 512}, "masking": {"mask_prob": 0.02}}
    with pytest.raises(ConfigError) as raised:
        take_architecture(cfg, model, "x.nemo", typed)
    assert str(raised.value).splitlines() == [
        "model.code_dim=16: differs from x.nemo, whose network has 8; leave it out",
        "model.encoder.n_layers=3: differs from x.nemo, whose network has 2; leave it out",
    ]
    assert (cfg.model.encoder.dropout, cfg.model.masking.mask_prob) == (0.0, 0.5)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", ["${model.code_dim}"], {1, 2}])
def test_references_are_not_followed(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"model.encoder.d_model in the file is .*plain value"):
        take_architecture(nest(), {"encoder": {"d_model": value}}, "x.nemo", set())


def test_typed_keys_of_the_mask() -> None:
    """How often it is drawn is a matter of training; what stands in its place belongs to the network."""
    cfg = nest()
    free = {"block_size": 8, "mask_prob": 0.5, "allow_overlap": False, "freeze": False}
    for key, value in (free | {"mask_value": 2.0, "feat_in": 7}).items():
        cfg.model.masking[key] = value
    typed = {f"model.masking.{key}" for key in cfg.model.masking}
    model = {"masking": dict.fromkeys(free, True) | {"mask_value": None, "feat_in": 80}}
    with pytest.raises(ConfigError) as raised:
        take_architecture(cfg, model, "x.nemo", typed)
    lines = str(raised.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == ["model.masking.mask_value", "model.masking.feat_in"]
    assert free.items() <= OmegaConf.to_container(cfg.model.masking).items()  # type: ignore[operator, union-attr]


NETWORK: dict[str, Any] = {name: {"feat_in": 1} for name in ("preprocessor", "quantizer", "encoder", "decoder")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model_config": 5, "state_dict": {}}, "model_config in it is a int"),
        ({"model_config": NETWORK}, "state_dict in it is a NoneType"),
        ({"model_config": NETWORK, "state_dict": {"w": 5}}, "'w' in its state_dict is a int, not a tensor"),
        ({"model_config": NETWORK | {"encoder": 5}, "state_dict": {}}, "model.encoder in the file is 5; a section"),
        ({"model_config": NETWORK | {"sample_rate": {"a": 1}}}, "model.sample_rate in the file is {'a': 1}; a plain"),
        ({"model_config": NETWORK | {"encoder": {"a.b": 1}}}, "'a.b' in its section model.encoder is not the name"),
        ({"model_config": NETWORK | {"encoder": {"a": {5: 1}}}}, "5 in its section model.encoder.a is not the name"),
        ({"model_config": NETWORK | {"encoder": {"a": torch.ones(9, 9)}}}, "model.encoder.a in the file is tensor("),
        ({"model_config": NETWORK | {"encoder": torch.ones(9, 9)}}, "model.encoder in the file is tensor("),
        ({"format_version": 1, "system": [1], "state_dict": {}}, "system in it is a list"),
        ({"format_version": 1, "system": {"arguments": [1]}, "state_dict": {}}, "arguments in it is a list"),
    ],
)
def test_files_of_another_form_are_one_line(content: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.pth"
    torch.save(content, file)
    with pytest.raises(CheckpointError) as raised:
        Restored(str(file))
    assert f"{file}: {reason}" in str(raised.value) and "\n" not in str(raised.value)


def test_another_model(tmp_path: Path) -> None:
    write_nemo(tmp_path / "x.nemo", {"target": "nemo.a.EncDecCTCModel", "encoder": {"a": 1}}, {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"x.nemo: holds EncDecCTCModel, not NEST \(no preprocessor, quantizer, "):
        Restored(str(tmp_path / "x.nemo"))
    torch.save({"state_dict": {}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: holds another system, not NEST"):
        Restored(str(tmp_path / "x.pth"))


def test_a_network_that_the_weights_do_not_explain(
    script, nest_manifests: list[str], archive: Path, in_tmp: Path
) -> None:
    content = read_plain(archive)
    content["model_config"]["encoder"]["n_layers"] = 10**9
    write_nemo(in_tmp / "x.nemo", content["model_config"], content["state_dict"])
    done = script("train", ["model.restore_from=x.nemo", *OWN, *nest_manifests[:1]])
    assert done.code == 2
    assert re.fullmatch(
        r"error: x.nemo: a network of more than \d+ weights is asked for, where it holds \d+\n", done.err
    )


def test_a_run_that_goes_on_from_it(script, archive: Path, nest_manifests: list[str], in_tmp: Path) -> None:
    """Nothing of the network is typed; the optimiser starts anew. Started again it resumes, and needs no archive."""
    moved = in_tmp / "x=1.nemo"
    moved.write_bytes(archive.read_bytes())
    command = [f"model.restore_from={moved}", *OWN, *nest_manifests[:1], "trainer.max_steps=1", "model.optim.lr=0.0"]
    done = script("train", [*command, "model.optim.sched.min_lr=0.0"])
    assert done.code == 0, done.text
    assert "architecture is taken, model.num_classes=16" in done.out and "weights taken" in done.out
    folder = Path("nemo_experiments/SSL-NEST-FastConformer")
    last = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    before = Restored(str(archive)).state
    weights = [name for name in before if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(last["state_dict"][name], before[name]) for name in weights), "a rate of 0 changes nothing"
    assert last["global_step"] == 1

    moved.unlink()
    done = script("train", [*command, "model.optim.sched.min_lr=0.0", "trainer.max_steps=2"])
    assert done.code == 0, done.text
    assert done.out.startswith("resuming ") and "is not read again: the run is resumed" in done.out
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_one_way_to_start_is_enough(script, archive: Path, nest_manifests: list[str], in_tmp: Path) -> None:
    done = script("train", [f"model.restore_from={archive}", f"init_from={archive}", *OWN, *nest_manifests[:1]])
    assert done.code == 2 and done.err == f"error: model.restore_from={archive} and init_from: give one of them\n", (
        done.text
    )
    assert not Path("nemo_experiments").exists()


def test_a_run_directory(archive: Path, nest_folder: Path) -> None:
    """Its best checkpoint holds what the archive beside it does."""
    own, nemo = Restored(str(nest_folder)), Restored(str(archive))
    assert own.model["encoder"]["d_model"] == nemo.model["encoder"]["d_model"] == 16
    assert all(torch.equal(weight, nemo.state[name]) for name, weight in own.state.items())
    system = NEST(num_classes=16, encoder=own.model["encoder"])
    own.load_into(system)
    assert all(torch.equal(weight, own.state[name]) for name, weight in system.state_dict().items())
    with pytest.raises(ConfigError, match=r"mismatched weights: decoder.decoder_layers.0.bias, "):
        own.load_into(NEST(num_classes=8, encoder=own.model["encoder"]))


def test_weights_only(archive: Path, nest_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    system = NEST(num_classes=16, encoder=Restored(str(nest_folder)).model["encoder"])
    start_from_weights(system, Source("init_from", str(archive), exclude=["decoder"]))
    assert "weights taken" in caplog.text and "missing: decoder.decoder_layers.0.bias" in caplog.text


def test_evaluate(script, nest_folder: Path, corpus: Path, in_tmp: Path) -> None:
    """Beside `data.test_manifest` the data section has NEST's own key."""
    done = script("evaluate", [f"ckpt_path={nest_folder}", f"data.test_ds.manifest_filepath={corpus / 'val.jsonl'}"])
    assert done.code == 0 and "test_accuracy" in done.out, done.text
    assert "--val_loss=" in done.out.splitlines()[0], "the best checkpoint"
