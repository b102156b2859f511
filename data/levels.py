"""Levels of mixtures and the batch they are put into: what made and recorded mixtures share.

A loss and a measure may rely on `mixture == sources.sum(1)` (`+ noise` where there is one) to the last bit, in an
item and in a batch. So one gain is applied to all parts, and the sum is taken last, on the tensors that are given
out, in this order.

Levels are measured by numpy: torch splits the sum of a long signal among its threads, and an item would
then differ in its last bits between a worker (one thread) and the main process.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

EMPTY_RMS = 1e-6
"""RMS below which a signal is silence, which no gain may turn into noise."""

_CEILING = 1 - 2**-20  # full scale, less what rounding may add


def rms(signal: Tensor) -> Tensor:
    """Root mean square over the last axis, float32.

    Shape: `(…, T)` -> `(…)`.
    """
    return torch.as_tensor(np.sqrt(np.square(signal.numpy()).mean(-1)))


def gain_to(level: Tensor | float, signal: Tensor) -> Tensor:
    """What brings signals to an RMS of `level` each, float32; 0 for silence.

    Shape: level `(…)`, signal `(…, T)` -> `(…)`.
    """
    own = rms(signal)
    return torch.where(own > EMPTY_RMS, level / own.clamp(min=EMPTY_RMS), 0.0).float()


def common_gain(mixture: Tensor, *, level_db: float | None) -> Tensor:
    """The gain that brings a mixture to `level_db` (RMS, dB relative to full scale; None: leaves it), less where it
    would pass full scale otherwise; 1 for silence.

    Shape: mixture `(T,)` -> `()`.
    """
    level = rms(mixture)
    if level <= EMPTY_RMS:
        return torch.ones(())
    gain = torch.ones(()) if level_db is None else 10 ** (level_db / 20) / level
    return gain.clamp(max=_CEILING / float(mixture.abs().max()))


def add_up(sources: Tensor, noise: Tensor | None) -> Tensor:
    """The mixture of sources and noise, in the order that makes it exact.

    Shape: sources `(…, C, T)`, noise `(…, T)` -> `(…, T)`.
    """
    mixture = sources.sum(-2)
    return mixture if noise is None else mixture + noise


def collate_mixtures(items: list[dict | list[dict]]) -> dict:
    """A batch of items, or of the mixtures that they are lists of; shorter ones are padded with zeros at the end.

    Shape:
        item: sources `(C, T)`, length `()` samples, noise `(T,)` in all or none, name str
        -> mixture `(B, T)`, sources `(B, C, T)`, length `(B,)`, noise `(B, T)`, name list of B.
    """
    mixtures = [mixture for item in items for mixture in (item if isinstance(item, list) else [item])]
    longest = max(mixture["sources"].shape[-1] for mixture in mixtures)

    def stacked(key: str) -> Tensor:
        return torch.stack([pad(mixture[key], (0, longest - mixture[key].shape[-1])) for mixture in mixtures])

    sources = stacked("sources")  # (B, C, T)
    noise = {"noise": stacked("noise")} if "noise" in mixtures[0] else {}
    return {
        "mixture": add_up(sources, noise.get("noise")),
        "sources": sources,
        **noise,
        "length": torch.stack([mixture["length"] for mixture in mixtures]),
        "name": [mixture["name"] for mixture in mixtures],
    }
