"""What many tests need: a small corpus of "speech", a way to run a script as a shell would, a trained checkpoint."""

import argparse
import contextlib
import importlib
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks are slowed down by more; before torch is imported

import numpy as np
import pytest
import soundfile
import torch

from data.manifest import write_manifest
from launch import job
from tests.golden_suite.suite import summary as golden_summary

RATE = 8000
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
    """mics/<n>_mic.wav, loopback/<n>_lpb.wav and clean/<n>.wav of two calls, and echo.jsonl that lists them."""
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
    """Commands of tests/commands that are held and that wait for their issue; golden cases and their errors."""
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
    for line in golden_summary(value for name, value in properties if name == "golden"):
        terminalreporter.write_line(line)
