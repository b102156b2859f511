"""Weights from elsewhere: which files a configuration names, what is taken of them, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from launch.errors import ConfigError
from launch.warm_start import Source, sources, start_from_weights
from models.checkpoint import read_checkpoint
from models.nemo import read_nemo
from models.nest import NEST
from tests.conftest import TINY_NEST, Finished

SMALL: dict[str, Any] = {
    "num_classes": 16,
    "encoder": {"d_model": 16, "n_layers": 1, "n_heads": 2, "subsampling_conv_channels": 4},
}


def config(**given: Any) -> dict[str, Any]:
    none = ("init_from", "init_include", "init_from_nemo_model", "init_from_ptl_ckpt", "init_from_pretrained_model")
    return {"model": {}, "init_exclude": [], "init_strict": False, **dict.fromkeys(none), **given}


def network(seed: int, **other: Any) -> NEST:
    torch.manual_seed(seed)
    return NEST(**SMALL | other)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    network(0).save_to(tmp_path / "x.nemo")
    return tmp_path / "x.nemo"


# Which files


def test_forms() -> None:
    assert sources(config()) == []
    assert sources(config(init_from="a.ckpt", init_include=["^a"], init_exclude=["b$"])) == [
        Source("init_from", "a.ckpt", ["^a"], ["b$"])
    ]
    for key in ("init_from_nemo_model", "init_from_ptl_ckpt"):
        assert sources(config(**{key: "a b.x"})) == [Source(key, "a b.x")]
        section = {"path": "a.x", "include": ["encoder.layers"], "exclude": ["norm"]}
        (chosen,) = sources(config(**{key: section}))
        assert chosen == Source(key, "a.x", (r"encoder\.layers",), ("norm",)), "parts of names, no patterns"
        several = sources(config(**{key: {"one": section, "two": {"path": "b.x"}}}))
        assert [(source.key, source.path) for source in several] == [(f"{key}.one", "a.x"), (f"{key}.two", "b.x")]


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({"init_from": "a", "init_from_ptl_ckpt": "b"}, ["init_from and init_from_ptl_ckpt: give one of them"]),
        (
            {"init_from_nemo_model": "a", "model": {"restore_from": "b"}},
            ["model.restore_from=b and init_from_nemo_model: give one of them"],
        ),
        ({"init_from_pretrained_model": "x"}, ["init_from_pretrained_model: nothing is downloaded here; "]),
        ({"init_strict": "yes"}, ["init_strict must be true or false, got 'yes'"]),
        ({"init_from": "a", "init_include": ["("]}, ["init_include: '(' is no regular expression ("]),
        ({"init_from": "a", "init_exclude": "encoder"}, ["init_exclude: give a list of regular expressions, got 'en"]),
        ({"init_from_ptl_ckpt": 5}, ["init_from_ptl_ckpt: give a path, or a section {path, include, exclude}, got 5"]),
        ({"init_from_ptl_ckpt": {}}, ["init_from_ptl_ckpt.path: give a file, got None"]),
        ({"init_from_ptl_ckpt": {"path": "a", "inklude": []}}, ["init_from_ptl_ckpt.inklude: no such key, there are"]),
        ({"init_from_ptl_ckpt": {"path": "a", "include": "x"}}, ["init_from_ptl_ckpt.include: give a list of parts"]),
        ({"init_from_ptl_ckpt": {"a": {"path": "a"}, "b": 1}}, ["init_from_ptl_ckpt.b: give a path, or a section"]),
        (
            {"init_from_nemo_model": {"a": {"path": None, "exclude": [1]}}},
            ["init_from_nemo_model.a.path: give a file", "init_from_nemo_model.a.exclude: give a list of parts"],
        ),
    ],
)
def test_wrong_ones_are_told_together(given: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        sources(config(**given))
    told = str(raised.value).splitlines()
    assert len(told) == len(lines) and all(t.startswith(line) for t, line in zip(told, lines, strict=True)), told


# What is taken


def test_parts_of_an_archive(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    theirs, system, untouched = read_nemo(archive)["state_dict"], network(1), network(1).state_dict()
    start_from_weights(system, Source("init_from_nemo_model", str(archive), ["encoder"], [r"encoder\.layers\.0\.conv"]))
    for name, weight in system.state_dict().items():
        taken = name.startswith("encoder.") and not name.startswith("encoder.layers.0.conv")
        assert torch.equal(weight, (theirs if taken else untouched)[name]), name
    assert not torch.equal(theirs["encoder.pre_encode.out.weight"], untouched["encoder.pre_encode.out.weight"])
    assert "init_from_nemo_model=" in caplog.text and "missing: decoder.decoder_layers.0.bias" in caplog.text


@pytest.mark.parametrize(
    ("other", "chosen", "told"),
    [
        ({}, {}, None),
        ({}, {"include": ["encoder"]}, None),
        ({"num_classes": 8}, {"exclude": ["decoder", "codebooks"]}, None),
        ({"num_classes": 8}, {}, "mismatched: decoder.decoder_layers.0.bias, decoder.decoder_layers.0.weight, quant"),
        ({"encoder": SMALL["encoder"] | {"n_layers": 2}}, {"include": ["encoder"]}, "missing: encoder.layers.1."),
        ({"encoder": SMALL["encoder"] | {"use_bias": False}}, {}, "unexpected: encoder.layers.0.conv."),
    ],
)
def test_strictly(archive: Path, other: dict[str, Any], chosen: dict[str, Any], told: str | None) -> None:
    """Of what is chosen; without `init_strict` the same file is taken as far as it fits."""
    source = Source("init_from", str(archive), **chosen)
    start_from_weights(network(1, **other), source)
    if told is None:
        start_from_weights(network(1, **other), source, strict=True)
        return
    with pytest.raises(ConfigError, match="init_from=.*: init_strict=true, but not all weights fit; ") as raised:
        start_from_weights(network(1, **other), source, strict=True)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_fits(archive: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of its 0 weights that include and exclude choose fits this system"):
        start_from_weights(network(1), Source("init_from", str(archive), ["no such name"]))


def test_a_checkpoint_of_another_framework_with_its_configuration(tmp_path: Path) -> None:
    """As Lightning writes them for NeMo: arguments as objects of OmegaConf, of which nothing is built."""
    theirs, system = network(0), network(1)
    arguments = OmegaConf.create({"encoder": {"n_layers": 1, "context": [1, "${..n_layers}"], "name": None}})
    for hyper_parameters in (arguments, {"cfg": arguments}):
        content = {
            "state_dict": theirs.state_dict(),
            "hyper_parameters": hyper_parameters,
            "hparams_type": type(arguments),
        }
        torch.save(content, tmp_path / "nemo.ckpt")
        start_from_weights(system, Source("init_from_ptl_ckpt", str(tmp_path / "nemo.ckpt")), strict=True)
        assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in system.state_dict().items())
        assert set(read_checkpoint(tmp_path / "nemo.ckpt")) == {"state_dict"}


# From the command line


def test_in_a_run(script, nest_run: Finished, nest_folder: Path, nest_manifests: list[str], in_tmp: Path) -> None:
    """Several sources one after the other; a run that is resumed reads none of them."""
    assert nest_run.code == 0, nest_run.text
    archive = next((nest_folder / "checkpoints").glob("*--*.nemo"))
    moved = in_tmp / "moved.nemo"
    moved.write_bytes(archive.read_bytes())
    typed = [*TINY_NEST, nest_manifests[0], "--config-name=nest_fast-conformer", "model.optim.lr=0.0"]
    typed += [
        "model.optim.sched.min_lr=0.0",
        "trainer.max_steps=1",
        f"init_from_nemo_model={{path: {moved}, include: [encoder]}}",
    ]
    done = script("train", typed)
    assert done.code == 0, done.text
    assert f"init_from_nemo_model={moved}: " in done.out and "weights taken" in done.out
    last = Path("nemo_experiments/SSL-NEST-FastConformer/checkpoints/last.ckpt")
    before, after = read_nemo(archive)["state_dict"], read_checkpoint(last)["state_dict"]
    same = {
        name: torch.equal(before[name], after[name]) for name in before if "running" not in name and "num_b" not in name
    }
    assert all(equal for name, equal in same.items() if name.startswith("encoder.")), "a rate of 0 changes nothing"
    assert not same["decoder.decoder_layers.0.weight"]

    moved.unlink()
    typed[-1] = f"+init_from_nemo_model.some.path={moved}"  # as NeMo's users type it
    done = script("train", [*typed, "+init_from_nemo_model.some.include=[encoder]", "trainer.max_steps=2"])
    assert done.code == 0, done.text
    assert f"init_from_nemo_model.some={moved} is not read again: the run is resumed" in done.out
