"""Where the kills of all cases did hit, at the end of the suite."""

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    counts = dict(value for report in reports for name, value in report.user_properties if name == "kills")
    total = sum((Counter(kills) for kills in counts.values()), Counter())
    if total:
        terminalreporter.write_line(f"killed processes: {sum(total.values())}, in")
        for place, times in total.most_common():
            terminalreporter.write_line(f"  {place:<17} {times:>3}  {'#' * times}")
