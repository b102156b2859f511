import pytest
import torch
import torchaudio

from modules.mel import WINDOWS, MelPreprocessor, mel_filterbank, mel_frequencies, pre_emphasis
from tests.modules.device_waits import NoValueIsAsked


def make(**options) -> MelPreprocessor:
    return MelPreprocessor(**{"dither": 0.0} | options).eval()


def tone(frequency_hz: float, num_samples: int = 16000) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency_hz / 16000 * torch.arange(num_samples))[None]


def lengths(*samples: int) -> torch.Tensor:
    return torch.tensor(samples)


@pytest.mark.parametrize(
    ("rate", "n_fft", "mels", "low", "high"),
    [(16000, 512, 80, 0, 8000), (8000, 256, 40, 60, 3800), (44100, 1024, 128, 0, 22050)],
)
def test_filters_are_torchaudios(rate, n_fft, mels, low, high):
    options = {"norm": "slaney", "mel_scale": "slaney"}
    expected = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, low, high, mels, rate, **options).T
    torch.testing.assert_close(mel_filterbank(rate, n_fft, mels, low, high), expected, atol=2e-7, rtol=0)


def test_features_are_torchaudios():
    """Another implementation of the whole chain, without pre-emphasis, on a waveform of whole frames."""
    signal = torch.randn(1, 4800, generator=torch.Generator().manual_seed(0))
    mel, length = make(normalize=None, preemph=None, pad_to=0)(signal, lengths(4800))
    transform = torchaudio.transforms.MelSpectrogram(
        16000,
        n_fft=512,
        hop_length=160,
        win_length=400,
        wkwargs={"periodic": False},
        pad_mode="constant",
        n_mels=80,
        norm="slaney",
        mel_scale="slaney",
    )
    expected = (transform(signal) + 2**-24).log()
    assert length.tolist() == [30] and mel.shape == (1, 80, 31)
    torch.testing.assert_close(mel[..., :30], expected[..., :30], atol=1e-4, rtol=0)
    assert (mel[..., 30] == 0).all()  # the last frame counts as padding


@pytest.mark.parametrize(("frequency_hz", "band"), [(100, 2), (1000, 26), (4000, 62)])
def test_tone_is_loudest_in_its_band(frequency_hz, band):
    mel, _ = make(normalize=None)(tone(frequency_hz), lengths(16000))
    assert (mel[0, :, 10:90].argmax(0) == band).all()
    assert abs(mel_frequencies(82, 0, 8000)[band + 1] - frequency_hz) < 60


def test_pre_emphasis():
    assert pre_emphasis(torch.tensor([[1.0, 1.0, 3.0]]), 0.5).tolist() == [[1.0, 0.5, 2.5]]
    mel = [make(normalize=None, preemph=value)(tone(200), lengths(16000))[0] for value in (None, 0.97)]
    assert (mel[0] - mel[1])[0, 5, 50] > 4  # 20 log10 of |1 - 0.97 exp(-j w)| there is -22 dB


@pytest.mark.parametrize(
    "normalize", ["per_feature", "all_features", None, {"fixed_mean": [1.0] * 80, "fixed_std": [2.0] * 80}]
)
@pytest.mark.parametrize("options", [{}, {"exact_pad": True}, {"preemph": None}], ids=str)
def test_item_alone_equals_item_in_a_longer_batch(normalize, options):
    preprocessor = make(normalize=normalize, **options)
    torch.manual_seed(0)  # the few frames of the shortest may be alike, and rounding then be magnified
    samples = [8000, 5003, 3199, 700]
    signals = torch.zeros(4, 8000)
    for row, num in zip(signals, samples, strict=True):
        row[:num] = torch.randn(num)
    mel, length = preprocessor(signals, lengths(*samples))
    for index, num in enumerate(samples):
        alone, (frames,) = preprocessor(signals[index : index + 1, :num], lengths(num))
        assert frames == length[index]
        torch.testing.assert_close(mel[index, :, :frames], alone[0, :, :frames], atol=2e-5, rtol=0)
        assert (mel[index, :, frames:] == 0).all() and (alone[0, :, frames:] == 0).all()


def test_what_stands_behind_an_item_does_not_matter():
    signal = torch.randn(1, 8000)
    garbage = signal.clone()
    garbage[:, 5000:] = 1e3
    assert torch.equal(make()(signal, lengths(5000))[0], make()(garbage, lengths(5000))[0])


@pytest.mark.parametrize(("normalize", "dims"), [("per_feature", (2,)), ("all_features", (1, 2))])
def test_normalised(normalize, dims):
    mel, length = make(normalize=normalize)(torch.randn(2, 8000) + 1, lengths(8000, 4000))
    for item, frames in zip(mel, length.tolist(), strict=True):
        valid = item[None, :, :frames].double()
        torch.testing.assert_close(valid.mean(dims), torch.zeros_like(valid.mean(dims)), atol=1e-5, rtol=0)
        torch.testing.assert_close(valid.std(dims), torch.ones_like(valid.std(dims)), atol=1e-4, rtol=0)


def test_fixed_statistics():
    signal, mean, deviation = torch.randn(1, 4000), torch.randn(80), torch.rand(80) + 0.5
    plain, length = make(normalize=None)(signal, lengths(4000))
    fixed = make(normalize={"fixed_mean": mean.tolist(), "fixed_std": deviation.tolist()})
    expected = ((plain - mean[:, None]) / deviation[:, None])[..., : length[0]]
    torch.testing.assert_close(fixed(signal, lengths(4000))[0][..., : length[0]], expected)
    assert set(fixed.state_dict()) == {"featurizer.window", "featurizer.fb"}


@pytest.mark.parametrize(("normalize", "expected"), [("per_feature", 0.0), ("all_features", None)])
def test_one_frame_and_none(normalize, expected):
    """The deviation of one number counts as 0, not as NaN; an item without a frame is padding."""
    mel, length = make(normalize=normalize)(torch.randn(3, 1600), lengths(160, 100, 0))
    assert length.tolist() == [1, 0, 0] and mel.isfinite().all()
    assert (mel[1:] == 0).all() and (expected is None or (mel[0] == expected).all())


@pytest.mark.parametrize("exact_pad", [False, True])
@pytest.mark.parametrize("num_samples", [1, 100, 160, 399, 1600, 1601])
def test_any_length(exact_pad, num_samples):
    mel, length = make(exact_pad=exact_pad, pad_to=0)(torch.randn(1, num_samples), lengths(num_samples))
    expected = num_samples // 160 - exact_pad  # with exact_pad, the last of S // 160 frames counts as padding
    assert length.tolist() == [max(0, expected)] and mel.shape[2] == length[0] + 1


@pytest.mark.parametrize(("pad_to", "num_frames"), [(0, 101), (1, 101), (16, 112), (101, 101), ("max", 1670)])
def test_pad_to(pad_to, num_frames):
    mel, length = make(pad_to=pad_to, pad_value=-7.0)(torch.randn(1, 16000), lengths(16000))
    assert mel.shape == (1, 80, num_frames) and length.tolist() == [100]
    assert (mel[..., 100:] == -7).all() and (mel[..., :100] != -7).all()


def test_pad_to_max_has_an_end():
    preprocessor = make(pad_to="max")
    assert preprocessor(torch.randn(1, 267200), lengths(267200))[0].shape[2] == 1670
    with pytest.raises(ValueError, match="^pad_to=max holds 1670 frames, 16.7 s; a batch has 1671"):
        preprocessor(torch.randn(1, 267360), lengths(267360))


@pytest.mark.parametrize(
    ("options", "silence"),
    [
        ({}, 2**-24),
        ({"log_zero_guard_type": "clamp", "log_zero_guard_value": 1e-5}, 1e-5),
        ({"log_zero_guard_value": "tiny"}, torch.finfo(torch.float32).tiny),
        ({"log_zero_guard_type": "clamp", "log_zero_guard_value": "eps"}, torch.finfo(torch.float32).eps),
    ],
)
def test_guard_of_the_logarithm(options, silence):
    mel, _ = make(normalize=None, **options)(torch.zeros(1, 1600), lengths(1600))
    torch.testing.assert_close(mel[..., :10], torch.full((1, 80, 10), silence).log())
    loud = [make(normalize=None, log=log, **options)(torch.randn(1, 1600), lengths(1600))[0] for log in (False, True)]
    assert loud[0].min() == 0 and loud[1].isfinite().all()


def test_mag_power():
    """White noise of twice the amplitude: twice the magnitudes, four times the powers."""
    signal = torch.randn(1, 1600)
    for power, factor in ((1.0, 2), (2.0, 4)):
        preprocessor = make(mag_power=power, log=False, normalize=None)
        torch.testing.assert_close(
            preprocessor(2 * signal, lengths(1600))[0], factor * preprocessor(signal, lengths(1600))[0]
        )


@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window):
    preprocessor = make(window=window)
    values = preprocessor.featurizer.window
    assert values.shape == (400,)
    torch.testing.assert_close(values, values.flip(0), atol=1e-6, rtol=0)
    named = window not in ("none", "ones")  # NeMo's checkpoints have no entry for these
    assert ("featurizer.window" in preprocessor.state_dict()) == named
    assert preprocessor(torch.randn(1, 1600), lengths(1600))[0].isfinite().all()
    assert torch.equal(make(window=None).featurizer.window, torch.ones(400))


def test_transform_is_the_next_power_of_two():
    assert make(n_fft=None).n_fft == 512
    assert make(n_fft=None, sample_rate=8000).n_fft == 256
    assert make(n_fft=None, window_size=1.0).n_fft == 16384


def test_dither_in_training_only():
    preprocessor, signal = make(dither=0.1, normalize=None), torch.zeros(2, 1600)
    quiet = preprocessor(signal, lengths(1600, 1600))[0]
    noisy = preprocessor.train()(signal, lengths(1600, 1600))[0]
    assert (signal == 0).all()  # not edited in place
    assert (quiet[..., :10] < -16).all() and (noisy[..., 1:9] > -16).all()
    assert not torch.equal(noisy[0], noisy[1])


def test_narrow_band_augmentation():
    options = {"normalize": None, "preemph": None, "nb_augmentation_prob": 0.5, "nb_max_freq": 4000}
    preprocessor, signal = make(**options), torch.randn(200, 480)
    wide = preprocessor(signal, torch.full((200,), 480))[0]
    assert (wide[..., :3] > -16).all()
    torch.manual_seed(0)
    mel = preprocessor.train()(signal, torch.full((200,), 480))[0]
    narrow = mel[:, -1, 0] < -16
    assert 70 < narrow.sum() < 130
    assert torch.equal(mel[~narrow], wide[~narrow]) and torch.equal(mel[narrow, :55], wide[narrow, :55])
    assert (mel[narrow, 66:, :3] < -16).all()


def test_no_gradient():
    signal = torch.randn(1, 1600, requires_grad=True)
    assert not make()(signal, lengths(1600))[0].requires_grad


def test_nothing_waits_for_the_device():
    preprocessor = make(nb_augmentation_prob=0.5, dither=1e-5).train()
    with NoValueIsAsked():
        preprocessor(torch.randn(2, 1600), lengths(1600, 900))


def test_precision():
    """float32 under autocast, double in a double network, and its own type in a half network."""
    signal = torch.randn(1, 8000)
    expected = make()(signal, lengths(8000))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make()(signal, lengths(8000))[0], expected)
    double = make().double()(signal, lengths(8000))[0]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, atol=1e-4, rtol=0)
    half = make().bfloat16()(signal, lengths(8000))[0]
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_splicing": 3}, "^frame_splicing must be 1 .* got 3"),
        ({"window": "kaiser"}, "^window must be one of hann, .* got 'kaiser'"),
        ({"normalize": "per_feat"}, "^normalize must be per_feature, all_features, null or .* got 'per_feat'"),
        ({"normalize": {"fixed_mean": [0.0]}}, "^normalize must be per_feature"),
        ({"normalize": {"fixed_mean": [0.0] * 4, "fixed_std": [1.0] * 4}}, "^normalize must have 80 numbers"),
        ({"pad_to": -1}, "^pad_to must be"),
        ({"pad_to": "min"}, "^pad_to must be a number of frames, 0 .* or max, got 'min'"),
        ({"features": 0}, "^features must be a whole number of at least 1, got 0"),
        ({"n_fft": 256}, "^window_size of 0.025 s, 400 samples, must fit into n_fft=256"),
        ({"n_fft": 32001}, "^n_fft must be at most 32000, two seconds, got 32001"),
        ({"window_stride": 1e-5}, "^window_size and window_stride must be at least 6.25e-05 s"),
        ({"window_size": "long"}, "^window_size must be a number of at least 0, got 'long'"),
        ({"exact_pad": True, "window_stride": 0.0101}, "^exact_pad needs .* even number of samples, got 161"),
        ({"highfreq": 9000}, "^highfreq must be above lowfreq and at most 8000 Hz, got 9000"),
        ({"lowfreq": 500, "highfreq": 400}, "^highfreq must be above lowfreq"),
        ({"log_zero_guard_type": "max"}, "^log_zero_guard_type must be one of add, clamp, got 'max'"),
        ({"log_zero_guard_value": "huge"}, "^log_zero_guard_value must be a number of at least 0, got 'huge'"),
        ({"nb_augmentation_prob": 0.1, "nb_max_freq": 8000}, "^nb_max_freq must be below 8000 Hz, got 8000"),
        ({"dither": -1}, "^dither must be a number of at least 0, got -1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"^signal must have shape \(batch, samples\), got \(1600,\)"):
        make()(torch.randn(1600), lengths(1600))


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": "all_features", "window": "blackman"}, {"normalize": None, "exact_pad": True, "pad_to": 0}],
)
def test_the_copy_for_export_has_the_same_features(options):
    """A convolution in place of the transform, sums in place of slices; the network itself stays as it is."""
    system = make(**options)
    exported = system.for_export()
    signal = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    (mel, length), (expected, frames) = (module(signal, lengths(9000, 5003)) for module in (exported, system))
    assert torch.equal(length, frames) and not torch.equal(mel, expected)
    torch.testing.assert_close(mel, expected, atol=2e-4, rtol=0)
    assert system.kernels is None and list(exported.state_dict()) == list(system.state_dict())
