"""Launch configurations compile for chips that are not here: no spills, within shared memory, with matrix units."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")

KERNELS = ("apply", "adjoint", "grad_query", "grad_key", "replay")
HALVES = {"float16", "bfloat16", "float32", "tf32"}
DTYPES = {**dict.fromkeys(KERNELS, HALVES), "replay": {"float16"}}
# A replay is `apply` without the running maximum: in these it differs by what it leaves out.
SAME = {"replay": {"padding", "rows", "wide", "lengths", "grouped"}}


def _compile(*arguments: str) -> None:
    # A process of its own: kernels that were imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.offline", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " 0 failed" in done.stdout


def test_the_pairs_that_editing_runs_compile_for_every_generation() -> None:
    _compile("--quick")


@pytest.mark.slow
def test_every_configuration_compiles_as_the_committed_table_says() -> None:
    _compile()


def test_the_committed_table_has_every_program_and_no_spill() -> None:
    from benchmarks.offline import complaints, programs, read_table

    table = read_table()
    assert table["3.9.0"].keys() == {program.key for program in programs(False)}
    # The release that PyTorch 2.11 brings; for sm_100 it spills some bytes in programs with a bias.
    chips = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
    assert table["3.6.0"].keys() == {program.key for program in programs(False, chips)}
    assert table["3.8.0"].keys() == {program.key for program in programs(False, ("sm_90",), "gluon")}
    for rows in table.values():
        for key, row in rows.items():
            names = dict(zip(("kernel", "arch", "dtype"), key.split("/"), strict=False))
            assert complaints({**names, **row}, None) == [], key


def test_what_is_compiled_covers_every_switch_of_the_kernels() -> None:
    from benchmarks.offline import programs

    of = {kernel: [p for p in programs(False, ("sm_90",)) if p.kernel == kernel] for kernel in KERNELS}
    for kernel, compiled in of.items():
        kinds = {kind for program in compiled for kind in program.inputs.split("+")}
        assert {"ragged", "bias", "padding", "rows", "wide", "lengths", "grouped"} <= kinds | SAME.get(kernel, set()), (
            kernel
        )
        assert {program.dtype for program in compiled} >= DTYPES[kernel], kernel
    assert {kind for p in of["apply"] for kind in p.inputs.split("+")} >= {
        "weighted",
        "cross",
        "short",
        "mixed",
        "unrounded",
        "prior",
    }
    assert any(p.inputs == "ragged+bias+weighted" for p in of["replay"])
    assert any("prior" in p.inputs for p in of["replay"])
    assert any("later" in p.inputs for p in of["grad_query"]) and any("cross" in p.inputs for p in of["grad_query"])
    assert {192, 224, 256} <= {program.head_dim for program in of["grad_key"]}


def test_a_table_is_read_back_as_it_was_written(tmp_path) -> None:
    from benchmarks.offline import read_table, write_table

    row = {"config": "64x64w4s2", "registers": 178, "spills": 0, "shared": 73728, "matrix_instructions": ["mma.sync"]}
    table = {"3.6.0": {"b": row, "a": row}, "3.9.0": {"a": row}}
    write_table(table, tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == table
    assert len((tmp_path / "table.json").read_text().splitlines()) == 3 + 2 * len(table) + 3
    assert read_table(tmp_path / "none.json") == {}


def test_a_worse_program_is_a_complaint() -> None:
    from benchmarks.offline import complaints

    good = {
        "arch": "sm_90",
        "dtype": "float16",
        "registers": 164,
        "spills": 0,
        "shared": 90112,
        "matrix_instructions": ["wgmma.mma_async"],
    }
    assert complaints(good, good) == []
    for change in (
        {"spills": 8},
        {"shared": 300000},
        {"shared": 90113},
        {"registers": 165},
        {"matrix_instructions": ["mma.sync"]},
    ):
        assert complaints({**good, **change}, good), change
    rounded = {**good, "dtype": "tf32", "matrix_instructions": ["mma.sync"]}
    assert complaints(rounded, None) == [] and complaints({**rounded, "matrix_instructions": []}, None)
