"""The peak memory of each operation on a lazy map: a row each, of an operation that asks for no matrix."""

from dataclasses import replace

import pytest
import torch

from benchmarks import map_operations, plot
from benchmarks.map_operations import OPERATIONS
from benchmarks.rows import read
from benchmarks.table_parts import DENSE
from benchmarks.tools_table import TABLES
from tests.support.no_matrices import refuse_matrices

COMMITTED = plot.RESULTS / "cpu-map-operations.json"


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if not operation.blocks])
def test_no_matrix_is_written_out(name, monkeypatch):
    refuse_matrices(monkeypatch)
    result = map_operations.result(OPERATIONS[name], True, 24)
    monkeypatch.undo()
    torch.testing.assert_close(result, map_operations.result(OPERATIONS[name], False, 24), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::fpe_pipeline.compat.lazy.MapNumbersWarning")
def test_a_row_for_each_way(monkeypatch):
    monkeypatch.setattr("benchmarks.memory.gc.collect", lambda: 0)
    rows = {row.provider: row for row in map_operations.run("largest in each row", 24)}
    assert {row.status for row in rows.values()} == {"ok"} and rows.keys() == {"fpe", DENSE}
    assert rows["fpe"].error <= rows["fpe"].budget and rows[DENSE].peak_mb > 0
    wrong = replace(OPERATIONS["scaled"], line=lambda A, B, of: (0.5 if of.lazy else 0.6) * A)
    monkeypatch.setitem(OPERATIONS, "scaled", wrong)
    (row,) = map_operations.run("scaled", 24)
    assert (row.status, row.peak_mb) == ("wrong", None)


def test_committed_rows():
    """An operation that needs no numbers holds less than a tenth of the matrix's line, and those of words no more."""
    rows = {(row.case, row.provider): row for row in read(COMMITTED)}
    assert len(rows) == 2 * len(OPERATIONS)
    for name, operation in OPERATIONS.items():
        ours, dense = rows[f"{name}/4096", "fpe"], rows[f"{name}/4096", DENSE]
        share = 1 if operation.words or operation.blocks else 0.1
        assert ours.peak_mb <= share * dense.peak_mb
    assert "| product with values | 4096 |" in TABLES["map-operations-cpu"](list(rows.values()))
