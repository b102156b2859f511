"""What a malformed input is here, and the ways in which one is used and reported."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.base import SystemData
from launch.errors import is_users_mistake, one_line
from tests.conftest import run_script


class World(NamedTuple):
    """Where inputs are made, and whole ones to damage: recordings, photos, and checkpoints by system."""

    folder: Path
    corpus: Path
    photos: Path
    checkpoints: dict[str, Path]


class Case(NamedTuple):
    """One input. *use*: uses it and returns what a user is told; that must hold *names*."""

    what: str
    use: Callable[[], str]
    names: str


Kind = Callable[[World], Iterator[Case]]


def refused(use: Callable[[], Any]) -> str:
    """What is said when a part of the framework refuses its input. What is no user's mistake is raised."""
    try:
        result = use()
    except Exception as error:
        if not is_users_mistake(error):
            raise
        return one_line(error)
    raise AssertionError(f"taken without a word: {str(result)[:200]}")


def typed(script: str, argv: Sequence[str]) -> str:
    """The error lines of a command, which must end in exit code 2."""
    done = run_script(script, list(argv))
    assert done.code == 2, f"exit code {done.code}: {done.text[-2000:]}"
    assert "Traceback" not in done.text, done.text[-2000:]
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert lines, done.text[-2000:]
    return "\n".join(lines)


def counted(data: SystemData) -> str:
    """What is said about files that a training passes over: its examples give way to others."""
    data.setup("fit")
    assert list(data.train_dataloader())
    return "\n".join(data.bad_files.values())
