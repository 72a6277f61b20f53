"""Cases that `make test` leaves to `make test-all`: of a test with many, the longer five sixths.

    python -m pytest -m "not slow and not gpu" --durations=0 -vv > durations.txt
    python -m tests.support.long_cases durations.txt

writes the list anew from what was measured, on top of the marks in the tests. At least a sixth of every test's cases
stay, so that nothing is left to the long run alone; where backends are cases, so does the one that is interpreted.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

LIST = Path(__file__).with_name("long_cases.txt")
LEAST = 0.1  # seconds, below which a case is worth running whatever others do
SHARE = 6  # of so many cases one stays
#: Of which no case says what another does: each is a document, a script or a machine.
APART = ("tests/documents/", "tests/integrations/")
_TIME = re.compile(r"([\d.]+)s (?:call|setup|teardown)\s+(\S+?::.*)")


def test_of(case: str) -> str:
    """The test that a case is of: its id without parameters."""
    return case.partition("[")[0]


def durations(lines: Iterable[str]) -> dict[str, float]:
    """Seconds of each case, with what is set up for it, as pytest prints them."""
    found: Counter[str] = Counter()
    for line in lines:
        if told := _TIME.match(line.rstrip()):
            found[told[2]] += float(told[1])
    return dict(found)


def longest(seconds: Mapping[str, float], least: float = LEAST) -> list[str]:
    """The cases to leave out, by name.

    >>> longest({"a::t[1]": 3.0, "a::t[2]": 2.0, "a::t[3]": 1.0, "a::u": 9.0, "a::v[1]": 0.2, "a::v[2]": 0.3})
    ['a::t[1]', 'a::t[2]', 'a::v[2]']
    """
    cases: dict[str, list[str]] = defaultdict(list)
    for case in seconds:
        cases[test_of(case)].append(case)
    found: list[str] = []
    for of_one in cases.values():
        by_time = sorted(of_one, key=lambda case: (seconds[case], case))
        long = [case for case in by_time[-(-len(by_time) // SHARE) :] if seconds[case] >= least]
        found += [case for case in long if not case.startswith(APART) and "triton" not in case.partition("[")[2]]
    return sorted(found)


def listed() -> frozenset[str]:
    """Those of the committed list."""
    return frozenset(LIST.read_text(encoding="utf-8").splitlines())


def main(argv: list[str]) -> int:
    measured = durations(Path(argv[0]).read_text(encoding="utf-8").splitlines())
    # What the list left out was not measured: it was the longest, and counts among those that are left out.
    # Where no case of a test was measured, the test is marked slow itself.
    default = {test_of(case) for case in measured}
    every = {case: float("inf") for case in listed() if test_of(case) in default} | measured
    LIST.write_text("".join(f"{case}\n" for case in longest(every)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
