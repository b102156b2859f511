"""Parameters that no gradient reaches are named, once, and in torch's error about them."""

import logging

import pytest
from torch import nn

from callbacks.not_finite import SkipNotFinite
from callbacks.unused_parameters import UnusedParameters, _listed


@pytest.fixture
def with_unused(tiny):
    """A system with a layer that is never called and one that is frozen."""

    class WithUnused(tiny.Tiny):
        def __init__(self, *, unused: bool = True) -> None:
            super().__init__()
            self.frozen = nn.Linear(1, 1).requires_grad_(False)
            if unused:
                self.spare = nn.Linear(1, 1)

    return WithUnused


@pytest.mark.parametrize("accumulate", [1, 2])
def test_named_once(tiny, with_unused, tmp_path, caplog, accumulate: int) -> None:
    caplog.set_level(logging.INFO)
    callbacks = [SkipNotFinite(), UnusedParameters()]
    tiny.make_trainer(tmp_path, callbacks, accumulate_grad_batches=accumulate).fit(with_unused(), tiny.Data())
    told = [record.message for record in caplog.records if record.name == "unused_parameters"]
    assert told == ["no gradient reaches spare.weight, spare.bias"]


def test_nothing_to_say(tiny, with_unused, tmp_path, caplog) -> None:
    """Also where another callback has taken the gradients of a step away."""

    class NotFinite(with_unused):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 0 else 1.0)

    callbacks = [SkipNotFinite(), UnusedParameters()]
    tiny.make_trainer(tmp_path, callbacks, max_epochs=1).fit(NotFinite(unused=False), tiny.Data())
    assert "no gradient reaches" not in caplog.text


def test_layers_that_were_replaced_are_looked_at(tiny, with_unused, tmp_path, caplog) -> None:
    class Replaces(UnusedParameters):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 0:
                pl_module.spare = nn.Linear(1, 1)
                self.layers_replaced(trainer, pl_module, {})

    tiny.make_trainer(tmp_path, [Replaces()]).fit(with_unused(unused=False), tiny.Data())
    assert caplog.text.count("no gradient reaches") == 1 and "spare.weight" in caplog.text


def test_torchs_error_gets_names(with_unused) -> None:
    """Torch counts the trainable parameters."""
    system = with_unused()
    error = RuntimeError(
        "Expected to have finished reduction in the prior iteration before starting a new one. …\nParameter indices"
        " which did not receive grad for rank 1: 2 3\n In addition, you can set the environment variable …"
    )
    UnusedParameters().on_exception(None, system, error)  # type: ignore[arg-type]
    assert str(error).startswith("no gradient reaches spare.weight, spare.bias: freeze them")
    assert "trainer.strategy=ddp_find_unused_parameters_true" in str(error)
    other = RuntimeError("something else")
    UnusedParameters().on_exception(None, system, other)  # type: ignore[arg-type]
    assert str(other) == "something else"


def test_a_long_list_is_cut() -> None:
    assert _listed([f"layer{n}" for n in range(23)]).endswith("layer19 and 3 more parameters")
