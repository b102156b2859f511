"""The comparison with others: what it compares is the same computation, and its table says what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.naive_aec_data import NaiveEchoDataset
from benchmarks.naive_deepvqe import NaiveAlignment, NaiveDeepVQE, weights_of
from benchmarks.naive_unet import NaiveUNet
from benchmarks.peer_loader import loader, make_recordings
from benchmarks.peer_networks import BUILDERS
from data.demo_sounds import shaped_noise
from data.manifest import write_manifest
from models.unet import UNet
from modules.alignment import SoftAlignment
from modules.deepvqe import DeepVQE
from modules.stft import STFT

NETWORK: dict[str, Any] = {
    "num_bins": 33,
    "mic_channels": (4, 6, 8),
    "far_channels": (3, 5),
    "decoder_channels": (7, 6),
    "gru_hidden": 12,
    "align_hidden": 4,
    "max_delay_frames": 7,
}


def quick(pair: str) -> dict[str, Any]:
    return peers.PAIRS[pair].sizes | peers.PAIRS[pair].quick


def test_the_literal_deepvqe_is_ours() -> None:
    torch.manual_seed(0)
    ours, literal = DeepVQE(**NETWORK, init_identity=False), NaiveDeepVQE(**NETWORK)
    literal.load_state_dict(weights_of(ours.state_dict(), literal))
    mic, far = torch.randn(2, 33, 20, 2), torch.randn(2, 33, 20, 2)
    for own, theirs in zip(ours(mic, far), literal(mic, far), strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


def test_the_literal_alignment_is_ours_and_so_are_its_gradients() -> None:
    torch.manual_seed(0)
    ours = SoftAlignment(mic_channels=6, far_channels=5, hidden_channels=4, max_delay_frames=7)
    literal = NaiveAlignment(6, 5, 4, 7)
    literal.load_state_dict(weights_of(ours.state_dict(), literal))
    mic, far, weights = torch.randn(2, 6, 20, 9), torch.randn(2, 5, 20, 9), torch.randn(2, 5, 20, 9)
    gradients = []
    for module in (ours, literal):
        inputs = mic.clone().requires_grad_(), far.clone().requires_grad_()
        aligned, distribution = module(*inputs)
        gradients.append((aligned, distribution, *torch.autograd.grad((aligned * weights).sum(), inputs)))
    for own, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


def test_the_plain_unet_is_ours() -> None:
    torch.manual_seed(0)
    ours, plain = UNet(base_channels=8, up="transposed"), NaiveUNet(base_channels=8)
    names = ours.network.state_dict()
    ours.network.load_state_dict(dict(zip(names, plain.state_dict().values(), strict=True)))
    image = torch.rand(2, 3, 45, 70)
    torch.testing.assert_close(ours(image), plain(image), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pair, peer", [("conv_tasnet", "torchaudio"), ("unet", "plain UNet"), ("deepvqe", "literal")])
def test_both_sides_begin_with_one_loss_and_learn(pair: str, peer: str, tmp_path: Path) -> None:
    jobs = [BUILDERS[pair](side, quick(pair), tmp_path, "cpu") for side in (peer, "ours")]
    first = [job.losses[peer] for job in jobs]
    assert first[0] == pytest.approx(first[1], abs=1e-4)
    for loss, job in zip(first, jobs, strict=True):
        assert float(job.run()) == pytest.approx(loss, abs=1e-4)  # the first step's, as was told
        assert float([job.run() for _ in range(3)][-1]) < loss


def test_loaders_hand_over_the_same_kind_of_batch(tmp_path: Path) -> None:
    sizes = quick("aec_loader")
    make_recordings(tmp_path, manifest=None, count=sizes["recordings"], seconds=sizes["recording_s"])
    for side in peers.PAIRS["aec_loader"].sides:
        batch = loader(side, sizes, tmp_path, "cpu").run()
        assert {name: batch[name].shape for name in ("mic", "far", "target")} == dict.fromkeys(
            ("mic", "far", "target"), (2, 8000)
        )
        assert 0.005 < float(batch["mic"].std()) < 0.1  # sound, and about as loud on all sides
        spectra = loader(side, sizes | {"spectra": True}, tmp_path, "cpu").run()
        total = sum(value.numel() for value in (spectra.values() if isinstance(spectra, dict) else [spectra]))
        assert total == 6 * 161 * 51 * 2
    dataset = NaiveEchoDataset([], sample_rate=16000, segment_s=0.5, spectra=True)
    signal = torch.randn(8000)
    torch.testing.assert_close(dataset.spectrum(signal), STFT(n_fft=320, hop_samples=160)(signal[None])[0])


def test_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "peers.json"
    assert peers.main(["--quick", "--only", "deepvqe_alignment", "--output", str(output)]) == 0
    row = json.loads(output.read_text())["pairs"]["deepvqe_alignment"]["rows"][0]
    assert (row["ours"], row["peer"]) == ("ours", "literal") and row["loss_difference"] < 1e-5
    assert min(row[key] for key in ("time_ratio", "ours_s", "peer_s", "memory_ratio", "ours_mib", "peer_mib")) > 0
    printed = capsys.readouterr().out
    assert "make peers" in printed.splitlines()[0] and "| deepvqe_alignment | ours | literal |" in printed
    assert printed == output.with_suffix(".md").read_text().replace("\n\n", "\n", 1)


def test_without_the_peers_the_others_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--only", "nest", "--python", str(tmp_path / "python")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no row" in line]
    assert line == f"* nest: no row for NeMo: {tmp_path / 'python'} is not there (make peers)"


class FakeSide(peers.Side):
    """Fails to start where its name is in `broken`, and in the second round where it is in `tired`."""

    broken, tired = ("ours, compiled",), ("asteroid",)

    def __init__(self, python: str, task: dict[str, Any], work: Path) -> None:
        self.name, self.rounds, self.python = task["side"], 0, python

    def answer(self, limit_s: float) -> dict[str, Any]:
        if self.name in self.broken:
            raise peers.SideFailed("no compiler")
        return {"losses": {}}

    def measure(self, times: int) -> dict[str, float]:
        self.rounds += 1
        if self.name in self.tired and self.rounds == 2:
            raise peers.SideFailed("no memory")
        return {"cpu_s": 1.0, "wall_s": 1.0, "peak_mib": 1.0}

    def close(self) -> None:
        pass


def test_a_side_that_fails_costs_only_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "Side", FakeSide)
    (tmp_path / "python").touch()
    assert peers.main(["--only", "conv_tasnet", "--rounds", "3", "--python", str(tmp_path / "python")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| conv_tasnet |") == 1 and "| conv_tasnet | ours | torchaudio | 1.000 |" in printed
    assert "* conv_tasnet: no row for ours, compiled: no compiler" in printed
    assert "* conv_tasnet: no row for asteroid: no memory" in printed


def test_why_a_side_ended(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Traceback …\n  File …\nValueError: no room\n\n")
    assert peers.last_line(tmp_path / "log") == "ValueError: no room"
    (tmp_path / "log").write_text("\n")
    assert peers.last_line(tmp_path / "log") == ""


def test_ratios_are_those_within_a_round() -> None:
    ours = [{"cpu_s": value, "wall_s": 1.0, "peak_mib": 10.0} for value in (1.0, 4.0, 3.0)]
    theirs = [{"cpu_s": value, "wall_s": 2.0, "peak_mib": 40.0} for value in (2.0, 4.0, 4.0)]
    found = {"sizes": {}, "rounds": {"ours": ours, "NeMo": theirs}, "losses": {"ours": {"NeMo": 1.5}, "NeMo": {}}}
    (row,) = peers.rows_of("nest", found, "cpu")
    assert (row["time_ratio"], row["quartiles"], row["memory_ratio"]) == (0.75, (0.625, 0.875), 0.25)
    assert peers.rows_of("nest", found, "cuda")[0]["time_ratio"] == 0.5
    assert row["loss_difference"] is None and "another network" in peers.markdown([row])
    found["losses"]["NeMo"] = {"NeMo": 1.75}
    assert "DIFFERS by 2.5e-01" in peers.markdown(peers.rows_of("nest", found, "cpu"))
    assert peers.equality(2e-6) == "equal to 2e-06" and peers.quartiles([2.0]) == (2.0, 2.0)


def test_recordings_of_a_manifest(tmp_path: Path) -> None:
    import numpy as np

    from data.audio import audio_info, write_audio

    speech = shaped_noise(np.random.default_rng(0), 16000, slope_db_per_octave=3)
    write_audio(tmp_path / "a.wav", 0.1 * speech / speech.std(), 16000)
    write_manifest(tmp_path / "talkers.jsonl", [{"audio_filepath": str(tmp_path / "a.wav"), "duration": 1.0}])
    make_recordings(tmp_path, manifest=tmp_path / "talkers.jsonl", count=1, seconds=1.5)
    for name, rate in (("recordings/0_mic.wav", 48000), ("copies/recordings/0_mic.wav", 16000)):
        assert (info := audio_info(tmp_path / name)).sample_rate == rate and info.duration_s == 1.5


@pytest.mark.parametrize("arguments", [["--only", "unet,nemo"], ["--rounds", "0"], ["--threads", "0"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        peers.main(arguments)


@pytest.mark.slow
@pytest.mark.skipif(not peers.PEERS.exists(), reason="asteroid and NeMo are not installed: make peers")
def test_peers_begin_with_our_loss(tmp_path: Path) -> None:
    assert peers.main(["--quick", "--only", "conv_tasnet,nest,unet", "--output", str(tmp_path / "peers.json")]) == 0
    pairs = json.loads((tmp_path / "peers.json").read_text())["pairs"]
    rows = [row for pair in pairs.values() for row in pair["rows"]]
    assert {row["peer"] for row in rows} == {"torchaudio", "asteroid", "NeMo", "plain UNet", "smp resnet18"}
    same = [row for row in rows if row["peer"] != "smp resnet18" and row["ours"] != "ours, bilinear"]
    assert all(row["loss_difference"] <= peers.SAME_LOSS for row in same)
