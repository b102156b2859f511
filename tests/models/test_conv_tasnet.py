"""The separation system around its network: batches of several lengths, live use, levels."""

import pytest
import torch
from torch import Tensor

from models.conv_tasnet import ConvTasNet

TINY = {
    "num_filters": 16, "bottleneck_channels": 8, "hidden_channels": 16, "skip_channels": 8, "num_blocks": 2,
    "num_repeats": 1,
}  # fmt: skip


def make_system(**arguments) -> ConvTasNet:
    torch.manual_seed(0)
    return ConvTasNet(**TINY | arguments).eval()


def batch_of(lengths: list[int], *, padding: float = 0.0) -> dict[str, Tensor]:
    """Two talkers each; *padding* is what stands behind an item's end."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.full((len(lengths), 2, max(lengths)), padding)
    for item, length in enumerate(lengths):
        sources[item, :, :length] = 0.1 * torch.randn(2, length, generator=generator)
    return {"mixture": sources.sum(1), "sources": sources, "length": torch.tensor(lengths)}


@pytest.mark.parametrize("arguments", [{}, {"causal": True, "norm": "cumulative"}, {"padding": "valid"}])
def test_padding_and_company_change_nothing(arguments: dict) -> None:
    system, lengths = make_system(**arguments), [4000, 2501, 3999]
    together = system.step(batch_of(lengths))
    alone = []
    for item, length in enumerate(lengths):
        one = {name: value[item : item + 1] for name, value in batch_of(lengths).items()}
        one["mixture"], one["sources"] = one["mixture"][..., :length], one["sources"][..., :length]
        alone.append(system.step(one))
        estimates = together["estimates"][item]
        torch.testing.assert_close(estimates[:, :length], alone[-1]["estimates"][0], atol=1e-6, rtol=0)
        assert not estimates[:, length:].any(), "nothing is put out behind the end"
    torch.testing.assert_close(together["loss"], torch.stack([one["loss"] for one in alone]).mean())
    noisy = system.step(batch_of(lengths, padding=0.5))
    torch.testing.assert_close(noisy["estimates"], together["estimates"], atol=0, rtol=0)


def test_a_batch_of_one_length_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    system, shapes = make_system(), []
    forward = system.network.forward
    monkeypatch.setattr(system.network, "forward", lambda x: (shapes.append(tuple(x.shape)), forward(x))[1])
    system.step(batch_of([800, 800, 800]))
    assert shapes == [(3, 800)]


def test_a_causal_system_refuses_to_look_ahead() -> None:
    with pytest.raises(ValueError, match="causal: true needs norm: cumulative or per_frame"):
        make_system(causal=True)


@pytest.mark.parametrize("norm", ["cumulative", "per_frame"])
def test_frames_at_a_time_as_the_whole(norm: str) -> None:
    system = make_system(causal=True, norm=norm)
    mixture = 0.1 * torch.randn(4001, generator=torch.Generator().manual_seed(1))
    whole = system.predict(mixture)["sources"]
    for frames in (1, 50):
        torch.testing.assert_close(system.predict(mixture, stream_frames=frames)["sources"], whole, atol=1e-5, rtol=0)


def test_frames_at_a_time_need_a_causal_system() -> None:
    with pytest.raises(ValueError, match="needs causal: true"):
        make_system().predict(torch.randn(100), stream_frames=8)


def test_levels_as_recorded() -> None:
    """Without a level of training, the network hears what there is."""
    system, heard = make_system(level_db=None), []
    system.network.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].clone()))
    mixture = 0.01 * torch.randn(1000)
    system.predict(mixture)
    torch.testing.assert_close(heard[0][0], mixture)
