"""Malformed inputs of every kind: each is reported in a line that names it. No traceback, no hang, nothing is run.

At most five of a kind, made with fixed seeds (tests/malformed). Single files that cannot be used are passed over by a
training and counted; everything else ends in exit code 2.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.conv_tasnet import ConvTasNet
from models.deepvqe import DeepVQE
from tests.malformed import audio, checkpoints, configurations, images, manifests, values
from tests.malformed.cases import World

KINDS = {**audio.KINDS, **images.KINDS, **manifests.KINDS, **configurations.KINDS, **checkpoints.KINDS, **values.KINDS}
SEPARATOR: dict[str, Any] = dict(num_filters=8, bottleneck_channels=4, hidden_channels=8, num_blocks=1, num_repeats=1)
CANCELLER: dict[str, Any] = dict(
    stft="n512", mic_channels=[4, 4], far_channels=[4], decoder_channels=[4], gru_hidden=4, align={"hidden_channels": 4}
)
LONGEST_S = 20
LONGEST_LINE = 1200


class Late(BaseException):
    """No answer in time; no reader takes this for an error of its file."""


@pytest.fixture(scope="module")
def world(corpus: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("malformed")
    made = {}
    for name, system in {"conv_tasnet": ConvTasNet(**SEPARATOR), "deepvqe": DeepVQE(**CANCELLER)}.items():
        content = {"state_dict": system.state_dict(), "config": {"model": {}, "data": {}}}
        system.on_save_checkpoint(content)
        made[name] = folder / f"{name}.ckpt"
        torch.save(content, made[name])
    return World(folder, corpus, photos, made)


@pytest.fixture
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Late(f"no answer within {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_in_time")
@pytest.mark.parametrize("kind", KINDS)
def test_reported(kind: str, world: World, in_tmp: Path, record_property: Callable) -> None:
    cases = list(KINDS[kind](world))
    assert 1 <= len(cases) <= 5
    wrong = []
    for case in cases:
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
        try:
            report = case.use()
        except (Exception, SystemExit, Late) as error:
            wrong.append(f"{case.what}: {type(error).__name__}: {error}")
            continue
        if case.names not in report or max(map(len, report.splitlines())) > LONGEST_LINE:
            wrong.append(f"{case.what}: told {report!r}, without {case.names}")
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n".join(wrong)
    assert not os.listdir(in_tmp), "nothing is written, and nothing that an input holds is run"
    record_property("malformed", len(cases))
