"""The table of launch configurations: which tiles a kernel takes on a chip, by the widths that its tiles hold.

Of the rows of a kernel, an element and a chip, the first that holds the widths serves. Two budgets bound them:
registers hold the accumulators (a tile's float32 columns and its scores), shared memory holds the stages of the load
pipeline.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

ANY = 1 << 30
KERNELS = ("apply", "adjoint", "gradient")
ELEMENTS = ("half", "tf32", "float32")
"""float16 and bfloat16; float32 whose products may be rounded, and whose may not."""

_AMPERE = ("sm_80", "sm_86", "sm_89")
_NVIDIA = (*_AMPERE, "sm_90", "sm_100", "sm_120")
_AMD = ("gfx942",)
# Rounded operands of gradients take this chip's registers, up to spilling, and its matrix units multiply them no faster
# than its scalar units do exact ones.
EXACT_GRADIENTS = ("sm_120",)
_NO, _YES, _EITHER = (False,), (True,), (False, True)
_APPLY, _ADJOINT, _PRODUCTS, _GRADIENT = ("apply",), ("adjoint",), ("apply", "adjoint"), ("gradient",)
_HALF, _ROUNDED, _EXACT, _SINGLE = ("half",), ("tf32",), ("float32",), ("tf32", "float32")


class Tiles(NamedTuple):
    """Rows of the resident tile, rows of a streamed tile, warps, and the stages where shared memory holds as many."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Row(NamedTuple):
    """For which launches a configuration serves, if no row before it does.

    Args:
        kernels: of :data:`KERNELS`.
        elements: of :data:`ELEMENTS`.
        chips: keys of :data:`.chips.SHARED_MEMORY`.
        biases: whether scores have a bias.
        head, packed, both: the most columns of a head, of what is packed, and of the two together.
        tiles: the configuration.
    """

    kernels: tuple[str, ...]
    elements: tuple[str, ...]
    chips: tuple[str, ...]
    biases: tuple[bool, ...]
    head: int
    packed: int
    both: int
    tiles: Tiles


ROWS = (
    # Four wavefronts, one a SIMD, so that each has 512 registers; eight would share them and spill.
    Row(_PRODUCTS, _HALF, _AMD, _NO, ANY, ANY, ANY, Tiles(64, 64, 4, 2)),
    Row(_PRODUCTS, _HALF, _AMD, _YES, 160, ANY, ANY, Tiles(64, 64, 4, 2)),
    Row(_PRODUCTS, _HALF, _AMD, _YES, ANY, ANY, ANY, Tiles(64, 32, 4, 2)),
    # Single precision has matrix instructions there, rounded or not.
    Row(_PRODUCTS, _SINGLE, _AMD, _EITHER, ANY, ANY, ANY, Tiles(64, 32, 4, 1)),
    Row(_GRADIENT, _HALF, _AMD, _NO, 96, 96, ANY, Tiles(64, 64, 4, 2)),
    Row(_GRADIENT, _HALF, _AMD, _EITHER, ANY, ANY, ANY, Tiles(64, 32, 4, 2)),
    Row(_GRADIENT, _SINGLE, _AMD, _EITHER, 128, 128, ANY, Tiles(64, 32, 4, 1)),
    Row(_GRADIENT, _SINGLE, _AMD, _EITHER, ANY, ANY, ANY, Tiles(64, 16, 4, 1)),
    # Rounded products of single precision.
    Row(_PRODUCTS, _ROUNDED, (*_AMPERE, "sm_90", "sm_100"), _EITHER, 128, 128, ANY, Tiles(64, 32, 8, 2)),
    Row(_PRODUCTS, _ROUNDED, ("sm_90", "sm_100"), _EITHER, 160, ANY, ANY, Tiles(64, 32, 8, 2)),
    Row(_PRODUCTS, _ROUNDED, _AMPERE, _EITHER, 160, ANY, ANY, Tiles(64, 16, 8, 2)),
    Row(_PRODUCTS, _ROUNDED, (*_AMPERE, "sm_90", "sm_100"), _EITHER, ANY, ANY, ANY, Tiles(32, 16, 8, 2)),
    Row(_PRODUCTS, _ROUNDED, ("sm_120",), _EITHER, 128, 128, ANY, Tiles(64, 32, 8, 1)),
    Row(_PRODUCTS, _ROUNDED, ("sm_120",), _EITHER, 160, 128, ANY, Tiles(64, 16, 8, 1)),
    Row(_PRODUCTS, _ROUNDED, ("sm_120",), _EITHER, ANY, 128, ANY, Tiles(32, 16, 8, 1)),
    Row(_PRODUCTS, _ROUNDED, ("sm_120",), _EITHER, ANY, ANY, ANY, Tiles(16, 32, 8, 1)),
    Row(_GRADIENT, _ROUNDED, (*_AMPERE, "sm_90", "sm_100"), _EITHER, 128, 128, ANY, Tiles(32, 32, 8, 1)),
    Row(_GRADIENT, _ROUNDED, (*_AMPERE, "sm_90", "sm_100"), _EITHER, ANY, ANY, ANY, Tiles(16, 16, 8, 1)),
    # Exact products of single precision run on the scalar units, whose operands live in registers.
    Row(_PRODUCTS, _EXACT, _NVIDIA, _EITHER, 128, 128, ANY, Tiles(32, 32, 8, 1)),
    Row(_PRODUCTS, _EXACT, _NVIDIA, _EITHER, 160, ANY, ANY, Tiles(16, 16, 8, 1)),
    Row(_PRODUCTS, _EXACT, _NVIDIA, _EITHER, ANY, ANY, ANY, Tiles(32, 16, 16, 1)),
    Row(_GRADIENT, _EXACT, _NVIDIA, _NO, 128, 128, ANY, Tiles(32, 16, 8, 1)),
    Row(_GRADIENT, _EXACT, _NVIDIA, _NO, 160, ANY, ANY, Tiles(32, 32, 8, 1)),
    Row(_GRADIENT, _EXACT, _NVIDIA, _YES, 160, ANY, ANY, Tiles(32, 16, 8, 1)),
    Row(_GRADIENT, _EXACT, _NVIDIA, _EITHER, ANY, ANY, ANY, Tiles(16, 16, 8, 1)),
    # Matrix instructions of a warp.
    Row(_APPLY, _HALF, (*_AMPERE, "sm_120"), _NO, 96, 128, ANY, Tiles(128, 64, 8, 3)),
    Row(_ADJOINT, _HALF, (*_AMPERE, "sm_120"), _NO, 96, 96, ANY, Tiles(128, 64, 8, 3)),
    Row(_PRODUCTS, _HALF, (*_AMPERE, "sm_120"), _NO, 160, 160, ANY, Tiles(128, 32, 8, 3)),
    Row(_APPLY, _HALF, _AMPERE, _YES, 160, 160, ANY, Tiles(64, 32, 8, 3)),
    Row(_ADJOINT, _HALF, _AMPERE, _YES, 128, 160, ANY, Tiles(64, 32, 8, 3)),
    Row(_APPLY, _HALF, ("sm_120",), _YES, 160, 128, ANY, Tiles(64, 32, 8, 3)),
    Row(_ADJOINT, _HALF, ("sm_120",), _YES, 128, 128, ANY, Tiles(64, 32, 8, 3)),
    Row(_PRODUCTS, _HALF, (*_AMPERE, "sm_120"), _EITHER, 160, ANY, ANY, Tiles(32, 32, 8, 3)),
    Row(_APPLY, _HALF, ("sm_120",), _YES, 192, ANY, ANY, Tiles(32, 16, 8, 2)),
    Row(_APPLY, _HALF, ("sm_120",), _YES, ANY, ANY, ANY, Tiles(32, 32, 8, 1)),
    Row(_APPLY, _HALF, ("sm_120",), _NO, ANY, ANY, ANY, Tiles(64, 16, 8, 2)),
    Row(_APPLY, _HALF, _AMPERE, _EITHER, ANY, ANY, ANY, Tiles(64, 16, 8, 2)),
    Row(_ADJOINT, _HALF, (*_AMPERE, "sm_120"), _EITHER, ANY, ANY, ANY, Tiles(32, 16, 8, 2)),
    Row(_GRADIENT, _HALF, (*_AMPERE, "sm_120", "sm_100"), _NO, 96, 96, ANY, Tiles(64, 64, 8, 2)),
    Row(_GRADIENT, _HALF, _AMPERE, _YES, 128, 128, ANY, Tiles(64, 32, 8, 2)),
    Row(_GRADIENT, _HALF, _AMPERE, _NO, 160, ANY, ANY, Tiles(64, 32, 8, 2)),
    Row(_GRADIENT, _HALF, _AMPERE, _YES, 160, ANY, ANY, Tiles(64, 16, 8, 2)),
    Row(_GRADIENT, _HALF, _AMPERE, _EITHER, 192, ANY, ANY, Tiles(32, 32, 8, 2)),
    Row(_GRADIENT, _HALF, _AMPERE, _EITHER, ANY, ANY, ANY, Tiles(64, 16, 8, 2)),
    # The compiler keeps more addresses in registers for this chip than for those before.
    Row(_GRADIENT, _HALF, ("sm_120",), _EITHER, 128, 128, ANY, Tiles(64, 32, 8, 2)),
    Row(_GRADIENT, _HALF, ("sm_120",), _NO, ANY, ANY, ANY, Tiles(64, 16, 8, 1)),
    Row(_GRADIENT, _HALF, ("sm_120",), _YES, 192, ANY, ANY, Tiles(64, 16, 8, 1)),
    Row(_GRADIENT, _HALF, ("sm_120",), _YES, ANY, ANY, ANY, Tiles(32, 32, 8, 1)),
    # Those of four warps, of 64 rows: sixteen rows a warp, since warps that share rows split the columns and exchange
    # probabilities through shared memory. Only what leaves no registers for that is held by more warps.
    Row(_PRODUCTS, _HALF, ("sm_90",), _YES, 160, 160, ANY, Tiles(128, 32, 8, 3)),
    Row(_PRODUCTS, _HALF, ("sm_90",), _YES, 160, ANY, ANY, Tiles(64, 32, 8, 2)),
    Row(_PRODUCTS, _HALF, ("sm_90",), _YES, ANY, ANY, ANY, Tiles(64, 16, 8, 2)),
    Row(_PRODUCTS, _HALF, ("sm_90",), _NO, 128, 160, ANY, Tiles(128, 64, 8, 3)),
    Row(_ADJOINT, _HALF, ("sm_90",), _NO, 160, 160, ANY, Tiles(128, 64, 8, 2)),
    Row(_ADJOINT, _HALF, ("sm_90",), _NO, 160, 256, ANY, Tiles(128, 32, 8, 3)),
    Row(_ADJOINT, _HALF, ("sm_90",), _NO, 160, ANY, ANY, Tiles(64, 64, 8, 3)),
    Row(_ADJOINT, _HALF, ("sm_90",), _NO, ANY, ANY, ANY, Tiles(64, 32, 8, 2)),
    Row(_APPLY, _HALF, ("sm_90",), _NO, 160, 256, ANY, Tiles(128, 64, 8, 2)),
    Row(_APPLY, _HALF, ("sm_90",), _NO, ANY, ANY, ANY, Tiles(128, 32, 8, 3)),
    Row(_GRADIENT, _HALF, ("sm_90",), _NO, ANY, ANY, 192, Tiles(64, 64, 4, 2)),
    Row(_GRADIENT, _HALF, ("sm_90",), _NO, ANY, ANY, 320, Tiles(64, 32, 4, 2)),
    Row(_GRADIENT, _HALF, ("sm_90",), _YES, ANY, ANY, 256, Tiles(64, 32, 4, 2)),
    Row(_GRADIENT, _HALF, ("sm_90",), _YES, ANY, ANY, 320, Tiles(64, 32, 8, 2)),
    Row(_GRADIENT, _HALF, ("sm_90",), _NO, ANY, ANY, ANY, Tiles(64, 32, 8, 2)),
    Row(_GRADIENT, _HALF, ("sm_90",), _YES, ANY, ANY, ANY, Tiles(64, 16, 8, 2)),
    # Those that accumulate in a memory of their own.
    Row(_PRODUCTS, _HALF, ("sm_100",), _NO, 128, 160, ANY, Tiles(128, 64, 8, 3)),
    Row(_PRODUCTS, _HALF, ("sm_100",), _YES, 128, 128, ANY, Tiles(128, 64, 8, 3)),
    Row(_PRODUCTS, _HALF, ("sm_100",), _NO, 160, ANY, ANY, Tiles(64, 64, 8, 3)),
    Row(_PRODUCTS, _HALF, ("sm_100",), _YES, 160, ANY, ANY, Tiles(64, 32, 8, 3)),
    Row(_PRODUCTS, _HALF, ("sm_100",), _EITHER, ANY, ANY, ANY, Tiles(64, 32, 8, 2)),
    Row(_GRADIENT, _HALF, ("sm_100",), _EITHER, ANY, ANY, ANY, Tiles(64, 32, 8, 2)),
)


@cache
def rows_of(kernel: str, element: str, chip: str, bias: bool) -> tuple[Row, ...]:
    """Those of :data:`ROWS` that are for such launches, in order; the last holds every width."""
    return tuple(
        row
        for row in ROWS
        if kernel in row.kernels and element in row.elements and chip in row.chips and bias in row.biases
    )


def row_for(kernel: str, element: str, chip: str, bias: bool, head: int, packed: int) -> Row:
    """The row for a head and packed columns of so many columns, as tiles hold them.

    Args:
        kernel, element, chip, bias: one each of what stands in :class:`Row`.
        head, packed: ``sum(split_width(...))`` of either.
    """
    rows = rows_of(kernel, element, chip, bias)
    return next(row for row in rows if head <= row.head and packed <= row.packed and head + packed <= row.both)
