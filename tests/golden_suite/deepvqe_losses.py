"""Golden values of the losses and of what is measured of a delay distribution.

Three peers' losses on one pair of signals; their values are named `<peer>_<loss>`, with the compression and the weight
of the complex term in the name. Where a peer adds up terms, so does this file, of our functions. A value that is
neither computed (`VALUES`) nor known not to be ours (`NOT_OURS`) fails.

The peers take the mean of the complex term over real and imaginary parts too, which is half of ours, and put 1e-12
where ours has an eps; a peer that keeps the means of its signals gets ours by appending each signal's negative.
"""

import json
import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, pad

from losses.echo import compressed_spectral_loss, delay_nll, neg_si_snr
from metrics.echo import estimated_delay
from modules.complex_mask import IDENTITY_CHANNEL, complex_convolving_mask
from modules.stft import STFT
from tests.golden_suite.deepvqe_blocks import WINDOWS
from tests.golden_suite.reference import Kind, Reference
from tests.golden_suite.suite import Check, GoldenError, read_json

LOSS = 1e-5  # relative
EPS = 1e-12
NOT_OURS = {
    "rz_mrstft": "spectral convergence and log magnitudes at several resolutions: no loss of ours has either",
    "richiejp_erle_mic_enh_clean": "no ERLE (it compares with clean speech), of a microphone that is not in the file",
}


def _losses(reference: Reference, check: Check) -> None:
    json_path = reference.path.with_suffix(".json")
    listed = [read_json(json_path)] if json_path.is_file() else []
    if "results" in reference.metadata:
        listed.append(json.loads(reference.metadata["results"]))
    if not listed:
        raise GoldenError(f"{reference.path}: neither its header nor {json_path.name} says the results")
    check.equal(f"{reference.path.name}: results in header and {json_path.name}", listed[0], listed[-1])
    for name, expected in listed[0].items():
        if name in NOT_OURS:
            continue
        match, value = next(
            ((match, value) for pattern, value in VALUES.items() if (match := re.fullmatch(pattern, name))),
            (None, None),
        )
        if match is None or value is None:
            raise GoldenError(f"{reference.path}: {name} is neither compared nor known not to be ours")
        check.close(name, value(reference, *match.groups()), expected, tolerance=LOSS, relative=True)


# Spectra


def _compressed(reference: Reference, compression: str, alpha: str) -> Tensor:
    """alpha * complex + (1 - alpha) * magnitude, the complex term halved."""
    complex_share = float(alpha)
    scale = 1 - complex_share / 2
    return scale * _spectral(reference, float(compression), complex_weight=complex_share / 2 / scale)


def _complex(reference: Reference, compression: str) -> Tensor:
    return _spectral(reference, float(compression), complex_weight=1.0) / 2


def _magnitude_l1(reference: Reference, _compression: str = "") -> Tensor:
    """Of a compression of 1, which no loss of ours would have; here as a part of richiejp's total."""
    estimate, target = (reference[name].norm(dim=-1) for name in ("pred_spec", "target_spec"))
    return l1_loss(estimate, target)


def _spectral(reference: Reference, compression: float, *, complex_weight: float) -> Tensor:
    return compressed_spectral_loss(
        reference["pred_spec"],
        reference["target_spec"],
        compression=compression,
        complex_weight=complex_weight,
        eps=EPS,
    ).mean()


# Waveforms


def _stft(reference: Reference, window: str) -> STFT:
    """Of the file's spectra: half a window from frame to frame."""
    n_fft = 2 * (reference["pred_spec"].shape[1] - 1)
    return STFT(n_fft=n_fft, hop_samples=n_fft // 2, window=WINDOWS[window])


def _time_l1(reference: Reference, _compression: str = "") -> Tensor:
    target = reference["target_wav"]
    return l1_loss(_stft(reference, "sqrthann").inverse(reference["pred_spec"], target.shape[-1]), target)


def _si_sdr_of_spectrum(reference: Reference, _compression: str = "") -> Tensor:
    target = reference["target_wav"]
    estimate = _stft(reference, "sqrthann").inverse(reference["pred_spec"], target.shape[-1])
    return neg_si_snr(estimate, target, eps=EPS).mean()


def _si_snr_of_spectra(reference: Reference, window: str) -> Tensor:
    stft = _stft(reference, window)
    num_samples = (reference["pred_spec"].shape[2] - 1) * stft.hop_samples
    estimate, target = (stft.inverse(reference[name], num_samples) for name in ("pred_spec", "target_spec"))
    return neg_si_snr(estimate, target, eps=EPS).mean()


def _si_sdr(reference: Reference) -> Tensor:
    return neg_si_snr(reference["pred_wav"], reference["target_wav"], eps=EPS).mean()


def _total(reference: Reference, compression: str) -> Tensor:
    """richiejp's: one of the compressed error, a half of each other term."""
    others = _magnitude_l1(reference) + _time_l1(reference) + _si_sdr_of_spectrum(reference)
    return _complex(reference, compression) + 0.5 * others


def _hybrid(reference: Reference, complex_scale: str, magnitude_scale: str) -> Tensor:
    """random-zhang's: spectra of a Hann window, SI-SNR of signals that keep their means, in tens of dB."""
    estimate, target = reference["pred_wav"], reference["target_wav"]
    scale = float(complex_scale) + float(magnitude_scale)
    stft = _stft(reference, "hann")
    spectral = compressed_spectral_loss(
        stft(estimate), stft(target), compression=0.3, complex_weight=float(complex_scale) / scale, eps=EPS
    )
    with_means = [torch.cat([signal, -signal], -1) for signal in (estimate, target)]
    return scale * spectral.mean() + neg_si_snr(with_means[0], with_means[1], eps=EPS).mean() / 10


# Delays


def _delays(reference: Reference) -> tuple[Tensor, Tensor, int]:
    """Distributions with their axis from no delay up, the true delays in whole frames, samples per frame."""
    distribution, hop_samples = reference["delay_dist"].flip(-1), _stft(reference, "sqrthann").hop_samples
    frames = (reference["delay_samples"] / hop_samples).round().clamp(0, distribution.shape[-1] - 1)
    return distribution, frames, hop_samples


def _delay_nll(reference: Reference) -> Tensor:
    """The peer counts all frames, ours those after the first echo: so each clip gets frames before its first."""
    distribution, frames, _ = _delays(reference)
    values = []
    for item, delay in zip(distribution, frames, strict=True):
        item = pad(item, (0, 0, int(delay), 0), value=1.0)[None]  # (1, delay + frames, D)
        values.append(delay_nll(item, delay[None], torch.ones(item.shape[:2], dtype=torch.bool))[0])
    return torch.cat(values).mean()


def _delay_accuracy(reference: Reference) -> Tensor:
    distribution, frames, hop_samples = _delays(reference)
    far = torch.ones(distribution.shape[1] * hop_samples)  # active all along
    found = torch.tensor([estimated_delay(item, far, hop_samples=hop_samples) or 0 for item in distribution])
    return ((found - frames).abs() <= 1).double().mean()


def _entropy(reference: Reference) -> Tensor:
    """No loss of ours; it shows whose distributions the file holds."""
    return torch.special.entr(reference["delay_dist"]).sum(-1).mean()


# Mask


def _mask_regulariser(reference: Reference) -> Tensor:
    """How far the magnitudes of a mask's taps are from those of the identity, squared; mean of the present bin's plus
    mean of the others'. No loss of ours; our mask tells its taps by weighting ones, tap by tap."""
    mask = pad(reference["mask27"], (1, 1, 2, 0))  # frames and bins around, which masks the ones beyond the edges
    batch, _, num_frames, num_bins = mask.shape
    ones = torch.tensor([1.0, 0.0]).expand(batch, num_bins, num_frames, 2)
    taps = []
    for tap in range(9):
        chosen = torch.zeros(27, 1, 1)
        chosen[tap::9] = 1
        taps.append(complex_convolving_mask(mask * chosen, ones).norm(dim=-1)[:, 1:-1, 2:])  # (B, F, frames)
    identity = taps.pop(IDENTITY_CHANNEL)
    return (identity - 1).square().mean() + torch.stack(taps).square().mean()


_NUMBER = r"([\d.]+)"
VALUES: dict[str, Callable[..., Tensor]] = {
    rf"cmy_compressed_c{_NUMBER}_alpha{_NUMBER}": _compressed,
    r"cmy_neg_sisnr_(hann|sqrthann)": _si_snr_of_spectra,
    rf"richiejp_c{_NUMBER}_plcmse": _complex,
    rf"richiejp_c{_NUMBER}_mag_l1": _magnitude_l1,
    rf"richiejp_c{_NUMBER}_time_l1": _time_l1,
    rf"richiejp_c{_NUMBER}_sisdr": _si_sdr_of_spectrum,
    rf"richiejp_c{_NUMBER}_total": _total,
    r"richiejp_neg_sisdr_time": _si_sdr,
    r"richiejp_delay_nll": _delay_nll,
    r"richiejp_delay_acc_pm1": _delay_accuracy,
    r"richiejp_attn_entropy": _entropy,
    r"richiejp_mask_reg": _mask_regulariser,
    r"rz_hybrid_(\d+)_(\d+)_sisnr": _hybrid,
}

KINDS = (Kind(lambda names: "pred_spec" in names and "target_spec" in names, _losses),)
