"""The benchmark of streaming: every network that it names is built, and every runtime is measured."""

import pytest

from benchmarks import streaming
from models.deepvqe import DeepVQE

PARAMETERS = {"n320": 6.7e6, "n512": 7.5e6, "n480": 7.2e6, "DeepVQE-S": 0.5e6, "deepvqe_demo": 0.36e6}


@pytest.mark.parametrize("name", streaming.NETWORKS)
def test_networks_are_those_of_the_recipes(name: str) -> None:
    system = streaming.network(*streaming.NETWORKS[name])
    count = sum(weight.numel() for weight in system.parameters())
    assert count == pytest.approx(PARAMETERS[name.partition(",")[0]], rel=0.1)


def test_three_runtimes() -> None:
    system = DeepVQE(mic_channels=[2, 4], far_channels=[2], decoder_channels=[2], gru_hidden=4,
                     align={"hidden_channels": 2, "max_delay_ms": 50.0}).eval()  # fmt: skip
    found = streaming.measure(system, rounds=1, frames=3)
    assert list(found) == ["PyTorch", "onnxruntime", "onnxruntime, 8 bits"]
    assert all(0 < median <= high for median, high in found.values())
