"""Mixed precision that switches itself on.

bf16 where the device has it, since it needs no loss scaling; fp16 with Lightning's scaler on older GPUs; nothing on a
CPU, where neither is faster on most machines, unless it is asked for.
"""

from typing import Any

import pytorch_lightning as pl
import torch

_PRECISIONS = ("auto", "bf16-mixed", "16-mixed", "32-true")


class AutoPrecision(pl.Callback):
    """Asks for `trainer.precision`, which wins when it is set.

    *precision*: `auto`, or one of bf16-mixed, 16-mixed, 32-true.
    """

    def __init__(self, *, precision: str = "auto") -> None:
        if precision not in _PRECISIONS:
            raise ValueError(f"precision={precision}: choose from {', '.join(_PRECISIONS)}")
        self.precision = precision

    def trainer_kwargs(self, *, system: pl.LightningModule, trainer: dict[str, Any]) -> dict[str, Any]:
        """The Trainer arguments this callback asks for, given the resolved `trainer` section."""
        if self.precision != "auto":
            return {"precision": self.precision}
        if trainer["accelerator"] != "cuda":
            return {}
        return {"precision": "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"}
