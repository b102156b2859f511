"""Documents that are carried out: the files that stand in a page of docs/, and its commands."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> dict[str, str]:
    """The blocks of docs/<name> that have a title: title -> text."""
    return dict(re.findall(r"```\w+ title=(\S+)\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL))


def write_files(page: dict[str, str], folder: Path) -> None:
    """Write the blocks whose titles are paths."""
    for name, text in page.items():
        if "." in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The script (without .py) and the arguments of each command of a block; a backslash continues a line."""
    split = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    assert all(argv[0] == "python" for argv in split), split
    return [(argv[1].removesuffix(".py"), argv[2:]) for argv in split]
