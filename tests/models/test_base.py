"""What all systems share: constructor arguments in the checkpoint, optimisers, schedules, weights."""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from launch.build import _NOT_THE_SYSTEMS as NOT_THE_SYSTEMS
from models.base import System
from models.checkpoint import find_class
from models.conv_tasnet import ConvTasNet
from models.optim import build_optimizer, build_schedule, check_optim

CONFIG = Path(__file__).parent.parent.parent / "config"
SMALL = dict(num_filters=8, bottleneck_channels=4, hidden_channels=8, skip_channels=4, num_blocks=1, num_repeats=1)


@pytest.mark.parametrize("file", sorted((CONFIG / "model").glob("*.yaml")), ids=lambda f: f.stem)
def test_one_key_for_each_constructor_argument(file: Path) -> None:
    """The YAML is the manual: it names every argument, and nothing else."""
    node = OmegaConf.to_container(OmegaConf.load(file), resolve=True)["model"]
    node = {key: value for key, value in node.items() if key not in NOT_THE_SYSTEMS}
    system = find_class(node.pop("_target_"), System)
    parameters = {name: p for name, p in inspect.signature(system).parameters.items()}
    assert set(node) == set(parameters)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    with torch.device("meta"):
        plain, typed = system(), system(**without_targets(node))
    for name in parameters:
        default = list(plain.hparams[name]) if isinstance(plain.hparams[name], tuple) else plain.hparams[name]
        if name != "optim" and default is not None:
            assert node[name] == default, f"{name}: YAML and constructor disagree"
    # Sections of parts have their defaults in these.
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in typed.named_parameters()}
    assert repr(plain) == repr(typed)


def without_targets(node: Any) -> Any:
    """As launch hands a section on."""
    if not isinstance(node, dict):
        return node
    return {key: without_targets(value) for key, value in node.items() if key != "_target_"}


def test_arguments_travel_in_the_checkpoint() -> None:
    system = ConvTasNet(**SMALL, optim={"name": "sgd", "lr": 0.1})
    checkpoint: dict = {}
    system.on_save_checkpoint(checkpoint)
    arguments = checkpoint["system"]["arguments"]
    assert arguments["num_filters"] == 8 and arguments["optim"] == {"name": "sgd", "lr": 0.1}
    assert arguments["mask"] == "relu", "defaults too, so that a later default changes nothing"
    assert type(arguments) is dict


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def test_optimisers_by_their_torch_names() -> None:
    optimizer = build_optimizer(parameters(), {"name": "AdamW", "lr": 0.1, "betas": [0.8, 0.9], "momentum": 0.9})
    assert isinstance(optimizer, torch.optim.AdamW)
    assert list(optimizer.param_groups[0]["betas"]) == [0.8, 0.9]
    assert isinstance(build_optimizer(parameters(), {"name": "sgd", "lr": 0.1, "eps": 1e-8}), torch.optim.SGD)
    with pytest.raises(ValueError, match="no such optimiser; choose from"):
        build_optimizer(parameters(), {"name": "adm"})
    with pytest.raises(ValueError, match="Adam has no lrr, weigth_decay"):
        build_optimizer(parameters(), {"name": "adam", "lrr": 1, "weigth_decay": 0})
    with pytest.raises(ValueError, match="no such schedule"):
        ConvTasNet(**SMALL, optim={"sched": {"name": "step"}})


@pytest.mark.parametrize(
    ("optim", "says"),
    [
        *(({"lr": value}, r"model\.optim\.lr must be a number of at least 0") for value in (-1, "abc", True, math.nan)),
        ({"eps": -1e-8}, r"model\.optim\.eps must be"),
        ({"weight_decay": -1}, r"model\.optim\.weight_decay must be"),
        *(
            ({"betas": value}, r"model\.optim\.betas must be two numbers from 0 to below 1")
            for value in ([0.9, 1], [-0.1, 0.9], [0.9], 0.9, ["a", 0.9])
        ),
        ({"name": "muon", "momentum": -1}, r"model\.optim\.momentum must be"),
        ({"name": "sgd", "nesterov": True}, "model.optim: SGD refuses its values .*Nesterov"),
        ({"sched": {"factor": 1}}, r"model\.optim\.sched\.factor must be a number from 0 to 0.999, got 1"),
        ({"sched": {"patience": None}}, r"model\.optim\.sched\.patience must be a number of at least 0"),
        ({"lr": 0, "sched": {"name": "cosine"}}, r"model\.optim\.lr=0 has no cosine schedule"),
    ],
)
def test_values_that_no_optimiser_takes(optim: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_optim(optim)


def test_values_that_differ_in_kind_from_one_optimiser_to_the_next() -> None:
    check_optim({"name": "adafactor", "eps": [None, 1e-3], "betas": [0.9, 0.99], "lr": 0})
    check_optim({"name": "adamw", "fused": True, "betas": (0.0, 0.5), "sched": {"name": "halving", "min_lr": 0}})


def rates(sched: dict, steps: int, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD(parameters(), lr=lr)
    scheduler = build_schedule(optimizer, steps, **sched)["scheduler"]  # type: ignore[index]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_cosine_with_warmup() -> None:
    found = rates({"name": "cosine", "warmup_steps": 4, "min_lr": 0.1}, 20)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert max(found) == found[4] == pytest.approx(1.0)
    assert found[12] == pytest.approx(0.55), "half way down"
    assert found[-1] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="needs an end"):
        build_schedule(torch.optim.SGD(parameters(), lr=1), float("inf"), name="cosine")


def test_halving() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    described = build_schedule(optimizer, 10, name="halving", monitor="val_si_sdri", mode="max", patience=1, min_lr=0.3)
    assert described is not None and described["monitor"] == "val_si_sdri"
    found = []
    for metric in (1, 2, 2, 2, 2, 2, 2):
        described["scheduler"].step(metric)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == [1, 1, 1, 0.5, 0.5, 0.3, 0.3]


def test_total_steps_for_schedules() -> None:
    system = ConvTasNet(**SMALL)
    for max_steps, max_epochs, expected in ((7, -1, 7), (-1, 3, 30), (-1, -1, float("inf"))):
        system._trainer = SimpleNamespace(max_steps=max_steps, max_epochs=max_epochs, estimated_stepping_batches=30)
        assert system._total_steps() == expected


def test_weights_by_name_and_shape() -> None:
    source, target = ConvTasNet(**SMALL), ConvTasNet(**(SMALL | {"num_filters": 4}))
    report = target.load_weights({**source.state_dict(), "extra": torch.ones(1)}, exclude=["decoder"])
    assert report["unexpected"] == ["extra"]
    assert "network.encoder.weight" in report["mismatched"]
    assert "network.decoder.weight" in report["missing"]
    own = target.state_dict()
    for name in report["loaded"]:
        assert torch.equal(own[name], source.state_dict()[name])
    assert report["loaded"]


def test_predicted_sources_add_up_to_the_mixture() -> None:
    """Whatever scale and sign the network puts out, since SI-SDR does not see them."""

    class Halves(ConvTasNet):
        def forward(self, mixture: torch.Tensor) -> torch.Tensor:
            early = torch.arange(mixture.shape[-1]) < mixture.shape[-1] // 2
            return torch.stack([mixture * early * 70, mixture * ~early * -30], 1)

    signal = 0.1 * torch.randn(16000)
    sources = Halves(**SMALL).predict(signal, sample_rate=8000, chunk_s=0.5, overlap_s=0.1)["sources"]
    torch.testing.assert_close(sources.sum(0), signal, rtol=1e-2, atol=1e-3)


def test_predict_undoes_the_level() -> None:
    system = ConvTasNet(**SMALL).eval()
    signal = torch.randn(4000) * 0.01
    quiet = system.predict(signal)["sources"]
    loud = system.predict(1000 * signal)["sources"]
    torch.testing.assert_close(loud / 1000, quiet, rtol=1e-3, atol=1e-6)
    assert torch.isfinite(system.predict(torch.zeros(4000))["sources"]).all()
    assert system.predict(torch.randn(3), sample_rate=44100)["sources"].shape == (2, 3)


def test_example_input_fits_forward() -> None:
    system = ConvTasNet(**SMALL)
    assert system(*system.example_input().values()).shape[:2] == (1, 2)


@pytest.mark.parametrize(("monitor", "frequency"), [("val_si_sdri", 5), ("train_loss", 1)])
def test_a_plateau_is_looked_for_when_there_is_a_new_value(monitor: str, frequency: int) -> None:
    system = ConvTasNet(**SMALL, optim={"sched": {"name": "halving", "monitor": monitor}})
    system.trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=9, check_val_every_n_epoch=5)
    assert system.configure_optimizers()["lr_scheduler"].get("frequency", 1) == frequency


def test_a_plateau_is_the_same_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    system, seen = ConvTasNet(**SMALL), []
    system.trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=9)
    monkeypatch.setattr(system.trainer.strategy, "reduce", lambda value, reduce_op: (value + 3) / 2)
    scheduler = build_schedule(torch.optim.SGD(parameters(), lr=1), 9, name="halving")["scheduler"]  # type: ignore[index]
    monkeypatch.setattr(scheduler, "step", lambda metric: seen.append(float(metric)))
    system.lr_scheduler_step(scheduler, 1.0)
    assert seen == [2.0], "the mean over the processes"
