"""The talkers of the demo corpus: who they are, and how each is made from a synthesiser voice.

A talker is an espeak-ng language and variant with its own pitch, pace and liveliness. What the synthesiser
lacks is added afterwards and is fixed per talker: the length of the vocal tract (by resampling, which moves
the formants), some breath, and the colour of the recording chain (a short filter with a tilt and three broad
resonances). Variants that are near copies of each other form a family, and a family never appears in two
splits: a talker of the test split is unheard in every respect.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from data.corpus import SPLITS

# Median pitch in Hz of each variant at espeak's neutral pitch setting. Left out: variants that whisper, croak,
# rasp or drone, those that overload, and those with espeak's breath, which differ from run to run. A trailing
# digit marks a near copy (a family), except in the plain m and f series.
FEMALE_VARIANTS = {
    "Andrea": 246, "Annie": 243, "anika": 269, "aunty": 171, "belinda": 233, "f1": 181, "f4": 181, "grandma": 202,
    "linda": 230, "shelby": 183, "steph": 185,
}  # fmt: skip
MALE_VARIANTS = {
    "Alex": 104, "Andy": 97, "Denis": 100, "Diogo": 106, "Gene": 96, "Henrique": 110, "Hugo": 111, "Lee": 97,
    "Marco": 133, "Mario": 109, "Michael": 109, "Mike": 92, "Mr serious": 102, "Nguyen": 153, "RicishayMax": 103,
    "adam": 102, "announcer": 66, "antonio": 112, "benjamin": 102, "boris": 103, "david": 75, "ed": 127,
    "edward": 103, "edward2": 102, "gustave": 108, "iven": 101, "iven2": 102, "iven3": 101, "iven4": 101, "john": 102,
    "kaukovalta": 103, "klatt3": 103, "klatt4": 103, "klatt5": 103, "klatt6": 102, "m1": 95, "m2": 102, "m3": 107,
    "m4": 95, "m5": 104, "m6": 103, "m7": 108, "m8": 86, "marcelo": 99, "max": 103, "michel": 106, "miguel": 112,
    "norbert": 103, "pablo": 115, "paul": 86, "pedro": 103, "quincy": 86, "rob": 108, "robert": 98, "travis": 104,
}  # fmt: skip

# espeak language: key of the grammar. English about half the time, as in most corpora that are used after
# this one.
ACCENTS = {
    "en-us": "en", "en-gb-scotland": "en", "en-gb-x-rp": "en", "en-gb-x-gbclan": "en", "en-gb-x-gbcwmd": "en",
    "en-029": "en", "en-us-nyc": "en", "de": "de", "es": "es", "es-419": "es", "fr": "fr", "fr-be": "fr", "it": "it",
    "pt": "pt", "pt-br": "pt", "nl": "nl", "sv": "sv", "pl": "pl", "fi": "fi", "id": "id",
}  # fmt: skip

# espeak's pitch setting against the factor by which it moves the pitch, measured.
_PITCH_SETTING = (0, 10, 25, 40, 50, 60, 75, 90, 99)
_PITCH_FACTOR = (0.664, 0.713, 0.808, 0.912, 1.0, 1.098, 1.274, 1.482, 1.641)


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A talker. `name` is its folder, `espeak` the synthesiser's voice, `tract` the factor on pitch and formants."""

    name: str
    split: str
    espeak: str
    language: str
    pitch_hz: float
    words_per_minute: float
    liveliness: float
    tract: float
    breath_db: float
    colour_seed: tuple[int, ...]
    pitch_setting: float


def family(variant: str) -> str:
    """The name that near copies share: iven, iven2, iven3 -> iven; m1 and m2 are different."""
    stem = variant.rstrip("0123456789")
    return variant if stem in ("m", "f") else stem


def choose_voices(*, seed: int, counts: tuple[int, int, int]) -> list[Voice]:
    """Make up `counts` talkers for train, val and test, half of them female.

    The test and val talkers take their variants first; train gets the families that are left and may use a
    variant more than once (with another language, pitch and tract). Pitches are spread evenly within each
    split.
    """
    rng = np.random.default_rng([seed, 1])
    base_hz = FEMALE_VARIANTS | MALE_VARIANTS
    female, male = ([str(v) for v in rng.permutation(list(pool))] for pool in (FEMALE_VARIANTS, MALE_VARIANTS))
    taken: set[str] = set()
    uses: Counter[str] = Counter()
    voices: list[Voice] = []
    for split, count in reversed(list(zip(SPLITS, counts, strict=True))):
        pools = [[v for v in pool if family(v) not in taken] for pool in (female, male)]
        pitches = {sex: iter(_spread(rng, (count + 1) // 2)) for sex in (0, 1)}
        accents = _accents(rng, count)
        for index in range(count):
            sex = index % 2
            # There are few female variants: two women in three are a male variant with a shorter tract.
            pool = pools[1] if sex == 1 or (index // 2) % 3 else pools[0]
            variant = min(pool, key=lambda name: uses[name])  # the first of the least used
            uses[variant] += 1
            taken.add(family(variant))
            voices.append(
                _make_voice(
                    rng,
                    seed=seed,
                    index=len(voices),
                    split=split,
                    accent=accents[index],
                    variant=variant,
                    base_hz=base_hz[variant],
                    female=sex == 0,
                    height=next(pitches[sex]),
                )
            )
    return sorted(voices, key=lambda voice: (SPLITS.index(voice.split), voice.name))


def _spread(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` values that cover 0..1 evenly, in random order."""
    return rng.permutation((np.arange(count) + rng.random(count)) / max(count, 1))


def _accents(rng: np.random.Generator, count: int) -> list[str]:
    """`count` accents in random order: English and other languages half each, every accent about equally often."""
    is_english = [index % 2 == 0 for index in range(count)]
    decks = {
        english: [str(accent) for accent in rng.permutation([a for a, g in ACCENTS.items() if (g == "en") == english])]
        for english in (True, False)
    }
    accents = [decks[english][index // 2 % len(decks[english])] for index, english in enumerate(is_english)]
    return [accents[index] for index in rng.permutation(count)]


def _make_voice(
    rng: np.random.Generator,
    *,
    seed: int,
    index: int,
    split: str,
    accent: str,
    variant: str,
    base_hz: float,
    female: bool,
    height: float,
) -> Voice:
    """A talker whose pitch lies at `height` (0..1) of the range of its sex."""
    low_hz, high_hz = (165.0, 265.0) if female else (85.0, 150.0)
    pitch_hz = low_hz * (high_hz / low_hz) ** height
    if not female:
        tract = rng.uniform(0.92, 1.07)
    elif variant in FEMALE_VARIANTS:
        tract = rng.uniform(0.96, 1.12)
    else:
        tract = rng.uniform(1.12, 1.22)
    factor = pitch_hz / (base_hz * tract)
    return Voice(
        name=f"{accent}_{variant.replace(' ', '-')}_{index:02d}",
        split=split,
        espeak=f"{accent}+{variant}",
        language=ACCENTS[accent],
        pitch_hz=pitch_hz,
        words_per_minute=rng.uniform(140, 185),
        liveliness=rng.uniform(35, 75),
        tract=tract,
        breath_db=rng.uniform(-45, -30),
        colour_seed=(seed, 2, index),
        pitch_setting=float(np.interp(factor, _PITCH_FACTOR, _PITCH_SETTING)),
    )
