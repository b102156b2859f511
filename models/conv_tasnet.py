"""Conv-TasNet speech separation (Luo and Mesgarani 2019, arXiv:1809.07454): waveform in, one waveform per talker out.

Trained with the permutation-invariant negative SI-SDR of the estimates (Kolbaek et al. 2017, arXiv:1703.06284).
"""

import logging
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.pit import pit_neg_si_sdr, reorder
from metrics.separation import SeparationMetrics
from models.base import System
from models.importers.conv_tasnet import asteroid_arguments, convert
from modules.checks import whole_numbers
from modules.chunking import separate_in_chunks
from modules.conv_tasnet import ConvTasNet as Network
from modules.conv_tasnet_stream import separate_stream
from modules.levels import restore_levels
from modules.resampling import resample

log = logging.getLogger(__name__)


class ConvTasNet(System):
    """Separates `num_sources` talkers. Network arguments: modules/conv_tasnet.py.

    *sample_rate*: of the training data, in Hz; `predict` resamples other rates.
    *level_db*: RMS of the training mixtures in dB full scale; `predict` brings a recording there and undoes it. Null:
    levels are left as they are.
    """

    inputs: ClassVar[dict[str, str]] = {"mixture": "audio"}
    outputs: ClassVar[dict[str, str]] = {"sources": "audio"}
    of_training = ("level_db",)
    checkpointed_parts = ("network.separator.blocks",)

    def __init__(
        self,
        *,
        sample_rate: int = 8000,
        level_db: float | None = -25.0,
        num_sources: int = 2,
        num_filters: int = 512,
        kernel_size: int = 16,
        stride: int | None = None,
        bottleneck_channels: int = 128,
        hidden_channels: int = 256,
        skip_channels: int | None = 128,
        block_kernel_size: int = 3,
        num_blocks: int = 8,
        num_repeats: int = 3,
        norm: str = "global",
        mask: str = "relu",
        causal: bool = False,
        padding: str = "centered",
        encoder_activation: str = "linear",
        compile: bool | str = False,
        gradient_checkpointing: bool = False,
        optim: dict[str, Any] | None = None,
    ) -> None:
        if causal and norm == "global":
            raise ValueError("causal: true needs norm: cumulative or per_frame; global looks at the whole recording")
        whole_numbers(sample_rate=sample_rate)
        super().__init__(optim=optim, compile=compile, gradient_checkpointing=gradient_checkpointing)
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
            causal=causal,
            padding=padding,
            encoder_activation=encoder_activation,
        )

    def forward(self, mixture: Tensor) -> Tensor:
        """(B, T) -> (B, num_sources, T)"""
        return self.network(mixture)

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mixture, sources = batch["mixture"], batch["sources"]
        if self.training or bool((batch["length"] == mixture.shape[-1]).all()):
            return self._separate_and_compare(mixture, sources)
        # Recordings of several lengths go alone: their padding would count in the norms' statistics and in the loss.
        alone = [
            self._separate_and_compare(mixture[i : i + 1, :length], sources[i : i + 1, :, :length])
            for i, length in enumerate(batch["length"].tolist())
        ]
        padded = [F.pad(o["estimates"], (0, mixture.shape[-1] - o["estimates"].shape[-1])) for o in alone]
        return {"loss": torch.stack([o["loss"] for o in alone]).mean(), "estimates": torch.cat(padded)}

    def _separate_and_compare(self, mixture: Tensor, sources: Tensor) -> dict[str, Tensor]:
        """Mean loss, and estimates in the order of the targets. Shape: (B, T), (B, C, T) -> (), (B, C, T)."""
        estimates = self(mixture)
        loss, permutation = pit_neg_si_sdr(estimates, sources)
        return {"loss": loss.mean(), "estimates": reorder(estimates, permutation)}

    def make_metric(self, stage: str) -> SeparationMetrics:
        return SeparationMetrics(sdr=stage == "test")

    def update_metric(self, metric: Any, batch: dict[str, Tensor], output: dict[str, Tensor]) -> None:
        metric.update(output["estimates"], batch["sources"], batch["mixture"], batch["length"])

    def example_scores(self, metric: Any) -> list[dict[str, Any]]:
        return metric.rows()

    def figures(self, batch: dict[str, Tensor], output: dict[str, Tensor]) -> dict[str, Tensor]:
        length = int(batch["length"][0])
        mixture, sources = batch["mixture"][:1, :length], batch["sources"][0, :, :length]
        signals = {"mixture": mixture[0]}
        estimates = restore_levels(output["estimates"][:1, :, :length], mixture)[0]
        for index, (estimate, target) in enumerate(zip(estimates, sources, strict=True), 1):
            signals |= {f"estimate{index}": estimate, f"target{index}": target}
        return signals

    def import_weights(self, content: dict[str, Any]) -> dict[str, Tensor]:
        state, source = convert(content)
        own = dict(self.hparams)
        if source == "asteroid" and isinstance(arguments := content.get("model_args"), dict):
            theirs = asteroid_arguments(arguments)
            for network in (own, theirs):
                network["stride"] = network["stride"] or network["kernel_size"] // 2
            if wrong := [f"model.{key}={value}" for key, value in theirs.items() if own[key] != value]:
                raise ValueError(f"weights of another network; set {' '.join(wrong)}".replace("=None", "=null"))
        elif source != "ours":
            kept = ", ".join(f"{key}={own[key]}" for key in ("mask", "norm", "causal", "padding", "encoder_activation"))
            log.warning("%s's weights do not say what they were trained with; taken for %s", source, kept)
        return {name if name.startswith("network.") else f"network.{name}": value for name, value in state.items()}

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
        stream_frames: int | None = None,
    ) -> dict[str, Tensor]:
        """Separate a recording of any length.

        *mixture*: (T,) or (B, T). *sample_rate*: its rate in Hz, null for the system's own. Longer recordings than
        *chunk_s* seconds run in chunks that overlap by *overlap_s*, talkers kept in order across chunks.
        *stream_frames*: a causal network runs over the recording so many frames at a time, its state carried on, as
        it would in a live system; null: all at once.

        Returns `sources` (…, num_sources, T) at the mixture's rate, at the levels with which they add up to it.
        """
        rate = sample_rate or self.sample_rate
        waveform = mixture.to(self.device, torch.float32)
        batch = waveform.reshape(-1, waveform.shape[-1])  # (B, T)
        own = resample(batch, rate, self.sample_rate)
        gain = self._gain(own)  # (B, 1)
        own = own * gain
        if stream_frames is not None:
            estimates = restore_levels(separate_stream(self.network, own, frames_per_call=stream_frames), own)
        else:
            estimates = separate_in_chunks(
                lambda chunk: restore_levels(self(chunk), chunk),
                own,
                chunk_samples=round(chunk_s * self.sample_rate),
                overlap_samples=round(overlap_s * self.sample_rate),
            )
        back = resample(estimates / gain[:, :, None], self.sample_rate, rate)[..., : waveform.shape[-1]]
        return {"sources": back.reshape(*waveform.shape[:-1], *back.shape[1:])}

    def _gain(self, mixture: Tensor) -> Tensor:
        """What brings each recording to the level of training; 1 for silence. Shape: (B, T) -> (B, 1)."""
        rms = mixture.square().mean(-1, keepdim=True).sqrt()
        level = rms if self.level_db is None else 10 ** (self.level_db / 20)
        return torch.where(rms > 0, level / rms, torch.ones_like(rms))
