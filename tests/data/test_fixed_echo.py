"""Echo recordings: what a row says is what an item holds, and the files of a row stay in step."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.utils.data import Dataset

from data.aec import EchoData
from data.bad_files import BadFiles, ResilientDataset
from data.base import SystemData
from data.echo_scenarios import SCENARIOS
from data.errors import AudioError
from data.fixed_echo import FixedEchoDataset, longest_delay_ms
from data.manifest import read_manifest, write_manifest
from data.sampler import ItemKey

RATE = 16000
FILES = {"mic": "mic_filepath", "far": "farend_filepath", "target": "clean_filepath"}


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> str:
    sf.write(path, samples, rate)
    return path.name


def make_rows(folder: Path, *changes: dict, seconds: float = 0.5) -> list[dict]:
    """Double talk with all files; each change is laid over a row, None takes a key out."""
    rng, rows = np.random.default_rng(0), []
    for number, change in enumerate(changes):
        row = {"duration": seconds, "scenario": "double_talk"}
        for name, key in FILES.items():
            row[key] = write(folder / f"{number}_{name}.wav", rng.uniform(-0.5, 0.5, round(seconds * RATE)))
        rows.append({key: value for key, value in (row | change).items() if value is not None})
    write_manifest(folder / "a.jsonl", rows)
    return read_manifest(folder / "a.jsonl")


def stored(row: dict, name: str, rate: int = RATE) -> torch.Tensor:
    samples, found = sf.read(row[FILES[name]], dtype="float32")
    assert found == rate
    return torch.from_numpy(samples)


def start_in(whole: torch.Tensor, part: torch.Tensor) -> int:
    (start,) = (n for n in (whole == part[0]).nonzero()[:, 0].tolist() if torch.equal(whole[n : n + len(part)], part))
    return start


def test_whole_recordings_as_they_are(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, {"id": 7, "delay_ms": 12.5}, {})
    dataset = FixedEchoDataset(rows, sample_rate=RATE)
    item, other = dataset[0], dataset[1, 3]
    for name in FILES:
        assert torch.equal(item[name], stored(rows[0], name)) and item[name].dtype == torch.float32
    assert item["has_target"] and item["has_target"].dtype == torch.bool and item["length"] == 8000
    assert item["delay_samples"] == 200 and item["delay_samples"].dtype == torch.float32
    assert other["delay_samples"] == -1 and item["path_change_sample"] == -1
    assert item["name"] == "7" and other["name"] == "1_mic"
    batch = dataset.collate([item, other])
    assert batch["far"].shape == (2, 8000) and batch["name"] == ["7", "1_mic"]
    assert batch["has_target"].tolist() == [True, True] and batch["length"].dtype == torch.int64
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize(
    ("change", "target", "far", "delay", "ser_db", "snr_db"),
    [
        ({"scenario": "double_talk", "clean_filepath": None}, None, True, 160, math.nan, math.nan),
        ({"scenario": "far_end", "clean_filepath": None}, 0, True, 160, -math.inf, -math.inf),
        ({"scenario": "far_end"}, "clean", True, 160, -math.inf, -math.inf),
        ({"scenario": "near_end", "clean_filepath": None}, None, True, -1, math.inf, math.nan),
        ({"scenario": "near_end"}, "clean", True, -1, math.inf, math.nan),
        ({"scenario": "near_end", "farend_filepath": None}, "clean", False, -1, math.inf, math.nan),
        ({"scenario": None, "kind": "synthetic doubletalk"}, "clean", True, 160, math.nan, math.nan),
    ],
)
def test_what_a_scenario_means(tmp_path: Path, change: dict, target, far, delay, ser_db, snr_db) -> None:
    (row,) = make_rows(tmp_path, change | {"delay_ms": 10})
    item = FixedEchoDataset([row], sample_rate=RATE)[0]
    assert SCENARIOS[item["scenario"]] == row["scenario"]
    assert bool(item["has_target"]) == (target is not None)
    expected = stored(row, "target") if target == "clean" else torch.zeros(8000)
    assert torch.equal(item["target"], expected)
    assert torch.equal(item["far"], stored(row, "far") if far else torch.zeros(8000))
    assert item["delay_samples"] == delay
    ratios = [float(item["ser_db"]), float(item["snr_db"])]
    np.testing.assert_equal(ratios, [ser_db, snr_db])  # NaN is NaN


def test_a_crop_is_the_same_in_all_files_and_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, {}, {})
    dataset, again = (FixedEchoDataset(rows, sample_rate=RATE, segment_s=0.1) for _ in range(2))
    again[1, 9]
    starts = set()
    for epoch in range(8):
        item = dataset[0, epoch]
        assert torch.equal(item["mic"], again[0, epoch]["mic"]) and item["length"] == 1600
        (start,) = {start_in(stored(rows[0], name), item[name]) for name in FILES}
        starts.add(start)
    assert len(starts) > 5
    other_seed = FixedEchoDataset(rows, sample_rate=RATE, segment_s=0.1, seed=1)
    assert not torch.equal(other_seed[0, 0]["mic"], dataset[0, 0]["mic"])


def test_a_short_recording_is_padded_at_the_end(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, {"clean_filepath": None})
    item = FixedEchoDataset(rows, sample_rate=RATE, segment_s=1.0)[0]
    assert item["length"] == 8000 and item["mic"].shape == item["far"].shape == item["target"].shape == (16000,)
    assert torch.equal(item["mic"][:8000], stored(rows[0], "mic")) and not item["mic"][8000:].any()


def test_the_clean_signal_is_brought_to_the_level_that_the_row_states(tmp_path: Path) -> None:
    rows = make_rows(
        tmp_path, {"clean_scale": 0.75}, {"nearend_scale": 0.75}, {"clean_scale": 2, "clean_filepath": None}
    )
    for segment_s in (None, 0.1):
        dataset = FixedEchoDataset(rows, sample_rate=RATE, segment_s=segment_s)
        item, information, unknown = (dataset[index] for index in range(3))
        start = start_in(stored(rows[0], "mic"), item["mic"])
        clean = stored(rows[0], "target")[start : start + len(item["mic"])]
        torch.testing.assert_close(item["target"], 0.75 * clean)
        start_in(stored(rows[1], "target"), information["target"])  # as it is: a corpus may carry that key
        assert not unknown["target"].any() and not unknown["has_target"]


@pytest.mark.parametrize("missing", [1, 320])
def test_up_to_20_ms_are_cut_to_the_shortest(tmp_path: Path, missing: int) -> None:
    rows = make_rows(tmp_path, {}, {})
    write(Path(rows[0]["mic_filepath"]), stored(rows[0], "mic").numpy()[missing:])  # as AEC-Challenge has it
    write(Path(rows[1]["clean_filepath"]), stored(rows[1], "target").numpy()[missing:])
    for segment_s in (None, 0.499):
        dataset = FixedEchoDataset(rows, sample_rate=RATE, segment_s=segment_s)
        for item in (dataset[0], dataset[1]):
            assert item["length"] == min(8000 - missing, round(RATE * (segment_s or 1)))
    assert torch.equal(FixedEchoDataset(rows, sample_rate=RATE)[0]["far"], stored(rows[0], "far")[: 8000 - missing])


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
def test_all_files_are_resampled_alike(tmp_path: Path, rate: int) -> None:
    rows = make_rows(tmp_path, {"farend_filepath": "0_mic.wav", "clean_filepath": "0_mic.wav"})
    for segment_s in (None, 0.2):
        item = FixedEchoDataset(rows, sample_rate=rate, segment_s=segment_s)[0, 5]
        assert item["length"] == round((segment_s or 0.5) * rate)
        assert torch.equal(item["mic"], item["far"]) and torch.equal(item["mic"], item["target"])


def test_a_part_of_longer_files(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, {"offset": 0.1, "duration": 0.2}, {"offset": 0.4, "duration": 0.3})
    write(Path(rows[0]["farend_filepath"]), np.append(stored(rows[0], "far").numpy(), np.ones(9000)))
    dataset = FixedEchoDataset(rows, sample_rate=RATE)
    item = dataset[0]
    for name in FILES:  # a far end that goes on after the part does not matter
        assert torch.equal(item[name], stored(rows[0], name)[1600:4800])
    assert dataset[1]["length"] == 1600, "what there is of it"
    crop = FixedEchoDataset(rows, sample_rate=RATE, segment_s=0.05)[0, 1]
    assert 1600 <= start_in(stored(rows[0], "mic"), crop["mic"]) <= 4000


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, *([{}] * 6))
    write(Path(rows[0]["farend_filepath"]), np.zeros(8321))
    write(Path(rows[1]["clean_filepath"]), np.zeros(7679))
    write(Path(rows[2]["farend_filepath"]), np.zeros(24000), rate=48000)
    Path(rows[3]["farend_filepath"]).unlink()
    Path(rows[4]["farend_filepath"]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    says = [
        r"^\S*0_far\.wav: 0\.52 s \(8321 samples\), but \S*0_mic\.wav has 0\.50 s \(8000 samples\); cut both",
        r"^\S*1_target\.wav: 0\.48 s \(7679 samples\), but \S*1_mic\.wav has 0\.50 s \(8000 samples\)",
        r"^\S*2_far\.wav: 48000 Hz, but \S*2_mic\.wav has 16000 Hz; bring both to one rate$",
        r"^\S*3_far\.wav: no such file",
        r"^\S*4_far\.wav: is a Git-LFS pointer, not audio; run `git lfs pull`",
    ]
    dataset = FixedEchoDataset(rows, sample_rate=RATE)
    for index, line in enumerate(says):
        with pytest.raises(AudioError, match=line):
            dataset[index]
    bad_files = BadFiles()
    resilient = ResilientDataset(dataset, bad_files)
    item, messages = resilient[0, 0]
    assert item["name"] == "5_mic" and len(messages) == 5, "replaced by the next that is in order"
    resilient.receive(resilient.collate([(item, messages)]))
    assert {Path(path).name for path in bad_files.found} == {f"{i}_far.wav" for i in (0, 2, 3, 4)} | {"1_target.wav"}


def test_an_offset_beyond_the_end_is_named(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, {"offset": 3.0})
    with pytest.raises(AudioError, match=r"0_mic\.wav: offset 3\S* s lies beyond the end"):
        FixedEchoDataset(rows, sample_rate=RATE)[0]


def test_the_longest_delay_is_that_of_an_echo(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, {"delay_ms": 30}, {"delay_ms": 90, "scenario": "near_end"}, {"delay_ms": 45.5}, {})
    assert longest_delay_ms(rows) == 45.5
    assert longest_delay_ms(rows[3:]) is None


def test_it_serves_a_data_module(tmp_path: Path) -> None:
    class Recorded(SystemData):
        def dataset(self, stage: str) -> Dataset[ItemKey]:
            return FixedEchoDataset(self.rows(stage) or [], sample_rate=RATE)

    make_rows(tmp_path, {}, {"scenario": "far_end", "clean_filepath": None}, {"scenario": "near_end"})
    data = Recorded(test_manifest=str(tmp_path / "a.jsonl"), batch_size=3, loader={"num_workers": 0})
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["scenario"].tolist() == [0, 1, 2] and batch["has_target"].tolist() == [True] * 3


@pytest.mark.parametrize("rate", [RATE, 48000])
def test_kept_recordings_give_the_same_crops(rate: int, tmp_path: Path) -> None:
    """Bit for bit at their own rate, else rounded to 16 bits; and no file is opened again."""
    rows = make_rows(tmp_path, {}, {"clean_filepath": None, "scenario": "far_end"}, {"offset": 0.1, "duration": 0.3})
    for row in rows:
        for key in set(FILES.values()) & row.keys():
            samples, _ = sf.read(row[key])
            sf.write(row[key], np.repeat(samples, rate // RATE), rate)
    crops = {"sample_rate": RATE, "segment_s": 0.25}
    plain, kept = FixedEchoDataset(rows, **crops), FixedEchoDataset(rows, **crops, cache=True)
    for key in [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2)]:
        expected, item = plain[key], kept[key]
        for name in FILES:
            torch.testing.assert_close(item[name], expected[name], atol=0 if rate == RATE else 2**-15, rtol=0)
        assert torch.equal(item["length"], expected["length"]) and item["has_target"] == expected["has_target"]
    for file in tmp_path.glob("*.wav"):
        file.unlink()
    assert torch.equal(kept[0, 1]["mic"], kept[0, 1]["mic"])
    with pytest.raises(AudioError):
        plain[0, 1]


def test_recordings_are_kept_when_they_fit(tmp_path: Path) -> None:
    """In training alone: validation reads each once per pass, whole."""
    make_rows(tmp_path, {}, {}, seconds=1.0)
    manifest = str(tmp_path / "a.jsonl")
    for given, kept in (
        ({}, True),
        ({"cache": False}, False),
        ({"cache_limit_mb": 0.1}, False),
        ({"cache": True}, True),
    ):
        data = EchoData(train_manifest=manifest, val_manifest=manifest, segment_s=0.5, sample_rate=RATE, **given)
        train, val = data.dataset("train"), data.dataset("val")
        assert isinstance(train, FixedEchoDataset) and isinstance(val, FixedEchoDataset)
        assert (bool(train._readers), bool(val._readers)) == (kept, False)
