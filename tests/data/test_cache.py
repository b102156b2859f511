import pickle

import numpy as np
import pytest
import soundfile as sf
import torch

from data.cache import RowReader, fits
from data.errors import AudioError


def write(path, values, rate=8000, subtype="PCM_16"):
    sf.write(path, values, rate, subtype=subtype)
    return {"audio_filepath": str(path), "duration": len(values) / rate}


@pytest.fixture
def ramp(tmp_path):
    """All 16-bit values, 8.192 s at 8 kHz."""
    return write(tmp_path / "ramp.wav", np.arange(-32768, 32768).astype(np.int16))


def test_sixteen_bit_recordings_come_back_bit_for_bit(ramp):
    kept, read = (RowReader([ramp], sample_rate=8000, cache=cache) for cache in (True, False))
    for start, count in ((0, 65000), (123, 4567)):
        assert torch.equal(kept.read(0, start=start, count=count), read.read(0, start=start, count=count))


def test_loud_and_resampled_recordings_are_close(tmp_path):
    loud = write(tmp_path / "a.wav", 3 * np.sin(np.arange(16000) / 5), 16000, "FLOAT")
    kept, read = (RowReader([loud], sample_rate=8000, cache=cache) for cache in (True, False))
    expected = read.read(0, start=100, count=5000)
    assert float(expected.abs().max()) > 2
    torch.testing.assert_close(kept.read(0, start=100, count=5000), expected, atol=2 * 3 / 32768, rtol=0)


def test_a_recording_is_read_once(ramp, tmp_path):
    reader = RowReader([ramp], sample_rate=8000, cache=True)
    before = reader.read(0, start=0, count=10)
    (tmp_path / "ramp.wav").unlink()
    assert torch.equal(reader.read(0, start=0, count=10), before)
    with pytest.raises(AudioError, match="no such file"):  # a spawned worker starts with an empty cache
        pickle.loads(pickle.dumps(reader)).read(0, start=0, count=10)


@pytest.mark.parametrize("cache", [True, False])
def test_a_row_with_an_offset_is_a_part(ramp, cache):
    part = ramp | {"offset": 1.0, "duration": 0.5}
    whole = RowReader([ramp], sample_rate=8000, cache=False).read(0, start=0, count=65536)
    reader = RowReader([part], sample_rate=8000, cache=cache)
    assert reader.num_samples[0] <= 4000
    assert torch.equal(reader.read(0, start=10, count=100), whole[8010:8110])


@pytest.mark.parametrize("cache", [True, False])
def test_a_manifest_that_promises_too_much(ramp, cache):
    reader = RowReader([ramp | {"duration": 100.0}], sample_rate=8000, cache=cache)
    with pytest.raises(AudioError, match=r"ramp\.wav"):
        reader.read(0, start=80 * 8000, count=100)


def test_what_fits():
    """Two bytes a sample, of each file that a row has."""
    rows = [{"duration": 2**19, "a": "1.wav", "b": "2.wav"}, {"duration": 2**19, "a": "3.wav"}]
    limits = {"sample_rate": 8000, "files": ("a", "b")}
    assert fits(rows, cache="auto", cache_limit_mb=24000, **limits)
    assert not fits(rows, cache="auto", cache_limit_mb=23999, **limits)
    assert fits(rows, cache=True, cache_limit_mb=0, **limits)
    assert not fits(rows, cache=False, cache_limit_mb=1e9, **limits)
