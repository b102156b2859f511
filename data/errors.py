"""Errors that a user can mend: a file that cannot be used, a manifest that cannot be read.

Each is built from ONE string. A `DataLoader` worker sends its exception to the main process, which builds it anew
as `type(error)(text)` with the worker's whole traceback as text; a constructor with more arguments would turn a
clear line into a `TypeError`.
"""

_FROM_WORKER = "Caught "


class DataError(ValueError):
    """Data that the user named cannot be used; the message is one line that says which and what to do."""

    def __init__(self, message: str) -> None:
        if message.startswith(_FROM_WORKER) and "\n" in message:
            # The last line of a traceback is "package.Class: message".
            message = message.rstrip().rsplit("\n", 1)[-1].partition(": ")[2]
        super().__init__(message)


class FileError(DataError):
    """One file cannot be used; an example that needs it is replaced by another (data/bad_files.py).

    The message begins with the file's path and ": ".
    """


class AudioError(FileError):
    """One recording cannot be read or written."""


class ImageError(FileError):
    """One image or mask cannot be read or written."""


class ManifestError(DataError):
    """A manifest cannot be read; the message names the file and the line."""
