"""What README claims follows from committed rows: a claim that they do not bear is a failing test."""

import re

import pytest

from benchmarks.cases import Case, headline_cases
from benchmarks.report import our_row
from benchmarks.rows import ROOT, Ratio, read_all
from benchmarks.tables import TABLES, grouped

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = read_all(ROOT / "benchmarks" / "results")


SHORTEST = 64  # tokens


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_rows_that_share_a_map_cost_less_wherever_that_was_measured(gpu):
    claim = (
        "**The attention of rows that share a map costs less than the attention it replaces**, at all but the shortest"
    )
    assert claim in README
    cases = grouped(ROWS, "kernels", gpu)
    for case in headline_cases():
        providers = cases[case.name]
        ours = our_row(providers.values())
        assert Ratio.of(ours, providers["unedited"]).low > 1.0, case.name
    for name, providers in cases.items():
        shares = name.endswith("/apply") and Case.parse(name).layout in ("pair", "halves")
        if shares and Case.parse(name).tokens > SHORTEST and "unedited" in providers:
            assert Ratio.of(our_row(providers.values()), providers["unedited"]).median > 1.0, name


def test_an_edited_step_as_a_graph_is_not_said_to_be_faster_than_it_is():
    ratios = [
        Ratio.of(editors["fpe-graph"], editors["unedited-graph"]).median
        for editors in grouped(ROWS, "edits", True).values()
        if "fpe-graph" in editors
    ]
    assert ratios
    assert max(1 / ratio for ratio in ratios) < 1.02, "an edited step costs more than an unedited one: say so in README"


@pytest.mark.parametrize("name", re.findall(r"<!-- table: ([\w-]+) -->", README))
def test_a_table_is_what_its_rows_say(name):
    if name not in TABLES:
        pytest.skip("a table of the study of quality, which has a test of its own")
    block = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end table -->", README, re.DOTALL)
    assert block is not None
    assert block[1] == TABLES[name](ROWS), "python -m benchmarks.plot --update README.md"


def test_without_rows_a_claim_says_that_nothing_was_measured():
    assert "not measured on a GPU yet" in TABLES["claim-gpu"]([])
    slow = [row for row in ROWS if row.suite == "kernels" and row.on_gpu]
    swapped = [row if row.provider not in ("unedited", "fpe-triton") else _renamed(row) for row in slow]
    assert "is not faster than" in TABLES["claim-gpu"](swapped)


def _renamed(row):
    from dataclasses import replace

    return replace(row, provider={"unedited": "fpe-triton", "fpe-triton": "unedited"}[row.provider])
