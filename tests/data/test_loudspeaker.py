import numpy as np
import pytest

from data.echo_levels import rms
from data.loudspeaker import Loudspeaker, band_limit, hard_clip, sigmoid_distortion, soft_clip

RATE = 16000
TIME_S = np.arange(RATE) / RATE
TONE = (0.1 * np.sin(2 * np.pi * 500 * TIME_S)).astype(np.float32)
CLEAN = {"nonlinear_p": 0.0, "speaker_highpass_hz": None}


def harmonic(signal, number):
    """Level of a harmonic of 500 Hz over the fundamental in dB."""
    spectrum = np.abs(np.fft.rfft(signal))
    return 20 * np.log10(spectrum[500 * number] / spectrum[500] + 1e-12)


def play(signal=TONE, seed=0, **settings):
    return Loudspeaker(**settings).play(signal, np.random.default_rng(seed), sample_rate=RATE)


def test_clipping_cuts_at_a_share_of_the_peak():
    clipped = hard_clip(TONE, 0.7)
    np.testing.assert_allclose(np.abs(clipped).max(), 0.07, rtol=1e-5)
    quiet = np.abs(TONE) < 0.07
    np.testing.assert_array_equal(clipped[quiet], TONE[quiet])
    soft = soft_clip(TONE, 0.7)
    assert 0.05 < np.abs(soft).max() < 0.07 and harmonic(soft, 3) < harmonic(clipped, 3) < -15
    for clip in (hard_clip, soft_clip):
        assert not clip(np.zeros(10, np.float32), 0.7).any()


def test_the_sigmoid_is_that_of_its_formula():
    x = np.array([-0.8, -0.1, 0.0, 0.1, 0.8])
    b = 1.5 * x - 0.3 * x**2
    a = [0.5, 0.5, 0.5, 4, 4]
    expected = [2 / (1 + np.exp(-p * q)) - 1 for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(sigmoid_distortion(x, 3.0), 3 * np.array(expected))
    assert harmonic(sigmoid_distortion(TONE), 2) > -20  # one half-wave is steeper: even harmonics


def test_the_band_has_its_edges_and_no_phase():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(4 * RATE).astype(np.float32)
    limited = band_limit(noise, sample_rate=RATE, highpass_hz=400, lowpass_hz=4000)
    gain = np.fft.rfft(limited) / np.fft.rfft(noise)
    hz = np.fft.rfftfreq(len(noise), 1 / RATE)
    for at_hz, expected_db in ((100, -24), (400, -3), (1000, 0), (4000, -3), (8000, -24)):
        near = np.abs(hz - at_hz) < 10
        assert abs(20 * np.log10(np.abs(gain[near].mean())) - expected_db) < 0.7
        assert np.abs(np.angle(gain[near].mean())) < 0.02
    assert band_limit(noise, sample_rate=RATE) is noise


@pytest.mark.parametrize("seed", range(4))
def test_a_played_signal_keeps_its_level_and_place(seed):
    speech = (np.random.default_rng(seed).standard_normal(RATE) * np.sin(3 * TIME_S)).astype(np.float32)
    played = play(speech, seed)
    assert played.dtype == np.float32 and len(played) == RATE
    np.testing.assert_allclose(rms(played), rms(speech), rtol=1e-4)
    correlation = np.fft.irfft(np.fft.rfft(played, 2 * RATE) * np.conj(np.fft.rfft(speech, 2 * RATE)))
    assert correlation.argmax() == 0


def test_silence_stays_silent():
    assert not play(np.zeros(1000, np.float32)).any()
    offset = np.full(1000, 0.1, np.float32)  # which no loudspeaker can play
    assert np.isfinite(play(offset, **{**CLEAN, "speaker_highpass_hz": (300, 300)})).all()


def test_each_setting_takes_effect():
    np.testing.assert_allclose(play(**CLEAN), TONE, atol=1e-6)
    distorts = [harmonic(play(seed=s, nonlinear_p=0.5, speaker_highpass_hz=None), 2) > -60 for s in range(40)]
    assert 10 < sum(distorts) < 30
    bent = {"nonlinear_p": 1.0, "speaker_highpass_hz": None, "speaker_soft_clip_p": 0.0, "speaker_distortion": (1, 1)}
    hard, mild = (play(**bent, speaker_clip=(share, share)) for share in (0.4, 1.0))
    assert harmonic(hard, 3) > harmonic(mild, 3) + 3
    whole, tenth, none = (play(**bent | {"speaker_distortion": (share, share)}) for share in (1.0, 0.1, 0.0))
    assert harmonic(whole, 2) > harmonic(tenth, 2) + 12 and np.allclose(none, TONE, atol=1e-6)
    soft = play(**bent | {"speaker_soft_clip_p": 1.0}, speaker_clip=(0.4, 0.4))
    assert harmonic(soft, 5) < harmonic(hard, 5) - 2
    two_tones = TONE + np.roll(TONE, 8) + (0.1 * np.sin(2 * np.pi * 4000 * TIME_S)).astype(np.float32)
    for limit, fundamental in (({"speaker_lowpass_hz": (1000, 1000)}, 1), ({"speaker_highpass_hz": (1500, 1500)}, -1)):
        changed = harmonic(play(two_tones, **CLEAN | limit), 8) - harmonic(two_tones, 8)
        assert fundamental * changed < -12
    lowpass = {"speaker_lowpass_hz": (900, 5000)}
    one, other = (play(two_tones, **CLEAN | lowpass | {"speaker_highpass_hz": edge}) for edge in (None, (50, 50)))
    np.testing.assert_allclose(harmonic(one, 8), harmonic(other, 8), atol=0.1)  # drawn apart from each other


@pytest.mark.parametrize(
    "bad",
    [
        {"nonlinear_p": 1.2},
        {"speaker_soft_clip_p": -1},
        {"speaker_clip": (0.5, 1.5)},
        {"speaker_clip": 0.8},
        {"speaker_distortion": (0, 2)},
        {"speaker_highpass_hz": (300, 100)},
        {"speaker_lowpass_hz": ("a", "b")},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Loudspeaker(**bad)


def test_responses_are_uneven_by_so_many_db_and_shift_nothing():
    impulse = np.zeros(8000, np.float32)
    impulse[4000] = 1.0
    gains_db = np.array([0, 0, 6, -6, 3, 0, 0, 0], float)
    response = band_limit(impulse, sample_rate=16000, octaves_db=gains_db)
    assert np.abs(response).argmax() == 4000
    level_db = 20 * np.log10(np.abs(np.fft.rfft(response)))
    for octave, expected in enumerate(gains_db):
        assert level_db[round(62.5 * 2**octave / 2)] == pytest.approx(expected, abs=0.2)


def test_each_loudspeaker_has_a_response_of_its_own():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(32000).astype(np.float32)
    plain = Loudspeaker(nonlinear_p=0.0, speaker_highpass_hz=None)
    uneven = Loudspeaker(nonlinear_p=0.0, speaker_highpass_hz=None, speaker_response_db=10.0)
    heard = [speaker.play(noise, np.random.default_rng(5), sample_rate=16000) for speaker in (plain, uneven, uneven)]
    other = uneven.play(noise, np.random.default_rng(6), sample_rate=16000)
    np.testing.assert_allclose(heard[0], noise, rtol=1e-4, atol=1e-5)
    assert np.array_equal(heard[1], heard[2]) and not np.allclose(heard[1], other) and not np.allclose(heard[1], noise)
