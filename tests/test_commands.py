"""The command line as an executable contract: tests/commands/*.txt, see the README there."""

import importlib
import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from data import prepare
from launch import runs
from models.nest import NEST

FOLDER = Path(__file__).parent / "commands"
ROOT = Path(__file__).parent.parent
_HEADER = re.compile(r"(?P<code>\d+)\s+(?P<run>run\s+)?(?:#(?P<issue>\d+)\s+)?(?P<command>\S.*)")


@dataclass
class Command:
    """One line of a file with its expectation."""

    file: str
    line: int
    code: int
    text: str
    run: bool
    issue: str | None
    replacements: list[tuple[str, str]]
    expected: list[str] = field(default_factory=list)

    def argv(self, **places: Path) -> list[str]:
        """What is run: replacements made (one word may become several), places filled in."""
        words = shlex.split(self.text)
        for old, new in self.replacements:
            words = [part for word in words for part in (word.replace(old, new).split() if old in word else [word])]
        return [word.replace("//", "/") for word in _fill(words, places)]


def _fill(words: list[str], places: dict[str, Path]) -> Iterator[str]:
    for word in words:
        for name, path in places.items():
            word = word.replace(f"{{{name}}}", str(path))
        yield word


def read_commands(file: Path) -> list[Command]:
    replacements, commands = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.startswith("= "):
            old, _, new = line[2:].partition(" -> ")
            replacements.append((old, new))
        elif line.startswith("  | "):
            commands[-1].expected.append(line[4:])
        elif line.strip() and not line.startswith("#"):
            found = _HEADER.fullmatch(line)
            assert found, f"{file.name}:{number}: neither a command nor an expectation: {line}"
            commands.append(
                Command(
                    file=file.stem,
                    line=number,
                    code=int(found["code"]),
                    text=found["command"],
                    run=bool(found["run"]),
                    issue=found["issue"],
                    replacements=replacements,
                )
            )
    return commands


COMMANDS = [command for file in sorted(FOLDER.glob("*.txt")) for command in read_commands(file)]


@pytest.fixture(scope="session")
def nemo_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny NEST in a file of NeMo's, of the size that tests/commands/nest.txt puts in place of the guide's."""
    encoder = {"d_model": 16, "n_heads": 2, "n_layers": 1, "subsampling_conv_channels": 4}
    file = tmp_path_factory.mktemp("nemo") / "tiny.nemo"
    NEST(num_classes=16, encoder=encoder).save_to(file)
    return file


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.file}:{c.line}")
def test_command(
    command: Command,
    script: Callable,
    corpus: Path,
    in_tmp: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture,
) -> None:
    if command.issue:
        pytest.skip(f"pending, issue {command.issue}: {command.text[:60]}")
    assert command.expected, "a command without an expected line proves little"
    (in_tmp / "demo_data").symlink_to(corpus)
    if "unet" in command.text:
        (in_tmp / "demo_photos").symlink_to(request.getfixturevalue("photos"))
    if "launch.runs" in command.text:
        (in_tmp / "runs").symlink_to(request.getfixturevalue("trained"))
    made = {"run": "trained", "echo_run": "trained_echo", "nest_run": "trained_nest", "unet_run": "trained_unet"}
    made |= {"recordings": "recordings", "archive": "nemo_archive", "photos": "photos"}
    named = {place for place in made if f"{{{place}}}" in " ".join([command.text, *sum(command.replacements, ())])}
    places = {place: request.getfixturevalue(made[place]) for place in named}
    argv = command.argv(corpus=corpus, tmp=in_tmp, **places)
    if argv[0] == "torchrun":
        argv = ["python", *under_torchrun(argv[1:], request.getfixturevalue("monkeypatch"))]
    python, name, *arguments = argv
    assert python == "python"
    if name == "-m":
        code = {"data.prepare": prepare.main, "launch.runs": runs.main}[arguments.pop(0)](arguments)
        shown = capsys.readouterr()
        assert code == command.code and all(line in shown.out + shown.err for line in command.expected), shown
        return
    if name == "train.py" and not command.run and not any(a.startswith("-") and a != "-m" for a in arguments):
        arguments.append("dry_run=true")
    done = script(name.removesuffix(".py"), arguments)
    assert done.code == command.code, done.text
    for line in command.expected:
        assert line in done.text
    assert "Traceback" not in done.text
    if command.code == 2 or not command.run:
        left = {file.name for file in in_tmp.iterdir()} & {"runs", "nemo_experiments"}
        assert not left, "a run that never began leaves no directory behind"


def under_torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The script and its arguments, in the environment of the first process that torchrun would start.

    A dry run joins no other process; tests/faults/test_launch.py starts them.
    """
    flags = list(itertools.takewhile(lambda word: word.startswith("-"), words))
    given = get_args_parser().parse_args([*flags, "train.py"])
    processes = int(given.nproc_per_node)
    sizes = {"WORLD_SIZE": processes * int(given.nnodes), "LOCAL_WORLD_SIZE": processes, "RANK": 0, "LOCAL_RANK": 0}
    named = {"TORCHELASTIC_RUN_ID": given.rdzv_id, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    for name, value in (sizes | named).items():
        monkeypatch.setenv(name, str(value))
    return words[len(flags) :]


def test_every_command_of_the_documents_is_held() -> None:
    held = {re.sub(r"\s+", " ", command.text) for command in COMMANDS}
    for document in [ROOT / "README.md"]:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s+", " ", line.partition("  #")[0]).strip()
                if re.match(r"python (\w+\.py|-m (data|launch))", text):
                    assert text in held, f"{document.name}: no line in tests/commands holds: {text}"


def test_scripts_share_one_screen() -> None:
    for name in ("train", "evaluate", "predict", "export"):
        source = (ROOT / f"{name}.py").read_text()
        assert len(source.splitlines()) <= 50, f"{name}.py no longer fits one screen"
        assert importlib.import_module(name).main
