import math

import numpy as np
import pytest
import soundfile as sf
import torch

from data.audio import audio_info, common_length, read_audio, write_audio
from data.errors import AudioError


def noise(num_samples: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    values = 0.1 * np.random.default_rng(seed).standard_normal((num_samples, channels))
    return values.astype(np.float32).squeeze()


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "a.wav"
    sf.write(path, noise(16000), 16000)
    return path


def test_info(tmp_path):
    sf.write(tmp_path / "a.flac", noise(4410, channels=2), 44100)
    info = audio_info(tmp_path / "a.flac")
    assert (info.sample_rate, info.num_frames, info.num_channels, info.duration_s) == (44100, 4410, 2, 0.1)


def test_same_rate_reads_the_samples_of_the_file(wav):
    whole = read_audio(wav, sample_rate=16000)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, torch.from_numpy(sf.read(wav, dtype="float32")[0]))
    assert torch.equal(read_audio(wav, sample_rate=16000, offset_s=0.25, duration_s=0.5), whole[4000:12000])


def test_a_crop_reads_only_its_frames(wav, monkeypatch):
    counts = []
    original = sf.SoundFile.read
    monkeypatch.setattr(sf.SoundFile, "read", lambda self, n, **kw: counts.append(n) or original(self, n, **kw))
    read_audio(wav, sample_rate=8000, offset_s=0.5, duration_s=0.1)
    assert counts[0] < 1600 + 100


@pytest.mark.parametrize("native, rate", [(16000, 8000), (44100, 16000), (8000, 16000), (48000, 16000)])
def test_a_resampled_crop_is_a_slice_of_the_resampled_file(tmp_path, native, rate):
    path = tmp_path / "a.wav"
    sf.write(path, noise(native), native, subtype="FLOAT")
    whole = read_audio(path, sample_rate=rate)
    assert len(whole) == rate
    for start, count in ((0, 100), (1, 777), (rate // 3, rate // 2), (rate - 50, 50)):
        crop = read_audio(path, sample_rate=rate, offset_s=start / rate, duration_s=count / rate)
        assert len(crop) == count
        torch.testing.assert_close(crop, whole[start : start + count], atol=1e-6, rtol=0)


def test_a_tone_keeps_its_frequency_and_one_above_the_new_band_is_gone(tmp_path):
    time = np.arange(32000) / 32000
    for hertz, kept in ((1000, True), (6000, False)):
        sf.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * hertz * time), 32000, subtype="FLOAT")
        tone = read_audio(tmp_path / "a.wav", sample_rate=8000)[1000:7000]
        assert math.isclose(float(tone.square().mean().sqrt()), 0.5 / math.sqrt(2), rel_tol=0.01) == kept
        assert float(tone.abs().max()) > 0.4 or float(tone.abs().max()) < 0.005
        if kept:
            peak_hz = int(torch.fft.rfft(tone).abs().argmax()) * 8000 / len(tone)
            assert abs(peak_hz - hertz) < 2


def test_channels_are_averaged(tmp_path):
    stereo = noise(800, channels=2)
    sf.write(tmp_path / "a.wav", stereo, 8000, subtype="FLOAT")
    mono = read_audio(tmp_path / "a.wav", sample_rate=8000)
    torch.testing.assert_close(mono, torch.from_numpy(stereo.mean(axis=1)))


def test_a_part_longer_than_the_file_is_what_there_is(wav):
    assert len(read_audio(wav, sample_rate=16000, offset_s=0.9, duration_s=5.0)) == 1600


# How a format is written, and how much it may change a sample.
FORMATS = {
    "u8.wav": ({"subtype": "PCM_U8"}, 1 / 128),
    "16.wav": ({"subtype": "PCM_16"}, 1 / 32768),
    "24.wav": ({"subtype": "PCM_24"}, 1e-6),
    "32.wav": ({"subtype": "PCM_32"}, 1e-6),
    "float.wav": ({"subtype": "FLOAT"}, 0.0),
    "a.flac": ({"subtype": "PCM_16"}, 1 / 32768),
    "a.ogg": ({"format": "OGG", "subtype": "VORBIS"}, 0.05),
    "a.opus": ({"format": "OGG", "subtype": "OPUS"}, 0.05),
    "a.mp3": ({"format": "MP3"}, 0.05),
}


def melody(num_samples: int, rate: int) -> np.ndarray:
    """What a lossy coder keeps: a tone that rises from 300 to 900 Hz."""
    time = np.arange(num_samples) / rate
    return (0.3 * np.sin(2 * np.pi * (300 + 300 * time / time[-1]) * time)).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_from_any_sample_on(tmp_path, name):
    how, coding = FORMATS[name]
    original = melody(32000, 16000)
    sf.write(tmp_path / name, original, 16000, **how)
    whole = read_audio(tmp_path / name, sample_rate=16000)
    assert len(whole) == 32000
    difference = (whole - torch.from_numpy(original))[800:-800]  # OPUS fades its ends
    assert float(difference.abs().max()) <= coding
    for start, count in ((0, 1), (1, 999), (5000, 16000), (15999, 3), (31000, 1000)):
        part = read_audio(tmp_path / name, sample_rate=16000, offset_s=start / 16000, duration_s=count / 16000)
        assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.97])
def test_a_cut_off_file_is_found_when_it_is_read(tmp_path, name, kept):
    path = tmp_path / name
    how = FORMATS[name][0] if name in FORMATS else {}
    sf.write(path, noise(32000), 16000, **how)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(AudioError, match=name):
        read_audio(path, sample_rate=16000)
    with pytest.raises(AudioError, match=name):
        read_audio(path, sample_rate=8000, offset_s=1.95)


@pytest.mark.parametrize("name", ["a.ogg", "a.opus"])
def test_every_cut_of_an_ogg_file_is_found_by_its_header(tmp_path, name):
    sf.write(tmp_path / name, noise(16000), 16000, **FORMATS[name][0])
    content = (tmp_path / name).read_bytes()
    assert audio_info(tmp_path / name).num_frames == 16000
    for size in np.random.default_rng(0).integers(64, len(content), 60):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(AudioError, match="truncated|not a readable recording|holds no samples"):
            audio_info(tmp_path / name)


def test_an_mp3_file_without_length_is_as_long_as_it_holds(tmp_path):
    path = tmp_path / "a.mp3"
    sf.write(path, noise(32000), 16000, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    content = path.read_bytes()
    path.write_bytes(content[content.index(content[:2], 4) :])  # the first frame is the header with the length
    full = audio_info(path).duration_s
    assert abs(full - 2.0) < 0.15
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert abs(audio_info(path).duration_s - full / 2) < 0.1
    assert len(read_audio(path, sample_rate=16000)) == audio_info(path).num_frames
    with pytest.raises(AudioError, match="beyond the end"):
        read_audio(path, sample_rate=16000, offset_s=1.5, duration_s=0.1)


def broken(path, kind):
    """Make one kind of unusable file at `path` (.wav or .flac)."""
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    elif kind == "text":
        path.write_text("this is not audio\n" * 20)
    elif kind == "no samples":
        sf.write(path, np.zeros(0), 16000)
    elif kind in ("nan", "infinite"):
        sf.write(path, np.array([0.0, np.nan if kind == "nan" else np.inf]), 16000, subtype="FLOAT")
    elif kind == "truncated":
        sf.write(path, noise(16000), 16000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "kind, name, says",
    [
        ("missing", "a.wav", "no such file"),
        ("folder", "a.wav", "is a folder"),
        ("empty", "a.wav", "is empty"),
        ("lfs", "a.flac", "git lfs pull"),
        ("text", "a.wav", "not a readable recording"),
        ("no samples", "a.wav", "no samples"),
        ("nan", "a.wav", "NaN"),
        ("infinite", "a.wav", "infinite"),
        ("truncated", "a.wav", "truncated"),
        ("truncated", "a.flac", "a.flac"),
    ],
)
def test_an_unusable_file_is_named_in_one_line(tmp_path, kind, name, says):
    broken(tmp_path / name, kind)
    with pytest.raises(AudioError) as error:
        read_audio(tmp_path / name, sample_rate=16000)
    message = str(error.value)
    assert str(tmp_path / name) in message and says in message and "\n" not in message
    assert str(type(error.value)(message)) == message  # as a DataLoader worker hands it over


def test_parts_that_do_not_exist(wav):
    with pytest.raises(AudioError, match="beyond the end"):
        read_audio(wav, sample_rate=8000, offset_s=1.0, duration_s=0.5)
    with pytest.raises(AudioError, match="negative"):
        read_audio(wav, sample_rate=8000, offset_s=-0.1)
    with pytest.raises(AudioError, match="cannot be opened"):
        read_audio("a\0b.wav", sample_rate=8000)
    with pytest.raises(ValueError, match="sample_rate"):
        read_audio(wav, sample_rate=0)


def test_write_keeps_levels_above_one_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "a.wav"
    samples = torch.tensor([0.0, 1.5, -2.0])
    write_audio(path, samples, 8000)
    assert torch.equal(read_audio(path, sample_rate=8000), samples)
    write_audio(path, np.zeros((2, 5)), 8000)
    assert audio_info(path).num_channels == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["a.wav"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.wav"
    write_audio(path, torch.ones(4), 8000)
    with pytest.raises(AudioError, match="cannot be written"):
        write_audio(path, torch.ones(4), -1)
    assert len(read_audio(path, sample_rate=8000)) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.wav"]
    with pytest.raises(AudioError, match=r"\.wav"):
        write_audio(tmp_path / "a.flac", torch.ones(4), 8000)
    with pytest.raises(ValueError, match="shape"):
        write_audio(path, torch.ones(1, 1, 4), 8000)


def test_recordings_of_one_moment_have_one_rate_and_nearly_one_length():
    mic = ("mic.wav", 16000, 160000)
    assert common_length([mic]) == 160000
    assert common_length([mic, ("far.wav", 16000, 159999), ("clean.wav", 16000, 160320)]) == 159999
    with pytest.raises(
        AudioError, match=r"^far\.wav: 10\.02 s \(160321 samples\), but mic\.wav has 10\.00 s \(160000 "
    ):
        common_length([mic, ("far.wav", 16000, 160321)])
    with pytest.raises(AudioError, match=r"^far\.wav: 48000 Hz, but mic\.wav has 16000 Hz"):
        common_length([mic, ("far.wav", 48000, 480000)])
