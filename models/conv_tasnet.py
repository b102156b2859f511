"""Conv-TasNet speech separation (Luo and Mesgarani 2019, arXiv:1809.07454): waveform in, one waveform per talker out.

Trained with the permutation-invariant negative SI-SDR of the estimates (Kolbaek et al. 2017, arXiv:1703.06284).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchaudio.functional import resample

from losses.pit import pit_neg_si_sdr, reorder
from metrics.separation import SeparationMetrics
from models.base import System
from modules.chunking import separate_in_chunks
from modules.conv_tasnet import ConvTasNet as Network
from modules.levels import restore_levels


class ConvTasNet(System):
    """Separates `num_sources` talkers. Network arguments: modules/conv_tasnet.py.

    *sample_rate*: of the training data, in Hz; `predict` resamples other rates.
    *level_db*: RMS of the training mixtures in dB full scale; `predict` brings a recording there and undoes it.
    """

    inputs: ClassVar[dict[str, str]] = {"mixture": "audio"}
    outputs: ClassVar[dict[str, str]] = {"sources": "audio"}

    def __init__(
        self,
        *,
        sample_rate: int = 8000,
        level_db: float = -25.0,
        num_sources: int = 2,
        num_filters: int = 512,
        kernel_size: int = 16,
        stride: int | None = None,
        bottleneck_channels: int = 128,
        hidden_channels: int = 256,
        skip_channels: int = 128,
        block_kernel_size: int = 3,
        num_blocks: int = 8,
        num_repeats: int = 3,
        norm: str = "global",
        mask: str = "relu",
        optim: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optim=optim)
        self.sample_rate = sample_rate
        self.level_db = level_db
        self.network = Network(
            num_sources=num_sources,
            num_filters=num_filters,
            kernel_size=kernel_size,
            stride=stride,
            bottleneck_channels=bottleneck_channels,
            hidden_channels=hidden_channels,
            skip_channels=skip_channels,
            block_kernel_size=block_kernel_size,
            num_blocks=num_blocks,
            num_repeats=num_repeats,
            norm=norm,
            mask=mask,
        )

    def forward(self, mixture: Tensor) -> Tensor:
        """(B, T) -> (B, num_sources, T)"""
        return self.network(mixture)

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        estimates = self(batch["mixture"])
        loss, permutation = pit_neg_si_sdr(estimates, batch["sources"])
        return {"loss": loss.mean(), "estimates": reorder(estimates, permutation)}

    def make_metric(self) -> SeparationMetrics:
        return SeparationMetrics()

    def update_metric(self, metric: Any, batch: dict[str, Tensor], output: dict[str, Tensor]) -> None:
        metric.update(output["estimates"], batch["sources"], batch["mixture"], batch["length"])

    def figures(self, batch: dict[str, Tensor], output: dict[str, Tensor]) -> dict[str, Tensor]:
        signals = {"mixture": batch["mixture"][0]}
        estimates = restore_levels(output["estimates"][:1], batch["mixture"][:1])[0]
        for index, (estimate, target) in enumerate(zip(estimates, batch["sources"][0], strict=True), 1):
            signals |= {f"estimate{index}": estimate, f"target{index}": target}
        return signals

    def example_input(self) -> dict[str, Tensor]:
        return {"mixture": torch.randn(1, self.sample_rate, generator=torch.Generator().manual_seed(0))}

    @torch.inference_mode()
    def predict(
        self,
        mixture: Tensor,
        *,
        sample_rate: int | None = None,
        chunk_s: float = 30.0,
        overlap_s: float = 2.0,
    ) -> dict[str, Tensor]:
        """Separate a recording of any length.

        *mixture*: (T,) or (B, T). *sample_rate*: its rate in Hz, null for the system's own. Longer recordings than
        *chunk_s* seconds run in chunks that overlap by *overlap_s*, talkers kept in order across chunks.

        Returns `sources` (…, num_sources, T) at the mixture's rate, at the levels with which they add up to it.
        """
        rate = sample_rate or self.sample_rate
        waveform = mixture.to(self.device, torch.float32)
        batch = waveform.reshape(-1, waveform.shape[-1])  # (B, T)
        rms = batch.square().mean(-1, keepdim=True).sqrt()
        gain = torch.where(rms > 0, 10 ** (self.level_db / 20) / rms, torch.ones_like(rms))
        own = resample(batch * gain, rate, self.sample_rate)
        estimates = separate_in_chunks(
            lambda chunk: restore_levels(self(chunk), chunk),
            own,
            chunk_samples=round(chunk_s * self.sample_rate),
            overlap_samples=round(overlap_s * self.sample_rate),
        )
        back = resample(estimates, self.sample_rate, rate)[..., : waveform.shape[-1]] / gain[:, :, None]
        return {"sources": back.reshape(*waveform.shape[:-1], *back.shape[1:])}
