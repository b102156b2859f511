"""Rooms: responses from a talker and from a loudspeaker to the one microphone that hears both.

Two sources: shoebox rooms (image sources by pyroomacoustics, Allen and Berkley, "Image method for efficiently
simulating small-room acoustics", JASA 1979), and responses that were measured.

Decisions that are not obvious
* Time 0 of a response is `taps[lead]`. pyroomacoustics begins its responses half a fractional-delay filter (40
  samples) early; that is their lead. So the direct path of a source at d metres lies at d / c, and a known delay is
  exact.
* Image sources of order 12 are complete for the first 45 ms or more and cost 3 ms per response. What comes later is
  diffuse: noise that falls by 60 dB in the reverberation time and takes over at the level it meets. So a long
  reverberation costs no more than a short one.
* A measured response is cut 2 ms before its direct path, which is its time 0: how long the measuring took to begin is
  no property of the room.
* A room is a function of (seed, number), made when first needed, and kept; each loader worker has its own copies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data.cache import RowReader
from data.checks import number, whole_number
from data.errors import AudioError, DataError
from data.manifest import place_of
from data.ranges import Range, check_range

SPEED_OF_SOUND = 343.0  # m/s, that of pyroomacoustics

_ROOMS = 1  # fifth word of a room's seed; items use at most four
_MAX_ORDER = 12
_TALKERS, _LOUDSPEAKERS = 3, 2  # positions per room
_WALL_M = 0.1  # nearest that anything comes to a wall, half a metre for the microphone
_TRIES = 50
_CROSSFADE_S = 0.01  # from image sources to the diffuse tail
_EARLY_FADE_S = 0.001
_ONSET = 10 ** (-10 / 20)  # of the largest tap, where a measured direct path is looked for
_BEFORE_S = 0.002


class Response(NamedTuple):
    """A response from a source to the microphone. float32 `taps` `(N,)`; `lead` is the index of time 0;
    `direct_samples` is when the direct path arrives, in samples after time 0."""

    taps: np.ndarray
    lead: int
    direct_samples: float


class Responses(NamedTuple):
    """Responses of one room; `moved` is that of the loudspeaker at another place, None if there is none."""

    talker: Response
    loudspeaker: Response
    moved: Response | None


def early_part(response: Response, *, target_ms: float, sample_rate: int) -> Response:
    """The response up to `target_ms` after its direct path, with a fade of 1 ms; 0: the direct path alone."""
    end = response.lead + response.direct_samples + target_ms * sample_rate / 1000
    fade = (end - np.arange(len(response.taps))) / (_EARLY_FADE_S * sample_rate) + 1  # 1 at `end`, 0 a fade later
    return response._replace(taps=(response.taps * np.clip(fade, 0, 1)).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class RoomSettings:
    """How rooms are drawn. Ranges are [low, high] and drawn from uniformly.

    Args:
        num_rooms: how many there are; None: every example has its own.
        room_size_m: ranges of length, width and height.
        t60_s: reverberation time.
        speaker_distance_m: from loudspeaker to microphone.
        talker_distance_m: from talker to microphone. A place that does not fit into its room is drawn again.
        rir_s: longest response; one also ends where it has fallen by 60 dB.

    Raises:
        ValueError: a value that cannot be used, by its key in the configuration.
    """

    num_rooms: int | None = 200
    room_size_m: Sequence[Range] = ((3.0, 8.0), (2.5, 6.0), (2.3, 3.5))
    t60_s: Range = (0.15, 0.6)
    speaker_distance_m: Range = (0.05, 0.6)
    talker_distance_m: Range = (0.3, 2.0)
    rir_s: float = 0.5

    def __post_init__(self) -> None:
        if self.num_rooms is not None:
            whole_number("num_rooms", self.num_rooms, least=1)
        if not isinstance(self.room_size_m, list | tuple) or len(self.room_size_m) != 3:
            raise ValueError(f"room_size_m must be three ranges, [low, high] each, got {self.room_size_m!r}")
        for side in self.room_size_m:
            check_range("room_size_m", side, least=1.5, most=50)
        check_range("t60_s", self.t60_s, least=0.05, most=5)
        check_range("speaker_distance_m", self.speaker_distance_m, least=0.01, most=10)
        check_range("talker_distance_m", self.talker_distance_m, least=0.01, most=10)
        number("rir_s", self.rir_s, least=0.01, most=10)

    def largest_direct_ms(self) -> float:
        """The latest that the direct path of a loudspeaker may arrive."""
        return self.speaker_distance_m[1] / SPEED_OF_SOUND * 1000


class ShoeboxRooms:
    """Rectangular rooms with a microphone on a table, a loudspeaker near it and talkers around it.

    Args:
        settings: how they are drawn.
        sample_rate: in Hz.
        seed: of the rooms that are kept; where every example has its own, that comes from the example's randomness.
    """

    def __init__(self, settings: RoomSettings, *, sample_rate: int, seed: int = 0) -> None:
        self.settings = settings
        self.sample_rate = sample_rate
        self.seed = seed
        self._kept: dict[int, tuple[list[Response], list[Response]]] = {}

    def draw(self, rng: np.random.Generator) -> Responses:
        """Responses of one of the rooms."""
        if self.settings.num_rooms is None:
            talkers, loudspeakers = self._room(rng)
        else:
            talkers, loudspeakers = self.room(int(rng.integers(int(self.settings.num_rooms))))
        first, second = rng.permutation(_LOUDSPEAKERS)[:2]
        return Responses(talkers[rng.integers(_TALKERS)], loudspeakers[first], loudspeakers[second])

    def room(self, number: int) -> tuple[list[Response], list[Response]]:
        """Responses of all talkers and of all loudspeakers of a room."""
        if number not in self._kept:
            self._kept[number] = self._room(np.random.default_rng([self.seed, number, 0, 0, _ROOMS]))
        return self._kept[number]

    def _room(self, rng: np.random.Generator) -> tuple[list[Response], list[Response]]:
        size = np.array([rng.uniform(*side) for side in self.settings.room_size_m])
        t60_s = float(rng.uniform(*self.settings.t60_s))
        margin = np.minimum([0.5, 0.5, 0.5], size / 3)
        microphone = rng.uniform(margin, np.append(size[:2] - margin[:2], min(1.4, size[2] - margin[2])))
        sources = [_place(rng, microphone, size, self.settings.talker_distance_m) for _ in range(_TALKERS)]
        sources += [_place(rng, microphone, size, self.settings.speaker_distance_m) for _ in range(_LOUDSPEAKERS)]
        responses = shoebox_responses(
            rng,
            size=size,
            t60_s=t60_s,
            microphone=microphone,
            sources=sources,
            sample_rate=self.sample_rate,
            rir_s=self.settings.rir_s,
        )
        return responses[:_TALKERS], responses[_TALKERS:]


def shoebox_responses(
    rng: np.random.Generator,
    *,
    size: np.ndarray,
    t60_s: float,
    microphone: np.ndarray,
    sources: Sequence[np.ndarray],
    sample_rate: int,
    rir_s: float,
) -> list[Response]:
    """Responses from several places of a rectangular room to one microphone.

    Args:
        rng: of the diffuse tails.
        size: length, width and height in metres; so are the coordinates of `microphone` and `sources`.
        t60_s: reverberation time. The walls absorb what Sabine's formula asks for, at most 99 %.
        sample_rate: in Hz.
        rir_s: longest response; one also ends where it has fallen by 60 dB.
    """
    import pyroomacoustics as pra  # here, as it takes a second to import and few need it

    pra.constants.set("num_threads", 1)  # each thread adds up a part: with others the last bits would differ
    surface = 2 * (size[0] * size[1] + size[0] * size[2] + size[1] * size[2])
    absorption = 24 * math.log(10) / SPEED_OF_SOUND * size.prod() / (surface * t60_s)
    material = pra.Material(float(np.clip(absorption, 0.01, 0.99)))
    room = pra.ShoeBox(size, fs=sample_rate, materials=material, max_order=_MAX_ORDER)
    for source in sources:
        room.add_source(source)
    room.add_microphone(microphone)
    room.compute_rir()
    lead = pra.constants.get("frac_delay_length") // 2
    # An image of order n + 1 is at least (n - 2) / |1 / size| away, wherever source and microphone are.
    complete = lead + int((_MAX_ORDER - 2) / np.linalg.norm(1 / size) / SPEED_OF_SOUND * sample_rate)
    responses = []
    for source, images in zip(sources, room.rir[0], strict=True):
        direct_samples = float(np.linalg.norm(source - microphone)) / SPEED_OF_SOUND * sample_rate
        num_taps = lead + round(direct_samples + min(rir_s, t60_s) * sample_rate)
        taps = _with_tail(images, rng, complete=complete, num_taps=num_taps, t60_s=t60_s, sample_rate=sample_rate)
        responses.append(Response(taps, lead, direct_samples))
    return responses


def _with_tail(
    images: np.ndarray, rng: np.random.Generator, *, complete: int, num_taps: int, t60_s: float, sample_rate: int
) -> np.ndarray:
    """The image sources up to tap `complete`, decaying noise from there on. `(num_taps,)`"""
    images = np.pad(images, (0, max(0, num_taps - len(images))))
    fade = round(_CROSSFADE_S * sample_rate)
    begin = complete - fade
    tail = rng.standard_normal(max(0, num_taps - begin))
    time_s = (np.arange(len(tail)) - fade / 2) / sample_rate  # 0 where the level is measured
    level = np.sqrt(np.square(images[begin:complete]).mean())
    tail *= level * 10 ** (-3 * time_s / t60_s)
    turn = np.pi / 2 * np.clip(np.arange(len(tail)) / fade, 0, 1)
    taps = images[:num_taps].copy()
    taps[begin:] = taps[begin:] * np.cos(turn) + tail * np.sin(turn)
    return taps.astype(np.float32)


def _place(rng: np.random.Generator, microphone: np.ndarray, size: np.ndarray, distance_m: Range) -> np.ndarray:
    """A place at a distance from the microphone, in any direction, rather level with it than above or below."""
    place = microphone
    for _ in range(_TRIES):
        direction = rng.standard_normal(3) * [1, 1, 0.5]
        place = microphone + direction / np.linalg.norm(direction) * rng.uniform(*distance_m)
        if (place >= _WALL_M).all() and (place <= size - _WALL_M).all():
            return place
    return np.clip(place, _WALL_M, size - _WALL_M)  # the room is too small for the distance


class _MeasuredRoom(NamedTuple):
    """Rows of the responses that may serve for a talker, and for a loudspeaker."""

    talkers: list[int]
    loudspeakers: list[int]


class MeasuredRooms:
    """Measured responses, two or three different ones of one room at a time.

    Args:
        rows: manifest rows with `audio_filepath`, `duration`, `room`. Where the rows of a room have the `kind`
            "loudspeaker" and "talker", each serves for what it is, otherwise any serves for either.
        sample_rate: rate that they are resampled to, in Hz.
        rir_s: longest response; more is cut off.

    Raises:
        DataError: a row without room, or no room with two responses. `draw` raises AudioError when one cannot be read.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, sample_rate: int, rir_s: float = 0.5) -> None:
        rows_of: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            if row.get("room") is None:
                raise DataError(
                    f"{place_of(row)}: its manifest row has no room;"
                    " echo and near end need two responses of the same one"
                )
            rows_of.setdefault(str(row["room"]), []).append(index)
        rooms = {name: _sort_by_kind(rows, members) for name, members in rows_of.items() if len(members) > 1}
        if not rooms:
            raise DataError(
                f"{place_of(rows[0])}: room {next(iter(rows_of))} has one response only, and so has every other;"
                " echo and near end need two different ones of the same room"
            )
        self.sample_rate = sample_rate
        self.rir_s = rir_s
        self._rooms = [rooms[name] for name in sorted(rooms)]
        self._files = [str(row["audio_filepath"]) for row in rows]
        self._reader = RowReader(rows, sample_rate=sample_rate, cache=True)

    def draw(self, rng: np.random.Generator) -> Responses:
        """Responses of one of the rooms."""
        room = self._rooms[rng.integers(len(self._rooms))]
        loudspeaker = int(rng.choice(room.loudspeakers))
        talker = int(rng.choice([row for row in room.talkers if row != loudspeaker]))
        others = [row for row in room.loudspeakers if row not in (loudspeaker, talker)]
        moved = self._read(int(rng.choice(others))) if others else None
        return Responses(self._read(talker), self._read(loudspeaker), moved)

    def _read(self, row: int) -> Response:
        taps = self._reader.read(row, start=0, count=self._reader.num_samples[row]).numpy()
        if not taps.any():
            raise AudioError(f"{self._files[row]}: is silent, no room response")
        return measured_response(taps, sample_rate=self.sample_rate, rir_s=self.rir_s)


def _sort_by_kind(rows: Sequence[Mapping[str, Any]], members: list[int]) -> _MeasuredRoom:
    kinds = {kind: [row for row in members if rows[row].get("kind") == kind] for kind in ("talker", "loudspeaker")}
    return (
        _MeasuredRoom(kinds["talker"], kinds["loudspeaker"]) if all(kinds.values()) else _MeasuredRoom(members, members)
    )


def measured_response(taps: np.ndarray, *, sample_rate: int, rir_s: float) -> Response:
    """A measured response with its direct path as time 0: the first local maximum within 10 dB of the largest tap.

    Shape: `(N,)`
    """
    size = np.abs(taps)
    direct = int(np.argmax(size >= _ONSET * size.max(initial=0.0)))
    while direct + 1 < len(size) and size[direct + 1] > size[direct]:
        direct += 1
    start = max(0, direct - round(_BEFORE_S * sample_rate))
    return Response(taps[start : direct + round(rir_s * sample_rate)].astype(np.float32), direct - start, 0.0)
