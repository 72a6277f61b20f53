"""The peak memory of each operation on a lazy map, against the same line of code on the matrix.

    python -m benchmarks.map_operations --output benchmarks/results/cpu-map-operations.json

Allocations are counted, so that the numbers are the same every time; there are no times. The map is of 4096 query and
4096 key tokens, of two batch rows with two heads each, and for words of 77 key tokens. What an operation gives as a
map is multiplied with values, so that nothing is left to be computed later. Ours have to agree with the matrix's first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fpe_kernels import AttentionMap
from fpe_pipeline.compat.lazy import LazyMap

from .memory import counted
from .rows import Environment, Row, write
from .table_parts import DENSE

__all__ = ["OPERATIONS", "SUITE", "Maps", "Operation", "run"]

SUITE = "map-operations"
OURS = "fpe"
#: Largest difference, as a share of the largest value.
BUDGET = 1e-4
BATCH, HEADS, CHANNELS, WORDS = 2, 2, 40, 77
TOKENS = 64**2


@dataclass(frozen=True)
class Maps:
    """Two maps of one shape [rows · heads, N, M], lazy or as matrices, and what is multiplied with them.

    Args:
        tokens: N.
        keys: M.
        lazy: whether they are lazy.
    """

    tokens: int
    keys: int
    lazy: bool

    def made(self, seed: int) -> Any:
        """The map of one seed."""
        random = torch.Generator().manual_seed(seed)
        query, key = (torch.randn(BATCH, HEADS, n, CHANNELS, generator=random) for n in (self.tokens, self.keys))
        if self.lazy:
            return LazyMap(AttentionMap(query, key), halves=(1, BATCH - 1))
        return torch.softmax(query @ key.transpose(-1, -2) * CHANNELS**-0.5, dim=-1).flatten(0, 1)

    def drawn(self, *shape: int) -> torch.Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, generator=torch.Generator().manual_seed(9))


Line = Callable[[Any, Any, Maps], Any]


@dataclass(frozen=True)
class Operation:
    """A line of code on maps.

    Args:
        line: of two maps, and what they are of.
        words: whether the map is one of words, of 77 key tokens.
        blocks: whether it needs numbers, a block of query rows at a time.
    """

    line: Line
    words: bool = False
    blocks: bool = False


def _by_head(A: Any) -> Any:
    return A.reshape(BATCH, HEADS, *A.shape[1:])


def _assigned(A: Any, key: Any, value: Any) -> Any:
    A[key] = value
    return A


def _averaged(A: Any, B: Any, of: Maps) -> Any:
    total = A.clone()
    total += B
    return total / 2


#: By name; the names are those of the operations that a lazy map has without the matrix.
OPERATIONS: dict[str, Operation] = {
    "product with values": Operation(lambda A, B, of: A @ of.drawn(BATCH * HEADS, of.keys, CHANNELS)),
    "transposed product": Operation(lambda A, B, of: A.transpose(1, 2) @ of.drawn(BATCH * HEADS, of.tokens, CHANNELS)),
    "shape": Operation(lambda A, B, of: _by_head(A).permute(1, 0, 2, 3)[0]),
    "rows and heads": Operation(lambda A, B, of: _by_head(A)[1:, 1]),
    "query rows": Operation(lambda A, B, of: A[:, 8:24]),
    "columns": Operation(lambda A, B, of: A[:, :, 5]),
    "sum over columns": Operation(lambda A, B, of: A.sum(-1)),
    "sum over query rows": Operation(lambda A, B, of: A.sum(1)),
    "mean over heads": Operation(lambda A, B, of: _by_head(A).mean(1)),
    "scaled": Operation(lambda A, B, of: 0.5 * A),
    "scaled by column": Operation(lambda A, B, of: A * of.drawn(of.keys)),
    "scaled by query row": Operation(lambda A, B, of: A / (1 + A.sum(-1, keepdim=True))),
    "mixed with another map": Operation(lambda A, B, of: 0.3 * A + 0.7 * B),
    "words mixed": Operation(
        lambda A, B, of: torch.einsum("hpw,bwn->bhpn", A, of.drawn(1, of.keys, of.keys))[0], words=True
    ),
    "a column assigned": Operation(lambda A, B, of: _assigned(A, (..., 3), 0)),
    "a word's column assigned": Operation(lambda A, B, of: _assigned(A, (..., 3), 2 * A[..., 5]), words=True),
    "rows assigned": Operation(lambda A, B, of: _assigned(A, slice(HEADS, None), B[:HEADS])),
    "average over steps": Operation(_averaged),
    "largest in each row": Operation(lambda A, B, of: A.max(-1).values, blocks=True),
}


def result(operation: Operation, lazy: bool, tokens: int) -> torch.Tensor:
    """What an operation comes to: its numbers, or the product of the map that it gives with values."""
    maps = Maps(tokens, WORDS if operation.words else tokens, lazy)
    out = operation.line(maps.made(0), maps.made(1), maps)
    is_map = isinstance(out, LazyMap) or (out.shape[-1] == maps.keys and out.ndim > 2)
    return out @ maps.drawn(maps.keys, CHANNELS) if is_map else out


def run(name: str, tokens: int = TOKENS) -> list[Row]:
    """The rows of one operation.

    Args:
        name: a key of :data:`OPERATIONS`.
        tokens: queries of its map, and keys where they are no words.
    """
    operation, environment = OPERATIONS[name], Environment.read("cpu")
    about = {"suite": SUITE, "case": f"{name}/{tokens}", "dtype": "float32"}
    with torch.no_grad():
        ways = {way: counted(partial(result, operation, way == OURS, tokens)) for way in (OURS, DENSE)}
    ours, exact = (ways[way].result for way in (OURS, DENSE))
    assert isinstance(ours, torch.Tensor) and isinstance(exact, torch.Tensor)
    error = float((ours - exact).abs().max() / exact.abs().max())
    if not error <= BUDGET:
        return [Row.new(environment, **about, provider=OURS, status="wrong", error=error, budget=BUDGET)]
    gate = {"error": error, "budget": BUDGET}
    return [
        Row.new(environment, **about, provider=way, status="ok", peak_mb=one.peak / 1e6, **gate if way == OURS else {})
        for way, one in ways.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.map_operations", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"queries of the maps (default: {TOKENS})")
    parser.add_argument("--output", type=Path, help="file for the rows")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    for name in OPERATIONS:
        measured = run(name, options.tokens)
        for row in measured:
            print(f"{row.case:<36}{row.provider:<16}{row.status:<8}{row.peak_mb or 0:10.2f} MB", flush=True)
        rows += measured
    if options.output is not None:
        write(options.output, rows)
    return 1 if any(row.status == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
