"""The loaders of echo recordings that benchmarks/peers.py compares, and the recordings: 48 kHz, as the AEC-Challenge's.

Both give batches of the same size in this process, without workers, each example with another crop each time.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from torch.utils.data import DataLoader

from benchmarks.peer_networks import Job, Sizes
from data.aec import EchoData
from data.audio import read_audio, write_audio
from data.convert import convert_manifests
from data.manifest import read_manifest, write_manifest

NATIVE_HZ, RATE_HZ = 48_000, 16_000
RECORDINGS, COPIES = "train.jsonl", "train_16k.jsonl"


def make_recordings(folder: Path, *, manifest: Path | None, count: int, seconds: float) -> None:
    """Microphones with their far end and near end, and copies of them at the network's rate.

    *manifest*: of talkers; None: noise in syllables.

    Raises DataError where the manifest cannot be used.
    """
    talkers = [] if manifest is None else read_manifest(manifest, required=("audio_filepath", "duration"))
    rng, rows, samples = np.random.default_rng(0), [], round(seconds * NATIVE_HZ)

    def talker(index: int) -> np.ndarray:
        if not talkers:
            beats = np.repeat(rng.random(round(8 * seconds) + 1), NATIVE_HZ // 8)[:samples]
            return (0.1 * beats * rng.standard_normal(samples)).astype(np.float32)
        speech = read_audio(talkers[index % len(talkers)]["audio_filepath"], sample_rate=NATIVE_HZ).numpy()
        return np.resize(speech, samples)

    for number in range(count):
        far, near = talker(2 * number), talker(2 * number + 1)
        signals = {"mic": near + 0.5 * np.roll(far, NATIVE_HZ // 10), "farend": far, "clean": near}
        for name, signal in signals.items():
            write_audio(folder / "recordings" / f"{number}_{name}.wav", 0.5 * signal, NATIVE_HZ, sixteen_bits=True)
        paths = {f"{name}_filepath": str(folder / "recordings" / f"{number}_{name}.wav") for name in signals}
        rows.append({**paths, "duration": seconds, "scenario": "double_talk", "delay_ms": 100.0})
    write_manifest(folder / RECORDINGS, rows)
    with contextlib.redirect_stdout(sys.stderr):  # it tells how far it is
        copies = convert_manifests(
            {"train": rows}, root=folder / "recordings", folder=folder / "copies", sample_rate=RATE_HZ
        )
    write_manifest(folder / COPIES, copies["train"])


def endless(loader: DataLoader) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def loader(side: str, sizes: Sizes, work: Path, device: str) -> Job:
    """The next batch. *sizes*: with `spectra` those of the three signals; ours then transforms the batch."""
    return Job(_ours(side, sizes, work) if side.startswith("ours") else _naive(sizes, work), {})


def _ours(side: str, sizes: Sizes, work: Path) -> Callable[[], Any]:
    from modules.stft import PRESETS, STFT

    data = EchoData(
        train_manifest=str(work / (COPIES if "copies" in side else RECORDINGS)),
        batch_size=sizes["batch"],
        segment_s=sizes["crop_s"],
        sample_rate=RATE_HZ,
        cache=False if "nothing kept" in side else "auto",  # in memory, as long as all recordings fit
        loader={"num_workers": 0},
    )
    data.setup("fit")
    batches = endless(data.train_dataloader())  # type: ignore[arg-type]
    _, n_fft, hop = PRESETS["n320"]
    stft = STFT(n_fft=n_fft, hop_samples=hop)

    def run() -> Any:
        batch = next(batches)
        if not sizes["spectra"]:
            return batch
        signals = torch.stack([batch[name] for name in ("mic", "far", "target")])
        return stft(signals.flatten(0, 1))

    return run


def _naive(sizes: Sizes, work: Path) -> Callable[[], Any]:
    from benchmarks.naive_aec_data import NaiveEchoDataset

    rows = read_manifest(work / RECORDINGS)
    assert sf.info(rows[0]["mic_filepath"]).samplerate == NATIVE_HZ
    dataset = NaiveEchoDataset(rows, sample_rate=RATE_HZ, segment_s=sizes["crop_s"], spectra=sizes["spectra"])
    batches = endless(DataLoader(dataset, batch_size=sizes["batch"], shuffle=True, drop_last=True))
    return lambda: next(batches)
