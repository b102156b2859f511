"""A log file that cannot be written is told once, and ends no run."""

import logging
import os
from pathlib import Path

import pytest

from launch.log_file import LogFile


class Full:
    """What an open file is on a full disk."""

    def write(self, text: str) -> None:
        raise OSError(28, os.strerror(28))

    flush = close = lambda self: None


def test_told_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    handler = LogFile(tmp_path / "train.log")
    log = logging.Logger("test")
    log.addHandler(handler)
    log.info("before")
    whole = handler.setStream(Full())  # type: ignore[arg-type]
    log.info("lost")
    log.info("lost too")
    handler.setStream(whole)
    log.info("after")
    handler.close()
    assert (tmp_path / "train.log").read_text() == "before\nafter\n"
    assert capsys.readouterr().err == f"{tmp_path}/train.log cannot be written (No space left on device)\n"


def test_a_folder_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (folder := tmp_path / "runs").mkdir()
    handler = LogFile(folder / "train.log", delay=True)
    folder.rmdir()
    handler.emit(logging.makeLogRecord({"msg": "lost"}))
    assert "train.log cannot be written (No such file or directory)" in capsys.readouterr().err
