"""A golden file that knows which of its tensors nobody has asked for, and how near is near enough."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tests.golden_suite.suite import Check, with_prefix


class Reference(Mapping[str, Tensor]):
    """Tensors by name; asking for one, alone or in a group, counts as using it."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self._tensors = tensors
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._used.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start so, under the rest of their names."""
        found = with_prefix(self._tensors, prefix)
        self._used.update(prefix + name for name in found)
        return found

    def unused(self) -> list[str]:
        return sorted(self._tensors.keys() - self._used)


@dataclass(frozen=True)
class Kind:
    """What a file may hold: how it is recognised, how it is compared."""

    mark: Callable[[Reference], bool]
    run: Callable[[Reference, Check], None]


def close(check: Check, what: str, actual: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """Each element within tolerance * (1 + its magnitude): absolute plus relative."""
    if actual.shape != expected.shape:
        check.equal(f"{what}: shape", tuple(actual.shape), tuple(expected.shape))
        return
    scale = 1 + expected.abs().double()
    check.close(what, actual.detach().double() / scale, expected.double() / scale, tolerance=tolerance)
