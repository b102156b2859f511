"""docs/fine_tuning.md, carried out on words of tones: smaller networks, fewer steps, everything else as on the page."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data.manifest import write_manifest
from models.checkpoint import read_plain
from tests.pages import ROOT, blocks, commands, write_files

PAGE = blocks("fine_tuning.md")
ARCHIVE = ROOT / "tests" / "golden" / "nest" / "nemo_archive" / "tiny.nemo"
RATE, LETTER_S = 16000, 0.16
LETTERS_HZ = {"a": 300, "b": 700, "c": 1500, "d": 3100}
# Those of the archive: as the page says, sizes are typed for both trainings.
SIZES = [
    "model.encoder.d_model=16",
    "model.encoder.n_heads=2",
    "model.encoder.n_layers=1",
    "model.encoder.subsampling_conv_channels=8",
]
QUICK = ["trainer.accelerator=cpu", "data.loader.num_workers=0"]
TO_LEARN = [
    "model.answers_per_frame=2",
    "model.encoder.dropout=0",
    "model.optim.lr=2e-2",
    "model.optim.sched.warmup_steps=10",
    "trainer.check_val_every_n_epoch=5",
]


def spoken(rng: np.random.Generator, text: str) -> np.ndarray:
    """Each letter a tone, swelling and ceasing, in faint noise."""
    time = np.arange(round(LETTER_S * RATE)) / RATE
    tones = [0.3 * np.sin(2 * np.pi * LETTERS_HZ[letter] * time) * np.hanning(time.size) for letter in text]
    return np.concatenate(tones) + 0.003 * rng.standard_normal(len(text) * time.size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, an archive, and a demo_data/ of tones."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    write_files(PAGE, folder)
    shutil.copy(ARCHIVE, folder / "trained.nemo")
    rng = np.random.default_rng(0)
    words = map("".join, rng.permutation(list(itertools.product(LETTERS_HZ, repeat=5))))
    for split, count in {"train": 64, "val": 8, "test": 8}.items():
        rows = []
        for number, text in enumerate(itertools.islice(words, count)):
            file = folder / "demo_data" / f"{split}{number}.wav"
            file.parent.mkdir(exist_ok=True)
            soundfile.write(file, spoken(rng, text), RATE)
            rows.append({"audio_filepath": str(file), "duration": len(text) * LETTER_S, "text": text.upper()})
        write_manifest(folder / "demo_data" / f"{split}.jsonl", rows)
        write_manifest(folder / "demo_data" / f"noise_{split}.jsonl", rows[:1])
    return folder


@pytest.fixture(scope="module")
def pre_trained(folder: Path, script: Callable) -> Path:
    """The folder, in which the page's first command was run."""
    (name, arguments), *_ = commands(PAGE["commands"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = script(name, [*arguments, *SIZES, *QUICK, "trainer.max_steps=4", "trainer.val_check_interval=4"])
    assert done.code == 0, done.text
    return folder


@pytest.fixture
def run(
    pre_trained: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable[[tuple[str, list[str]], list[str]], str]:
    """Carries out a command of the page with further arguments; returns what it prints."""
    monkeypatch.chdir(pre_trained)
    monkeypatch.syspath_prepend(pre_trained)

    def carry_out(command: tuple[str, list[str]], more: list[str]) -> str:
        done = script(command[0], [*command[1], *more])
        assert done.code == 0, f"{command}\n{done.text}"
        return done.out

    return carry_out


def encoder(path: Path) -> dict[str, torch.Tensor]:
    """Its weights and statistics in a file, or at the end of the only run in a folder."""
    if path.is_dir():
        (path,) = path.glob("*/checkpoints/last.ckpt")
    state = read_plain(path)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("encoder.")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one and one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_the_encoder_learns_to_write(run: Callable, pre_trained: Path) -> None:
    _, tune, evaluate, predict = commands(PAGE["commands"])
    tune[1].append("model.alphabet=abcd")
    untrained = run(tune, [*SIZES, *QUICK, "trainer.max_steps=1", "exp_manager.version=untrained"])
    taken = [line for line in untrained.splitlines() if line.startswith(("init_from=", "  missing:", "  mismatched:"))]
    assert taken == [
        f"init_from=runs/nest_demo: {len(encoder(pre_trained / 'runs' / 'nest_demo'))} weights taken",
        "  missing: head.bias, head.weight, preprocessor.featurizer.fb, preprocessor.featurizer.window",
    ]
    run(tune, [*SIZES, *QUICK, *TO_LEARN, "trainer.max_steps=160", "exp_manager.version=trained"])
    before, after = (scores(pre_trained / "runs" / "ctc" / name) for name in ("untrained", "trained"))
    assert before["test_cer"] > 0.7
    assert after["test_cer"] < 0.3
    assert f"test_cer   {after['test_cer']:.4g}\n" in run(evaluate, QUICK)

    run(predict, ["device=cpu"])
    written = sorted((pre_trained / "transcripts").glob("*_transcript.json"))
    assert [file.name for file in written] == [f"test{number}_transcript.json" for number in range(8)]
    texts = [json.loads(file.read_text())["transcript"][0]["text"] for file in written]
    assert len(set(texts)) > 4 and set("".join(texts)) <= set(LETTERS_HZ)


def test_the_variants_keep_what_they_say(run: Callable, pre_trained: Path) -> None:
    archive, frozen, slower = commands(PAGE["variants"])
    still = ["model.optim.lr=0", "model.optim.sched.name=none", "trainer.max_steps=1", "exp_manager.name=archive"]
    run(archive, [*SIZES, *QUICK, *still])
    there, here = encoder(pre_trained / "trained.nemo"), encoder(pre_trained / "runs" / "archive")
    statistics = [name for name in there if ".batch_norm." in name]  # move without any rate
    assert same(*({k: v for k, v in state.items() if k not in statistics} for state in (there, here)))

    run(frozen, [*SIZES, *QUICK, "trainer.max_steps=4", "exp_manager.name=frozen"])
    assert same(encoder(pre_trained / "runs" / "nest_demo"), encoder(pre_trained / "runs" / "frozen"))

    run(slower, [*SIZES, *QUICK, "trainer.max_steps=4", "exp_manager.name=slower", "exp_manager.version=one"])
    saved = read_plain(pre_trained / "runs" / "slower" / "one" / "checkpoints" / "last.ckpt")
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-3, 1e-4]
    assert not same(encoder(pre_trained / "runs" / "nest_demo"), encoder(pre_trained / "runs" / "slower"))


def test_mistakes_are_told(run: Callable, script: Callable, pre_trained: Path) -> None:
    _, tune, *_ = commands(PAGE["commands"])
    told = run(tune, [*SIZES, *QUICK, "model.encoder.d_model=24", "dry_run=true"])
    assert "  mismatched: encoder.layers.0.conv.batch_norm.bias" in told
    done = script("train", [*tune[1], *SIZES, *QUICK, "model.alphabet=abc"])
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("error: train.jsonl, line ") and "'d' of its text is not in model.alphabet" in line


def test_pre_training_goes_on(run: Callable, pre_trained: Path) -> None:
    restored, other = commands(PAGE["further"])
    told = run(restored, [*QUICK, "trainer.max_steps=1", "model.train_ds.min_duration=0.5", "exp_manager.version=one"])
    assert "model.restore_from=trained.nemo: its architecture is taken, " in told and "model.encoder.d_model=16" in told
    told = run(other, [*SIZES, *QUICK, "trainer.max_steps=1", "exp_manager.version=one"])
    assert "  missing: decoder." in told and "mismatched" not in told
