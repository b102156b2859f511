import numpy as np
import pytest
import soundfile as sf

from data.errors import AudioError, DataError
from data.rooms import (
    SPEED_OF_SOUND,
    MeasuredRooms,
    Response,
    RoomSettings,
    ShoeboxRooms,
    early_part,
    measured_response,
    shoebox_responses,
)

RATE = 16000


def rooms(seed=0, **settings):
    return ShoeboxRooms(RoomSettings(**settings), sample_rate=RATE, seed=seed)


def decay_s(taps):
    """Reverberation time from the fall of the backward integral between -5 and -25 dB."""
    energy = np.cumsum(taps[::-1].astype(float) ** 2)[::-1]
    level_db = 10 * np.log10(energy / energy[0] + 1e-20)
    return 3 * (np.argmax(level_db < -25) - np.argmax(level_db < -5)) / RATE


def metres(response):
    return response.direct_samples / RATE * SPEED_OF_SOUND


def test_the_direct_path_arrives_when_sound_does():
    source, microphone = np.array([1.0, 1.2, 1.3]), np.array([2.5, 2.0, 1.2])
    (response,) = shoebox_responses(
        np.random.default_rng(0),
        size=np.array([5.0, 4.0, 3.0]),
        t60_s=0.2,
        microphone=microphone,
        sources=[source],
        sample_rate=RATE,
        rir_s=0.5,
    )
    expected = np.linalg.norm(source - microphone) / 343.0 * RATE
    assert response.direct_samples == pytest.approx(expected)
    assert abs(np.abs(response.taps).argmax() - response.lead - expected) <= 0.5
    direct = response.taps[: response.lead + round(expected) + 20]  # before the floor reflects
    hz = np.fft.rfftfreq(4096)[300:1500]
    phase = np.unwrap(np.angle(np.fft.rfft(direct, 4096)))[300:1500]
    assert -np.polyfit(2 * np.pi * hz, phase, 1)[0] - response.lead == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("t60_s", [0.3, 0.6])
def test_rooms_reverberate_as_long_as_they_are_asked_to(t60_s):
    several = rooms(t60_s=(t60_s, t60_s), rir_s=1.0)
    decays = [decay_s(talker.taps) for number in range(3) for talker in several.room(number)[0]]
    assert np.median(decays) == pytest.approx(t60_s, rel=0.15)
    assert len(several.room(0)[0][0].taps) == pytest.approx(t60_s * RATE, abs=200)


def test_distances_sizes_and_lengths_are_those_of_the_settings():
    several = rooms(num_rooms=5, speaker_distance_m=(0.2, 0.3), talker_distance_m=(0.8, 1.0), rir_s=0.1)
    drawn = [several.draw(np.random.default_rng(seed)) for seed in range(12)]
    for responses in drawn:
        assert 0.2 <= metres(responses.loudspeaker) <= 0.3 and 0.8 <= metres(responses.talker) <= 1.0
        assert responses.moved is not None and responses.moved is not responses.loudspeaker
        assert 0.2 <= metres(responses.moved) <= 0.3
        for response in responses:
            beyond = len(response.taps) - response.lead - response.direct_samples
            assert beyond == pytest.approx(0.1 * RATE, abs=1)
            assert response.taps.dtype == np.float32 and np.isfinite(response.taps).all()
    assert RoomSettings(speaker_distance_m=(0.2, 0.343)).largest_direct_ms() == pytest.approx(1.0)
    small, large = (rooms(room_size_m=((a, a),) * 3, t60_s=(0.3, 0.3)).room(0)[0][0] for a in (2.3, 9.0))
    reverberant = [np.square(r.taps[r.lead + round(r.direct_samples) + 400 :]).sum() for r in (small, large)]
    assert reverberant[0] > 3 * reverberant[1]  # V / A, which the time fixes: the smaller the room, the louder
    assert max(metres(talker) for talker in rooms(room_size_m=((2, 2),) * 3, talker_distance_m=(5, 5)).room(0)[0]) < 3.5


def test_a_room_is_a_function_of_seed_and_number_and_is_kept():
    one, again, other = rooms(), rooms(), rooms(seed=1)
    again.room(7)
    np.testing.assert_array_equal(one.room(3)[0][0].taps, again.room(3)[0][0].taps)
    assert not np.array_equal(one.room(3)[0][0].taps[:500], other.room(3)[0][0].taps[:500])
    assert one.room(3) is one.room(3)


def test_so_many_rooms_or_a_new_one_for_each_example():
    pool = rooms(num_rooms=2)
    taken = {id(pool.draw(np.random.default_rng(seed)).talker) for seed in range(12)}
    assert len(pool._kept) == 2 and len(taken) <= 6
    new = rooms(num_rooms=None)
    first, same, second = (new.draw(np.random.default_rng(seed)).loudspeaker for seed in (0, 0, 1))
    assert first.direct_samples == same.direct_samples != second.direct_samples and not new._kept


def test_the_early_part_ends_after_the_direct_path():
    response = Response(np.ones(1000, np.float32), 40, 60.0)
    early = early_part(response, target_ms=10.0, sample_rate=RATE)
    assert early.taps[:261].all() and (early.taps[:261] == 1).all() and not early.taps[277:].any()
    assert (early.lead, early.direct_samples) == (40, 60.0)
    assert not early_part(response, target_ms=0.0, sample_rate=RATE).taps[117:].any()


@pytest.fixture
def make_rows(tmp_path):
    def make(layout):
        """Rows of (room, kind) with a click each, later and lower from row to row."""
        rows = []
        for number, (room, kind) in enumerate(layout):
            taps = np.zeros(2400)
            taps[500 + 100 * number] = 0.9 - 0.1 * number
            taps[900 + 100 * number] = 0.2
            path = tmp_path / f"rir{number}.wav"
            sf.write(path, taps, RATE)
            row = {"audio_filepath": str(path), "duration": 0.15, "manifest_line": f"rir.jsonl, line {number + 1}"}
            rows.append(row | ({} if room is None else {"room": room}) | ({} if kind is None else {"kind": kind}))
        return rows

    return make


def peaks(responses):
    return [None if r is None else round(float(np.abs(r.taps).max()), 1) for r in responses]


def test_measured_responses_of_one_room(make_rows):
    measured = MeasuredRooms(
        make_rows([("hall", None), ("hall", None), ("hall", None), ("alone", None)]), sample_rate=RATE, rir_s=0.01
    )
    seen = set()
    for seed in range(30):
        responses = measured.draw(np.random.default_rng(seed))
        assert len(set(peaks(responses))) == 3
        seen.add(tuple(peaks(responses)))
        for response in responses:
            assert response.direct_samples == 0.0 and response.lead == 32
            assert np.abs(response.taps).argmax() == 32 and len(response.taps) == 32 + 160
    assert len(seen) == 6 and {peak for peaks in seen for peak in peaks} == {0.9, 0.8, 0.7}


def test_measured_responses_serve_for_what_they_are(make_rows):
    measured = MeasuredRooms(make_rows([(1, "talker"), (1, "loudspeaker")]), sample_rate=RATE)
    for seed in range(5):
        assert peaks(measured.draw(np.random.default_rng(seed))) == [0.9, 0.8, None]


def test_responses_that_cannot_serve_are_named(make_rows, tmp_path):
    with pytest.raises(DataError, match=r"rir\.jsonl, line 1: .*rir0\.wav: its manifest row has no room"):
        MeasuredRooms(make_rows([(None, None)]), sample_rate=RATE)
    with pytest.raises(DataError, match=r"rir\.jsonl, line 1: .*rir0\.wav: room hall has one response only"):
        MeasuredRooms(make_rows([("hall", None), ("attic", None)]), sample_rate=RATE)
    rows = make_rows([("hall", None), ("hall", None)])
    (tmp_path / "rir0.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"rir0\.wav: is empty"):
        MeasuredRooms(rows, sample_rate=RATE).draw(np.random.default_rng(0))


def test_a_silent_response_is_a_bad_file(tmp_path):
    for name in "ab":
        sf.write(tmp_path / f"{name}.wav", np.zeros(100), RATE)
    rows = [{"audio_filepath": str(tmp_path / f"{name}.wav"), "duration": 100 / RATE, "room": 1} for name in "ab"]
    with pytest.raises(AudioError, match=r"\.wav: is silent, no room response"):
        MeasuredRooms(rows, sample_rate=RATE).draw(np.random.default_rng(0))


def test_a_measured_direct_path_need_not_be_the_largest_tap():
    taps = np.zeros(1000, np.float32)
    taps[[300, 301, 302, 450]] = [0.2, 0.4, 0.1, -0.9]
    response = measured_response(taps, sample_rate=RATE, rir_s=0.5)
    assert response.taps[response.lead] == np.float32(0.4) and len(response.taps) == 1000 - 301 + response.lead
    assert measured_response(np.zeros(10, np.float32), sample_rate=RATE, rir_s=0.5).lead == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"num_rooms": 0},
        {"room_size_m": (3, 8)},
        {"room_size_m": ((3, 8), (3, 8), (0, 2))},
        {"t60_s": (0.01, 0.2)},
        {"speaker_distance_m": (0.3, 0.1)},
        {"talker_distance_m": 2.0},
        {"rir_s": 0},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RoomSettings(**bad)
