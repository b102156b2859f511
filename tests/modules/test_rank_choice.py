"""Every layer of a model gets an answer; low rank only where the spectrum and the arithmetic allow it."""

import pytest
import torch
from torch import Tensor, nn

from modules.low_rank import break_even_rank, factorised
from modules.rank_choice import Choice, Rules, candidates, choose_ranks, choose_smaller_ranks, ratio_of
from modules.spectrum import singular_values_of, stable_rank


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def with_spectrum(layer: nn.Module, values: Tensor) -> nn.Module:
    matrix = layer.weight.detach().flatten(1)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    with torch.no_grad():
        layer.weight.copy_(((u * values.float()) @ v).view(layer.weight.shape))
    return layer


def falling(layer: nn.Module, rate: float = 0.3) -> nn.Module:
    return with_spectrum(layer, torch.exp(-rate * torch.arange(min(layer.weight.flatten(1).shape))))


def random(outputs: int, inputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight)
    return layer


def model_of(**layers: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(layers)


def test_energy_takes_the_least_rank() -> None:
    layer = with_spectrum(nn.Linear(6, 6), torch.tensor([3.0, 2, 1, 0, 0, 0]))
    for energy, rank in [(0.5, 1), (0.9, 2)]:
        choice = choose_ranks(model_of(a=layer), Rules(energy=energy))["a"]
        assert (choice.rank, choice.full, choice.wanted, choice.max_rank) == (rank, 6, rank, 2)
        assert choice.energy == pytest.approx([9 / 14, 13 / 14][rank - 1])
        assert choice.stable_rank == pytest.approx(14 / 9)
    choice = choose_ranks(model_of(a=layer), Rules(energy=0.95))["a"]
    assert choice.rank is None and choice.wanted == 3  # as many weights as before


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (48, 384), (1000, 16)])
def test_random_matrices_stay_dense(shape: tuple[int, int]) -> None:
    """Tall ones too, in which 90 % of the energy of noise need fewer numbers than the matrix has."""
    for layer in (random(*shape), nn.Linear(*shape[::-1])):
        fresh = {"a": stable_rank(singular_values_of(layer.weight))}
        for rules in (*(Rules(energy=energy) for energy in (0.3, 0.5, 0.9, 0.95)), Rules(rank_by="stable_rank")):
            choice = choose_ranks(model_of(a=layer), rules, fresh_stable_ranks=fresh)["a"]
            assert choice.rank is None and choice.reason


def test_noise_under_a_signal_is_no_reason_to_stay_dense() -> None:
    layer = random(128, 64)
    with torch.no_grad():
        layer.weight += torch.randn(128, 4) @ torch.randn(4, 64) * 3
    choice = choose_ranks(model_of(a=layer), Rules(energy=0.9))["a"]
    assert choice.rank == choice.wanted and 3 <= choice.rank <= 16


def test_one_direction_is_not_enough() -> None:
    """An output layer whose bias-like direction outweighs all others keeps some of these, unless told otherwise."""
    layer = random(128, 60)
    with torch.no_grad():
        layer.weight += 100 * torch.outer(torch.randn(128), torch.randn(60))
    for rank_by in ("energy", "stable_rank"):
        chosen = {
            share: choose_ranks(
                model_of(a=layer), Rules(rank_by=rank_by, min_ratio=share), fresh_stable_ranks={"a": 50.0}
            )["a"].rank
            for share in (0.0, 0.1, 0.25)
        }
        assert chosen[0.0] <= 2 and (chosen[0.1], chosen[0.25]) == (6, 15), rank_by
    assert choose_ranks(model_of(a=layer), Rules(rank_by="ratio", ratio=0.05))["a"].rank == 3


def test_flat_spectra_are_not_refused_when_that_is_said() -> None:
    choice = choose_ranks(model_of(a=random(64, 64)), Rules(energy=0.5, min_energy=0.0))["a"]
    assert choice.rank is not None
    choice = choose_ranks(model_of(a=random(64, 64)), Rules(rank_by="ratio", ratio=0.05))["a"]
    assert choice.rank is None and choice.reason == "its spectrum is too flat, below min_energy=0.5"
    choice = choose_ranks(model_of(a=random(64, 64)), Rules(rank_by="ratio", ratio=0.05, min_energy=0.0))["a"]
    assert choice.rank == 3 and choice.reason == ""


def test_scaled_stable_rank() -> None:
    layer = random(32, 32)
    fresh = {"a": stable_rank(singular_values_of(layer.weight))}
    falling(layer, 0.5)
    choice = choose_ranks(model_of(a=layer), Rules(rank_by="stable_rank"), fresh_stable_ranks=fresh)["a"]
    own = stable_rank(singular_values_of(layer.weight))
    assert choice.rank == -int(-own * 32 / fresh["a"] // 1) and 1 < choice.rank < 10
    for unknown in ({}, {"a": 0.0}):  # began as zero: nothing to scale by
        assert (
            choose_ranks(model_of(a=layer), Rules(rank_by="stable_rank"), fresh_stable_ranks=unknown)["a"].rank is None
        )


def test_ratios_by_pattern() -> None:
    rules = Rules(rank_by="ratio", ratio=0.25, ratios={"attn": 0.1, r"ff\.1": 0.2, "ff": 0.15})
    assert [ratio_of(name, rules) for name in ("self_attn.q", "ff.1", "ff.2", "out")] == [0.1, 0.2, 0.15, 0.25]
    model = model_of(attn=falling(nn.Linear(40, 40)), out=falling(nn.Linear(40, 60)))
    chosen = choose_ranks(model, rules)
    assert [chosen[name].rank for name in ("attn", "out")] == [4, 10]
    assert choose_ranks(model_of(a=falling(nn.Linear(4, 4), 1.0)), Rules(rank_by="ratio", ratio=0.01))["a"].rank == 1


def test_every_layer_gets_an_answer() -> None:
    model = model_of(
        good=falling(nn.Linear(16, 16)),
        gru=nn.GRU(16, 16),
        up=nn.ConvTranspose1d(16, 16, 2),
        depthwise=nn.Conv1d(16, 16, 3, groups=16),
        embedding=nn.Embedding(16, 16),
        encoder=nn.Conv1d(1, 16, 4),
        frozen=falling(nn.Linear(16, 16)).requires_grad_(False),
        zero=nn.Linear(16, 16),
        broken=nn.Linear(16, 16),
        tied=falling(nn.Linear(16, 16)),
        excluded=falling(nn.Linear(16, 16)),
        targets=falling(nn.Linear(16, 16)),
        factors=factorised(nn.Linear(16, 16), 2),
        norm=nn.LayerNorm(16),
    )
    model["embedding"].weight = model["tied"].weight
    model._ddp_params_and_buffers_to_ignore = ["targets.weight", "targets.bias"]
    nn.init.zeros_(model["zero"].weight)
    nn.init.constant_(model["broken"].weight, torch.nan)
    rules = Rules(exclude=("^excl",))
    reasons = {name: choice.reason for name, choice in choose_ranks(model, rules).items()}
    assert reasons == {
        "good": "",
        "gru": "recurrent: its matrices are not layers",
        "up": "transposed convolution",
        "depthwise": "convolution in 16 groups",
        "embedding": "embedding: its rows are looked up, not multiplied",
        "encoder": "one input or output channel",
        "frozen": "frozen",
        "zero": "its weight is zero",
        "broken": "its weight is not finite",
        "tied": "its weight is also that of embedding",
        "excluded": "excluded",
        "targets": "never gets a gradient",
        "factors": "is factorised already",
    }
    assert list(candidates(model, rules)) == ["good", "zero", "broken"]
    assert candidates(model, rules)["good"] is model["good"]


def test_names_and_sizes() -> None:
    model = model_of(a=falling(nn.Linear(16, 24)), b=falling(nn.Conv1d(4, 16, 8)), c=falling(nn.Linear(8, 8), 1.0))

    def chosen(**rules: object) -> dict[str, str]:
        return {name: choice.reason for name, choice in choose_ranks(model, Rules(**rules)).items() if not choice.rank}

    assert chosen() == {}
    assert chosen(include=("a", "b")) == {"c": "not included"}
    assert chosen(include=("a", "b"), exclude=("b",)) == {"b": "excluded", "c": "not included"}
    assert chosen(threshold=16) == {"c": "8 x 8, below threshold=16"}
    assert chosen(threshold=17)["a"] == "24 x 16, below threshold=17"
    assert chosen(min_elements=65) == {"c": "64 entries, below min_elements=65"}


def test_what_was_measured_decides() -> None:
    model = model_of(a=with_spectrum(nn.Linear(20, 20), torch.tensor([1.0] * 4 + [0.01] * 16)))
    for max_ranks, rank, reason in [
        ({}, 4, ""),
        ({"a": 4}, 4, ""),
        ({"a": 3}, None, "too little speed-up above rank 3"),
        ({"a": 0}, None, "too little speed-up at any rank"),
        ({"b": 0}, 4, ""),
    ]:
        choice = choose_ranks(model, Rules(), max_ranks=max_ranks)["a"]
        assert (choice.rank, choice.reason) == (rank, reason)
    worth = break_even_rank((20, 20))
    choice = choose_ranks(model, Rules(rank_by="ratio", ratio=0.9), max_ranks={"a": 20})["a"]
    assert choice.rank is None and choice.reason == f"as many operations as before above rank {worth}"


def test_smaller_ranks() -> None:
    model = model_of(
        a=factorised(nn.Linear(40, 40), 12), b=falling(nn.Linear(40, 40)), c=factorised(nn.Linear(9, 9), 2)
    )
    chosen = choose_smaller_ranks(model, Rules(rank_by="ratio", ratio=0.2))
    assert {name: (choice.rank, choice.full) for name, choice in chosen.items()} == {"a": (8, 40), "c": (None, 9)}
    assert chosen["c"].reason == "has that rank" and chosen["c"].energy == pytest.approx(1)
    s = torch.linalg.svdvals(model["a"].to_dense().weight.detach())
    assert chosen["a"].energy == pytest.approx(float(s[:8].square().sum() / s.square().sum()), rel=1e-4)
    nn.init.constant_(model["a"].u, torch.inf)
    assert choose_smaller_ranks(model, Rules(rank_by="ratio", ratio=0.2))["a"] == Choice(
        reason="its weight is not finite"
    )


def test_choosing_changes_nothing() -> None:
    model = model_of(a=falling(nn.Linear(16, 16)), b=factorised(nn.Linear(16, 16), 5))
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    first = choose_ranks(model, Rules()), choose_smaller_ranks(model, Rules())
    assert first == (choose_ranks(model, Rules()), choose_smaller_ranks(model, Rules()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_described_on_one_line() -> None:
    numbers = {"full": 64, "wanted": 8, "energy": 0.912, "stable_rank": 2.34}
    assert Choice(rank=8, **numbers).described() == "rank 8 of 64 (rank 8 of 64 keeps 91.2%, stable rank 2.3)"
    assert Choice(reason="frozen").described() == "dense: frozen"
    assert Choice(reason="too slow", **numbers).described().startswith("dense: too slow (rank 8 of 64 keeps")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"rank_by": "svd"}, "rank_by must be one of energy, stable_rank, ratio, got 'svd'"),
        ({"energy": 1.5}, "energy must be a number from 0 to 1, got 1.5"),
        ({"energy": 0}, "energy must be above 0, got 0"),
        ({"energy": float("nan")}, "energy must be a number"),
        ({"ratio": True}, "ratio must be a number from 0 to 1, got True"),
        ({"ratios": {"attn": "x"}}, "ratios[attn] must be a number from 0 to 1, got 'x'"),
        ({"ratios": {"attn": 0.0}}, "ratios[attn] must be above 0, got 0.0"),
        ({"ratios": {"(": 0.5}}, "'(' is no regular expression"),
        ({"include": ("[",)}, "'[' is no regular expression"),
        ({"exclude": (3,)}, "3 is no regular expression"),
        ({"threshold": -1}, "threshold must be a number of at least 0, got -1"),
        ({"min_elements": None}, "min_elements must be a number"),
        ({"min_ratio": -0.1}, "min_ratio must be a number from 0 to 1, got -0.1"),
        ({"min_energy": 2}, "min_energy must be a number from 0 to 1, got 2"),
    ],
)
def test_wrong_rules_are_refused(rules: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Rules(**rules)
    assert message in str(error.value) and "\n" not in str(error.value)
