"""NeMo's own configuration of NEST, unchanged: what it trains, where it puts it, what is refused."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.command_line import _composer, keys
from launch.errors import ConfigError
from launch.foreign import read, supplied, written_for_nemo
from tests.conftest import Finished, run_script
from tests.launch.nemo_config import NEMO, foreign_flags

# Where ours differs (docs/nemo.md).
DIFFERENT = {"trainer.strategy": "auto"}


def test_ours_has_its_keys_and_values() -> None:
    with _composer(None, None) as (_, compose):
        ours = compose("nest_fast-conformer")
    nemo = OmegaConf.create(NEMO)
    differences = {}
    for key in keys(nemo):
        if OmegaConf.is_config(OmegaConf.select(nemo, key)) or OmegaConf.is_missing(nemo, key):
            continue
        value, own = OmegaConf.select(nemo, key), OmegaConf.select(ours, key, default="missing")
        if own != value:
            differences[key] = own
    assert {k: v for k, v in differences.items() if not k.endswith("manifest_filepath")} == DIFFERENT
    assert OmegaConf.is_missing(ours.model.train_ds, "manifest_filepath")
    assert ours.model.validation_ds.manifest_filepath is None


def test_it_trains_unchanged(nest_run: Finished, nest_folder: Path) -> None:
    """In a group of one process, as `strategy: ddp` says; exp_manager's files where NeMo has them. An epoch may be
    shorter than `val_check_interval`."""
    assert nest_run.code == 0, nest_run.text
    assert "is written for NeMo: taken with model=nest exp_manager=nemo" in nest_run.err
    assert nest_run.out.startswith(f"nothing to resume, a new run: {nest_folder}\n")
    assert "trainer.val_check_interval=3 is more than the 2 batches of an epoch: it is counted over" in nest_run.out
    assert "DDPStrategy" in (nest_folder / "plan.json").read_text()
    names = sorted(file.name for file in (nest_folder / "checkpoints").iterdir())
    best = names[0].removesuffix(".ckpt")
    expected = [f"{best}.ckpt", f"{best}.nemo", "SSL-NEST-FastConformer.nemo", "last.ckpt"]
    assert names == expected, "the archive of the replaced one is gone with it"
    assert best.startswith("SSL-NEST-FastConformer--val_loss=") and best.endswith("-step=6")
    assert f"best checkpoint  nemo_experiments/SSL-NEST-FastConformer/checkpoints/{best}.ckpt" in nest_run.out
    assert any(nest_folder.glob("events.out.tfevents*"))
    assert "test_accuracy" in json.loads((nest_folder / "summary.json").read_text())["metrics"]


def test_keys_that_we_do_not_have_are_named(manifests: list[str], in_tmp: Path) -> None:
    text = NEMO.replace("  logger: false", "  logger: {x: 1}\n  plugin: 3")
    text = text.replace("create_tensorboard_logger: true", "create_mlflow_logger: true")
    text = text.replace("save_top_k: 1", "save_first: true")
    text = text.replace("num_books: 1\n", "num_books: 1\n  tokenizer: {dir: x}\n")
    text = text.replace("modules.ConformerEncoder", "modules.SqueezeformerEncoder")
    flags = foreign_flags(in_tmp, text)
    done = run_script("train", [*flags, "model.train_ds.manifest_filepath=x.json", "trainer.accelerator=cpu"])
    assert done.code == 2, done.text
    lines = [line.removeprefix("error: ") for line in done.err.splitlines()[1:]]
    for expected in (
        "trainer.logger={'x': 1}: exp_manager supplies it",
        "trainer.plugin: Trainer has no such argument",
        "exp_manager.create_mlflow_logger=True: not supported",
        "exp_manager.checkpoint_callback_params.save_first: no such key here, there are always_save_nemo, auto_insert",
        "model.tokenizer: NEST has no such argument",
        "model.encoder._target_=nemo.collections.asr.modules.SqueezeformerEncoder: only nemo.collections.asr.modules."
        "ConformerEncoder can stand here",
    ):
        assert sum(line.startswith(expected) for line in lines) == 1, f"{expected}\n{done.err}"
    assert len(lines) == 6
    assert not Path("nemo_experiments").exists()


def test_a_slip_is_answered_as_everywhere(in_tmp: Path) -> None:
    """Also where a file of ours has the name of the foreign one."""
    done = run_script("train", [*foreign_flags(in_tmp), "model.encoder.d_modle=1"])
    assert done.code == 2, done.text
    slip = "error: model.encoder.d_modle=1: no such key. Did you mean model.encoder.d_model?"
    assert done.err.splitlines()[1:] == [slip]


def test_a_section_hydra_of_its_own_is_refused(in_tmp: Path) -> None:
    """It would beat exp_manager without a word."""
    done = run_script("train", foreign_flags(in_tmp, NEMO + "hydra: {run: {dir: x}}\n"))
    file = in_tmp / "conf" / "nest_fast-conformer.yaml"
    assert done.err == f"error: {file}: take out its section hydra; exp_manager says where a run lives\n"
    assert done.code == 2


def test_a_file_that_is_none(in_tmp: Path) -> None:
    for text, reason in (("a: [1", "not a configuration"), ("- 1\n", "no mapping"), ("\x00", "not a configuration")):
        (in_tmp / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=rf"x.yaml: .*{reason}"):
            read(in_tmp / "x.yaml")


def test_recognised_by_its_classes_or_sections() -> None:
    assert written_for_nemo(OmegaConf.create(NEMO))
    assert written_for_nemo(OmegaConf.create("model: {masking: {}, quantizer: {}}"))
    assert written_for_nemo(OmegaConf.create("model: {encoder: {a: {_target_: nemo.X}}}"))
    assert not written_for_nemo(OmegaConf.create("model: {num_filters: 3}"))
    assert not written_for_nemo(OmegaConf.create("model: nest"))


def test_what_launch_supplies() -> None:
    section, problems = supplied({"logger": True, "enable_checkpointing": False, "devices": 1})
    assert (section, problems) == ({"devices": 1}, [])
    assert supplied({"use_distributed_sampler": True})[1]
