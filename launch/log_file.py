"""The log file of a run, on a disk that may be full."""

import logging
import sys


class LogFile(logging.FileHandler):
    """A log file; that lines cannot be written is told once on the console, and ends no run.

    Python's own handler would print a traceback for each line, or raise in the line that opens the file.
    """

    _told = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError as error:
            self._tell(error)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._tell(error)
        else:
            super().handleError(record)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            print(f"{self.baseFilename} cannot be written ({error.strerror or error})", file=sys.stderr)
