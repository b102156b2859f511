"""What ends a run on all its processes, and how its message names things."""


class RunFailure(RuntimeError):
    """Ends a run with one line that says all there is to say.

    *told_elsewhere*: the first process says so; it is raised by all of them.
    """

    def __init__(self, message: str, *, told_elsewhere: bool = False) -> None:
        super().__init__(message)
        self.told_elsewhere = told_elsewhere


def listed(names: list[str], *, most: int, none: str, kind: str = "") -> str:
    """The first of some names, each once: "a, b and 3 more"; *none*: what is said where there are none.

    *kind*: of what there are more.
    """
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more{kind and ' '}{kind}" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or none
