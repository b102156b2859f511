"""What tests of mixtures share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

RATE = 8000


def corpus(
    folder: Path, *, speakers: int = 4, utterances: int = 2, seconds: float = 1.0, rate: int = RATE
) -> list[dict]:
    """Speaker n is a tone of 300 + 200 n Hz; each utterance has a level of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for speaker in range(speakers):
        for number in range(utterances):
            path = folder / f"s{speaker}_{number}.wav"
            time = np.arange(int(seconds * rate)) / rate
            sf.write(path, 0.1 * (1 + number) * np.sin(2 * np.pi * (300 + 200 * speaker) * time), rate)
            rows.append({"audio_filepath": str(path), "duration": seconds, "speaker": f"s{speaker}"})
    return rows


@pytest.fixture
def make_corpus() -> Callable[..., list[dict]]:
    """Writes recordings of talkers to a folder and gives their manifest rows."""
    return corpus
