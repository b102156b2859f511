"""What the tests of faults have recorded, in words for the end of a run: under xdist nothing else reaches the terminal.

`kills`: how many hit which place, of a case; `lines`: as they are; `cell`: a row of the table of signals.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any


def summary(recorded: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Lines for the terminal; none where no test of faults ran."""
    named: dict[str, list[Any]] = {}
    for name, value in recorded:
        named.setdefault(name, []).append(value)
    for lines in named.get("lines", ()):
        yield from lines
    if "cell" in named:
        yield f"{'signal':<44} code  step  left  s until gone"
        yield from sorted(named["cell"])
    if "kills" in named:
        total = sum(map(Counter, named["kills"]), Counter[str]())
        yield f"killed processes: {total.total()}, in"
        yield from (f"  {place:<17} {times:>3}  {'#' * times}" for place, times in total.most_common())
