"""A plugin of pytest: every test's outcome as a finding, by name, the moment it is known.

Dots on a terminal lose the names of what failed when a run is cut short; these lines do not.
"""

from __future__ import annotations

import json
import os
from typing import Any

from .records import MARK

# pytest catches what is written to the usual place while a test runs.
_OUTPUT = os.dup(1)


def _say(**record: Any) -> None:
    os.write(_OUTPUT, (MARK + json.dumps(record) + "\n").encode())


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _say(kind="begin", what=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.failed:
        _say(kind="check", what=report.nodeid, ok=not report.failed, seconds=round(report.duration, 2))
    if report.failed:
        words = str(report.longrepr).strip().splitlines() or ["no message"]
        _say(kind="failure", what=report.nodeid, why=f"{report.when}: {words[-1][:300]}")
    if report.when == "teardown":
        _say(kind="end", what=report.nodeid)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        words = str(report.longrepr).strip().splitlines() or ["no message"]
        _say(kind="failure", what=f"collecting {report.nodeid}", why=words[-1][:300])
