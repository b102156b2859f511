"""What a run prints at its end."""

from launch.report import table


def test_an_error_stands_beside_its_mean() -> None:
    lines = table({"test_si_sdri": 6.2282, "test_si_sdri_stderr": 0.3374, "test_num_mixtures": 60.0}).splitlines()
    assert lines == ["test_si_sdri         6.228 +- 0.34", "test_num_mixtures    60"]
