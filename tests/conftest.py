"""What many tests need: a small corpus of "speech", a way to run a script as a shell would, a trained checkpoint."""

import argparse
import contextlib
import importlib
import io
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks are slowed down by more; before torch is imported

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data.manifest import write_manifest
from launch import job
from tests.faults.summary import summary as faults_summary
from tests.golden_suite.suite import summary as golden_summary

# The first backward of a process counts its devices. Behind an export it would find more than there are, start a thread
# for each, and no later test could fork a training.
torch.ones((), requires_grad=True).backward()

RATE = 8000
# Columns of metrics.csv that no two runs share, be they ever so alike.
OF_THE_MACHINE = {"examples_per_s", "data_wait_share", "step_s", "cpu_load", "host_mem_mb", "cpu_s",
                  "low_rank_step_s_before", "low_rank_step_s_after",
                  *(f"{name}_timing in s" for name in ("train_step", "train_backward", "validation_step", "test_step"))
                 }  # fmt: skip
# A network of a few hundred weights: what is tested is the framework around it.
TINY = [
    "model.num_filters=16",
    "model.bottleneck_channels=8",
    "model.hidden_channels=16",
    "model.skip_channels=8",
    "model.num_blocks=2",
    "model.num_repeats=1",
    "data.segment_s=0.25",
    "data.eval_segment_s=0.5",
    "data.train_mixtures=64",
    "data.val_mixtures=4",
    "data.test_mixtures=4",
    "data.loader.num_workers=0",
    "trainer.accelerator=cpu",
]

TINY_ECHO = [
    "model.stft=n512",
    "model.mic_channels=[4,4]",
    "model.far_channels=[4]",
    "model.decoder_channels=[4]",
    "model.gru_hidden=8",
    "model.align.hidden_channels=4",
    "model.align.max_delay_ms=200",
    "data.num_rooms=2",
    "data.segment_s=0.5",
    "data.eval_segment_s=0.5",
    "data.train_examples=32",
    "data.val_examples=4",
    "data.test_examples=4",
    "data.batch_size=2",
    "data.loader.num_workers=0",
    "trainer.accelerator=cpu",
]

TINY_NEST = [
    "model.num_classes=16",
    "model.encoder.d_model=16",
    "model.encoder.n_heads=2",
    "model.encoder.n_layers=2",
    "model.encoder.subsampling_conv_channels=4",
    "model.train_ds.min_duration=0.1",
    "model.validation_ds.min_duration=0.1",
    "model.train_ds.batch_size=4",
    "model.validation_ds.batch_size=4",
    "model.masking.mask_prob=0.05",
    "data.loader.num_workers=0",
    "trainer.accelerator=cpu",
]

TINY_UNET = [
    "model.base_channels=4",
    "model.depth=3",
    "data.crop=32",
    "data.synthesis_size=64",
    "data.train_examples=16",
    "data.val_examples=4",
    "data.test_examples=4",
    "data.batch_size=4",
    "data.loader.num_workers=0",
    "trainer.accelerator=cpu",
]


def _existing_folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {text}")
    return str(Path(text).resolve())


def pytest_addoption(parser: pytest.Parser) -> None:
    folder = Path(__file__).parent / "golden"
    parser.addoption("--golden-dir", type=_existing_folder, default=str(folder), help="golden files, one folder each")
    parser.addoption("--system", default=None, help="golden cases of this system only")


@dataclass
class Finished:
    """What a shell would see of a command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def run_script(script: str, arguments: list[str] | str) -> Finished:
    """`python <script>.py <arguments>` in this process, from the current folder."""
    main = importlib.import_module(script).main
    argv = shlex.split(arguments) if isinstance(arguments, str) else list(arguments)
    out, err = io.StringIO(), io.StringIO()
    handlers = logging.getLogger().handlers[:]
    typed = sys.argv[:]
    sys.argv = [f"{script}.py"]
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = job.exit_code(main, script, argv)
    finally:
        sys.argv = typed
        torch.set_num_threads(threads)
        for handler in logging.getLogger().handlers:
            if handler not in handlers:
                handler.close()
        logging.getLogger().handlers = handlers
    return Finished(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def script() -> Callable[[str, list[str] | str], Finished]:
    return run_script


def synthetic_speech(rng: np.random.Generator, seconds: float, pitch_hz: float) -> np.ndarray:
    """Harmonics of a wavering pitch in syllables of noise-like length: cheap, and never silent for long."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch_hz * (1 + 0.05 * np.sin(2 * np.pi * 3 * time))) / RATE
    tone = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 8))
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(2, 5) * time + rng.uniform(0, 6))
    return (0.1 * tone * syllables + 0.001 * rng.standard_normal(time.size)).astype(np.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speech of nine talkers, a noise and a room's two responses, with manifests named as those of the demo corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for talker in range(9):
        split = ("train", "val", "test")[max(0, talker - 3) // 2 if talker > 4 else 0]
        for number in range(2):
            file = folder / "speech" / f"talker{talker}" / f"{number}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, synthetic_speech(rng, 1.0, 90 + 20 * talker), RATE)
            rows[split].append({"audio_filepath": str(file), "duration": 1.0, "speaker": f"talker{talker}"})
    response = np.zeros(800, np.float32)
    response[[20, 300]] = 1.0, 0.3
    sounds = {"noise": 0.1 * rng.standard_normal(2 * RATE), "talker": response, "loudspeaker": np.roll(response, -15)}
    for name, signal in sounds.items():
        soundfile.write(folder / f"{name}.wav", signal, RATE)
    noise = {"audio_filepath": str(folder / "noise.wav"), "duration": 2.0}
    responses = [
        {"audio_filepath": str(folder / f"{kind}.wav"), "duration": 0.1, "room": "a", "kind": kind}
        for kind in ("talker", "loudspeaker")
    ]
    for split, lines in rows.items():
        write_manifest(folder / f"{split}.jsonl", lines)
        write_manifest(folder / f"noise_{split}.jsonl", [noise])
        write_manifest(folder / f"rir_{split}.jsonl", responses)
    return folder


@pytest.fixture(scope="session")
def manifests(corpus: Path) -> list[str]:
    """Overrides that name the corpus's manifests."""
    return [f"data.{split}_manifest={corpus / f'{split}.jsonl'}" for split in ("train", "val", "test")]


@pytest.fixture(scope="session")
def trained(manifests: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny separator that was trained for four steps, validated and tested."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        done = run_script("train", ["model=conv_tasnet", "debug=fast", "exp_manager.version=one", *TINY, *manifests])
    assert done.code == 0, done.text
    return folder / "runs" / "conv_tasnet" / "one"


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mics/<n>_mic.wav, loopback/<n>_lpb.wav and clean/<n>.wav of two calls, and echo.jsonl that lists them.

    far_end.jsonl lists them as far-end single talk.
    """
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(1)
    rows = []
    for number in range(2):
        far, near = (synthetic_speech(rng, 1.0, pitch) for pitch in (100 + 30 * number, 210))
        mic = near + 0.5 * np.concatenate([np.zeros(400, np.float32), far[:-400]])  # 50 ms later
        names = {
            "mic": f"mics/{number}_mic.wav",
            "farend": f"loopback/{number}_lpb.wav",
            "clean": f"clean/{number}.wav",
        }
        for (key, name), signal in zip(names.items(), (mic, far, near), strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            soundfile.write(folder / name, signal, RATE)
            names[key] = str(folder / name)
        files = {f"{key}_filepath": name for key, name in names.items()}
        rows.append({"id": f"call{number}", "scenario": "double_talk", "duration": 1.0, "delay_ms": 50.0, **files})
    write_manifest(folder / "echo.jsonl", rows)
    write_manifest(folder / "far_end.jsonl", [row | {"scenario": "far_end"} for row in rows])
    return folder


@pytest.fixture(scope="session")
def trained_echo(manifests: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny echo canceller that was trained for four steps, validated and tested."""
    folder = tmp_path_factory.mktemp("trained_echo")
    with contextlib.chdir(folder):
        done = run_script("train", ["model=deepvqe", "debug=fast", "exp_manager.version=one", *TINY_ECHO, *manifests])
    assert done.code == 0, done.text
    return folder / "runs" / "deepvqe" / "one"


@pytest.fixture(scope="session")
def trained_nest(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny NEST that was trained for two steps, validated and tested."""
    parts = {"train": "train", "val": "validation", "test": "test"}
    named = [f"model.{ds}_ds.manifest_filepath={corpus / f'{part}.jsonl'}" for part, ds in parts.items()]
    typed = [*named, "trainer.max_steps=2", "exp_manager.version=one"]
    folder = tmp_path_factory.mktemp("trained_nest")
    with contextlib.chdir(folder):
        done = run_script("train", ["model=nest", *TINY_NEST, *typed])
    assert done.code == 0, done.text
    return folder / "runs" / "nest" / "one"


def painted_photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth gradient with a few rectangles and some grain. uint8 (H, W, 3)"""
    ends = rng.integers(40, 216, (2, 3))
    photo = ends[0] + (ends[1] - ends[0]) * np.linspace(0, 1, width)[None, :, None] * np.ones((height, 1, 1))
    for _ in range(4):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        photo[top : top + rng.integers(8, height), left : left + rng.integers(8, width)] = rng.integers(0, 256, 3)
    return (photo + rng.normal(0, 3, photo.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ to draw marks on, {train,val,test}.jsonl; images/ with masks/, masked.jsonl; damaged/, 1.png is empty."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(2)
    rows: dict[str, list[dict]] = {"train": [], "val": [], "test": [], "masked": []}
    for name in ("photos", "images", "masks"):
        (folder / name).mkdir()
    for number in range(8):
        photo = painted_photo(rng, 80 + 4 * number, 96)
        file = folder / "photos" / f"{number}.png"
        Image.fromarray(photo).save(file)
        rows["train" if number < 4 else "val" if number < 6 else "test"].append({"image_filepath": str(file)})
    for number in range(3):
        photo, mask = painted_photo(rng, 72, 88 + 8 * number), np.zeros((72, 88 + 8 * number), np.uint8)
        mask[30:40, 10:60:5] = 255
        photo[mask == 255] = 255
        files = {
            "image_filepath": folder / "images" / f"{number}.png",
            "mask_filepath": folder / "masks" / f"{number}.png",
        }
        for file, pixels in zip(files.values(), (photo, mask), strict=True):
            Image.fromarray(pixels).save(file)
        rows["masked"].append({key: str(file) for key, file in files.items()})
    for name, lines in rows.items():
        write_manifest(folder / f"{name}.jsonl", lines)
    shutil.copytree(folder / "images", folder / "damaged")
    (folder / "damaged" / "1.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="session")
def trained_unet(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny UNet that was trained for two steps, validated and tested."""
    named = [f"data.{part}_manifest={photos / f'{part}.jsonl'}" for part in ("train", "val", "test")]
    typed = [*named, "trainer.max_steps=2", "exp_manager.version=one"]
    folder = tmp_path_factory.mktemp("trained_unet")
    with contextlib.chdir(folder):
        done = run_script("train", ["model=unet", *TINY_UNET, *typed])
    assert done.code == 0, done.text
    return folder / "runs" / "unet" / "one"


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test run under a job scheduler must not be taken for one of its ranks."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_JOB_ID", "RUN_STAMP"):
        monkeypatch.delenv(name, raising=False)
    assert os.environ.get("RUN_STAMP") is None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Commands of tests/commands that are held and that wait for their issue; golden cases and their errors; faults."""
    lines = [
        line
        for file in sorted((Path(__file__).parent / "commands").glob("*.txt"))
        for line in file.read_text().splitlines()
        if line[:1].isdigit()
    ]
    pending = sum(bool(re.match(r"\d+\s+(run\s+)?#\d+", line)) for line in lines)
    terminalreporter.write_line(f"commands: {len(lines) - pending} held, {pending} pending")
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    properties = [named for report in reports for named in report.user_properties]
    counts = [value for name, value in properties if name == "malformed"]
    if counts:
        terminalreporter.write_line(f"malformed inputs: {sum(counts)} of {len(counts)} kinds, all reported")
    for line in (*golden_summary(value for name, value in properties if name == "golden"), *faults_summary(properties)):
        terminalreporter.write_line(line)
