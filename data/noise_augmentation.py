"""Noise or other talkers added to parts of the recordings of a batch (NEST's multi-speaker noise augmentation).

Source: Huang et al., "NEST: Self-supervised Fast Conformer as All-purpose Seasoning to Speech Processing Tasks"
(arXiv 2408.13106), and NeMo 3.0.0's MultiSpeakerNoiseAugmentation, whose keys and distributions these are.

Decisions that are not obvious
* Each recording draws from a generator of its own. With one generator for all, in which case they are drawn in NeMo's
  order, and `nemo_compat`, the result is NeMo's number for number.
* A recording that is not chosen gets nothing. NeMo leaves its noise unscaled in the signal, and takes the length of
  the noise file for that of the noisy signal (`nemo_compat`).
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data.checks import number, whole_number


@dataclass(frozen=True, kw_only=True)
class MultiSpeakerNoiseAugmentation:
    """How recordings are made noisy; NeMo's keys. Ranges are drawn from uniformly.

    Args:
        prob: share of the recordings that are changed.
        noise_ratio: share of these that get noise; the others get speech of other recordings of the batch.
        min_r_speech, max_r_speech: level of the recording over added speech, dB.
        min_r_noise, max_r_noise: level of the recording over added noise, dB.
        min_mix_rate, max_mix_rate: share of the recording's length that is covered.
        min_num_segments, max_num_segments: pieces that what is added is cut into.
        min_num_speakers, max_num_speakers: recordings that added speech is taken from.

    Raises:
        ValueError: a value that cannot be used, by its key.
    """

    prob: float = 0.5
    noise_ratio: float = 0.5
    min_r_speech: float = -5.0
    max_r_speech: float = 5.0
    min_r_noise: float = -5.0
    max_r_noise: float = 20.0
    min_mix_rate: float = 0.5
    max_mix_rate: float = 0.5
    min_num_segments: int = 1
    max_num_segments: int = 1
    min_num_speakers: int = 1
    max_num_speakers: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if "_num_" in name:
                whole_number(name, value, least=1)
            elif "_r_" in name:
                number(name, value, least=-200, most=200)
            else:
                number(name, value, least=0, most=1)
            if name.startswith("max_") and value < getattr(self, (low := name.replace("max_", "min_"))):
                raise ValueError(f"{name} must not be below {low}={getattr(self, low)}, got {value}")


def augmented_noise(
    audio: Tensor,
    length: Tensor,
    noise: Tensor,
    noise_length: Tensor,
    *,
    settings: MultiSpeakerNoiseAugmentation,
    rngs: Sequence[random.Random],
    nemo_compat: bool = False,
) -> tuple[Tensor, Tensor]:
    """What is added to each recording of a batch, and how long the noisy recordings are then.

    Args:
        audio: recordings, zeros after their `length` samples.
        noise: a noise for each, zeros after its `noise_length` samples.
        rngs: the generator of each; the same one for all draws in NeMo's order.
        nemo_compat: as NeMo where a recording is not chosen (see the head of this file), and in how segments are cut.

    Shape:
        audio, noise `(B, S)`, length, noise_length `(B,)` -> float32 `(B, S)`, int64 `(B,)`. Nothing is changed in
        place.
    """
    added = noise.clone() if nemo_compat else torch.zeros_like(noise)
    noisy_length = (noise_length if nemo_compat else length).clone()
    lengths, noise_lengths = length.tolist(), noise_length.tolist()
    for item, rng in enumerate(rngs):
        if rng.random() > settings.prob:
            continue
        plan = _Plan(lengths[item], len(lengths), settings, rng, nemo_compat)
        if plan.add_speech:
            segments = _speech_segments(audio, lengths, item, plan, rng)
        else:
            segments = _noise_segments(noise[item, : min(noise_lengths[item], noise.shape[1])], plan)
        placed = _place(segments, lengths[item] - plan.num_samples, audio.shape[1], rng)
        added[item] = placed * _gain(audio[item, : lengths[item]], placed[: lengths[item]], plan.ratio_db)
        noisy_length[item] = lengths[item]
    return added, noisy_length


class _Plan:
    """What is drawn for one recording, in NeMo's order: how much is added, in which pieces, of what, how loud."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        settings: MultiSpeakerNoiseAugmentation,
        rng: random.Random,
        nemo_compat: bool,
    ) -> None:
        rate = settings.min_mix_rate
        if rate < settings.max_mix_rate:
            rate = rng.uniform(rate, settings.max_mix_rate)
        self.num_samples = max(1, int(length * rate))
        num_segments = rng.randint(settings.min_num_segments, settings.max_num_segments)
        self.num_speakers = min(rng.randint(settings.min_num_speakers, settings.max_num_speakers), batch_size)
        self.segment_lengths = _segment_lengths(rng, num_segments, self.num_samples, nemo_compat)
        self.add_speech = rng.random() >= settings.noise_ratio and batch_size > 1
        if self.add_speech:
            self.ratio_db = rng.uniform(settings.min_r_speech, settings.max_r_speech)
        else:
            self.ratio_db = rng.uniform(settings.min_r_noise, settings.max_r_noise)


def _segment_lengths(rng: random.Random, num_segments: int, num_samples: int, nemo_compat: bool) -> list[int]:
    """Samples of each segment: how often each comes when every sample draws one of them."""
    if nemo_compat:  # a draw per sample, even for a single segment
        return list(Counter(rng.choices(range(num_segments), k=num_samples)).values())
    if num_segments == 1:
        return [num_samples]
    counts = np.random.default_rng(rng.getrandbits(64)).multinomial(num_samples, [1 / num_segments] * num_segments)
    return counts.tolist()


def _noise_segments(noise: Tensor, plan: _Plan) -> list[Tensor]:
    """The noise `(N,)` from its beginning on, repeated as needed, cut into the segments."""
    return list(_repeated(noise, plan.num_samples).split(plan.segment_lengths))


def _speech_segments(audio: Tensor, lengths: list[int], item: int, plan: _Plan, rng: random.Random) -> list[Tensor]:
    """A random part of another recording for each segment; the speakers take turns once, then they are drawn."""
    others = [other for other in range(len(lengths)) if other != item]
    speakers = rng.sample(others, k=min(plan.num_speakers, len(others)))
    segments, turn = [], 0
    for count in plan.segment_lengths:
        speaker = speakers[turn]
        speech, spare = audio[speaker, : lengths[speaker]], lengths[speaker] - count
        if spare < 0:
            segments.append(_repeated(speech, count))
        else:
            start = rng.randint(0, spare - 1) if spare > 0 else 0
            segments.append(speech[start : start + count])
        turn += 1
        if turn >= len(speakers):
            turn = rng.randint(0, len(speakers) - 1)
    return segments


def _place(segments: list[Tensor], spare: int, num_samples: int, rng: random.Random) -> Tensor:
    """Segments from left to right at random places, none over another, with `spare` samples between them in all.

    Shape: returns `(num_samples,)`, zeros where there is no segment.
    """
    placed, first, last = torch.zeros(num_samples), 0, spare
    for segment in segments:
        start = rng.randint(first, last - 1) if first < last else first
        placed[start : start + len(segment)] = segment
        first, last = start + len(segment), last + len(segment)
    return placed


def _gain(speech: Tensor, added: Tensor, ratio_db: float) -> float:
    """What brings the added sound to `ratio_db` below the speech, both measured over the whole recording; 0 for
    silence.
    """
    speech_energy, added_energy = (float(signal.square().mean()) for signal in (speech, added))
    return math.sqrt(speech_energy / (10 ** (ratio_db / 10) * added_energy)) if added_energy > 0 else 0.0


def _repeated(signal: Tensor, count: int) -> Tensor:
    """A signal `(N,)`, repeated and cut to `(count,)`."""
    return signal.repeat(math.ceil(count / max(1, len(signal))))[:count]
