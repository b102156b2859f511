"""Golden cases of the separation loss and metrics: metrics_*.safetensors with what public libraries say, metrics.json.

An entry of the JSON belongs to the file that it names, or to metrics_<its key>.safetensors. Whatever is listed there
is either compared (`_ours`, `_degenerate`) or known not to be ours (`NOT_OURS`); a value that is neither fails. SNR,
SD-SDR, SIR and SAR are not ours.

Tolerances in float64: 1e-9 dB for asteroid, whose formula is ours, and 1e-6 dB for libraries that place their eps
elsewhere. In float32 5e-3 dB: that is the libraries' own rounding (3e-4 dB was seen), ours sum in float64.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.audio import (
    scale_invariant_signal_distortion_ratio,
    signal_distortion_ratio,
    signal_noise_ratio,
)

from losses.pit import pairwise_neg_si_sdr, permutation_invariant_loss, pit_neg_si_sdr, reorder
from losses.pit import si_sdr as loss_si_sdr
from metrics.separation import SeparationMetrics
from metrics.separation import sdr as metric_sdr
from metrics.separation import si_sdr as metric_si_sdr
from tests.golden_suite.suite import Case, Check, GoldenError, read_json, read_tensors

DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE_DB = {"float64": 1e-6, "float32": 5e-3}
ASTEROID_TOLERANCE_DB = {"float64": 1e-9, "float32": 2e-2}  # it lists pairs that hardly match, at -60 dB and below
PERFECT_DB = 80.0  # Above, a value is what rounding left, which differs from one processor to the next.
NOT_OURS = {"snr", "sdsdr", "torchmetrics.snr", "torchmetrics.snr.zero_mean", "sir", "sar"}
# Key -> kind of ratio, whether means are removed.
LISTED = {
    "torchmetrics.sisdr.zero_mean=False": ("si_sdr", False),
    "torchmetrics.sisdr.zero_mean=True": ("si_sdr", True),
    "torchmetrics.sisnr": ("si_sdr", True),
    "torchmetrics.sdr512.zero_mean=False": ("sdr", False),
    "torchmetrics.sdr512.zero_mean=True": ("sdr", True),
    "fast_bss_eval.si_sdr": ("si_sdr", False),
    "fast_bss_eval.si_sdr.zero_mean": ("si_sdr", True),
    "fast_bss_eval.bss_eval_sources": ("sdr", False),
    "mir_eval.bss_eval_sources": ("sdr", False),
}


def discover(folder: Path) -> list[Case]:
    cases = []
    for path in sorted(folder.glob("metrics_*.safetensors")):
        names = ("degenerate",) if path.stem.startswith("metrics_degenerate") else tuple(DTYPES)
        for name in names:
            function = _degenerate if name == "degenerate" else partial(_values, dtype=name)
            cases.append(Case(f"{path.stem}-{name}", path.name, (path.name,), partial(function, path)))
    path = folder / "metrics.json"
    return [*cases, Case("metrics.json", path.name, (path.name,), partial(_entries, path))] if path.is_file() else cases


def _entries(path: Path, check: Check) -> None:
    """Every entry has its file."""
    for key, entry in read_json(path).items():
        name = _file_of(key, entry)
        check.equal(f"{path}: the file of entry {key}, {name}, is there", path.with_name(name).is_file(), True)


def _file_of(key: str, entry: dict[str, Any]) -> str:
    return entry.get("file", f"metrics_{key}.safetensors")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    json_path = path.with_name("metrics.json")
    for key, entry in read_json(json_path).items():
        if _file_of(key, entry) == path.name:
            return entry, read_tensors(path)[0]
    raise GoldenError(f"{json_path}: no entry for {path.name}")


# Ordinary signals


def _values(path: Path, check: Check, *, dtype: str) -> None:
    entry, tensors = _read(path)
    unknown = entry.keys() - {"file", "args", "asteroid", *DTYPES}
    check.equal(f"{path.name}: parts of its entry that no case knows", sorted(unknown), [])
    estimates, targets = tensors["est"].to(DTYPES[dtype]), tensors["target"].to(DTYPES[dtype])  # (B, C, T)
    mixture = tensors["mix"].to(DTYPES[dtype]).unsqueeze(1).expand_as(targets)
    for key, listed in entry.get("asteroid", {}).items():
        kind, _, zero_mean = key.removeprefix(f"{dtype}.").partition(".zero_mean=")
        if kind == "sisdr":
            values = _asteroid(estimates, targets, zero_mean=zero_mean == "True")
            _compare(check, f"asteroid {key}", listed, values, ASTEROID_TOLERANCE_DB[dtype])
        elif kind not in NOT_OURS and key.startswith(dtype):
            raise GoldenError(f"{path.name}: asteroid's {key} is neither compared nor known not to be ours")
    for key, listed in entry[dtype].items():
        if key in LISTED:
            values = _ours(estimates, targets, mixture, *LISTED[key])
            listed = listed if isinstance(listed, dict) else {"per_source": listed}
            _compare(check, f"{dtype} {key}", listed, values, TOLERANCE_DB[dtype])
        elif key not in NOT_OURS:
            raise GoldenError(f"{path.name}: {key} is neither compared nor known not to be ours")


def _compare(
    check: Check, what: str, listed: dict[str, Any], values: dict[str, list[Tensor]], tolerance: float
) -> None:
    """Every listed field with each of our ways to compute it."""
    for field, expected in listed.items():
        if field in NOT_OURS:
            continue
        if field not in values:
            raise GoldenError(f"{what}: {field} is neither compared nor known not to be ours")
        for value in values[field]:
            if value.dtype == torch.int64:
                check.equal(f"{what} {field}", value.tolist(), expected)
            else:
                check.close(f"{what} {field}", value, expected, tolerance=tolerance)


def _asteroid(estimates: Tensor, targets: Tensor, *, zero_mean: bool) -> dict[str, list[Tensor]]:
    pairwise = pairwise_neg_si_sdr(estimates, targets, zero_mean=zero_mean)
    loss, permutation = permutation_invariant_loss(pairwise)
    return {
        "pairwise_neg": [pairwise],
        "per_item_min_loss": [loss],
        "pit_loss_mean": [loss.mean()],
        "best_idx": [permutation],
    }


def _ours(estimates: Tensor, targets: Tensor, mixture: Tensor, kind: str, zero_mean: bool) -> dict[str, list[Tensor]]:
    """Fields of a library's entry -> our values, one for each of our functions that has this ratio. (B, C) each."""
    if kind == "sdr":
        pairs = [_sdr(e.unsqueeze(1).expand_as(targets), targets, zero_mean=zero_mean) for e in estimates.unbind(1)]
        _, permutation = permutation_invariant_loss(-torch.stack(pairs, 1))  # (B, C, C): estimate, target
        in_order = reorder(estimates, permutation)
        after, before = (_sdr(signals, targets, zero_mean=zero_mean) for signals in (in_order, mixture))
        return {
            "per_source": [after],
            "mix_per_source": [before],
            "sdri_per_source": [after - before],
            "sdri_mean": [(after - before).mean()],
            "sdr": [after],
            "perm": [permutation],
        }
    loss, permutation = pit_neg_si_sdr(estimates, targets, zero_mean=zero_mean)
    in_order = reorder(estimates, permutation)
    functions = [partial(loss_si_sdr, zero_mean=zero_mean), *([metric_si_sdr] if zero_mean else [])]
    after = [function(in_order, targets) for function in functions]
    before = [function(mixture, targets) for function in functions]
    improvement = [a - b for a, b in zip(after, before, strict=True)]
    return {
        "per_source": after,
        "value": after,
        "mix_per_source": before,
        "sisdri_per_source": improvement,
        "sisdri_mean": [value.mean() for value in improvement],
        "pit_best_metric": [-loss],
        "pit_best_perm": [permutation],
        "perm": [permutation],
    }


def _sdr(signals: Tensor, targets: Tensor, *, zero_mean: bool) -> Tensor:
    if zero_mean:  # ours has no such option: it is the same as to centre the signals first
        signals, targets = (x.double() - x.double().mean(-1, keepdim=True) for x in (signals, targets))
    return metric_sdr(signals, targets)


# Silence and perfection

# Name -> estimate and target, and what the metric counts the mixture as; None: it is averaged.
DEGENERATE = {
    "est==target": (lambda target, noise: (target, target), "num_perfect"),
    "est==3*target": (lambda target, noise: (3 * target, target), "num_perfect"),
    "est==-target": (lambda target, noise: (-target, target), "num_perfect"),
    "target silent": (lambda target, noise: (noise, 0 * target), "num_silent"),
    "est silent": (lambda target, noise: (0 * target, target), "num_silent_estimates"),
    "both silent": (lambda target, noise: (0 * target, 0 * target), "num_silent"),
    "est noise only (orthogonal-ish)": (lambda target, noise: (noise, target), None),
}
COUNTS = ("num_silent", "num_silent_estimates", "num_perfect")
# What a library is listed with -> how it is computed again. torchmetrics' by torchmetrics: ours builds on it.
AGAIN = {
    "tm.sisdr": scale_invariant_signal_distortion_ratio,
    "tm.snr": signal_noise_ratio,
    "tm.sdr": signal_distortion_ratio,
    "tm.sdr.load_diag=1e-6": partial(signal_distortion_ratio, load_diag=1e-6),
    "asteroid-formula.sisdr(zero_mean)": loss_si_sdr,
    "fbe.si_sdr": scale_invariant_signal_distortion_ratio,
    "fbe.sdr": metric_sdr,
}


def _degenerate(path: Path, check: Check) -> None:
    entry, tensors = _read(path)
    for name, listed in entry.items():
        if name not in DEGENERATE:
            raise GoldenError(f"{path.name}: no case builds the signals of {name!r}")
        build, counted_as = DEGENERATE[name]
        estimate, target = build(tensors["target"], tensors["noise"])  # (1, T)
        _check_loss(check, name, estimate, target)
        _check_metric(check, name, estimate, target, tensors["target"] + tensors["noise"], counted_as)
        for key, expected in listed.items():
            dtype, _, what = key.partition(".")
            signals = estimate.to(DTYPES[dtype]), target.to(DTYPES[dtype])
            _check_library(check, f"{name} {key}", what, *signals, expected, TOLERANCE_DB[dtype])


def _check_loss(check: Check, name: str, estimate: Tensor, target: Tensor) -> None:
    """Value and gradient of the training loss are finite whatever comes."""
    for dtype in DTYPES.values():
        leaf = estimate.to(dtype).unsqueeze(0).requires_grad_()
        loss, _ = pit_neg_si_sdr(leaf, target.to(dtype).unsqueeze(0))
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        check.equal(f"{name}: finite loss and gradient", bool(loss.isfinite().all() & gradient.isfinite().all()), True)


def _check_metric(
    check: Check, name: str, estimate: Tensor, target: Tensor, mixture: Tensor, counted_as: str | None
) -> None:
    metric = SeparationMetrics()
    metric.update(estimate.unsqueeze(0), target.unsqueeze(0), mixture, torch.tensor([target.shape[-1]]))
    values = metric.compute()
    counts = {count: int(values[count]) for count in COUNTS}
    check.equal(f"{name}: counted as", counts, {count: int(count == counted_as) for count in COUNTS})
    check.equal(f"{name}: averaged", bool(values["si_sdr"].isfinite()), counted_as is None)


def _check_library(
    check: Check, what: str, function: str, estimate: Tensor, target: Tensor, expected: Any, tolerance: float
) -> None:
    theirs = function.startswith("fbe.")
    if theirs and (".clamp" in function or isinstance(expected, str) or abs(expected) > PERFECT_DB - 20):
        return  # fast_bss_eval's own clamping, errors and rounding
    if function not in AGAIN:
        raise GoldenError(f"{what} is neither compared nor known not to be ours")
    try:
        value = AGAIN[function](estimate, target).item()
    except torch.linalg.LinAlgError as error:
        check.equal(what, f"EXC {type(error).__name__}", str(expected).partition(":")[0])
        return
    if expected == "nan" or (not isinstance(expected, str) and expected > PERFECT_DB):
        check.equal(f"{what}: perfect", not value <= PERFECT_DB, True)
    elif isinstance(expected, str):
        check.equal(what, str(value), expected)
    else:
        check.close(what, value, expected, tolerance=tolerance)
