"""What a run prints at its end."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.report import closing, table
from models.base import System


def test_an_error_stands_beside_its_mean() -> None:
    lines = table({"test_si_sdri": 6.2282, "test_si_sdri_stderr": 0.3374, "test_num_mixtures": 60.0}).splitlines()
    assert lines == ["test_si_sdri         6.228 +- 0.34", "test_num_mixtures    60"]


def test_the_next_command_names_every_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for inputs, expected in (({"mixture": "audio"}, ""), ({"mic": "audio", "far": "audio"}, " far=<files>")):
        caplog.clear()
        system = SimpleNamespace(inputs=inputs)
        trainer = SimpleNamespace(
            checkpoint_callback=SimpleNamespace(best_model_path="b.ckpt"), lightning_module=system
        )
        with caplog.at_level("INFO"):
            closing(tmp_path, trainer, None)  # type: ignore[arg-type]
        command = f"python predict.py ckpt_path=b.ckpt input=<files>{expected} output=<folder>"
        assert caplog.messages[-1].split(maxsplit=1) == ["next", command]


def test_names_the_folders_of_test_examples_that_there_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = SimpleNamespace(checkpoint_callback=None, lightning_module=SimpleNamespace())
    (tmp_path / "look").mkdir()
    with caplog.at_level("INFO"):
        closing(tmp_path, trainer, None)  # type: ignore[arg-type]
    folders = [message for message in caplog.messages if message.startswith(("listen", "images"))]
    assert folders == [f"images           {tmp_path / 'look'}"]


def test_a_system_that_only_trains_is_evaluated_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Encoder(System):
        def step(self, batch: dict) -> dict:
            return {}

    trainer = SimpleNamespace(checkpoint_callback=None, lightning_module=Encoder())
    with caplog.at_level("INFO"):
        closing(tmp_path, trainer, None)  # type: ignore[arg-type]
    assert "python evaluate.py ckpt_path=" in caplog.messages[-1]
