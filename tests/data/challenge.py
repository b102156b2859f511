"""A folder laid out as the AEC-Challenge, of a few recordings of half a second."""

import csv
from pathlib import Path

import numpy as np
import soundfile as sf

SCALE = 0.6
DELAY_S = 0.025
SPLITS = ("test", "test", "train", "train", "train", "train", "train", "train")
DEVICES = ("-aB_c", "b0", "c1", "d2")
TESTED = "d2"  # its recordings are in a test set too


def write(path: Path, samples: np.ndarray, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, samples, rate, subtype="PCM_16")


def call(seed: int, rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Far end, its echo DELAY_S later, near end. `(T,)` each"""
    far, near = 0.1 * np.random.default_rng(seed).standard_normal((2, rate // 2))
    shift = round(DELAY_S * rate)
    return far, 0.5 * np.concatenate([np.zeros(shift), far[:-shift]]), near


def write_table(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_synthetic(folder: Path, *, rate: int = 16000) -> None:
    rows = []
    for number, split in enumerate(SPLITS):
        far, echo, near = call(number, rate)
        write(folder / "farend_speech" / f"farend_speech_fileid_{number}.wav", far, rate)
        write(folder / "echo_signal" / f"echo_fileid_{number}.wav", echo, rate)
        write(folder / "nearend_speech" / f"nearend_speech_fileid_{number}.wav", near, rate)
        mic = (echo + SCALE * near)[:-1]  # one sample less, as the challenge has it
        write(folder / "nearend_mic_signal" / f"nearend_mic_fileid_{number}.wav", mic, rate)
        known = {"nearend_speaker": f"n{number // 2}", "farend_wav_path": "a, b.wav", "ser": number - 3}
        rows.append(known | {"split": split, "fileid": number, "nearend_scale": SCALE})
    write_table(folder / "meta.csv", rows)


def write_fullband(folder: Path, *, rate: int = 48000) -> None:
    rows = []
    for number in range(3):
        far, echo, near = call(50 + number, rate)
        signals = {"farend": far, "echo": echo, "nearend": near, "mic": echo + near, "target": near}
        for role, signal in signals.items():
            write(folder / f"f{number:05}_{role}.wav", signal, rate)
        rows.append({"file_id": f"f{number:05}", "ser": 3.5, "echo_delay": 1000 * DELAY_S + number})
    write_table(folder / "meta.csv", rows)


def write_real(folder: Path, *, rate: int = 16000) -> None:
    for number, device in enumerate(DEVICES):
        far, echo, near = call(80 + number, rate)
        for kind in ("farend_singletalk", "farend_singletalk_with_movement", "sweep"):
            write(folder / f"{device}_{kind}_mic.wav", echo, rate)
            write(folder / f"{device}_{kind}_lpb.wav", far, rate)
        write(folder / f"{device}_doubletalk_mic.wav", echo + near, rate)
        write(folder / f"{device}_doubletalk_lpb.wav", far, rate)
        write(folder / f"{device}_nearend_singletalk_mic.wav", near, rate)


def write_test_set(folder: Path, *, rate: int = 16000) -> None:
    far, echo, near = call(99, rate)
    signals = {"doubletalk": echo + near, "doubletalk-with-movement": echo + near}
    signals |= {"farend-singletalk": echo, "nearend-singletalk": near}
    for kind, mic in signals.items():
        inner = folder / kind.removesuffix("-with-movement")
        for role, signal in {"mic": mic, "lpb": far if "near" not in kind else 0 * far, "enrl": near}.items():
            write(inner / f"{TESTED}_{kind}_{role}.wav", signal, rate)


def write_challenge(folder: Path) -> Path:
    """The repository; returns its `datasets`."""
    datasets = folder / "datasets"
    write_synthetic(datasets / "synthetic")
    write_fullband(datasets / "synthetic_fullband")
    write_real(datasets / "real")
    write_test_set(datasets / "blind_test_set_icassp2023")
    write(folder / "baseline" / "clean" / "b0_doubletalk.wav", np.zeros(8), 16000)
    write(datasets / "._b0_doubletalk_mic.wav", np.zeros(8), 16000)
    (datasets / "RIRs").mkdir()
    return datasets
