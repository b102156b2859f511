"""Self-supervised acceptance: what hears only the channel is at chance in the probe, and what a seed has is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from benchmarks import accept_nest, training
from benchmarks.accept import HERE, mean_and_error
from benchmarks.accept_nest import (
    BEST_CONSTANT,
    CHANCE,
    CONSTANT,
    LOG_MEL,
    OURS,
    REPEAT,
    UNTRAINED,
    encoder_layers,
    last_visible,
    log_mel,
    report,
    score_masked,
    split,
    start_seed,
)
from benchmarks.speaker_probe import accuracies, log_probabilities, read_segments
from data.audio import write_audio
from data.manifest import read_manifest, write_manifest
from models.nest import NEST

RATE = 16000
PROTOCOL = yaml.safe_load((HERE / "protocols" / "nest.yaml").read_text()) | {"recipe": "x"}
PROBE = PROTOCOL["probe"] | {"segment_s": 0.5, "draws": [5, 4], "num_rooms": 2}
TALKERS = 8
TINY = {
    "num_classes": 8,
    "num_books": 2,
    "masking": {"mask_prob": 0.02},
    "encoder": {"d_model": 16, "n_heads": 2, "n_layers": 2, "subsampling_conv_channels": 4},
}


def recordings(folder: Path, halves: list[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    """A manifest's rows: each talker's first and second half."""
    for talker, parts in enumerate(halves):
        write_audio(folder / f"t{talker}.wav", np.concatenate(parts).astype(np.float32), RATE)
    rows = [
        {"audio_filepath": f"t{talker}.wav", "duration": sum(map(len, parts)) / RATE, "speaker": f"t{talker}"}
        for talker, parts in enumerate(halves)
    ]
    write_manifest(folder / "speech.jsonl", rows)
    return read_manifest(folder / "speech.jsonl")


def noise(seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(RATE)


def tone(talker: int) -> np.ndarray:
    return 0.2 * np.sin(2 * np.pi * (500 + 150 * talker) * np.arange(RATE) / RATE)


def probe(folder: Path, halves: list[tuple[np.ndarray, np.ndarray]], features: Any = None) -> tuple[float, float]:
    """Accuracy and its standard error over the talkers."""
    train, test = read_segments(recordings(folder, halves), PROBE, sample_rate=RATE)
    assert train.audio.shape == (TALKERS * 2 * 5, RATE // 2) and test.audio.shape == (TALKERS * 2 * 4, RATE // 2)
    return mean_and_error(accuracies(features or log_mel(RATE), train, test))


def test_what_hears_only_the_channel_is_at_chance(in_tmp: Path) -> None:
    """All talkers say the same, and the features show the channel as clearly as can be."""
    mean, error = probe(in_tmp, [(noise(0), noise(1))] * TALKERS)
    assert mean < 1 / TALKERS + 3 * error and mean < 0.3


def test_nothing_of_a_first_half_is_in_a_second_half(in_tmp: Path) -> None:
    """Talkers differ in their first halves only."""
    mean, error = probe(in_tmp, [(tone(talker), noise(1)) for talker in range(TALKERS)])
    assert mean < 1 / TALKERS + 3 * error and mean < 0.3


def test_what_knows_the_talker_is_right_whatever_the_channel(in_tmp: Path) -> None:
    def pitch(audio: Tensor) -> Tensor:
        return torch.fft.rfft(audio).abs().argmax(1).float()[:, None, None]

    halves = [(tone(talker) + 0.1 * noise(2), tone(talker) + 0.1 * noise(3)) for talker in range(TALKERS)]
    assert probe(in_tmp, halves, pitch)[0] > 0.95


def test_every_segment_has_a_channel_and_every_half_has_rooms_of_its_own(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, keys, default_rng = recordings(in_tmp, [(noise(0), noise(0))] * 2), [], np.random.default_rng

    def watched(key: list[int]) -> np.random.Generator:
        keys.append(tuple(key))
        return default_rng(key)

    monkeypatch.setattr(np.random, "default_rng", watched)
    train, test = read_segments(rows, PROBE, sample_rate=RATE)
    audio = torch.cat([train.audio, test.audio])
    assert len(audio) < len(keys) == len(set(keys)), "as many channels as signals, and rooms"
    level_db = 20 * audio.square().mean(1).sqrt().log10()
    torch.testing.assert_close(level_db, torch.full_like(level_db, -25.0), atol=1e-3, rtol=0)
    assert torch.equal(read_segments(rows, PROBE, sample_rate=RATE)[1].audio, test.audio)


def test_a_recording_too_short_is_one_line(in_tmp: Path) -> None:
    rows = recordings(in_tmp, [(noise(0), noise(1))] * 2)
    with pytest.raises(SystemExit, match=r"speech.jsonl, line 1: .*t0.wav: shorter than two segments of 1.5 s"):
        read_segments(rows, PROBE | {"segment_s": 1.5}, sample_rate=RATE)


def test_discriminants_find_what_is_hidden_by_a_common_spread() -> None:
    """Classes that lie close in a direction of little spread, beside one of much."""
    generator = torch.Generator().manual_seed(0)
    speaker = torch.arange(3).repeat(40)
    place = torch.arange(120) // 3 % 4
    features = torch.randn(120, 2, generator=generator).double() * torch.tensor([10.0, 0.1])
    features = torch.stack([features[:, 0] + features[:, 1] + speaker, features[:, 0]], 1)
    half = slice(0, 60), slice(60, 120)
    found = log_probabilities(features[half[0]], speaker[half[0]], place[half[0]], features[half[1]])
    assert (found.argmax(1) == speaker[half[1]]).double().mean() > 0.95
    torch.testing.assert_close(found.exp().sum(1), torch.ones(60).double())


def test_features_of_all_layers_without_padding() -> None:
    torch.manual_seed(0)
    system = NEST(**TINY).eval()
    audio = torch.randn(3, 8000)
    with torch.inference_mode():
        features = encoder_layers(system)(audio)
        encoded, length = system.encode(audio, torch.tensor([8000] * 3))
    assert features.shape == (3, 2, 32) and not any(layer._forward_hooks for layer in system.encoder.layers)
    assert int(length[0]) < encoded.shape[2], "there is padding to leave out"
    torch.testing.assert_close(features[:, -1, :16], encoded[..., : int(length[0])].mean(2))


def test_the_last_visible_token() -> None:
    tokens = torch.arange(12).view(6, 2)
    visible = torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    assert last_visible(tokens, visible, torch.zeros(2))[:, 0].tolist() == [2, 2, 2, 2, 8, 8]
    assert last_visible(tokens, ~visible | visible, tokens[0]).equal(tokens)
    assert last_visible(tokens, visible & ~visible, tokens[3])[:, 1].tolist() == [7] * 6


@pytest.fixture
def masked(in_tmp: Path) -> Path:
    """Manifests of training and test."""
    rng = np.random.default_rng(0)
    envelope = np.exp(np.repeat(rng.uniform(-4, 0, 20), RATE // 10))
    rows = recordings(in_tmp, [(envelope * np.tile(noise(2 * t), 2), np.tile(noise(9), 2)) for t in range(4)])
    write_manifest(in_tmp / "train.jsonl", rows[:2])
    write_manifest(in_tmp / "test.jsonl", [row | {"id": row["speaker"]} for row in rows[2:]] * 3)
    return in_tmp


def test_an_oracle_is_always_right_and_a_constant_is_a_constant(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    system, own_step = NEST(**TINY).eval(), NEST.step

    def oracle(batch: dict[str, Any]) -> dict[str, Tensor]:
        output = own_step(system, batch)
        certain = torch.nn.functional.one_hot(output["tokens"], 8).transpose(2, 3).float()  # (B, T, C, N)
        return output | {"log_probs": (certain + 1e-9).log()}

    monkeypatch.setattr(system, "step", oracle)
    scores, tokens = score_masked(system, {}, masked)
    assert scores[OURS] == [100, 100] and tokens["accuracy"] == 1
    assert all(0 <= value < 100 for name in (CONSTANT, BEST_CONSTANT, REPEAT) for value in scores[name])
    assert 1 < tokens["codebook_perplexity"] <= 8 and tokens["masked_share"] > 0

    monkeypatch.setattr(system, "step", lambda batch: own_step(system, batch))
    with torch.no_grad():
        system.decoder.decoder_layers[0].weight.zero_()
        counts = torch.zeros(2, 8, dtype=torch.long)
        for _, output in accept_nest.evaluated(system, {}, masked / "train.jsonl"):
            counts += accept_nest.histogram(output["tokens"][output["valid"]], 8)
        system.decoder.decoder_layers[0].bias.copy_(counts.double().softmax(1).T.flatten())  # class by class
    scores, again = score_masked(system, {}, masked)
    assert scores[OURS] == scores[CONSTANT], "it says the commonest token of training"
    assert again["codebook_perplexity"] == tokens["codebook_perplexity"], "the same noise and masks each time"


def test_talkers_are_held_out(in_tmp: Path) -> None:
    rows = [{"audio_filepath": f"{n}.wav", "duration": 4.0, "speaker": f"s{n}"} for n in range(142)]
    write_manifest(in_tmp / "speech.jsonl", rows)
    parts = split(PROTOCOL, in_tmp / "speech.jsonl")
    names = {part: [row["speaker"] for row in found] for part, found in parts.items()}
    assert names["test"] == [f"s{n}" for n in range(112, 142)] and len(names["val"]) == 8
    assert sorted(sum(names.values(), [])) == sorted(row["speaker"] for row in rows)
    write_manifest(in_tmp / "speech.jsonl", [*rows[:50], rows[0]])
    with pytest.raises(SystemExit, match="one recording per talker"):
        split(PROTOCOL, in_tmp / "speech.jsonl")
    write_manifest(in_tmp / "speech.jsonl", rows[:39])
    with pytest.raises(SystemExit, match=r"speech.jsonl: 39 talkers are too few for 8 \+ 30"):
        split(PROTOCOL, in_tmp / "speech.jsonl")


def test_seeds_share_a_plan_and_one_that_was_interrupted_continues(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class FakeProcess:
        def __init__(self, typed: list[str], **_: Any) -> None:
            started.append(typed)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(training, "_start_train", FakeProcess)
    monkeypatch.setattr(training.clock, "cpu_seconds", iter([0.0, 5.0, 5.0, 45.0]).__next__)
    parts = {name: [{"audio_filepath": "a.wav", "duration": 4.0, "speaker": "s"}] for name in ("train", "val", "test")}
    for seed in (1, 2, 1):
        begun = start_seed(PROTOCOL, in_tmp / "m.jsonl", parts, seed, in_tmp)
        assert begun.calibration_s == 45.0 and begun.folder == in_tmp / f"seed{seed}" / "ours"
    calibrations, trainings = started[:2], started[2:]
    assert [f"trainer.max_steps={steps}" in typed for steps, typed in zip((5, 40), calibrations, strict=True)] == [
        True
    ] * 2
    assert len(trainings) == 3 and all("exp_manager.resume_if_exists=true" in typed for typed in trainings)
    assert trainings[0] == trainings[2] and "seed=2" in trainings[1]
    assert f"trainer.max_steps={begun.planned}" in trainings[0]
    with pytest.raises(SystemExit, match=r"plan.json: of another protocol"):
        start_seed(PROTOCOL | {"cpu_minutes": 3}, in_tmp / "m.jsonl", parts, 1, in_tmp)


def test_report(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    rows = [{"audio_filepath": f"{n}.wav", "duration": 4.0, "speaker": f"s{n}"} for n in range(42)]
    write_manifest(in_tmp / "speech.jsonl", rows)

    class Training:
        def finish(self) -> tuple[Path, dict[str, Any]]:
            return in_tmp, {}

    def start_seed(protocol: Any, manifest: Path, parts: Any, seed: int, work: Path) -> Training:
        (work / f"seed{seed}").mkdir(parents=True)
        return Training()

    def score_seed(protocol: Any, parts: Any, seed: int, checkpoint: Path, folder: Path) -> dict[str, Any]:
        wobble = [seed + 0.5 * (-1) ** talker for talker in range(30)]

        def scores(**levels: float) -> dict[str, list[float]]:
            return {OURS: [20 + w for w in wobble]} | {name: [level] * 30 for name, level in levels.items()}

        return {
            "accuracy": scores(**{CONSTANT: 15.0, BEST_CONSTANT: 15.5, REPEAT: 23.0}),
            "probe": scores(**{UNTRAINED: 16.5, LOG_MEL: 60.0}),
            "tokens": {"codebook_perplexity": 60.0, "codebook_usage": 0.9, "masked_share": 0.4},
        }

    monkeypatch.setattr(accept_nest, "start_seed", start_seed)
    monkeypatch.setattr(accept_nest, "score_seed", score_seed)
    text, result = report(PROTOCOL, in_tmp / "speech.jsonl", in_tmp)
    assert "goal: Masked accuracy, ours minus training's commonest token: +7.00 +- 0.09 (over seeds +- 0.58)" in text
    assert [line.rsplit(": ", 1)[1] for line in text.splitlines() if line.startswith("goal:")] == [
        "reached", "reached", "missed", "reached",
    ]  # fmt: skip
    assert "ours minus log-mel mean + std: -38.00" in text and "seed 3: codebook perplexity 60.0" in text
    assert list(result["probe"]) == ["seed 1", "seed 2", "seed 3", "all seeds"] and json.dumps(result)
    monkeypatch.setattr(accept_nest, "start_seed", None)
    assert report(PROTOCOL, in_tmp / "speech.jsonl", in_tmp)[0] == text, "not run again"
    assert capsys.readouterr().out.count("seed 2 …") == 1
    write_manifest(in_tmp / "others.jsonl", rows[::-1])
    with pytest.raises(SystemExit, match=r"result.json: of another protocol"):
        report(PROTOCOL, in_tmp / "others.jsonl", in_tmp)
    with pytest.raises(SystemExit, match=r"result.json: of another protocol"):
        report(PROTOCOL | {"mask_draws": 1}, in_tmp / "speech.jsonl", in_tmp)


def test_protocol_is_frozen() -> None:
    fixed = {"num_test_speakers": 30, "train_seeds": [1, 2, 3], "cpu_minutes": 20, "experiment": "nest_demo"}
    assert {name: PROTOCOL[name] for name in fixed} == fixed
    assert PROTOCOL["goals"] == {"accuracy_errors": 3.0, "probe_points": 5.0}


@pytest.mark.slow
def test_a_small_acceptance_run(in_tmp: Path) -> None:
    """The whole of a seed with its training, on noises."""
    rows = recordings(in_tmp, [(np.tile(noise(n), 2), np.tile(noise(n + 60), 2)) for n in range(54)])
    write_manifest(in_tmp / PROTOCOL["manifest"], rows)
    write_audio(in_tmp / "noise.wav", noise(99).astype(np.float32), RATE)
    write_manifest(in_tmp / PROTOCOL["noise_manifest"], [{"audio_filepath": "noise.wav", "duration": 1.0}])
    protocol = PROTOCOL | {"train_seeds": [1], "cpu_minutes": 1.5}
    _, result = report(protocol, in_tmp / PROTOCOL["manifest"], in_tmp / "work")
    (seed,) = result["seeds"].values()
    assert 0 < seed["training"]["steps"] <= seed["training"]["planned_steps"]
    assert set(seed["probe"]) == {OURS, UNTRAINED, LOG_MEL, CHANCE}
    assert all(len(values) == 30 for measure in ("accuracy", "probe") for values in seed[measure].values())
