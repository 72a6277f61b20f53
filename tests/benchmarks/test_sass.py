"""The reader of SASS finds the loop that multiplies, and what in it waits for what."""

from __future__ import annotations

import pytest

from benchmarks import sass

PRODUCT, EXPONENTIAL = "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24", "MUFU.EX2 R3, R4"
BARRIER, TO_SHARED, SPILL = "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "STS [R2], R3", "STL [R1], R3"
SHUFFLE = "SHFL.BFLY PT, R9, R12, 0x2, 0x1f"


def wait(left: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, {left:#x}"


SCORES, VALUES = [PRODUCT] * 4, [PRODUCT] * 8
GOOD = [*SCORES, *VALUES, wait(1), *[EXPONENTIAL] * 6, BARRIER, wait(0), BARRIER]


def program(*bodies: list[str], before: tuple[str, ...] = (), spin: bool = True) -> sass.Program:
    """A loop around each body, with the wait for a barrier that the assembler puts out of line."""
    lines, late = ["kernel:", *before], []
    for count, body in enumerate(bodies):
        lines += [f".L_loop{count}:", f"@!P0 BRA `(.L_spin{count})" if spin else "NOP", f".L_on{count}:", *body]
        lines += [f"@P1 BRA `(.L_loop{count})", "MUFU.EX2 R9, R9", "EXIT"]
        if spin:
            late += [f".L_spin{count}:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3", f"@!P0 BRA `(.L_spin{count})"]
            late += [f"BRA `(.L_on{count})"]
    lines += [*late, ".L_end:", "BRA `(.L_end)"]
    address = 0
    text = []
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/              {line} ;")
            address += 16
    return sass.read("\n".join(text))


@pytest.mark.parametrize("spin", [True, False])
def test_a_loop_is_found_with_what_is_in_it(spin) -> None:
    found = program(GOOD, GOOD, spin=spin)
    assert len(found.loops) == 2 and found.spills == 0
    for loop in found.loops:
        assert loop.products == len(SCORES) + len(VALUES)
        assert loop.waits == [1, 0]
        assert loop.hidden_exponentials == 1.0
        assert (loop.barriers, loop.copies, loop.serialised) == (GOOD.count(BARRIER), 0, False)
    assert sass.stalls(found, products=1) == []
    assert sass.stalls(program([*GOOD, *[SHUFFLE] * 4]), shuffles=4) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([step for product in SCORES + VALUES for step in (product, wait(0))], "waits for every product"),
        ([*SCORES, wait(0), EXPONENTIAL, *VALUES, wait(0)], "not to [1, 0]"),
        ([*SCORES, wait(0), EXPONENTIAL, *VALUES, wait(0)], "100% of the exponentials"),
        ([*SCORES, *VALUES, wait(1), EXPONENTIAL, wait(0), EXPONENTIAL], "50% of the exponentials"),
        ([*SCORES, *VALUES, wait(2), EXPONENTIAL, wait(0)], "down to [2, 0]"),
        ([*GOOD, *[BARRIER] * 4], "6 barriers a tile"),
        ([TO_SHARED, *GOOD], "copies between registers and shared memory (1 "),
        ([*GOOD, SPILL], "spills (1 instructions)"),
        ([*GOOD, *[SHUFFLE] * 5], "shuffles 5 times a tile, at most 4"),
    ],
)
def test_what_stalls_is_said(body, words) -> None:
    found = sass.stalls(program(GOOD, body), products=1, shuffles=4)
    assert any(words in line for line in found), found


def test_one_loop_that_waits_is_enough() -> None:
    serial = [step for product in SCORES + VALUES for step in (product, wait(0))]
    assert program(GOOD, serial).serialised and not program(GOOD, GOOD).serialised
    assert program(serial[:4]).serialised is False  # two products, each of which something else needs


def test_a_program_without_products_and_what_is_no_program() -> None:
    assert sass.stalls(program([EXPONENTIAL])) == ["has no loop of products"]
    assert sass.read("") == sass.Program((), 0)


def test_spills_outside_of_the_loop_count() -> None:
    assert program(GOOD, before=(SPILL, SPILL)).spills == 2
