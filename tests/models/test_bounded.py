"""Networks are built with memory in proportion to the weights that a file holds."""

import pytest
import torch
from torch import nn

from models.bounded import bounded
from models.checkpoint import CheckpointError

STATE = nn.Linear(30, 40).state_dict()


def test_what_a_file_explains_is_built() -> None:
    with bounded(STATE, "x.ckpt"):
        dense = nn.Sequential(*(nn.Linear(30, 40) for _ in range(500)))
    torch.empty(2**28)  # no longer watched, as the next line is not
    nn.ParameterList(torch.zeros(1) for _ in range(2000))
    assert len(dense) == 500


@pytest.mark.parametrize("build", [lambda: nn.Linear(10**5, 10**5), lambda: torch.zeros(2**28)])
def test_a_tensor_too_large_is_refused_before_there_is_memory_for_it(build) -> None:
    with (
        pytest.raises(CheckpointError, match=r"^x.ckpt: a tensor of \d+ numbers is asked for, far more than it holds$"),
        bounded(STATE, "x.ckpt"),
    ):
        build()


def test_layers_without_end_are_refused() -> None:
    def layers():
        while True:
            yield nn.Linear(1, 1)

    expected = r"^x.ckpt: a network of more than 1032 weights is asked for, where it holds 2$"
    with pytest.raises(CheckpointError, match=expected), bounded(STATE, "x.ckpt"):
        nn.Sequential(*layers())
