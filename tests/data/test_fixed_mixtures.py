from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from data.errors import AudioError, DataError
from data.fixed_mixtures import FixedMixtureDataset
from data.manifest import read_manifest, write_manifest

RATE = 8000


def make_rows(folder: Path, *, num_sources=2, num_rows=3, seconds=1.0, noise_level=0.0, name_noise=False, rate=RATE):
    """A manifest of fixed mixtures in 16 bits; row n is 0.1 n seconds longer than the first."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(num_rows):
        count = round((seconds + 0.1 * number) * rate)
        signals = {f"s{talker + 1}": 0.1 * rng.standard_normal(count) for talker in range(num_sources)}
        noise = noise_level * rng.standard_normal(count)
        signals["mix"] = sum(signals.values()) + noise
        if name_noise:
            signals["noise"] = noise
        for name, samples in signals.items():
            sf.write(folder / f"{number}_{name}.wav", samples, rate)
        rows.append({f"{name}_filepath": f"{number}_{name}.wav" for name in signals} | {"duration": count / rate})
    write_manifest(folder / "a.jsonl", rows)
    return read_manifest(folder / "a.jsonl")


def level_db(signal):
    return float(20 * torch.log10(signal.square().mean().sqrt()))


@pytest.mark.parametrize("num_sources", [2, 3])
@pytest.mark.parametrize("noise", [{}, {"noise_level": 0.05}, {"noise_level": 0.05, "name_noise": True}])
def test_the_mixture_is_the_sum_of_its_parts(tmp_path, num_sources, noise):
    rows = make_rows(tmp_path, num_sources=num_sources, **noise)
    for segment_s in (None, 0.5, 1.15):
        dataset = FixedMixtureDataset(rows, num_sources=num_sources, segment_s=segment_s)
        items = [dataset[index, 0] for index in range(len(dataset))]
        for item in items:
            parts = item["sources"].sum(0) + item["noise"] if noise else item["sources"].sum(0)
            assert torch.equal(item["mixture"], parts) and ("noise" in item) == bool(noise)
            assert abs(level_db(item["mixture"][: item["length"]]) + 25) < 1e-3
            assert item["mixture"].dtype == torch.float32 and item["length"].dtype == torch.int64
        batch = dataset.collate(items)
        total = batch["sources"].sum(1) + batch["noise"] if noise else batch["sources"].sum(1)
        assert torch.equal(batch["mixture"], total)
        assert batch["sources"].shape == (3, num_sources, round((segment_s or 1.2) * RATE))
        assert batch["name"] == ["0_mix", "1_mix", "2_mix"]


def test_whole_mixtures_are_the_files_but_for_one_gain_and_padded_at_the_end(tmp_path):
    rows = make_rows(tmp_path, noise_level=0.05)
    dataset = FixedMixtureDataset(rows, num_sources=2)
    items = [dataset[index] for index in range(3)]
    assert [item["length"].item() for item in items] == [8000, 8800, 9600]
    for number, item in enumerate(items):
        names = ("mix", "s1", "s2")
        stored = [torch.from_numpy(sf.read(tmp_path / f"{number}_{name}.wav", dtype="float32")[0]) for name in names]
        gain = float(item["sources"][0] @ stored[1] / (stored[1] @ stored[1]))
        for ours, file in zip([item["mixture"], *item["sources"]], stored, strict=True):
            torch.testing.assert_close(ours, gain * file, atol=1e-6, rtol=0)
    batch = dataset.collate(items)
    assert batch["length"].tolist() == [8000, 8800, 9600]
    assert torch.equal(batch["sources"][0, :, :8000], items[0]["sources"]) and not batch["sources"][0, :, 8000:].any()
    assert not batch["noise"][0, 8000:].any() and not batch["mixture"][0, 8000:].any()


def test_a_crop_is_a_function_of_seed_epoch_and_index_and_the_same_in_all_files(tmp_path):
    rows = make_rows(tmp_path)
    dataset = FixedMixtureDataset(rows, num_sources=2, segment_s=0.25)
    again = FixedMixtureDataset(rows, num_sources=2, segment_s=0.25)
    again[2, 9]
    assert torch.equal(dataset[1, 4]["sources"], again[1, 4]["sources"])
    assert torch.equal(dataset[1]["sources"], again[1, 0]["sources"])
    other = FixedMixtureDataset(rows, num_sources=2, segment_s=0.25, seed=1)
    for item in (dataset[1, 5], other[1, 4]):
        assert not torch.equal(dataset[1, 4]["sources"], item["sources"])
    starts = set()
    for epoch in range(8):
        starts.add(tuple(start_in(tmp_path / f"0_s{n + 1}.wav", dataset[0, epoch]["sources"][n]) for n in range(2)))
    assert len(starts) > 4 and all(first == second for first, second in starts)
    with pytest.raises(IndexError):
        dataset[3, 0]


def start_in(path, crop):
    """Where a crop, of any level, lies in a file."""
    return int(np.correlate(sf.read(path)[0], crop.numpy(), "valid").argmax())


def test_a_mixture_shorter_than_the_segment_is_padded(tmp_path):
    item = FixedMixtureDataset(make_rows(tmp_path), num_sources=2, segment_s=3.0)[0]
    length = item["length"].item()
    assert item["sources"].shape == (2, 24000) and 7990 <= length <= 8000
    assert (
        item["mixture"][:length].any() and not item["mixture"][length:].any() and not item["sources"][:, length:].any()
    )


def test_another_rate_and_a_part_of_a_longer_file(tmp_path):
    rows = make_rows(tmp_path, rate=16000)
    assert FixedMixtureDataset(rows, num_sources=2)[0]["length"].item() == 8000
    part = [rows[0] | {"offset": 0.25, "duration": 0.5, "id": "part"}]
    item = FixedMixtureDataset(part, num_sources=2, sample_rate=16000)[0]
    assert item["length"].item() == 8000 and item["name"] == "part"
    assert start_in(tmp_path / "0_s1.wav", item["sources"][0]) == 4000
    crop = FixedMixtureDataset(part, num_sources=2, sample_rate=16000, segment_s=0.4)[0]
    assert 4000 <= start_in(tmp_path / "0_s1.wav", crop["sources"][0]) <= 4000 + 1600


def test_whether_there_is_noise_is_decided_once(tmp_path):
    rows = make_rows(tmp_path, noise_level=0.05, name_noise=True)
    nameless = [{key: value for key, value in row.items() if key != "noise_filepath"} for row in rows]
    assert FixedMixtureDataset(nameless, num_sources=2).has_noise  # the mixtures tell
    mixed = FixedMixtureDataset([nameless[0], rows[1]], num_sources=2)
    named = FixedMixtureDataset(rows, num_sources=2)
    for index in range(2):  # a remainder is the noise, but for rounding
        torch.testing.assert_close(mixed[index]["noise"], named[index]["noise"], atol=1e-4, rtol=0)
    clean = make_rows(tmp_path)
    assert not FixedMixtureDataset(clean, num_sources=2).has_noise
    for row in clean:
        sf.write(row["mix_filepath"], np.zeros(8000), RATE)
        sf.write(row["s1_filepath"], np.zeros(8000), RATE)
        sf.write(row["s2_filepath"], np.full(8000, 1 / 32768), RATE)
    quiet = FixedMixtureDataset(clean, num_sources=2)
    assert not quiet.has_noise  # one step of 16 bits is rounding, whatever the mixture's level
    assert torch.isfinite(quiet[0]["mixture"]).all()


def test_loud_mixtures_stay_below_full_scale_and_silence_stays_silent(tmp_path):
    rows = make_rows(tmp_path, num_rows=1)
    assert float(FixedMixtureDataset(rows, num_sources=2, level_db=0.0)[0]["mixture"].abs().max()) <= 1.0
    for key in ("mix_filepath", "s1_filepath", "s2_filepath"):
        sf.write(rows[0][key], np.zeros(8000), RATE)
    item = FixedMixtureDataset(rows, num_sources=2)[0]
    assert not item["mixture"].any() and not item["sources"].any()


def test_what_does_not_fit_is_named(tmp_path):
    rows = make_rows(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: 2 source\(s\), 3 are needed"):
        FixedMixtureDataset(rows, num_sources=3)
    sf.write(tmp_path / "0_s2.wav", np.zeros(7000), RATE)
    (tmp_path / "1_s1.wav").write_bytes(b"")
    dataset = FixedMixtureDataset(rows, num_sources=2)  # one row can be asked about noise
    with pytest.raises(AudioError, match=r"0_s2\.wav: ends 0\.125 s before .*0_s1\.wav"):
        dataset[0]
    with pytest.raises(AudioError, match=r"1_s1\.wav: is empty"):
        dataset[1]
    assert dataset[2]["length"] == 9600
    with pytest.raises(DataError, match=r"none of the first mixtures can be read: .*0_s2\.wav"):
        FixedMixtureDataset(rows[:2], num_sources=2)
