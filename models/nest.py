"""NEST: self-supervised pre-training of a Fast-Conformer by masked prediction of random-projection tokens.

Huang et al., "NEST: Self-supervised Fast Conformer as All-purpose Seasoning to Speech Processing Tasks", 2024
(arXiv 2408.13106). The modules, their names, the configuration and the numbers are those of NeMo 3.0.0's
`EncDecDenoiseMaskedTokenPredModel`; where its known faults are not reproduced, see docs/nemo.md.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from losses.masked_prediction import masked_nll, selected_frames
from metrics.masked_prediction import MaskedPredictionMetrics, right_tokens, with_books
from models.base import ExportedNetwork, System, Tensors
from models.nemo import write_nemo
from models.nest_encoder import as_type, exported, layer_numbers, layer_outputs
from models.nest_sections import after_subsampling, build_part, complete_sections
from models.optim import parameter_groups
from modules import low_rank
from modules.block_masking import RandomBlockMasking
from modules.conformer import ConformerEncoder
from modules.masked_subsampling import MaskedSubsampling
from modules.mel import MelPreprocessor
from modules.quantizer import RandomProjectionVectorQuantizer
from modules.resampling import resample
from modules.softmax_decoder import MultiSoftmaxDecoder

log = logging.getLogger(__name__)

# What NeMo calls the parts, for the archives that it reads.
_MODULES = "nemo.collections.asr.modules."
TARGETS = {
    "preprocessor": f"{_MODULES}AudioToMelSpectrogramPreprocessor",
    "spec_augment": f"{_MODULES}SpectrogramAugmentation",
    "masking": f"{_MODULES}RandomBlockMasking",
    "quantizer": f"{_MODULES}RandomProjectionVectorQuantizer",
    "encoder": f"{_MODULES}ConformerEncoder",
    "decoder": f"{_MODULES}MultiSoftmaxDecoder",
    "loss": "nemo.collections.asr.losses.MultiMLMLoss",
}
NEMO_VERSION = "3.0.0"  # whose network this is
NEMO_MODEL = "nemo.collections.asr.models.ssl_models.EncDecDenoiseMaskedTokenPredModel"
ARCHITECTURE = (
    "sample_rate",
    "num_classes",
    "num_books",
    "code_dim",
    "squeeze_single",
    "mask_position",
    *TARGETS,
)
"""The keys of a model section that say what the network is; an archive's take the place of ours."""


class NEST(System):
    """A Fast-Conformer that predicts the tokens of clean speech from noisy, masked speech.

    Each section takes the keys of NeMo's class of that name (`_target_` is ignored) and defaults to NeMo's values.

    Args:
        sample_rate: in Hz.
        num_classes, num_books, code_dim: of the codebooks.
        squeeze_single: no axis for the books where there is one.
        mask_position: `pre_conv` masks mel frames; `post_conv` sub-sampled frames, and `masking.feat_in`,
            `masking.block_size`, `quantizer.feat_in`, `combine_time_steps` are brought in line with them.
        nemo_compat: reproduce NeMo's known faults: masks from the global generator, a loss of NaN where nothing is
            masked, `reduce: local`, validation loss as the mean of the batches' means.
        preprocessor: see `MelPreprocessor`. spec_augment: never applied, kept for the configuration's sake.
        masking: see `RandomBlockMasking`. quantizer: see `RandomProjectionVectorQuantizer`.
        encoder: see `ConformerEncoder`. decoder: see `MultiSoftmaxDecoder`.
        loss: `combine_time_steps`, `mask_threshold`, and `reduce`: `global` is the mean over the masked frames of all
            processes and micro-batches of a step, `local` the mean of their means.
        compile: see `System`; the encoder's layers. gradient_checkpointing: these and the sub-sampling.
        optim, optim_param_groups: see models/optim.py.

    Raises:
        ValueError: a section has an unknown key, or values that do not fit together.
    """

    inputs: ClassVar[dict[str, str]] = {"audio": "audio"}
    outputs: ClassVar[dict[str, str]] = {"features": "array"}
    compiled_parts = ("encoder.layers",)
    checkpointed_parts = ("encoder.pre_encode", "encoder.layers")
    compiled_shapes_vary = True
    of_training = (
        *(f"masking.{key}" for key in ("block_size", "mask_prob", "allow_overlap", "freeze")),
        *(
            "spec_augment.",
            "preprocessor.dither",
            "encoder.dropout",
            "encoder.stochastic_depth",
            "loss.",
            "nemo_compat",
        ),
    )

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        num_classes: int = 8192,
        num_books: int = 1,
        code_dim: int = 16,
        squeeze_single: bool = False,
        mask_position: str = "pre_conv",
        nemo_compat: bool = False,
        preprocessor: dict[str, Any] | None = None,
        spec_augment: dict[str, Any] | None = None,
        masking: dict[str, Any] | None = None,
        quantizer: dict[str, Any] | None = None,
        encoder: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        compile: bool | str = False,
        gradient_checkpointing: bool = False,
        optim: dict[str, Any] | None = None,
        optim_param_groups: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(optim=optim, compile=compile, gradient_checkpointing=gradient_checkpointing)
        if mask_position not in ("pre_conv", "post_conv"):
            raise ValueError(f"mask_position must be pre_conv or post_conv, got {mask_position!r}")
        if not isinstance(nemo_compat, bool):
            raise ValueError(f"nemo_compat must be true or false, got {nemo_compat!r}")
        self.sample_rate, self.mask_position, self.nemo_compat = sample_rate, mask_position, nemo_compat
        self.num_books, self.num_classes = num_books, num_classes
        shared = {"num_classes": num_classes, "num_books": num_books, "code_dim": code_dim}
        given = {"preprocessor": preprocessor, "spec_augment": spec_augment, "masking": masking, "loss": loss}
        given |= {"quantizer": quantizer, "encoder": encoder, "decoder": decoder}
        self.sections = complete_sections(
            given, **shared, sample_rate=sample_rate, squeeze_single=squeeze_single, mask_position=mask_position
        )
        sections = self.sections if mask_position == "pre_conv" else after_subsampling(self.sections)
        self.preprocessor: MelPreprocessor = build_part("preprocessor", sections)
        self.encoder: ConformerEncoder = build_part("encoder", sections)
        self.quantizer: RandomProjectionVectorQuantizer = build_part("quantizer", sections)
        self.mask_processor: RandomBlockMasking = build_part("masking", sections)
        self.decoder: MultiSoftmaxDecoder = build_part("decoder", sections)
        self.loss = sections["loss"]
        self.loss_reduce = "local" if nemo_compat else self.loss["reduce"]
        if mask_position == "post_conv":
            self.pre_encoder = MaskedSubsampling(self.encoder.pre_encode, self.mask_processor)
            self.encoder.pre_encode = self.pre_encoder
            # They never get a gradient, which DDP would wait for (torch's name for what it leaves alone).
            still = {id(weight) for weight in self.pre_encoder.pre_encode.parameters()}
            self._ddp_params_and_buffers_to_ignore = [
                name for name, weight in self.named_parameters(remove_duplicate=False) if id(weight) in still
            ]
        self.optim_param_groups = dict(optim_param_groups or {})
        parameter_groups(self, self.optim_param_groups, self.optim)  # a wrong one is found here
        # Of this process; no buffer, which DDP would overwrite with the first one's.
        self._num_empty_batches = torch.zeros((), dtype=torch.long)

    def encode(self, audio: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder makes of recordings, nothing masked.

        Shape: `(B, S)`, `(B,)` -> `(B, D, T')`, `(B,)`.
        """
        return self.encoder(*self.preprocessor(audio, length))

    def forward(self, audio: Tensor) -> Tensor:
        """(B, S) -> (B, D, T')"""
        return self.encode(audio, torch.full((len(audio),), audio.shape[-1], device=audio.device))[0]

    def predict_masked(
        self,
        clean: Tensor,
        noisy: Tensor,
        noisy_length: Tensor,
        *,
        mask: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities of the tokens, where the noisy features are masked.

        *clean*, *noisy*: mel features `(B, F, T)`. *mask*: the frames to hide, `(B, T)` of the mels or, after the
        sub-sampling, `(B, T')`; None draws it from *seeds* `(B,)`, or from torch's generator without.

        Returns log-probabilities `(B, T', C, N)`, their number of frames `(B,)`, tokens `(B, T', N)` and the mask.
        Without an axis N where `squeeze_single` says so.
        """
        if self.mask_position == "post_conv":
            return self._predict_masked_frames(clean, noisy, noisy_length, mask, seeds)
        tokens = self.quantizer(clean)
        if mask is None:
            mask = self.mask_processor.draw(noisy.shape[-1], noisy_length, seeds)
        encoded, length = self.encoder(self.mask_processor.hide(noisy, mask), noisy_length)
        num_tokens = tokens.shape[1]  # causal_downsampling makes a frame more, on which NeMo stops
        return self.decoder(encoded[..., :num_tokens]), length.clamp(max=num_tokens), tokens, mask

    def _predict_masked_frames(
        self, clean: Tensor, noisy: Tensor, noisy_length: Tensor, mask: Tensor | None, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, masked after the sub-sampling. NeMo 3.0.0 crashes here; this is what its parent class does."""
        targets, _ = self.pre_encoder(clean.transpose(1, 2), noisy_length)  # (B, T', D)
        frames, length = self.pre_encoder(noisy.transpose(1, 2), noisy_length)
        tokens = self.quantizer(targets.transpose(1, 2))
        if mask is None:
            mask = self.mask_processor.draw(frames.shape[1], length, seeds)
        masked = self.mask_processor.hide(frames.transpose(1, 2), mask).transpose(1, 2)
        encoded, length = self.encoder.contextualise(masked, length)
        return self.decoder(encoded), length, tokens, mask

    def masked_loss(self, log_probs: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses of the masked frames, the number of these `()`, and which they are `(B, T')`."""
        selected = selected_frames(
            mask,
            combine_time_steps=self.loss["combine_time_steps"],
            mask_threshold=self.loss["mask_threshold"],
        )
        nll_sum, count = masked_nll(log_probs, tokens, selected)
        return nll_sum, count, selected

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        clean, _ = self.preprocessor(batch["audio"], batch["length"])
        noisy, noisy_length = self.preprocessor(batch["noisy"], batch["noisy_length"])
        seeds = None if self.nemo_compat else batch["mask_seed"]
        log_probs, length, tokens, mask = self.predict_masked(clean, noisy, noisy_length, seeds=seeds)
        nll_sum, count, selected = self.masked_loss(log_probs, tokens, mask)
        output = {"loss": nll_sum / (count if self.nemo_compat else count.clamp(min=1))}
        if not self.nemo_compat:
            output["loss_count"] = count
        elif not self.training:
            output["num_compared"] = 1
        if self.training:
            right = right_tokens(*with_books(log_probs, tokens), selected)
            self._num_empty_batches = self._num_empty_batches.to(count.device, non_blocking=True) + (count == 0)
            output |= {
                "accuracy": right.sum() / (count.clamp(min=1) * self.num_books),
                "empty_batches": self._num_empty_batches.float(),
            }
            return output
        valid = torch.arange(log_probs.shape[1], device=length.device) < length[:, None]
        return output | {
            "log_probs": log_probs,
            "tokens": tokens,
            "selected": selected,
            "valid": valid,
            "nll": nll_sum[None],  # not a scalar: the metric sums it up
        }

    def make_metric(self, stage: str) -> MaskedPredictionMetrics:
        return MaskedPredictionMetrics(num_books=self.num_books, num_classes=self.num_classes)

    def update_metric(self, metric: Any, batch: dict[str, Tensor], output: dict[str, Tensor]) -> None:
        metric.update(
            log_probs=output["log_probs"],
            targets=output["tokens"],
            selected=output["selected"],
            valid=output["valid"],
            nll_sum=output["nll"][0],
        )

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking and float(self.trainer.callback_metrics["val_masked_share"]) == 0:
            log.warning(
                "nothing was masked in this validation, so its loss of 0 means nothing: model.masking has"
                " block_size=%d, mask_prob=%g",
                self.mask_processor.block_size,
                self.mask_processor.mask_prob,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_empty_batches"] = int(self._num_empty_batches)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._num_empty_batches = torch.tensor(checkpoint.get("num_empty_batches", 0))

    def example_input(self) -> dict[str, Tensor]:
        return {"audio": torch.randn(1, self.sample_rate, generator=torch.Generator().manual_seed(0))}

    def exported_network(self, *, waveform: bool) -> ExportedNetwork:
        facts = {"sample_rate": self.sample_rate, "frame_rate_hz": self.frame_rate_hz}
        return exported(self.encoder, self.preprocessor, waveform=waveform, facts=facts)

    @property
    def frame_rate_hz(self) -> float:
        """Of the encoder's output."""
        return self.sample_rate / (self.preprocessor.hop_samples * self.encoder.subsampling_factor)

    @torch.inference_mode()
    def predict(
        self,
        audio: Tensor,
        *,
        sample_rate: int | None = None,
        layers: int | Sequence[int] | Literal["all"] = (-1,),
        format: Literal["npy", "safetensors"] = "npy",
        dtype: Literal["float32", "float16"] = "float32",
    ) -> dict[str, Any]:
        """The features that layers of the encoder make of a recording, nothing masked.

        *audio*: (S,), or (B, S) of equal length; memory grows with the square of the length. *sample_rate*: its rate in
        Hz, null for the system's own. *layers*: 1 is the output of the first Conformer layer, n_layers that of the last
        one, 0 what enters the first; an `out_proj` counts as one more. Negative numbers count from the end: -1 is what
        `encode` gives. all: from 1 to n_layers. NeMo's ConformerMultiLayerFeatureExtractor counts from 0, so that its
        layer i is i + 1 here, and applies out_proj, where there is one, to every layer. *format*: npy: one array, which
        layers of different width do not fit into; safetensors: a tensor for each layer. *dtype*: of the features.

        Returns `features`, of one layer (…, T', D), of several (…, layers, T', D), or with safetensors `Tensors` with
        layer_<number> (…, T', D) each. T' frames are those that the recording fills, `frame_rate_hz` a second.

        Raises ValueError for a recording of less than one mel frame, for layers that there are not, and for features
        that float16 cannot hold.
        """
        wanted = layer_numbers(self.encoder, layers)
        if format == "npy" and len(wanted) > 1 and max(wanted) > len(self.encoder.layers):
            raise ValueError(f"layer {max(wanted)} has another width than the others: format=safetensors takes both")
        rate = sample_rate or self.sample_rate
        signal = audio.to(self.device, torch.float32).reshape(-1, audio.shape[-1])  # (B, S)
        if signal.numel():
            signal = resample(signal, rate, self.sample_rate)
        found = {
            number: as_type(output, dtype).reshape(*audio.shape[:-1], *output.shape[1:])  # (…, T', D)
            for number, output in layer_outputs(self.encoder, self.preprocessor, signal, wanted)
        }
        if format == "npy":
            features = [found[number] for number in wanted]
            return {"features": features[0] if len(features) == 1 else torch.stack(features, -3)}
        facts = {"frame_rate_hz": f"{self.frame_rate_hz:g}", "sample_rate": str(self.sample_rate)}
        facts["layers"] = ",".join(map(str, wanted))
        return {"features": Tensors({f"layer_{number}": found[number] for number in wanted}, facts)}

    def save_to(self, path: str | Path) -> None:
        """Write a `.nemo` archive that NeMo restores: factors of layers that switched to low rank are multiplied."""
        write_nemo(path, self.nemo_config(), low_rank.dense_weights(self))

    def nemo_config(self) -> dict[str, Any]:
        """The `model:` section by which NeMo builds this network."""
        scalars = {key: self.hparams[key] for key in ARCHITECTURE if key not in TARGETS}
        sections = {name: {"_target_": target} | self.sections[name] for name, target in TARGETS.items()}
        sections["loss"].pop("reduce")  # ours alone
        ours = ("scale_lr_with_batch", "scale_lr_rule")
        optim = {key: value for key, value in self.optim.items() if value is not None and key not in ours}
        return {**scalars, **sections, "target": NEMO_MODEL, "nemo_version": NEMO_VERSION, "optim": optim}
