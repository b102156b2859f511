"""NeMo's schedules, warm-up as a share, and groups of parameters with values of their own."""

import math

import pytest
import torch
from torch import nn

from models.optim import build_optimizer, build_schedule, check_optim, parameter_groups

NOAM = {"name": "NoamAnnealing", "d_model": 64, "warmup_steps": 100, "min_lr": 1e-6}


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2)
        self.encoder_norm = nn.LayerNorm(2)
        self.decoder = nn.Linear(2, 2)
        self.quantizer = nn.Linear(2, 2).requires_grad_(False)


def rates(sched: dict, num_steps: int, *, lr: float = 5.0, total_steps: float = math.inf) -> list[float]:
    """The rate of each optimiser step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = build_schedule(optimizer, total_steps, **sched)["scheduler"]  # type: ignore[index]
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_noam_by_its_formula() -> None:
    found = rates(NOAM, 300)
    assert found[0] == found[1] == 0.000625, "NeMo's first two steps have one rate"
    for step in range(1, 300):
        assert found[step] == pytest.approx(5 * 64**-0.5 * min(step**-0.5, step * 100**-1.5), rel=1e-12)
    assert found.index(max(found)) == 100 and found[100] == pytest.approx(5 / 8 / 10, rel=1e-12)


def test_noam_of_the_default_configuration() -> None:
    found = rates(NOAM | {"d_model": 512, "warmup_steps": 25000}, 3)
    assert found == pytest.approx([5.590169943749475e-08, 5.590169943749475e-08, 1.118033988749895e-07], rel=1e-12)


def test_the_floor_acts_after_the_warmup_only() -> None:
    found = rates(NOAM | {"min_lr": 0.05, "warmup_steps": 20}, 400)
    assert found[0] < 0.05 and max(found) > 0.05
    assert found[-1] == 0.05


def test_warmup_as_a_share_of_the_run() -> None:
    share = {**NOAM, "warmup_steps": None, "warmup_ratio": 0.25}
    assert rates(share, 300, total_steps=403) == rates(NOAM, 300)
    with pytest.raises(ValueError, match="warmup_ratio needs an end: set trainer.max_steps"):
        rates(share, 1)
    cosine = {"name": "CosineAnnealing", "min_lr": 0.1}
    found = rates(cosine | {"warmup_ratio": 0.1}, 50, total_steps=50)
    assert found == rates(cosine | {"name": "cosine", "warmup_steps": 5}, 50, total_steps=50)


def test_noam_without_a_warmup_falls_from_the_start() -> None:
    found = rates({"name": "noam", "d_model": 4, "warmup_steps": None}, 5, lr=1.0)
    assert found == pytest.approx([0.5 * max(1, step) ** -0.5 for step in range(5)])


@pytest.mark.parametrize(
    ("sched", "says"),
    [
        ({"d_model": None}, r"model\.optim\.sched\.d_model is missing"),
        ({"d_model": 0}, r"model\.optim\.sched\.d_model must be a number of at least 1"),
        ({"warmup_ratio": 0.1}, "warmup_steps=100 and warmup_ratio=0.1: set one of them to null"),
        ({"warmup_ratio": 1.5, "warmup_steps": None}, r"warmup_ratio must be a number from 0 to 1, got 1\.5"),
        ({"warmup_steps": "many"}, r"warmup_steps must be a number of at least 0, got 'many'"),
        ({"min_lr": 6.0}, r"model\.optim\.lr=5\.0 is below model\.optim\.sched\.min_lr=6\.0"),
        ({"warmup": 3}, r"model\.optim\.sched has no warmup; it has d_model, factor, .*warmup_ratio, warmup_steps"),
        ({"name": "noamannealing"}, "no such schedule; choose from .*NoamAnnealing"),
        ({"name": ["noam"]}, "no such schedule"),
    ],
)
def test_values_that_no_schedule_takes(sched: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        check_optim({"name": "adamw", "lr": 5.0, "sched": NOAM | sched})
    assert "\n" not in str(raised.value)


def test_the_section_is_flat() -> None:
    """Another schedule is one override; what only NoamAnnealing reads is no mistake beside it."""
    for name in ("none", "halving", "cosine", "CosineAnnealing"):
        sched = NOAM | {"name": name, "warmup_ratio": None, "factor": 0.5, "patience": 3}
        check_optim({"lr": 1.0, "sched": sched})
        build_schedule(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), 10, **sched)


def test_one_group_of_everything_with_decay_on_norms_and_biases() -> None:
    module = Parts()
    optimizer = build_optimizer(
        parameter_groups(module, {}, {}), {"name": "adamw", "lr": 0.1, "weight_decay": 0.5, "betas": [0.9, 0.98]}
    )
    (group,) = optimizer.param_groups
    trained = [p for name, p in module.named_parameters() if not name.startswith("quantizer")]
    assert [id(p) for p in group["params"]] == [id(p) for p in trained]
    for parameter in trained:
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in trained:
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.95))


def test_children_with_values_of_their_own() -> None:
    module, optim = Parts(), {"name": "adamw", "lr": 5.0, "weight_decay": 0.1, "sched": NOAM}
    groups = parameter_groups(module, {"encoder": {"lr": 1.0}, "decoder": {"weight_decay": 0.0, "eps": None}}, optim)
    optimizer = build_optimizer(groups, optim)
    expected = [
        list(module.encoder_norm.parameters()),
        *(list(p.parameters()) for p in (module.encoder, module.decoder)),
    ]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in e] for e in expected
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [5.0, 1.0, 5.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8] * 3
    scheduler = build_schedule(optimizer, math.inf, **(NOAM | {"min_lr": 0.04}))["scheduler"]  # type: ignore[index]
    for _ in range(400):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.04, 0.04, 0.04], "each has the floor"
    assert scheduler.lr_lambdas[0](100) == scheduler.lr_lambdas[1](100) == pytest.approx(1 / 80)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (
            {"head": {"lr": 1}},
            r"optim_param_groups\.head: no such part of the model; choose from encoder, encoder_norm, ",
        ),
        ({"encoder": 0.1}, r"optim_param_groups\.encoder must be values for its parameters, .*got 0\.1"),
        ({"encoder": {"sched": {}}}, r"optim_param_groups\.encoder must be values"),
        ({"encoder": {"lr": -1}}, r"optim_param_groups\.encoder: model\.optim\.lr must be a number of at least 0"),
        ({"encoder": {"lr": 1e-9}}, r"optim_param_groups\.encoder: model\.optim\.lr=1e-09 is below .*min_lr"),
        ({"encoder": {"lrr": 1}}, r"optim_param_groups\.encoder: model\.optim: AdamW has no lrr"),
        ({"quantizer": {"lr": 1}}, r"optim_param_groups\.quantizer has no parameters to train"),
    ],
)
def test_groups_that_cannot_be(groups: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        parameter_groups(Parts(), groups, {"name": "adamw", "lr": 5.0, "sched": NOAM})
    assert "\n" not in str(raised.value)


def test_muon_has_groups_of_its_own() -> None:
    with pytest.raises(ValueError, match="muon makes groups of its own"):
        parameter_groups(Parts(), {"encoder": {"lr": 1.0}}, {"name": "muon"})
    build_optimizer(parameter_groups(Parts(), {}, {"name": "muon"}), {"name": "muon"})
