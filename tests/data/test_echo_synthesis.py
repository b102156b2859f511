import numpy as np
import pytest
import soundfile as sf
import torch

from data.echo_levels import level_ratio_db
from data.echo_path import EchoPath
from data.echo_scenarios import SCENARIO_WEIGHTS, SCENARIOS, collate_echo, scenario_probabilities
from data.echo_synthesis import EchoDataset, EchoMixing
from data.errors import AudioError, DataError
from data.loudspeaker import Loudspeaker
from data.rooms import MeasuredRooms, RoomSettings, ShoeboxRooms

RATE = 8000
SEGMENT_S = 0.5
DOUBLE_TALK, FAR_END, NEAR_END = (dict.fromkeys([name], 1.0) for name in SCENARIOS)
ROOMS = {"num_rooms": 3, "t60_s": (0.15, 0.3)}
QUIET = {"noise_p": 0.0, "far_noise_p": 0.0, "clip_p": 0.0, "near_end_far_p": 0.0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three speakers, two utterances each: syllables of noise."""
    folder, rows = tmp_path_factory.mktemp("talkers"), []
    for number in range(6):
        rng = np.random.default_rng(number)
        syllables = np.repeat(rng.uniform(0, 1, 16) ** 2, RATE // 10)
        path = folder / f"s{number % 3}_{number}.wav"
        sf.write(path, 0.1 * syllables * rng.standard_normal(len(syllables)), RATE)
        rows.append({"audio_filepath": str(path), "duration": 1.6, "speaker": f"s{number % 3}"})
    return rows


@pytest.fixture(scope="module")
def noise_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / "hum.wav"
    sf.write(path, 0.02 * np.sin(2 * np.pi * 50 * np.arange(RATE) / RATE), RATE)
    return [{"audio_filepath": str(path), "duration": 1.0}]


@pytest.fixture(scope="module")
def rooms():
    return ShoeboxRooms(RoomSettings(**ROOMS), sample_rate=RATE)


@pytest.fixture
def make(rows, noise_rows, rooms):
    """A dataset; `loudspeaker`, `path` and settings of `EchoMixing` may differ from the defaults."""

    def make(*, loudspeaker=None, path=None, seed=0, num_items=40, measured=None, noise=True, **options):
        return EchoDataset(
            rows,
            num_items=num_items,
            sample_rate=RATE,
            mixing=EchoMixing(**{key: value for key, value in options.items() if not key.startswith("cache")}),
            loudspeaker=Loudspeaker(**loudspeaker or {}),
            path=EchoPath(**path or {}),
            rooms=rooms,
            measured=measured,
            noise_rows=noise_rows if noise else None,
            segment_s=SEGMENT_S,
            seed=seed,
            **{key: value for key, value in options.items() if key.startswith("cache")},
        )

    return make


def equal(one, other):
    same = [one[k] == other[k] if k == "name" else torch.equal(one[k], other[k]) for k in one]
    return one.keys() == other.keys() and all(same)


def lag(reference, signal):
    """By how many samples the signal is the later one: the peak of the whitened cross-correlation."""
    size = 2 * len(reference)
    product = torch.fft.rfft(signal.double(), size) * torch.fft.rfft(reference.double(), size).conj()
    correlation = torch.fft.irfft(product / (product.abs() + 1e-9))
    peak = int(correlation.argmax())
    return peak if peak < size // 2 else peak - size


def rms_db(signal):
    return 20 * float(signal.square().mean().sqrt().log10())


def test_items_hold_what_they_say(make):
    dataset = make(path={"path_change_p": 0.5})
    items = [dataset[index] for index in range(12)]
    for item in items:
        scenario = SCENARIOS[item["scenario"]]
        assert item["name"].startswith(scenario) and item["has_target"] and item["length"] == 4000
        if scenario == "near_end":
            assert not item["echo"].any() and item["ser_db"] == torch.inf and item["delay_samples"] == -1
            assert item["near"].any() and item["path_change_sample"] == -1
        elif scenario == "far_end":
            assert not item["near"].any() and not item["target"].any()
            assert item["ser_db"] == -torch.inf and item["snr_db"] in (-torch.inf, torch.inf)
        if scenario != "near_end":
            assert item["echo"].any() and item["far"].any() and item["delay_samples"] > 0
        signals = [item[name] for name in ("mic", "far", "target", "near", "echo", "noise")]
        assert all(signal.shape == (4000,) and signal.dtype == torch.float32 for signal in signals)
        assert all(torch.isfinite(signal).all() for signal in signals)
        assert [item[k].dtype for k in ("has_target", "length", "scenario", "path_change_sample")] == [
            torch.bool,
            torch.int64,
            torch.int64,
            torch.int64,
        ]
        assert all(item[k].dtype == torch.float32 for k in ("delay_samples", "ser_db", "snr_db"))
    assert {SCENARIOS[item["scenario"]] for item in items} == set(SCENARIOS)
    batch = dataset.collate(items)
    assert batch["mic"].shape == (12, 4000) and batch["ser_db"].shape == (12,) and len(batch["name"]) == 12


def test_the_microphone_is_the_sum_to_the_last_bit(make):
    dataset = make(clip_p=0.0, path={"path_change_p": 0.5, "gain_step_p": 0.5}, target_ms=30.0)
    items = [dataset[index] for index in range(10)]
    for part in (*items, dataset.collate(items)):
        assert torch.equal(part["mic"], part["near"] + part["echo"] + part["noise"])
        assert float(part["mic"].abs().max()) <= 1.0


def test_clipping_leaves_the_components_as_they_are(make):
    plain, clipped = make(clip_p=0.0), make(clip_p=1.0, clip_db=(3.0, 3.0))
    for index in range(3):
        one, other = plain[index], clipped[index]
        assert all(torch.equal(one[key], other[key]) for key in ("near", "echo", "noise", "target", "far"))
        limit = float(one["mic"].abs().max()) * 10 ** (-3 / 20)
        torch.testing.assert_close(other["mic"], one["mic"].clamp(-limit, limit))
    sometimes = make(clip_p=0.5)
    assert 3 < sum(torch.equal(sometimes[i]["mic"], plain[i]["mic"]) for i in range(16)) < 13


def test_scenarios_come_as_often_as_they_weigh(make):
    dataset = make(scenario_weights={"double_talk": 2, "near_end": 1, "far_end": 1}, num_items=200)
    counts = np.bincount([np.random.default_rng([0, 0, i]).choice(3, p=dataset._scenario_p) for i in range(200)])
    assert [counts[dataset[i]["scenario"]] > 0 for i in range(3)] and abs(counts[0] - 100) < 25 and min(counts) > 30
    for weights, scenario in ((DOUBLE_TALK, 0), (FAR_END, 1), (NEAR_END, 2)):
        assert all(make(scenario_weights=weights)[index]["scenario"] == scenario for index in range(5))


def test_near_and_far_end_are_never_the_same_speaker(make):
    dataset = make(scenario_weights=DOUBLE_TALK)
    pairs = {tuple(dataset[index]["name"].split("_")[2:4]) for index in range(16)}
    assert all(near != far for near, far in pairs) and len(pairs) > 4


def test_ratios_are_those_that_were_asked_for(make):
    dataset = make(scenario_weights=DOUBLE_TALK, ser_db=(-7.0, 3.0), snr_db=(5.0, 15.0), noise_p=1.0)
    items = [dataset[index] for index in range(20)]
    for item in items:
        near, echo, noise = (item[name].numpy() for name in ("near", "echo", "noise"))
        assert level_ratio_db(near, echo) == pytest.approx(float(item["ser_db"]), abs=1e-3)
        assert level_ratio_db(near, noise) == pytest.approx(float(item["snr_db"]), abs=1e-3)
    ser_db, snr_db = ([float(item[key]) for item in items] for key in ("ser_db", "snr_db"))
    assert -7.01 < min(ser_db) < -5 and 0 < max(ser_db) < 3.01
    assert 4.99 < min(snr_db) < 7 and 13 < max(snr_db) < 15.01
    echoes = make(scenario_weights=FAR_END, snr_db=(12.0, 12.0), noise_p=1.0)
    assert level_ratio_db(echoes[0]["echo"].numpy(), echoes[0]["noise"].numpy()) == pytest.approx(12, abs=1e-3)


def test_levels_of_microphone_and_reference_are_drawn_apart(make):
    dataset = make(level_db=(-40.0, -20.0), far_level_db=(-35.0, -25.0), scenario_weights=DOUBLE_TALK, clip_p=0.0)
    levels = np.array([(rms_db(item["mic"]), rms_db(item["far"])) for item in (dataset[i] for i in range(20))])
    assert (levels.min(0) > [-40.01, -35.01]).all() and (levels.max(0) < [-19.99, -24.99]).all()
    assert (np.ptp(levels, axis=0) > [15, 7]).all() and abs(np.corrcoef(levels.T)[0, 1]) < 0.5
    loud = make(level_db=(0.0, 0.0), far_level_db=(0.0, 0.0), scenario_weights=DOUBLE_TALK, clip_p=0.0)[0]
    assert 0.99 < float(loud["mic"].abs().max()) <= 1 and 0.99 < float(loud["far"].abs().max()) <= 1


@pytest.mark.parametrize("distorts", [0.0, 1.0])
def test_the_delay_is_where_the_echo_is(make, distorts):
    dataset = make(
        scenario_weights=FAR_END,
        path={"delay_ms": (0.0, 100.0), "path_change_p": 0.0, "gain_step_p": 0.0},
        loudspeaker={"nonlinear_p": distorts},
        **QUIET,
    )
    for index in range(8):
        item = dataset[index]
        assert lag(item["far"], item["echo"]) == pytest.approx(float(item["delay_samples"]), abs=1.0)


def test_the_target_is_aligned_with_the_direct_path(make):
    whole, early, direct = (
        make(scenario_weights=NEAR_END, target_ms=target_ms, **QUIET) for target_ms in (None, 20.0, 0.0)
    )
    for index in range(4):
        items = [dataset[index] for dataset in (whole, early, direct)]
        assert torch.equal(items[0]["target"], items[0]["near"])
        assert all(torch.equal(item["near"], items[0]["near"]) for item in items)
        for item in items[1:]:
            assert lag(item["target"], item["near"]) == 0
        late = [rms_db(item["near"] - item["target"]) - rms_db(item["near"]) for item in items[1:]]
        assert late[0] < late[1] < 0  # the more is kept, the less is missing


def test_a_headset_and_silence_at_the_far_end(make):
    active = [make(scenario_weights=NEAR_END, near_end_far_p=0.5)[index]["far"].any() for index in range(16)]
    assert 3 < sum(map(bool, active)) < 13
    item = make(scenario_weights=NEAR_END, near_end_far_p=1.0)[0]
    assert item["far"].any() and not item["echo"].any() and len(item["name"].split("_")) == 5
    assert not make(scenario_weights=NEAR_END, near_end_far_p=0.0)[0]["far"].any()


def test_the_reference_drops_out_and_the_echo_goes_on(make):
    plain = make(scenario_weights=FAR_END, far_dropout_p=0.0)[2]
    dropped = make(scenario_weights=FAR_END, far_dropout_p=1.0, far_dropout_ms=(100.0, 100.0))[2]
    assert torch.equal(plain["echo"], dropped["echo"])
    changed = (plain["far"] != dropped["far"]).nonzero()
    assert 750 < len(changed) <= 800 and int(changed[-1] - changed[0]) < 800 and not dropped["far"][changed].any()
    some = make(scenario_weights=FAR_END, far_dropout_p=0.5)
    without = make(scenario_weights=FAR_END)
    assert 2 < sum(torch.equal(some[i]["far"], without[i]["far"]) for i in range(12)) < 10


def test_far_end_noise_is_in_reference_and_echo(make):
    options = {"scenario_weights": FAR_END, "noise_p": 0.0, "far_level_db": (-30.0, -30.0)}
    linear = {"loudspeaker": {"nonlinear_p": 0.0, "speaker_highpass_hz": None}}
    clean, low, noisy = (
        make(far_noise_p=p, far_snr_db=(snr_db, snr_db), **options, **linear)[0]
        for p, snr_db in ((0.0, 0.0), (1.0, 15.0), (1.0, 0.0))
    )
    for name in ("far", "echo"):
        without, little, much = (
            float(torch.fft.rfft(item[name]).abs()[round(50 * SEGMENT_S)]) for item in (clean, low, noisy)
        )
        assert much > 2 * little > 2 * without and much > 5 * without
    assert not noisy["noise"].any() and noisy["snr_db"] == torch.inf
    assert equal(make(far_noise_p=1.0, noise=False, **options)[0], make(far_noise_p=0.0, noise=False, **options)[0])


def test_noise_is_left_out_at_random(make):
    some = make(noise_p=0.5)
    assert 3 < sum(bool(some[index]["noise"].any()) for index in range(16)) < 13
    assert not any(make(noise_p=1.0, noise=False)[index]["noise"].any() for index in range(3))


def test_measured_rooms_take_their_share(make, tmp_path):
    rows = []
    for number in range(2):  # a click: the near end comes as it was recorded
        sf.write(tmp_path / f"{number}.wav", np.eye(1, 400, 100)[0] * 0.5, RATE)
        rows.append({"audio_filepath": str(tmp_path / f"{number}.wav"), "duration": 0.05, "room": "hall"})
    measured = MeasuredRooms(rows, sample_rate=RATE)
    direct = [
        bool((dataset[i]["target"] - dataset[i]["near"]).abs().max() < 1e-6)
        for dataset in [make(measured=measured, rir_p=0.5, scenario_weights=NEAR_END, target_ms=0.0)]
        for i in range(16)
    ]
    assert 3 < sum(direct) < 13
    assert equal(make(measured=measured, rir_p=0.0)[0], make()[0])


def test_an_item_is_a_function_of_seed_epoch_and_index(make):
    dataset, again = make(), make()
    again[7, 5]
    assert equal(dataset[3, 2], again[3, 2]) and equal(dataset[3], dataset[3, 0])
    assert equal(dataset[3, 2], make(cache=False)[3, 2])
    assert dataset._talkers.cache and not make(cache_limit_mb=0.01)._talkers.cache
    for other in (dataset[3, 1], dataset[2, 2], make(seed=1)[3, 2]):
        assert not torch.equal(dataset[3, 2]["mic"], other["mic"])
    with pytest.raises(IndexError):
        dataset[40, 0]


def test_no_part_shifts_another(make):
    """What is drawn for one part of the chain leaves the others as they were, common gains aside."""
    plain = make(**QUIET)
    changes = [
        {"noise_p": 1.0},
        {"far_dropout_p": 1.0},
        {"clip_p": 1.0},
        {"loudspeaker": {"nonlinear_p": 0.0}},
        {"path": {"delay_ms": (0, 10), "path_change_p": 1.0}},
    ]
    for change in changes:
        for index in range(2):
            one, other = plain[index], make(**QUIET | change)[index]
            assert one["name"] == other["name"]
            kept = other["far"] != 0 if "far_dropout_p" in change else slice(None)
            assert torch.equal(one["far"][kept], other["far"][kept])
            near, changed = one["near"], other["near"]
            gain = near.norm() / changed.norm().clamp(min=1e-9)
            torch.testing.assert_close(changed * gain, near, atol=1e-5, rtol=0)


def test_data_that_cannot_serve_is_named(make, rows, tmp_path):
    parts = {"mixing": EchoMixing(), "loudspeaker": Loudspeaker(), "path": EchoPath(), "rooms": None}
    options = {"num_items": 2, "sample_rate": RATE, **parts}
    with pytest.raises(DataError, match="s0 is the only speaker"):
        EchoDataset([row for row in rows if row["speaker"] == "s0"], **options)
    with pytest.raises(DataError, match=r"a\.wav: its manifest row has no speaker"):
        EchoDataset([{"audio_filepath": "a.wav", "duration": 1.0}, *rows], **options)
    (tmp_path / "empty.wav").write_bytes(b"")
    bad = [row | {"audio_filepath": str(tmp_path / "empty.wav")} for row in rows]
    rooms = ShoeboxRooms(RoomSettings(**ROOMS), sample_rate=RATE)
    with pytest.raises(AudioError, match=r"empty\.wav: is empty"):
        EchoDataset(bad, **options | {"rooms": rooms})[0]


def test_silent_recordings_make_silent_examples(make, rows, tmp_path, rooms):
    sf.write(tmp_path / "silence.wav", np.zeros(2 * RATE), RATE)
    silent = [row | {"audio_filepath": str(tmp_path / "silence.wav")} for row in rows]
    dataset = EchoDataset(
        silent,
        num_items=8,
        sample_rate=RATE,
        mixing=EchoMixing(),
        loudspeaker=Loudspeaker(),
        path=EchoPath(),
        rooms=rooms,
        segment_s=SEGMENT_S,
    )
    for index in range(8):
        assert not dataset[index]["mic"].any() and torch.isfinite(dataset[index]["far"]).all()


def test_weights_and_batches():
    assert scenario_probabilities(SCENARIO_WEIGHTS) == [0.5, 0.25, 0.25]
    assert scenario_probabilities({"far_end": 3}) == [0, 1, 0]
    for bad in ({"farend": 1}, {"far_end": -1}, {"far_end": 0}, {"far_end": "x"}, {"far_end": float("nan")}, [1, 2, 3]):
        with pytest.raises(ValueError, match="scenario_weights must"):
            scenario_probabilities(bad)
    items = [{"mic": torch.ones(n), "far": torch.ones(n), "length": torch.tensor(n), "name": f"{n}"} for n in (3, 5)]
    batch = collate_echo(items)
    assert batch["mic"].tolist() == [[1, 1, 1, 0, 0], [1] * 5] and batch["length"].tolist() == [3, 5]
    assert batch["name"] == ["3", "5"]


@pytest.mark.parametrize(
    "bad",
    [
        {"scenario_weights": {"both": 1}},
        {"rir_p": 1.5},
        {"noise_p": -0.1},
        {"snr_db": 20},
        {"far_noise_p": True},
        {"far_snr_db": [1]},
        {"ser_db": [10, -10]},
        {"level_db": [-20, 5]},
        {"far_level_db": [-200, -20]},
        {"near_end_far_p": "often"},
        {"far_dropout_p": 2},
        {"far_dropout_ms": [-1, 5]},
        {"clip_p": 2},
        {"clip_db": [-3, 0]},
        {"target_ms": -1},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EchoMixing(**bad)
