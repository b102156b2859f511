"""Every case of a folder of golden files: `pytest tests/golden_suite --golden-dir=<folder> [--system=<name>]`."""

from pathlib import Path

import pytest

from tests.golden_suite.suite import Case, collect, run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = collect(Path(metafunc.config.getoption("golden_dir")), metafunc.config.getoption("system"))
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def test_golden(case: Case, record_property) -> None:
    if case.skip:
        pytest.skip(case.skip)
    try:
        check = run(case)
    except pytest.skip.Exception as skip:  # e.g. of an importorskip: a case counts only when it ran
        pytest.fail(f"a golden case must not be skipped: {skip}", pytrace=False)
    record_property("golden", [case.file, check.count, *check.worst])
    if check.failures:
        pytest.fail("\n".join(check.failures), pytrace=False)
