import pytest

from data.errors import DataError
from data.noise_augmentation import MultiSpeakerNoiseAugmentation
from data.ssl_settings import read_section

# The whole section of NeMo's nest_fast-conformer.yaml.
NEMO = {
    "manifest_filepath": "a.json,b.json",
    "noise_manifest": ["noise.json"],
    "sample_rate": 16000,
    "batch_size": 8,
    "shuffle": True,
    "num_workers": 8,
    "pin_memory": True,
    "use_start_end_token": False,
    "trim_silence": False,
    "max_duration": 60.0,
    "min_duration": 1.0,
    "drop_last": True,
    "is_concat": False,
    "concat_sampling_technique": "temperature",
    "concat_sampling_temperature": 1.0,
    "is_tarred": False,
    "tarred_audio_filepaths": None,
    "shuffle_n": 2048,
    "bucketing_strategy": "synced_randomized",
    "bucketing_batch_size": None,
    "batch_augmentor": {"_target_": "nemo.collections.asr.modules.ssl_modules.MultiSpeakerNoiseAugmentation"}
    | {"prob": 0.25, "noise_ratio": 0.5, "min_r_speech": -5.0, "max_r_speech": 5.0, "min_r_noise": -5.0},
}


def test_nemos_section():
    settings = read_section("train", NEMO)
    assert settings.manifest_filepath == ("a.json", "b.json") and settings.noise_manifest == ("noise.json",)
    assert settings.batch_augmentor == MultiSpeakerNoiseAugmentation(prob=0.25)
    assert read_section("val", None).manifest_filepath is None


@pytest.mark.parametrize(
    "section, says",
    [
        ({"is_tarred": True}, "is_tarred=True is not supported: tarred audio is not read; unpack"),
        ({"tarred_audio_filepaths": "a.tar"}, "tarred_audio_filepaths=a.tar is not supported"),
        ({"use_lhotse": True}, "use_lhotse=True is not supported: .* batch_size .* use_bucketing=true"),
        ({"batch_duration": 600}, "batch_duration=600 is not supported"),
        ({"use_dali": True}, "use_dali=True is not supported"),
        ({"augmentor": {"white_noise": {}}}, "augmentor=.* is not supported: .* batch_augmentor"),
        ({"bucketing_batch_size": [8, 4]}, r"bucketing_batch_size=\[8, 4\] is not supported"),
        ({"noise_manifests": "n.json"}, "noise_manifests: no such key; did you mean noise_manifest?"),
        ({"flavour": 1}, "flavour: no such key; there is manifest_filepath, "),
        ({"manifest_filepath": 5}, "manifest_filepath must be the path of a manifest"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"num_workers": "many"}, "num_workers must be a whole number of at least 0, got 'many'"),
        ({"shuffle": "yes"}, "shuffle must be true or false, got 'yes'"),
        ({"drop_last": 3}, "drop_last must be true, false or null, got 3"),
        ({"max_duration": -1}, "max_duration must be a number of at least 0, got -1"),
        ({"min_audio_len_secs": 0}, "min_audio_len_secs must be a number"),
        ({"channel_selector": "left"}, "channel_selector must be null, average or the number of a channel, got 'left'"),
        ({"channel_selector": True}, "channel_selector must be null"),
        ({"concat_sampling_technique": "fair"}, "concat_sampling_technique must be one of temperature, round-robin"),
        ({"concat_sampling_temperature": 0}, "concat_sampling_temperature must be a number"),
        ({"concat_sampling_probabilities": ["a"]}, "concat_sampling_probabilities must be a number"),
        ({"is_concat": True, "use_bucketing": True}, "use_bucketing cannot be had with is_concat=true"),
        ({"batch_augmentor": "noise"}, "batch_augmentor must be a section"),
        (
            {"batch_augmentor": {"noise_ration": 1}},
            "batch_augmentor.noise_ration: no such key; did you mean noise_ratio?",
        ),
        ({"batch_augmentor": {"prob": 2}}, "batch_augmentor.prob must be a number from 0 to 1, got 2"),
    ],
)
def test_mistakes_name_the_key_as_it_is_typed(section, says):
    with pytest.raises(DataError, match=f"^model.validation_ds.{says}") as caught:
        read_section("val", section)
    assert "\n" not in str(caught.value)
