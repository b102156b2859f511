import numpy as np
import pytest

from data.echo_levels import active_rms, gain_for_ratio_db, level_ratio_db, rms
from data.echo_path import EchoPath, convolve, delay, drifting_delay
from data.ranges import check_range
from data.rooms import Response

RATE = 16000
CLICK = Response(np.array([0, 0, 1, 0], np.float32), 2, 0.0)  # time 0 is its third tap
STEADY = {"delay_ms": (0, 0), "path_change_p": 0.0, "gain_step_p": 0.0}


def band(num_samples, seed=0, *, upto=0.8):
    """Noise below a share of the Nyquist frequency, as a function of real time."""
    rng = np.random.default_rng(seed)
    spectrum = rng.standard_normal(num_samples // 2 + 1) + 1j * rng.standard_normal(num_samples // 2 + 1)
    spectrum[round(upto * num_samples / 2) :] = 0
    return np.fft.irfft(spectrum, num_samples).astype(np.float32)


def later(signal, samples):
    """A circular delay by a phase: exact for any number of samples."""
    hz = np.fft.rfftfreq(len(signal))
    return np.fft.irfft(np.fft.rfft(signal) * np.exp(-2j * np.pi * hz * samples), len(signal)).astype(np.float32)


def echo(signal, seed=0, *, response=CLICK, moved=None, **settings):
    path = EchoPath(**STEADY | settings)
    return path.echo(signal, np.random.default_rng(seed), response=response, moved=moved, sample_rate=RATE)


def test_convolution_starts_from_rest_and_is_cut():
    np.testing.assert_allclose(convolve(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.5])), [1, 2.5, 4], atol=1e-12)
    np.testing.assert_allclose(convolve(np.array([1.0, 2.0, 3.0]), CLICK.taps, lead=2), [1, 2, 3], atol=1e-6)


@pytest.mark.parametrize("samples", [0, 7, 0.5, 100.25, 3.999])
def test_a_delay_is_exact_in_whole_samples_and_in_parts(samples):
    signal = band(4000)
    delayed = delay(signal, samples)
    assert delayed.shape == signal.shape and delayed.dtype == np.float32
    np.testing.assert_allclose(delayed[200:-50], later(signal, samples)[200:-50], atol=2e-3 * np.abs(signal).max())
    if samples == 7:
        np.testing.assert_array_equal(delayed, np.append(np.zeros(7, np.float32), signal[:-7]))


def test_a_delay_longer_than_the_signal_leaves_silence():
    assert not delay(np.ones(10, np.float32), 500.0).any() and not delay(np.ones(10, np.float32), 500.5).any()


@pytest.mark.parametrize("drift_ppm", [0.0, 300.0, -800.0])
def test_drift_changes_the_delay_around_the_middle(drift_ppm):
    signal = band(RATE)
    drifted = drifting_delay(signal, 40.3, drift_ppm=drift_ppm)
    for centre in (2000, RATE // 2, RATE - 2000):
        part = slice(centre - 40, centre + 40)
        expected = later(signal, 40.3 + drift_ppm * 1e-6 * (centre - RATE / 2))
        np.testing.assert_allclose(drifted[part], expected[part], atol=0.05 * np.abs(signal).max())
    assert drifted.dtype == np.float32 and len(drifting_delay(signal[:1001], 0.0, drift_ppm=drift_ppm)) == 1001


def test_the_delay_is_that_of_device_and_direct_path():
    signal = band(RATE)
    direct = Response(CLICK.taps, 2, 17.5)
    drawn = [echo(signal, seed, response=direct, delay_ms=(5, 20)) for seed in range(8)]
    for seed in range(8):
        bulk = drawn[seed].delay_samples - 17.5
        assert 80 <= bulk <= 320 and bulk % 1 != 0
        np.testing.assert_allclose(drawn[seed].signal[400:-50], later(signal, bulk)[400:-50], atol=1e-4)
        assert drawn[seed].path_change_sample == -1


def test_a_jump_has_no_single_delay():
    signal = band(RATE)
    result = echo(signal, delay_ms=(10, 10), delay_jump_p=1.0, delay_jump_ms=(5, 5))
    assert result.delay_samples == -1
    np.testing.assert_allclose(result.signal[400:3000], later(signal, 160)[400:3000], atol=1e-6)
    np.testing.assert_allclose(result.signal[-3000:-50], later(signal, 240)[-3000:-50], atol=1e-6)
    back = echo(signal, delay_ms=(10, 10), delay_jump_p=1.0, delay_jump_ms=(-50, -50)).signal
    np.testing.assert_allclose(back[-3000:], signal[-3000:], atol=1e-6)  # not below 0


def test_drift_is_in_the_echo():
    signal = band(RATE)
    drifting = echo(signal, delay_ms=(10, 10), drift_ppm=(500, 500))
    assert drifting.delay_samples == 160
    np.testing.assert_allclose(drifting.signal, drifting_delay(signal, 160, drift_ppm=500), atol=1e-6)


@pytest.mark.parametrize("fade_ms", [0, 50])
def test_the_path_changes_to_that_of_the_moved_loudspeaker(fade_ms):
    signal = band(RATE)
    moved = Response(-CLICK.taps, 2, 0.0)
    result = echo(signal, moved=moved, path_change_p=1.0, path_change_fade_ms=(fade_ms, fade_ms))
    change, end = result.path_change_sample, result.path_change_sample + max(1, fade_ms * 16)
    assert 0.2 * RATE <= change <= 0.8 * RATE
    np.testing.assert_allclose(result.signal[: change + 1], signal[: change + 1], atol=1e-6)
    np.testing.assert_allclose(result.signal[end:], -signal[end:], atol=1e-6)
    if fade_ms:
        assert np.abs(result.signal[change + 350 : change + 450]).max() < 0.2 * np.abs(signal).max()
    changes = [echo(signal, seed, moved=moved, path_change_p=0.5).path_change_sample >= 0 for seed in range(30)]
    assert 5 < sum(changes) < 25
    assert echo(signal, path_change_p=1.0).path_change_sample == -1  # there is no other response


def test_the_level_steps():
    signal = band(RATE)
    stepped = echo(signal, gain_step_p=1.0, gain_step_db=(-6, -6)).signal
    np.testing.assert_allclose(stepped[:3000], signal[:3000], atol=1e-6)
    np.testing.assert_allclose(stepped[-3000:], signal[-3000:] * 10 ** (-6 / 20), rtol=1e-4, atol=1e-6)
    steps = [not np.allclose(echo(signal, seed, gain_step_p=0.5).signal, signal, atol=1e-6) for seed in range(30)]
    assert 5 < sum(steps) < 25


def test_no_setting_shifts_another():
    signal = band(4000)
    plain = echo(signal, 3, delay_ms=(0, 50))
    for change in ({"gain_step_p": 1.0}, {"path_change_p": 1.0}, {"drift_ppm": (1, 9)}, {"delay_jump_ms": (-1, 3)}):
        assert echo(signal, 3, delay_ms=(0, 50), moved=CLICK, **change).delay_samples == plain.delay_samples


def test_the_largest_delay():
    assert EchoPath(delay_ms=(0, 100)).largest_delay_ms(4.0) == 100
    assert EchoPath(delay_ms=(0, 100), delay_jump_p=0.1, delay_jump_ms=(-80, 30)).largest_delay_ms(4.0) == 130
    assert EchoPath(delay_ms=(0, 100), drift_ppm=(-500, 0)).largest_delay_ms(4.0) == 101


def test_ratios_are_those_while_there_is_sound():
    rng = np.random.default_rng(0)
    near, other = rng.standard_normal((2, RATE)).astype(np.float32) * 0.1
    near[4000:] *= 1e-4  # a long pause
    gain = gain_for_ratio_db(near, other, ratio_db=6.0)
    assert gain == pytest.approx(10 ** (-6 / 20), rel=0.02) and level_ratio_db(near, gain * other) == pytest.approx(6)
    whole = gain_for_ratio_db(near, other, ratio_db=6.0, level=rms)
    assert rms(near) / rms(whole * other) == pytest.approx(10 ** (6 / 20), rel=1e-5)
    assert active_rms(near) == pytest.approx(0.1, rel=0.03) and active_rms(near[:100]) == rms(near[:100])
    silence = np.zeros(RATE, np.float32)
    assert gain_for_ratio_db(silence, near, ratio_db=3.0) == gain_for_ratio_db(near, silence, ratio_db=3.0) == 1
    assert level_ratio_db(near, silence) == level_ratio_db(silence, silence) == np.inf
    assert level_ratio_db(silence, near) == -np.inf


@pytest.mark.parametrize(
    "bad",
    [
        {"delay_ms": (-1, 10)},
        {"delay_jump_p": 2},
        {"delay_jump_ms": (5, -5)},
        {"drift_ppm": (0, 1e4)},
        {"path_change_p": None},
        {"path_change_fade_ms": (-1, 0)},
        {"gain_step_p": -0.1},
        {"gain_step_db": "loud"},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EchoPath(**bad)


def test_ranges_say_what_they_must_be():
    assert check_range("a", [1, 2.5]) == (1.0, 2.5)
    for value in ([2, 1], [1], 3, [True, 2], [0, float("nan")], ["1", "2"]):
        with pytest.raises(ValueError, match=r"a must be \[low, high\], got"):
            check_range("a", value)
    with pytest.raises(ValueError, match=r"a must be \[low, high\], from 0 to 1, got"):
        check_range("a", [0, 2], least=0, most=1)
    with pytest.raises(ValueError, match=r"a must be \[low, high\], 0 or more, got"):
        check_range("a", [-1, 2], least=0)
