"""Who may know whom: the import graph of the house, read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("launch", "models", "modules", "losses", "metrics", "data", "callbacks", "benchmarks")
SCRIPTS = ("train", "evaluate", "predict", "export")

# What each room may import of the house.
ALLOWED = {
    "launch": {"launch", "models", "data", "callbacks"},
    "models": {"models", "modules", "losses", "metrics"},
    "callbacks": {"callbacks", "modules"},
    "modules": {"modules"},
    "losses": {"losses"},
    "metrics": {"metrics"},
    "data": {"data"},
    "benchmarks": set(ROOMS),
}
# Libraries that a room must not know.
FORBIDDEN = {
    "modules": {"pytorch_lightning", "hydra", "omegaconf"},
    "losses": {"pytorch_lightning", "hydra", "omegaconf"},
    "metrics": {"pytorch_lightning", "hydra", "omegaconf"},
    "models": {"hydra", "omegaconf"},
    "data": {"hydra", "omegaconf"},
    "callbacks": {"hydra", "omegaconf"},
}


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [(room, file) for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize(("room", "file"), FILES, ids=lambda v: v.name if isinstance(v, Path) else v)
def test_direction(room: str, file: Path) -> None:
    for name in imported(file):
        top = name.partition(".")[0]
        assert top != "lightning", f"{file}: pytorch_lightning only; lightning is another class tree"
        assert top not in FORBIDDEN.get(room, set()), f"{file}: {room} must not know {top}"
        assert top not in SCRIPTS, f"{file}: nothing imports a script"
        if top in ROOMS:
            allowed = top in ALLOWED[room] or (room == "data" and name.startswith("modules.stft"))
            assert allowed, f"{file}: {room} must not know {top}"


def test_systems_do_not_know_one_another() -> None:
    shared = {"base", "checkpoint", "global_loss", "nemo", "optim", "plain", "__init__"}
    shared |= {"deepvqe_sections", "nest_archive", "nest_encoder", "nest_sections"}
    systems = {file.stem for file in (ROOT / "models").glob("*.py")} - shared
    for system in systems:
        for name in imported(ROOT / "models" / f"{system}.py"):
            room, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            assert not (room == "models" and other in systems - {system}), f"{system} imports {other}: move it down"


def test_no_circle() -> None:
    rooms = {room: {n.partition(".")[0] for f in (ROOT / room).rglob("*.py") for n in imported(f)} for room in ROOMS}
    graph = {room: (names & set(ROOMS)) - {room} for room, names in rooms.items()}
    seen: set[str] = set()
    while graph:
        floor = {room for room, needs in graph.items() if needs <= seen}
        assert floor, f"a circle among {sorted(graph)}"
        seen |= floor
        graph = {room: needs for room, needs in graph.items() if room not in floor}
