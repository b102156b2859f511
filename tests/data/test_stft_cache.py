"""Kept spectra: the same numbers as without, found again, never out of date, refused where they make no sense."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from data.aec import EchoData
from data.echo_scenarios import collate_echo
from data.errors import DataError
from data.fixed_echo import FixedEchoDataset
from data.manifest import read_manifest, write_manifest
from data.stft_cache import SpectrumCache
from models.deepvqe import DeepVQE
from modules.stft import PRESETS
from tests.conftest import TINY_ECHO

RATE = 16000
LENGTHS = (8000, 5003, 5120, 90)  # whole hops or not, less than a window
TINY = {"mic_channels": [4, 6], "far_channels": [4], "decoder_channels": [4], "gru_hidden": 8}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rng, rows = np.random.default_rng(0), []
    for number, length in enumerate(LENGTHS):
        row = {"id": f"r{number}", "scenario": "double_talk", "duration": length / RATE}
        for key in ("mic", "farend", "clean"):
            sf.write(tmp_path / f"{number}_{key}.wav", 0.1 * rng.standard_normal(length), RATE)
            row[f"{key}_filepath"] = f"{number}_{key}.wav"
        rows.append(row)
    rows[2] |= {"scenario": "near_end"}
    del rows[2]["farend_filepath"]
    write_manifest(tmp_path / "calls.jsonl", rows)
    return tmp_path / "calls.jsonl"


def items_of(manifest: Path, folder: Path | None, preset: str = "n320", window: str = "sqrt_hann") -> list[dict]:
    rate = PRESETS[preset][0]
    spectra = None if folder is None else SpectrumCache(folder, preset=preset, window=window, sample_rate=rate)
    dataset = FixedEchoDataset(read_manifest(manifest), sample_rate=rate, spectra=spectra)
    return [dataset[index] for index in range(len(dataset))]


def system_of(preset: str, window: str = "sqrt_hann") -> DeepVQE:
    torch.manual_seed(0)
    return DeepVQE(**TINY, stft=preset, window=window, sample_rate=PRESETS[preset][0], init_identity=False).eval()


@pytest.mark.parametrize(("preset", "window"), [("n320", "sqrt_hann"), ("n512", "hann"), ("n480", "sqrt_hann")])
def test_a_system_gives_the_same_bits(manifest: Path, tmp_path: Path, preset: str, window: str) -> None:
    system = system_of(preset, window)
    plain = items_of(manifest, None, preset, window)
    for kept in (items_of(manifest, tmp_path / "kept", preset, window) for _ in range(2)):  # computed, then read
        assert all(
            set(item) - set(other) == {"mic_spectrum", "far_spectrum"} for item, other in zip(kept, plain, strict=True)
        )
        for chosen in ([0, 1, 2, 3], [1], [3], [0, 0]):
            batch, other = (collate_echo([items[index] for index in chosen]) for items in (kept, plain))
            assert batch["mic_spectrum"].ndim == 4 and batch["mic_spectrum"].dtype == torch.float32
            with torch.no_grad():
                output, expected = system.step(batch), system.step(other)
            assert output.keys() == expected.keys()
            assert all(torch.equal(output[name], expected[name]) for name in output)
    assert len(list((tmp_path / "kept").iterdir())) == len(LENGTHS)


def test_kept_spectra_are_used(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = items_of(manifest, tmp_path / "kept")
    system = system_of("n320")
    batch = collate_echo(items[:1])
    with torch.no_grad():
        silent = system.step(batch | {"mic_spectrum": torch.zeros_like(batch["mic_spectrum"])})
    assert not silent["enhanced"].any()
    monkeypatch.setattr("modules.stft.STFT.forward", None)
    for item, again in zip(items, items_of(manifest, tmp_path / "kept"), strict=True):
        assert torch.equal(item["mic_spectrum"], again["mic_spectrum"])


def test_whatever_spectra_depend_on_makes_new_ones(manifest: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"

    def count(**options: str) -> int:
        items_of(manifest, kept, **options)
        return len(list(kept.iterdir()))

    assert (count(), count(), count(window="hann"), count(preset="n512")) == (4, 4, 8, 12)
    assert count(preset="n480") == 16
    before = items_of(manifest, kept)[0]["mic_spectrum"]
    samples, _ = sf.read(tmp_path / "0_mic.wav")
    sf.write(tmp_path / "0_mic.wav", 0.5 * samples, RATE)
    assert count() == 17 and not torch.equal(items_of(manifest, kept)[0]["mic_spectrum"], before)
    os.utime(tmp_path / "1_farend.wav", ns=(0, 0))
    assert count() == 18
    rows = read_manifest(manifest)
    write_manifest(manifest, [row | {"offset": 0.001} for row in rows])
    assert count() == 22


def test_a_damaged_file_and_a_folder_that_cannot_be(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items_of(manifest, tmp_path / "kept")
    for content in (b"", b"\x93NUMPY damaged", b"no array"):
        for path in (tmp_path / "kept").iterdir():
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"kept/\w+\.npy: no spectra can be read from it \(.*\); remove it$"):
            items_of(manifest, tmp_path / "kept")
    with pytest.raises(DataError, match=r"data\.stft_cache=\S*calls\.jsonl: cannot be made \(File exists\)"):
        items_of(manifest, manifest)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"\.npy: cannot be written \(No space left on device\); make room or set"):
        items_of(manifest, tmp_path / "other")
    assert not any((tmp_path / "other").iterdir()), "nothing half-written"


def test_crops_have_no_spectra_to_keep(manifest: Path, tmp_path: Path) -> None:
    spectra = SpectrumCache(tmp_path, preset="n320", window="hann", sample_rate=RATE)
    with pytest.raises(ValueError, match="not of crops"):
        FixedEchoDataset([], sample_rate=RATE, segment_s=1.0, spectra=spectra)
    with pytest.raises(ValueError, match=r"data\.stft=n999: no such preset; choose from n320, n512, n480"):
        SpectrumCache(tmp_path, preset="n999", window="hann", sample_rate=RATE)


def test_refused_where_examples_are_made_or_cropped(manifest: Path, corpus: Path, tmp_path: Path) -> None:
    talkers, calls = str(corpus / "val.jsonl"), str(manifest)
    options = {"stft_cache": str(tmp_path / "kept"), "stft": "n320", "window": "hann", "train_manifest": talkers}
    made = (
        r"data\.stft_cache=\S*kept: {} examples are made anew, only recordings that are read whole .* set data\.stft_c"
    )
    for manifests, stage, says in (
        ({"val_manifest": talkers}, "train", made.format("val")),
        ({"val_manifest": talkers}, "val", made.format("val")),
        ({"val_manifest": calls, "test_manifest": talkers}, "train", made.format("test")),
        ({}, "train", "training examples are made or cropped anew"),
        ({"train_manifest": calls, "val_manifest": calls, "val_examples": 0}, "train", "made or cropped anew"),
    ):
        with pytest.raises(DataError, match=says):
            EchoData(**(options | manifests)).dataset(stage)
    data = EchoData(**options, val_manifest=calls)
    assert "mic_spectrum" not in data.dataset("train")[0] and "mic_spectrum" in data.dataset("val")[0]
    with pytest.raises(ValueError, match="stft_cache needs stft and window"):
        EchoData(stft_cache="x")
    with pytest.raises(ValueError, match="stft_cache must be a folder"):
        EchoData(stft_cache=True)


def test_a_run_scores_the_same_with_it(manifest: Path, corpus: Path, in_tmp: Path, script: Callable) -> None:
    typed = [*TINY_ECHO, f"data.train_manifest={corpus / 'train.jsonl'}", f"data.val_manifest={manifest}"]
    typed += [f"data.test_manifest={manifest}", "debug=fast", "data.eval_batch_size=2"]
    metrics = []
    for name, cache in (("without", "null"), ("with", "kept")):
        done = script("train", ["model=deepvqe", *typed, f"exp_manager.version={name}", f"data.stft_cache={cache}"])
        assert done.code == 0, done.text
        metrics.append(json.loads((in_tmp / "runs" / "deepvqe" / name / "summary.json").read_text())["metrics"])
    assert metrics[0] == metrics[1] and {"val_loss", "test_si_sdri_double_talk"} <= metrics[0].keys()
    assert len(list((in_tmp / "kept").iterdir())) == len(LENGTHS)
    typed = ["ckpt_path=runs/deepvqe/without", f"data.test_manifest={manifest}", "data.stft_cache=other"]
    done = script("evaluate", typed)
    assert done.code == 0 and len(list((in_tmp / "other").iterdir())) == len(LENGTHS), done.text
    typed = [*TINY_ECHO, f"data.train_manifest={manifest}", f"data.val_manifest={manifest}"]
    done = script("train", ["model=deepvqe", *typed, "data.stft_cache=kept", "data.stft=n320"])
    assert done.code == 2 and "data.stft=n320 differs from the system's n512: set model.stft" in done.text
