"""Launch configurations compile for chips that are not here: no spills, within shared memory, with matrix units."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")


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
