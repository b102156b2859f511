import numpy as np
import pytest
import soundfile as sf

from data.noise_sampling import NoiseRecordings

RATE = 4000


@pytest.fixture
def noise_rows(tmp_path):
    """Writes files of given samples and gives their rows; a name without samples is a missing file."""

    def make(*, durations=True, **files):
        rows = []
        for name, samples in files.items():
            row = {"audio_filepath": str(tmp_path / f"{name}.wav")}
            if samples is not None:
                sf.write(row["audio_filepath"], samples, RATE, subtype="FLOAT")
                row |= {"duration": len(samples) / RATE} if durations else {}
            rows.append(row)
        return rows

    return make


def draw(rows, count, *, seed=0, **options):
    noise, messages = NoiseRecordings(rows, sample_rate=RATE, **options).draw(np.random.default_rng(seed), count)
    return noise.numpy(), messages


RAMP = np.arange(1, 8001, dtype=np.float32) / 8000


@pytest.mark.parametrize("durations", [True, False])
def test_a_part_of_a_longer_file_and_all_of_a_shorter_one(noise_rows, durations):
    rows = noise_rows(ramp=RAMP, durations=durations)
    parts = [draw(rows, 1000, seed=seed)[0] for seed in range(5)]
    assert len({float(part[0]) for part in parts}) == 5
    for part in parts:
        first = round(float(part[0]) * 8000)
        np.testing.assert_array_equal(part, RAMP[first - 1 : first + 999])
    np.testing.assert_array_equal(draw(rows, 9000)[0], RAMP)
    np.testing.assert_array_equal(draw(rows, 1000, seed=1)[0], parts[1])


def test_the_part_that_a_row_names(noise_rows):
    (row,) = noise_rows(ramp=RAMP)
    noise, _ = draw([row | {"offset": 1.0, "duration": 0.5}], 4000)
    np.testing.assert_array_equal(noise, RAMP[4000:6000])
    for seed in range(5):
        noise, _ = draw([row | {"offset": 1.0, "duration": 0.5}], 1000, seed=seed)
        assert RAMP[3999] <= noise[0] and noise[-1] <= RAMP[6000]


def test_silent_parts_are_drawn_again(noise_rows):
    click = np.zeros(8000, np.float32)
    click[7000:] = -0.5
    rows = noise_rows(click=click)
    assert all(draw(rows, 200, seed=seed)[0].min() == -0.5 for seed in range(5))
    # NeMo takes a negative sum for silence: all 100 draws are used up, and what comes last is taken.
    last = [draw(rows, 200, seed=seed, nemo_compat=True)[0] for seed in range(3)]
    assert any(noise.min() > -0.01 for noise in last)


@pytest.mark.parametrize("count", [500, 3000])
@pytest.mark.parametrize("nemo_compat", [False, True])
def test_a_silent_file_becomes_faint_white_noise(noise_rows, count, nemo_compat):
    rows = noise_rows(silent=np.zeros(2000, np.float32))
    levels = []
    for seed in range(4):
        noise, messages = draw(rows, count, seed=seed, nemo_compat=nemo_compat)
        assert len(noise) == min(count, 2000) and noise.dtype == np.float32 and not messages
        levels.append(20 * np.log10(noise.std()))
    assert min(levels) > -91 and max(levels) < -45.5 and np.ptp(levels) > 3


def test_bad_files_are_passed_over_and_told(noise_rows):
    rows = noise_rows(none=None, ramp=RAMP)
    noises, messages = zip(*(draw(rows, 100, seed=seed) for seed in range(12)), strict=True)
    assert all(noise.any() for noise in noises)
    assert any(messages) and all("none.wav: no such file" in text for met in messages for text in met)


def test_no_noise_that_can_be_read_is_silence(noise_rows):
    noise, messages = draw(noise_rows(none=None), 100)
    assert len(noise) == 100 and not noise.any() and len(messages) == 20
    noise, messages = draw([], 100)
    assert len(noise) == 100 and not noise.any() and not messages
