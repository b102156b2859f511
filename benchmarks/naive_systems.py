"""Networks and a loader of first scripts in the place of ours, so that train.py runs them: the baseline of
benchmarks/speedups.py, by `packages=[benchmarks] model._target_=benchmarks.naive_systems.…`. Arguments, losses and
metrics are ours. Used for nothing else.
"""

from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import naive_deepvqe, naive_unet
from benchmarks.naive_aec_data import NaiveEchoDataset
from data.aec import EchoData
from data.fixed_echo import SCENARIOS, FixedEchoDataset, collate_echo
from data.sampler import ItemKey
from models.conv_tasnet import ConvTasNet
from models.deepvqe import DeepVQE
from models.unet import UNet


class NaiveConvTasNet(ConvTasNet):
    """torchaudio's network."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        ours = self.network
        block = ours.separator.blocks[0]
        self.network = _Channels(
            torchaudio.models.ConvTasNet(
                num_sources=ours.num_sources,
                enc_kernel_size=ours.kernel_size,
                enc_num_feats=ours.encoder.out_channels,
                msk_kernel_size=block.depthwise.kernel_size[0],
                msk_num_feats=block.expand.in_channels,
                msk_num_hidden_feats=block.expand.out_channels,
                msk_num_layers=arguments.get("num_blocks", 8),
                msk_num_stacks=arguments.get("num_repeats", 3),
                msk_activate="relu",
            )
        )


class _Channels(nn.Module):
    """Shape: (B, T) -> (B, C, T)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, mixture: Tensor) -> Tensor:
        return self.network(mixture[:, None])


class NaiveUNet(UNet):
    """One as tutorials write it."""

    def __init__(self, *, base_channels: int = 32, depth: int = 4, **arguments: Any) -> None:
        super().__init__(base_channels=base_channels, depth=depth, **arguments | {"channels_last": False})
        self.network = naive_unet.NaiveUNet(base_channels=base_channels, depth=depth)

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)


class NaiveDeepVQE(DeepVQE):
    """The paper written down literally."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        names = ("mic_channels", "far_channels", "decoder_channels", "gru_hidden", "compression")
        delays = 1 + round(self.reach_ms * self.sample_rate / 1000 / self.hop_samples)
        self.network = naive_deepvqe.NaiveDeepVQE(
            num_bins=self.stft.n_fft // 2 + 1,
            align_hidden=self.align["hidden_channels"],
            max_delay_frames=delays,
            **{name: arguments[name] for name in names if name in arguments},
        )


class NaiveEchoData(EchoData):
    """Training recordings are read whole and resampled for each example, and nothing is kept."""

    def dataset(self, stage: str) -> Dataset | None:
        ours = super().dataset(stage)
        if stage != "train" or not isinstance(ours, FixedEchoDataset):
            return ours
        return _Echoes(ours.rows, sample_rate=self.sample_rate, segment_s=self.segments_s["train"], spectra=False)


class _Echoes(NaiveEchoDataset):
    """With what the batches of ours hold beside the signals."""

    collate = staticmethod(collate_echo)

    def __getitem__(self, key: ItemKey) -> dict[str, Any]:  # type: ignore[override]
        index, _ = key
        row = self.rows[index]
        return {
            **super().__getitem__(index),
            "has_target": torch.tensor(True),
            "length": torch.tensor(self.samples),
            "scenario": torch.tensor(SCENARIOS.index(row["scenario"])),
            "delay_samples": torch.tensor(row.get("delay_ms", -1.0) * self.sample_rate / 1000),
            "path_change_sample": torch.tensor(-1),
            "ser_db": torch.tensor(0.0),
            "snr_db": torch.tensor(0.0),
            "name": str(index),
        }
