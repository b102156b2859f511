"""DeepVQE acoustic echo cancellation (Indenbom et al. 2023, arXiv:2306.03177): microphone and far end in, near end out.

The paper gives no loss. Trained with the compressed spectral loss of Braun and Tashev (2020, arXiv:2009.12286) on the
resynthesised waveform; the terms beside it, and what each is for, are in losses/echo.py.
"""

import logging
import math
import time
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.echo import (
    compressed_spectral_loss,
    delay_nll,
    echo_weight,
    far_active_frames,
    level_gain,
    near_end_active,
    neg_si_snr,
    neg_snr,
)
from metrics.echo import EchoMetrics
from metrics.perceptual import checked_names
from models.base import StreamingStep, System
from models.deepvqe_sections import ALIGN, LOSS, check_foreign, section
from models.global_loss import mean_of_all
from models.importers.deepvqe import arguments_of, convert
from modules.chunking import split_chunks, stitch_sources
from modules.deepvqe import DeepVQE as Network
from modules.deepvqe_stream import (
    DeepVQEStream,
    WaveformStream,
    enhance_stream,
    frames,
    hops,
    of_frames,
    of_hops,
)
from modules.delay import estimate_delay
from modules.resampling import resample
from modules.stft import PRESETS, STFT

log = logging.getLogger(__name__)

_SIGNALS = ("mic", "far", "mic_spectrum", "far_spectrum")  # what a batch may have of the network's input


class _Compared(NamedTuple):
    """Enhanced signals (B, T), delay distributions (B, frames, D), and each term's values and their validity (B,)."""

    enhanced: Tensor
    delays: Tensor | None
    terms: dict[str, tuple[Tensor, Tensor]]


class DeepVQE(System):
    """Takes echo, noise and what else is not the near end out of a microphone signal, given the far end's.

    Network arguments: modules/deepvqe.py.

    *sample_rate*: of the training data, in Hz; `predict` resamples other rates.
    *stft*: n320, n512 (16 kHz) or n480 (24 kHz). *window*: sqrt_hann, or hann as some public weights have it.
    *align*: `hidden_channels`, `max_delay_ms`, `scale`, `temperature`, `mask_start`; see modules/alignment.py.
    *loss*: `compression` and `complex_weight` of the spectral loss; `si_snr_weight`, `snr_weight`, `delay_weight` and
    `echo_weight` of what may stand beside it, 0 for none. A term is the mean over the examples of all processes for
    which it means something; accumulated batches have one each, of which the step takes the mean.
    *scores*: what the test reports beside levels and ratios: pesq, stoi, aecmos, dnsmos.
    """

    inputs: ClassVar[dict[str, str]] = {"mic": "audio", "far": "audio"}
    outputs: ClassVar[dict[str, str]] = {"enhanced": "audio"}
    of_training = ("init_identity",)
    checkpointed_parts = (
        "network.mic_encoder",
        "network.far_encoder",
        "network.alignment",
        "network.decoder",
    )
    chosen_in_evaluation: ClassVar[tuple[str, ...]] = ("scores",)

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        stft: str = "n320",
        window: str = "sqrt_hann",
        mic_channels: list[int] | tuple[int, ...] = (64, 128, 128, 128, 128),
        far_channels: list[int] | tuple[int, ...] = (32, 128),
        decoder_channels: list[int] | tuple[int, ...] = (128, 128, 128, 64),
        gru_hidden: int = 512,
        residual: str = "all",
        subpixel: str = "interleave",
        mask_norm: bool = False,
        init_identity: bool = True,
        compression: float = 0.3,
        align: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        scores: list[str] | tuple[str, ...] = (),
        compile: bool | str = False,
        gradient_checkpointing: bool = False,
        optim: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optim=optim, compile=compile, gradient_checkpointing=gradient_checkpointing)
        if stft not in PRESETS:
            raise ValueError(f"model.stft={stft}: no such preset; choose from {', '.join(PRESETS)}")
        preset_rate, n_fft, hop_samples = PRESETS[stft]
        if sample_rate != preset_rate:
            raise ValueError(f"model.stft={stft} is made for {preset_rate} Hz: set model.sample_rate={preset_rate}")
        self.sample_rate = sample_rate
        self.hop_samples = hop_samples
        self.align = section("align", align, ALIGN)
        self.loss_terms = section("loss", loss, LOSS)
        self.hparams.update(align=self.align, loss=self.loss_terms)  # whole, so that a later default changes nothing
        self.scores = checked_names(scores)
        lists = {"mic_channels": mic_channels, "far_channels": far_channels, "decoder_channels": decoder_channels}
        if wrong := [name for name, value in lists.items() if not isinstance(value, list | tuple)]:
            raise ValueError(f"{wrong[0]} must be a list of whole numbers, got {lists[wrong[0]]!r}")
        switches = {"init_identity": init_identity, "mask_norm": mask_norm}
        switches |= {f"align.{key}": self.align[key] for key in ("scale", "mask_start")}
        if wrong := [name for name, value in switches.items() if not isinstance(value, bool)]:
            raise ValueError(f"{wrong[0]} must be true or false, got {switches[wrong[0]]!r}")
        if not far_channels and self.loss_terms["delay_weight"] > 0:
            raise ValueError("loss.delay_weight needs far_channels: without a far end there is no delay to find")
        max_delay_frames = math.ceil(self.align["max_delay_ms"] * sample_rate / 1000 / hop_samples)
        self.reach_ms = 1000 * (max_delay_frames - 1) * hop_samples / sample_rate  # delays 0 … max_delay_frames - 1
        self.stft = STFT(n_fft=n_fft, hop_samples=hop_samples, window=window)
        self.network = Network(
            num_bins=n_fft // 2 + 1,
            mic_channels=tuple(mic_channels),
            far_channels=tuple(far_channels),
            decoder_channels=tuple(decoder_channels),
            gru_hidden=gru_hidden,
            residual=residual,
            subpixel=subpixel,
            mask_norm=mask_norm,
            init_identity=init_identity,
            compression=compression,
            align_hidden=self.align["hidden_channels"],
            max_delay_frames=max_delay_frames,
            align_scale=self.align["scale"],
            align_temperature=self.align["temperature"],
            align_mask_start=self.align["mask_start"],
        )

    def forward(self, mic: Tensor, far: Tensor) -> Tensor:
        """(B, T), (B, T) -> (B, T)"""
        return self._enhance(mic, far)[0]

    def _enhance(
        self, mic: Tensor, far: Tensor, mic_spectrum: Tensor | None = None, far_spectrum: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T), (B, T) -> (B, T), and the distribution over delays (B, frames, D).

        Spectra (B, F, frames, 2) that are known, of the signals padded to whole hops, are not computed.
        """
        num_samples = mic.shape[-1]
        # Whole hops: what comes after the last one is under half a window only, and its errors would be magnified.
        mic, far = self.stft.whole_hops(mic), self.stft.whole_hops(far)
        mic_spectrum = self.stft(mic) if mic_spectrum is None else _as_from_stft(mic_spectrum)
        if self.network.alignment is None:
            far_spectrum = None
        else:
            far_spectrum = self.stft(far) if far_spectrum is None else _as_from_stft(far_spectrum)
        spectrum, delays = self.network(mic_spectrum, far_spectrum)
        return self.stft.inverse(spectrum, mic.shape[-1])[..., :num_samples], delays

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        num_samples = batch["mic"].shape[-1]
        whole = self.training or bool((batch["length"] == num_samples).all())
        # Recordings of several lengths go alone: their padding would count in the means of the loss.
        parts = [batch] if whole else [self._item(batch, i, int(n)) for i, n in enumerate(batch["length"])]
        inputs = [{name: part[name] for name in _SIGNALS if name in part} for part in parts]
        compared = [self._compare(part, *self._enhance(**own)) for part, own in zip(parts, inputs, strict=True)]
        enhanced = [F.pad(c.enhanced, (0, num_samples - c.enhanced.shape[-1])) for c in compared]
        terms = _means([c.terms for c in compared])
        weights = {name: self.loss_terms.get(f"{name}_weight", 1.0) for name in terms}
        output = {
            "loss": torch.stack([weights[name] * value for name, value in terms.items()]).sum(),
            "enhanced": torch.cat(enhanced),
        }
        if not self.training:  # where it would make the host wait for the device at every step
            output["num_compared"] = batch["has_target"].sum()
        if len(terms) > 1:
            output |= {f"loss_{name}": value.detach() for name, value in terms.items()}
        delays = [c.delays for c in compared if c.delays is not None]
        if delays:
            frames = max(d.shape[1] for d in delays)
            output["delay_distribution"] = torch.cat([F.pad(d, (0, 0, 0, frames - d.shape[1])) for d in delays])
        return output

    def _item(self, batch: dict[str, Tensor], index: int, num_samples: int) -> dict[str, Tensor]:
        """One item of a batch, its padding taken off: of waveforms (B, T), and of spectra (B, F, frames, 2)."""
        tensors = {name: value[index : index + 1] for name, value in batch.items() if isinstance(value, Tensor)}
        frames = -(-num_samples // self.hop_samples) + 1
        ends = {2: (..., slice(num_samples)), 4: (..., slice(frames), slice(None))}
        return {name: value[ends[value.ndim]] if value.ndim in ends else value for name, value in tensors.items()}

    def _compare(self, batch: dict[str, Tensor], enhanced: Tensor, delays: Tensor | None) -> _Compared:
        """Every term that has a weight: (B,) values, and for which items they mean something."""
        weights = self.loss_terms
        gain = level_gain(batch["mic"])  # (B, 1)
        estimate, target = self.stft(enhanced * gain), self.stft(batch["target"] * gain)
        bins = None
        if weights["echo_weight"] > 0 and "echo" in batch:
            near, echo = self.stft(batch["near"] * gain), self.stft(batch["echo"] * gain)
            bins = echo_weight(near, echo, weight=weights["echo_weight"])
        spectral = compressed_spectral_loss(
            estimate,
            target,
            compression=weights["compression"],
            complex_weight=weights["complex_weight"],
            weight=bins,
        )
        known = batch["has_target"]
        terms = {"spectral": (spectral, known)}
        active_near = known & near_end_active(batch["target"])
        for name, ratio in (("si_snr", neg_si_snr), ("snr", neg_snr)):
            if weights[f"{name}_weight"] > 0:
                terms[name] = ratio(enhanced, batch["target"]), active_near
        if weights["delay_weight"] > 0 and delays is not None:
            active = far_active_frames(batch["far"], hop_samples=self.hop_samples, num_frames=delays.shape[1])
            delay = batch["delay_samples"] / self.hop_samples
            delay = torch.where(batch["path_change_sample"] < 0, delay, torch.full_like(delay, -1.0))
            terms["delay"] = delay_nll(delays, delay, active)
        return _Compared(enhanced, delays, terms)

    def make_metric(self, stage: str) -> EchoMetrics:
        return EchoMetrics(
            sample_rate=self.sample_rate,
            hop_samples=self.hop_samples,
            scores=self.scores if stage == "test" else (),
        )

    def update_metric(self, metric: Any, batch: dict[str, Tensor], output: dict[str, Tensor]) -> None:
        metric.update(
            output["enhanced"],
            mic=batch["mic"],
            far=batch["far"],
            target=batch["target"],
            has_target=batch["has_target"],
            length=batch["length"],
            scenario=batch["scenario"],
            delay_samples=batch["delay_samples"],
            delay_distribution=output.get("delay_distribution"),
        )

    def example_scores(self, metric: Any) -> list[dict[str, Any]]:
        return metric.rows()

    def figures(self, batch: dict[str, Tensor], output: dict[str, Tensor]) -> dict[str, Tensor]:
        length = int(batch["length"][0])
        signals = {"mic": batch["mic"], "far": batch["far"], "enhanced": output["enhanced"]}
        if batch["has_target"][0]:
            signals["target"] = batch["target"]
        figures = {name: signal[0, :length] for name, signal in signals.items()}
        if "delay_distribution" in output:  # no delay at the bottom; the root, so that weak second thoughts are seen
            frames = output["delay_distribution"][0, : length // self.hop_samples + 1]
            figures[f"delays_up_to_{self.reach_ms:.0f}_ms"] = frames.T.flip(0).sqrt()
        return figures

    def import_weights(self, content: dict[str, Any]) -> dict[str, Tensor]:
        state, source = convert(content)
        if source != "ours":
            unknown = check_foreign(dict(self.hparams), self.align, arguments_of(state, source))
            log.warning("%s's weights do not say what they were trained with; taken for %s", source, ", ".join(unknown))
        return {name if name.startswith("network.") else f"network.{name}": value for name, value in state.items()}

    def example_input(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(1, self.sample_rate, generator=generator) for name in self.inputs}

    def streaming_step(self, *, waveform: bool) -> StreamingStep:
        """A frame of spectra (1, num_bins, 2), or with *waveform* a hop of samples (1, hop_samples)."""
        signals = ("mic", "far") if self.network.alignment is not None else ("mic",)
        module = WaveformStream(self.network, self.stft) if waveform else DeepVQEStream(self.network)
        shape = (1, self.hop_samples) if waveform else (1, self.network.num_bins, 2)
        inputs = {name: torch.zeros(shape, device=self.device) for name in signals}
        facts = {"sample_rate": self.sample_rate, "hop_samples": self.hop_samples, "n_fft": self.stft.n_fft}
        facts |= {"signals": "samples" if waveform else "spectra", "window": self.hparams["window"]}
        split, join = (hops, of_hops) if waveform else (frames, of_frames)
        ends = ("mic_encoder.0.", "far_encoder.0.", "alignment.", f"decoder.{len(self.network.decoder) - 1}.")
        return StreamingStep(
            module,
            inputs,
            module.initial_state(),
            output="enhanced",
            facts=facts,
            split=partial(split, self.stft),
            join=partial(join, self.stft),
            not_in_8_bits=ends,
        )

    @torch.inference_mode()
    def predict(
        self,
        mic: Tensor,
        far: Tensor,
        *,
        sample_rate: int | None = None,
        chunk_s: float = 60.0,
        overlap_s: float = 4.0,
        streaming: bool = False,
    ) -> dict[str, Tensor]:
        """Cancel the echo in a recording of any length.

        *mic*, *far*: (T,) or (B, T), recorded together. *sample_rate*: their rate in Hz, null for the system's own.
        Longer recordings than *chunk_s* seconds run in chunks that overlap by *overlap_s*. *streaming*: frame by frame
        instead, as a live system would, on one core; the log tells the real-time factor.

        Returns `enhanced`, (…, T) at the recordings' rate and the microphone's level.
        """
        if mic.shape != far.shape or not mic.numel():
            raise ValueError(f"mic has shape {tuple(mic.shape)}, far {tuple(far.shape)}: give both the same, not empty")
        rate = sample_rate or self.sample_rate
        signals = torch.stack([mic, far], -2).to(self.device, torch.float32)
        signals = signals.reshape(-1, *signals.shape[-2:])  # (B, 2, T)
        own = resample(signals, rate, self.sample_rate)
        enhanced = self._stream(own) if streaming else self._in_chunks(own, chunk_s=chunk_s, overlap_s=overlap_s)
        back = resample(enhanced, self.sample_rate, rate)[..., : mic.shape[-1]]
        return {"enhanced": back.reshape(mic.shape)}

    def _stream(self, signals: Tensor) -> Tensor:
        """(B, 2, T) -> (B, T)"""
        self._warn_of_delay(signals)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        began = time.perf_counter()
        try:
            used = signals.unbind(1) if self.network.alignment is not None else (signals[:, 0],)
            enhanced = enhance_stream(self.network, self.stft, *used)
        finally:
            torch.set_num_threads(threads)
        took_s, length_s = time.perf_counter() - began, signals.shape[-1] / self.sample_rate
        log.info("%.1f s in %.1f s on one core: real-time factor %.3f", length_s, took_s, took_s / length_s)
        return enhanced

    def _in_chunks(self, own: Tensor, *, chunk_s: float, overlap_s: float) -> Tensor:
        """(B, 2, T) -> (B, T)"""
        hop, num_samples = self.hop_samples, own.shape[-1]
        own = self.stft.whole_hops(own)
        chunk_samples, overlap_samples = (hop * round(s * self.sample_rate / hop) for s in (chunk_s, overlap_s))
        warm_up = overlap_samples // 2  # a chunk's beginning knows nothing of the echo of what was played before it
        warned, pieces = False, []
        # All chunks begin on one grid of frames.
        for start, piece in split_chunks(own, chunk_samples=chunk_samples, overlap_samples=overlap_samples, unit=hop):
            warned = warned or self._warn_of_delay(piece)
            skip = warm_up if start else 0
            pieces.append((start + skip, self(piece[:, 0], piece[:, 1])[:, None, skip:]))
        return stitch_sources(pieces, own.shape[-1])[:, 0, :num_samples]

    def _warn_of_delay(self, signals: Tensor) -> bool:
        """A line when an echo comes later than the network can look back; whether there is nothing more to say.

        Shape: (B, 2, T).
        """
        if self.network.alignment is None:
            return True
        for mic, far in signals.cpu():
            delay_s, _ = estimate_delay(mic, far, sample_rate=self.sample_rate, max_s=max(1.0, 2e-3 * self.reach_ms))
            if delay_s is not None and not 0 <= 1000 * delay_s <= self.reach_ms:
                when = "after" if delay_s > 0 else "before"
                log.warning(
                    "the echo comes about %.0f ms %s the far end, the network looks for 0 to %.0f ms after it"
                    " (model.align.max_delay_ms): shift the far end",
                    abs(1000 * delay_s),
                    when,
                    self.reach_ms,
                )
                return True
        return False


def _as_from_stft(spectrum: Tensor) -> Tensor:
    """The same numbers, in memory frame by frame as torch.stft leaves them: else convolutions add up in another order.

    Shape: (B, F, frames, 2)
    """
    return spectrum.transpose(1, 2).contiguous().transpose(1, 2)


def _means(parts: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Each term's mean over the items for which it means something; zero, with a gradient of zero, where none is.

    Shape: (B,), (B,) of each term of each part -> () each.
    """
    values = {name: torch.cat([part[name][0] for part in parts]) for name in parts[0]}
    chosen = {name: torch.cat([part[name][1] for part in parts]) for name in parts[0]}
    totals = torch.stack([torch.where(chosen[name], values[name], 0.0).sum() for name in values])
    counts = torch.stack([chosen[name].sum() for name in values])
    return dict(zip(values, mean_of_all(totals, counts), strict=True))
