"""What `model.train_ds`, `model.validation_ds` and `model.test_ds` may say: NeMo's keys, checked.

A key of NeMo's that we do not support, a key that does not exist and a value that cannot be used are one line that
names the key as it is typed.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from data.checks import number, whole_number
from data.concat_sampling import TECHNIQUES
from data.errors import DataError
from data.noise_augmentation import MultiSpeakerNoiseAugmentation
from data.ssl_manifest import manifest_paths

SECTIONS = {"train": "train_ds", "val": "validation_ds", "test": "test_ds"}

_TARRED = "tarred audio is not read; unpack the shards and name a manifest of the files"
_LHOTSE = "lhotse is not used; batch_size sets the batch, use_bucketing=true makes batches of alike duration"
# Keys of NeMo's that change what is trained on and that we do not have: the values that ask for nothing, what to do.
_UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_tarred": ((False, None), _TARRED),
    "tarred_audio_filepaths": ((None,), _TARRED),
    "bucketing_batch_size": ((None,), "only tarred audio has it; use_bucketing=true makes batches of alike duration"),
    "bucketing_weights": ((None,), "only tarred audio has it; use_bucketing=true makes batches of alike duration"),
    "use_lhotse": ((False, None), _LHOTSE),
    "use_dali": ((False, None), "DALI is not used; leave it out"),
    "augmentor": ((None,), "perturbations of single recordings are not supported; batch_augmentor adds noise"),
} | dict.fromkeys(
    ("input_cfg", "shar_path", "batch_duration", "num_buckets", "bucket_duration_bins", "bucket_batch_size"),
    ((None,), _LHOTSE),
)
# Keys of NeMo's without effect: here as there, or on what tarred audio alone has.
_WITHOUT_EFFECT = (
    "use_start_end_token",
    "int_values",  # a recording is the same read as whole numbers and scaled
    "labels",
    "parser",
    "shuffle_n",
    "bucketing_strategy",
    "tarred_shard_strategy",
)
_SWITCHES = ("shuffle", "pin_memory", "trim_silence", "use_bucketing", "is_concat", "concat_shuffle")


@dataclass(frozen=True, kw_only=True)
class SpeechSettings:
    """One of the sections. Keys and defaults are NeMo's, but for `use_bucketing` and `crop_s`, which are ours.

    Args:
        manifest_filepath: the manifest, several as one text with commas or a list; None: no data.
        noise_manifest: the same of noises; None: no noise.
        sample_rate: in Hz; everything is resampled to it.
        batch_size: recordings per process and step.
        shuffle: a new order each epoch; of training only, evaluation has a fixed order.
        drop_last: leave out the last incomplete batch; None: in training.
        num_workers: loading processes, or auto.
        pin_memory: page-locked batches, where there is a GPU.
        trim_silence: cut what is 60 dB below the loudest off both ends.
        min_duration, max_duration: recordings that are shorter or longer (seconds) are left out; None: no limit.
        min_audio_len_secs: clips that are shorter are repeated up to this length.
        crop_s: of longer recordings a crop of so many seconds, another one each epoch; None: they are taken whole.
        channel_selector: of recordings with several channels: None or average (their mean), or a channel's number.
        use_bucketing: batches of alike duration.
        is_concat: draw from the manifests of the list by
            concat_sampling_technique: temperature, round-robin or random,
            concat_sampling_temperature: above 1 evens the manifests out,
            concat_sampling_probabilities: of each manifest, for random,
            concat_sampling_scale: length of an epoch over the number of recordings,
            concat_sampling_seed: of these draws; None: the run's,
            concat_shuffle: a new order in each manifest each epoch.
        batch_augmentor: `MultiSpeakerNoiseAugmentation`; None: the noise is added as it is.
    """

    manifest_filepath: tuple[str, ...] | None = None
    noise_manifest: tuple[str, ...] | None = None
    sample_rate: int = 16000
    batch_size: int = 8
    shuffle: bool = True
    drop_last: bool | None = None
    num_workers: int | str = 8
    pin_memory: bool = True
    trim_silence: bool = False
    min_duration: float | None = 1.0
    max_duration: float | None = 60.0
    min_audio_len_secs: float = 1.0
    crop_s: float | None = None
    channel_selector: int | str | None = None
    use_bucketing: bool = False
    is_concat: bool = False
    concat_sampling_technique: str = "temperature"
    concat_sampling_temperature: float = 1.0
    concat_sampling_probabilities: tuple[float, ...] | None = None
    concat_sampling_scale: float = 1.0
    concat_sampling_seed: int | None = None
    concat_shuffle: bool = True
    batch_augmentor: MultiSpeakerNoiseAugmentation | None = None

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.drop_last not in (True, False, None):
            raise ValueError(f"drop_last must be true, false or null, got {self.drop_last!r}")
        for name, least in (("sample_rate", 1), ("batch_size", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=least))
        if self.num_workers != "auto":
            whole_number("num_workers", self.num_workers, least=0)
        number("min_audio_len_secs", self.min_audio_len_secs, least=1 / self.sample_rate)
        if self.crop_s is not None:
            number("crop_s", self.crop_s, least=0.1)
        for name in ("min_duration", "max_duration"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), least=0)
        if self.concat_sampling_technique not in TECHNIQUES:
            raise ValueError(
                f"concat_sampling_technique must be one of {', '.join(TECHNIQUES)}, got"
                f" {self.concat_sampling_technique!r}"
            )
        for name in ("concat_sampling_temperature", "concat_sampling_scale"):
            number(name, getattr(self, name), least=1e-3)
        for probability in self.concat_sampling_probabilities or ():
            number("concat_sampling_probabilities", probability, least=0)
        if self.concat_sampling_seed is not None:
            whole_number("concat_sampling_seed", self.concat_sampling_seed, least=0)
        channel = self.channel_selector
        if channel not in (None, "average") and (isinstance(channel, str | bool) or not isinstance(channel, int)):
            raise ValueError(f"channel_selector must be null, average or the number of a channel, got {channel!r}")
        if self.is_concat and self.use_bucketing:
            raise ValueError("use_bucketing cannot be had with is_concat=true, which orders recordings itself")


def read_section(stage: str, section: Mapping[str, Any] | None) -> SpeechSettings:
    """The settings of a stage (train, val, test).

    Raises:
        DataError: a key that is not supported or does not exist, or a value that cannot be used.
    """
    address = f"model.{SECTIONS[stage]}"
    values = dict(section or {})
    for key, (neutral, advice) in _UNSUPPORTED.items():
        value = values.pop(key, None)
        if value not in neutral:
            raise DataError(f"{address}.{key}={value} is not supported: {advice}")
    for key in _WITHOUT_EFFECT:
        values.pop(key, None)
    for key in ("manifest_filepath", "noise_manifest"):
        if values.get(key) is not None:
            values[key] = tuple(manifest_paths(f"{address}.{key}", values[key]))
    try:
        _refuse_unknown(values, SpeechSettings)
        if (augmentor := values.get("batch_augmentor")) is not None:
            values["batch_augmentor"] = _augmentor(augmentor)
        settings = SpeechSettings(**values)
    except ValueError as error:
        raise DataError(f"{address}.{error}") from None
    if stage != "train" and (drawn := [key for key in ("crop_s", "is_concat") if getattr(settings, key)]):
        raise DataError(f"{address}.{drawn[0]}={getattr(settings, drawn[0])}: only training draws; leave it out")
    return settings


def _augmentor(section: Any) -> MultiSpeakerNoiseAugmentation:
    if not isinstance(section, Mapping):
        raise ValueError(f"batch_augmentor must be a section of its keys, or null, got {section!r}")
    values = {key: value for key, value in section.items() if key != "_target_"}  # there is one class only
    try:
        _refuse_unknown(values, MultiSpeakerNoiseAugmentation)
        return MultiSpeakerNoiseAugmentation(**values)
    except ValueError as error:
        raise ValueError(f"batch_augmentor.{error}") from None


def _refuse_unknown(values: Mapping[str, Any], settings: type) -> None:
    names = [field.name for field in fields(settings)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(names)}"
            raise ValueError(f"{key}: no such key; {hint}")
