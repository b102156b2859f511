"""Layers that switch to low rank, in all four systems, together with everything else that training is made of.

A pairwise covering array: each two values of two settings meet in one case at least. A case trains across a switch,
goes on from a checkpoint before it and from one after it, in the middle of epochs, and has to arrive at the same bits;
then the last checkpoint is evaluated and predicted with (of the eight cases that are not slow, in two).
"""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, flag_override

import models
import train
from callbacks.last import LastCheckpoint
from callbacks.low_rank import LowRank
from launch import environment
from models.conv_tasnet import ConvTasNet
from models.muon import Muon
from models.nemo import read_nemo
from models.nest import NEST
from modules.layer_switch import switch_layers
from modules.optimizer_state import arrange, names_in_groups
from tests.conftest import TINY, TINY_ECHO, TINY_NEST, TINY_UNET

SETTINGS: dict[str, tuple[Any, ...]] = {
    "system": ("conv_tasnet", "nest", "unet", "deepvqe"),
    "switch": ("step", "epoch", "schedule", "auto", "start"),
    "optimiser": ("adamw", "sgd", "muon", "fused"),
    "schedule": ("none", "halving", "cosine", "noam"),
    "accumulation": (1, 2),
    "clipping": (None, 1.0),
    "precision": ("32-true", "bf16-mixed"),
    "ema": (False, True),
    "dbc": (False, True),
    "moments": ("project", "reset"),
    "passes": ("plain", "compile", "checkpointing"),
    "processes": (1, 2),
}
Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(case: Case) -> set[Pair]:
    return set(itertools.combinations(case.items(), 2))


def covering_array(settings: dict[str, tuple[Any, ...]]) -> list[Case]:
    """Cases in which all pairs of values meet; greedy, and always the same.

    Each begins with the first pair that is missing; each further setting takes the value with the most missing pairs.
    """
    missing = {
        ((one, a), (other, b)): None  # a dict, which keeps its order
        for one, other in itertools.combinations(settings, 2)
        for a, b in itertools.product(settings[one], settings[other])
    }
    cases: list[Case] = []
    while missing:
        case: Case = dict(next(iter(missing)))
        for name in settings:
            if name not in case:
                values = settings[name][len(cases) % len(settings[name]) :] + settings[name]
                case[name] = max(values, key=lambda value: _gain({**case, name: value}, settings, missing))  # noqa: B023
        case = {name: case[name] for name in settings}
        for pair in pairs_of(case):
            missing.pop(pair, None)
        cases.append(case)
    return cases


def _gain(case: Case, settings: dict[str, tuple[Any, ...]], missing: dict[Pair, None]) -> int:
    ordered = {name: case[name] for name in settings if name in case}
    return sum(pair in missing for pair in pairs_of(ordered))


CASES = covering_array(SETTINGS)


def always(cases: list[Case], number: int) -> list[Case]:
    """Of those that are cheap, the ones that add most pairs."""
    left = [case for case in cases if case["processes"] == 1 and case["passes"] != "compile"]
    chosen: list[Case] = []
    while len(chosen) < number:
        covered = set().union(*map(pairs_of, chosen))
        chosen.append(max(left, key=lambda case: len(pairs_of(case) - covered)))
        left.remove(chosen[-1])
    return chosen


FEW = always(CASES, 8)
PARAMETERS = [
    pytest.param(
        case,
        id="-".join(f"{value}" if isinstance(value, str) else f"{name}={value}" for name, value in case.items()),
        marks=() if case in FEW else pytest.mark.slow,
    )
    # First the two processes: what torch has run in this one by then may keep it from being forked.
    for case in sorted(CASES, key=lambda case: -case["processes"])
]
SWITCH = {
    "start": ["start=0"],
    "epoch": ["switch_epoch=1"],
    "step": ["switch_step=1"],
    "schedule": ["schedule={0:0.5,1:0.25}"],
    "auto": ["window=2", "slope=100", "watch_every_n_steps=1"],
}
OPTIMISER = {
    "adamw": ["name=adamw"],
    "sgd": ["name=sgd", "momentum=0.9"],
    "muon": ["name=muon"],
    "fused": ["name=adamw", "fused=true"],
}
SCHEDULE = {
    "none": ["name=none"],
    "halving": ["name=halving", "patience=0", "monitor=val_loss"],
    "cosine": ["name=cosine", "warmup_steps=1", "warmup_ratio=null"],
    "noam": ["name=noam", "d_model=16", "warmup_steps=2", "warmup_ratio=null"],
}
DBC = ["every=1", "residual=ef", "min_elements=1"]
TRAIN: Any = train.main.__wrapped__  # what is behind Hydra's decorator
STEPS, BEFORE, AFTER = 4, 1, 3  # two epochs of two steps; both checkpoints lie in the middle of one


def test_each_two_values_meet_in_one_case() -> None:
    for one, other in itertools.combinations(SETTINGS, 2):
        met = {(case[one], case[other]) for case in CASES}
        assert met == set(itertools.product(SETTINGS[one], SETTINGS[other])), (one, other)
    assert len(CASES) <= 40
    for name in ("system", "switch", "optimiser", "schedule", "precision", "ema", "dbc", "moments"):
        assert {case[name] for case in FEW} == set(SETTINGS[name]), name


@pytest.fixture(scope="session")
def data_of(manifests: list[str], corpus: Path, photos: Path) -> dict[str, list[str]]:
    """For each system, what a tiny one is trained on."""
    lines = (corpus / "train.jsonl").read_text().splitlines()[:8]
    eight = corpus / "eight.jsonl"
    eight.write_text("\n".join(lines) + "\n")
    nest = {"train": eight, "validation": corpus / "val.jsonl", "test": corpus / "test.jsonl"}
    return {
        "conv_tasnet": [*TINY, *manifests],
        "deepvqe": [*TINY_ECHO, *manifests],
        "nest": [*TINY_NEST, *(f"model.{part}_ds.manifest_filepath={file}" for part, file in nest.items())],
        "unet": [*TINY_UNET, *(f"data.{part}_manifest={photos / part}.jsonl" for part in ("train", "val", "test"))],
    }


def typed(case: Case, data: list[str]) -> list[str]:
    """The case as a command line."""
    batches = 2 * case["accumulation"]  # of an epoch
    examples = 2 * batches * case["processes"]  # in batches of two
    size = {
        "conv_tasnet": [f"data.train_mixtures={examples}", "data.batch_size=2"],
        "deepvqe": [f"data.train_examples={examples}", "data.batch_size=2"],
        "unet": [f"data.train_examples={examples}", "data.batch_size=2"],
        "nest": [
            f"model.train_ds.batch_size={8 // (batches * case['processes'])}",
            "trainer.val_check_interval=1.0",
            "trainer.check_val_every_n_epoch=1",
        ],
    }
    chosen = ["low_rank", *(name for name in ("ema", "dbc") if case[name])]
    return [
        f"model={case['system']}",
        *data,
        *size[case["system"]],
        f"callbacks=[default,{','.join(chosen)}]",
        *(f"callbacks.low_rank.{value}" for value in SWITCH[case["switch"]]),
        "callbacks.low_rank.rank_by=ratio",
        "callbacks.low_rank.min_speedup=0",
        "callbacks.low_rank.min_energy=0",
        f"callbacks.low_rank.moments={case['moments']}",
        *(["callbacks.ema.decay=0.9"] if case["ema"] else ()),
        *(
            ["callbacks.dbc.every=1", "callbacks.dbc.residual=ef", "callbacks.dbc.min_elements=1"]
            if case["dbc"]
            else []
        ),
        *(f"++model.optim.{value}" for value in OPTIMISER[case["optimiser"]]),
        *(f"++model.optim.sched.{value}" for value in SCHEDULE[case["schedule"]]),
        f"model.compile={'default' if case['passes'] == 'compile' else 'false'}",
        f"model.gradient_checkpointing={str(case['passes'] == 'checkpointing').lower()}",
        f"trainer.accumulate_grad_batches={case['accumulation']}",
        f"trainer.gradient_clip_val={'null' if case['clipping'] is None else case['clipping']}",
        f"trainer.precision={case['precision']}",
        *(["trainer.strategy=ddp_fork", "trainer.devices=2"] if case["processes"] == 2 else []),
        "trainer.max_epochs=-1",
        f"trainer.max_steps={STEPS}",
        "test=false",
        "logger=none",
        "callbacks.figures=null",
        "callbacks.images=null",
        "callbacks.last.every_n_steps=1",
        "exp_manager.version=whole",
    ]


@hydra.main(version_base="1.3", config_path=str(Path(train.__file__).parent / "config"), config_name="train")
def thrice(cfg: DictConfig) -> None:
    """train.py, and twice more from checkpoints on the way; composed once."""
    TRAIN(cfg)
    runtime = HydraConfig.get().runtime
    whole = Path(runtime.output_dir)
    for step in (BEFORE, AFTER):
        with flag_override(runtime, ["readonly", "struct"], False):
            runtime.output_dir = str(whole.with_name(f"from_{step}"))
        cfg.ckpt_path = str(whole / f"at_{step}.ckpt")
        TRAIN(cfg)


@pytest.fixture
def all_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of each last.ckpt, in the run directory; what costs time and has no say in it is left out."""
    save = LastCheckpoint._save

    def and_copy(self: LastCheckpoint, trainer: Any) -> None:
        save(self, trainer)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            shutil.copy(folder / "checkpoints" / "last.ckpt", folder / f"at_{trainer.global_step}.ckpt")

    monkeypatch.setattr(LastCheckpoint, "_save", and_copy)
    monkeypatch.setattr(environment, "write_snapshot", lambda folder, git: None)
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)  # composes everything to find this out


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile with a backend that runs the graphs as they are."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, mode, dynamic: compiler(f, backend="eager", dynamic=dynamic))


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_switch_in_training(
    case: Case,
    script: Callable,
    data_of: dict[str, list[str]],
    recordings: Path,
    photos: Path,
    in_tmp: Path,
    all_saved: None,
    no_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if case["processes"] == 2 and torch.cuda.is_initialized():
        pytest.skip("an earlier test used CUDA in this process: Lightning refuses to fork it")
    with monkeypatch.context() as patched:
        patched.setattr(train, "main", thrice)
        done = script("train", typed(case, data_of[case["system"]]))
    assert done.code == 0, done.text
    folder = Path("runs") / case["system"]
    before, after, whole = (load(folder / "whole" / f"at_{step}.ckpt") for step in (BEFORE, AFTER, STEPS))
    from_the_first_step = case["switch"] in ("start", "schedule")
    assert bool(before["structure"]) == from_the_first_step and after["structure"]
    if case["switch"] == "schedule":
        assert before["structure"] != after["structure"]
    for step in (BEFORE, AFTER):
        resumed = load(folder / f"from_{step}" / "checkpoints" / "last.ckpt")
        assert difference(state_of(whole), state_of(resumed)) is None, step
    last = folder / "whole" / "checkpoints" / "last.ckpt"
    assert models.load(last).structure == whole["structure"]
    if case in FEW and case["system"] != "conv_tasnet":
        return  # the two scripts take as long as the trainings
    done = script("evaluate", [f"ckpt_path={last}", "output=scores.json"])
    assert done.code == 0 and Path("scores.json").exists(), done.text
    inputs = {
        "conv_tasnet": [f"input={recordings / 'mics'}"],
        "deepvqe": [f"input={recordings / 'mics'}", f"far={recordings / 'loopback'}"],
        "unet": [f"input={photos / 'images'}"],
        "nest": [f"input={recordings / 'mics'}"],
    }
    done = script("predict", [f"ckpt_path={last}", *inputs[case["system"]], "output=predicted"])
    assert done.code == 0 and any(Path("predicted").iterdir()), done.text


@pytest.mark.slow
@pytest.mark.parametrize("system", SETTINGS["system"])
def test_a_switched_checkpoint_in_a_fresh_process(
    system: str, script: Callable, data_of: dict[str, list[str]], recordings: Path, photos: Path, in_tmp: Path
) -> None:
    """Evaluates as here, predicts, and exports, where the system does these at all."""
    case = {name: values[0] for name, values in SETTINGS.items()} | {"system": system, "ema": True}
    done = script("train", typed(case, data_of[system]))
    assert done.code == 0, done.text
    last = Path("runs") / system / "whole" / "checkpoints" / "last.ckpt"
    assert load(last)["structure"]

    def fresh(name: str, *arguments: str) -> None:
        command = [sys.executable, str(Path(train.__file__).with_name(f"{name}.py")), f"ckpt_path={last}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    assert script("evaluate", [f"ckpt_path={last}", "output=here.json"]).code == 0
    fresh("evaluate", "output=there.json")
    here, there = (json.loads(Path(f"{place}.json").read_text())["metrics"] for place in ("here", "there"))
    assert here and difference(here, there) is None
    inputs = {
        "conv_tasnet": [f"input={recordings / 'mics'}"],
        "deepvqe": [f"input={recordings / 'mics'}", f"far={recordings / 'loopback'}"],
        "unet": [f"input={photos / 'images'}"],
        "nest": [f"input={recordings / 'mics'}"],
    }
    fresh("predict", *inputs[system], "output=predicted")
    assert any(Path("predicted").iterdir())
    fresh("export", "output=x.onnx")
    assert Path("x.onnx").stat().st_size > 0


def test_the_best_of_before_the_switch_is_tested_after_it(
    script: Callable, data_of: dict[str, list[str]], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the report of the switch is not the one that its checkpoint knows of. One ratio is typed for one layer."""
    monkeypatch.setattr(environment, "write_snapshot", lambda folder, git: None)
    case = {name: values[0] for name, values in SETTINGS.items()}
    line = [value for value in typed(case, data_of["conv_tasnet"]) if value != "test=false"]
    more = ["callbacks.low_rank.switch_step=3", "callbacks.low_rank.ratios={mask_conv:0.125}"]
    more += ["callbacks.low_rank.include=[mask_conv,expand]", "monitor.metric=val_loss", "monitor.mode=max"]
    tested: list[bool] = []
    monkeypatch.setattr(ConvTasNet, "on_test_start", lambda self: tested.append(bool(self.structure)), raising=False)
    done = script("train", [*line, *more])
    assert done.code == 0 and tested == [False], done.text
    (switch,) = json.loads(Path("runs/conv_tasnet/whole/summary.json").read_text())["low_rank"]
    ranks = {name.rpartition(".")[2]: layer["rank"] for name, layer in switch["layers"].items()}
    assert ranks == {"expand": 2, "mask_conv": 1}
    assert switch["step"] == 3 and switch["parameters_after"] < switch["parameters_before"]
    assert switch["flops_after"] < switch["flops_before"] and switch["metric_after"] is not None
    assert "network.separator.bottleneck: dense: not included" in done.text


def test_an_archive_holds_dense_weights(tmp_path: Path) -> None:
    encoder = {"d_model": 16, "n_heads": 2, "n_layers": 1, "subsampling_conv_channels": 4}
    system = NEST(num_classes=16, encoder=encoder)
    names = system.state_dict().keys()
    switch_layers(system, {"encoder.layers.0.conv.pointwise_conv1": 3, "decoder.decoder_layers.0": 2})
    system.save_to(tmp_path / "x.nemo")
    state = read_nemo(tmp_path / "x.nemo")["state_dict"]
    assert state.keys() == names
    layer = system.decoder.decoder_layers[0]
    torch.testing.assert_close(state["decoder.decoder_layers.0.weight"].flatten(1), layer.u @ layer.v)
    fresh = NEST(num_classes=16, encoder=encoder)
    assert not any(fresh.load_weights(state)[kind] for kind in ("missing", "unexpected", "mismatched"))


def test_muon_has_its_two_groups_when_layers_of_rank_1_are_no_matrices() -> None:
    """What a checkpoint holds of an optimiser goes by position."""
    layer = torch.nn.Linear(4, 4)
    before = Muon(layer.parameters())
    torch.nn.Module.register_module(network := torch.nn.Module(), "layer", layer)
    switch_layers(network, {"layer": 1}, optimizers=[before])
    after = Muon(network.parameters())
    names = names_in_groups(before, dict(network.named_parameters()))
    assert names != names_in_groups(after, dict(network.named_parameters()))
    arrange(after, dict(network.named_parameters()), names)
    assert names_in_groups(after, dict(network.named_parameters())) == names
    after.load_state_dict(before.state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": 0.5},
        {"schedule": {"a": 0.2}},
        {"schedule": {0: 0.2, 1: 0.3}},
        {"schedule": [[0, 0.0]]},
        {"include": "mask_conv"},
        {"exclude": ["("]},
        {"ratios": 0.5},
        {"ratios": {"mask_conv": "a"}},
        {"window": 1},
        {"switch_epoch": "soon"},
        {"start": 1},
        {"moments": "no"},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is no regular expression" if "exclude" in wrong else next(iter(wrong))):
        LowRank(**wrong)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def state_of(content: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint all that a training goes on with; not what it has cost so far."""
    kept = ("EMA", "DBC", "LowRank", "EarlyStopping", "RngState")
    callbacks = {key: state for key, state in content["callbacks"].items() if key.startswith(kept)}
    for key, state in callbacks.items():
        if key.startswith("LowRank"):
            callbacks[key] = {name: value for name, value in state.items() if name != "report"}
    names = ("state_dict", "optimizer_states", "lr_schedulers", "structure", "epoch", "global_step")
    return {**{name: content[name] for name in names}, "callbacks": callbacks}


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where two trees of plain values first differ; None: they are the same, bit for bit."""
    if isinstance(one, torch.Tensor | np.ndarray):
        return None if np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True) else place
    if type(one) is not type(other):
        return place
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{place}: {sorted(map(str, one.keys() ^ other.keys()))}"
        found = (difference(one[key], other[key], f"{place}/{key}") for key in one)
        return next((place for place in found if place), None)
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return place
        found = (difference(a, b, f"{place}/{i}") for i, (a, b) in enumerate(zip(one, other, strict=True)))
        return next((place for place in found if place), None)
    return None if one == other or one != one else place
