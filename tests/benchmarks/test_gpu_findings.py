"""What stages of a GPU session say and leave: which rows are failures."""

import pytest

from benchmarks.gpu import records
from benchmarks.rows import Row
from tests.support.planted_faults import HERE


@pytest.mark.parametrize(
    ("suite", "provider", "fails"),
    [
        ("kernels", "fpe-triton", True),
        ("edits", "fpe-graph", True),
        ("recordings", "full-source-dropped", True),
        ("recordings", "recorded-device", True),
        ("kernels", "fpe-reference", False),  # the equations as they stand
        ("tuning", "fpe-triton@128x64w8s3", False),
        ("kernels", "sdpa-cudnn", False),
        ("edits", "unedited-graph", False),
    ],
)
def test_a_row_of_ours_that_is_wrong_is_a_failure_of_the_session(capsys, suite, provider, fails):
    about = {"suite": suite, "case": "a", "provider": provider, "dtype": "float16"}
    records.say_row(Row.new(HERE, **about, status="wrong", reason="relative error 1 exceeds its budget"))
    said = [records.heard(line)["kind"] for line in capsys.readouterr().out.split("\n")[:-1]]
    assert said == (["row", "failure"] if fails else ["row"])
