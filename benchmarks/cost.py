"""`python -m benchmarks.cost`: the time that a case's work takes at the ceilings of a chip, before anything runs.

Work is matrix flops, exponentials and bytes; a ceiling is a rate of each; the limit is the longest of the three times.
The same arithmetic serves two questions: how far from what the *case* needs (:func:`needed`: nothing padded, each score
once) and how far from what the *kernels* do (:func:`packed`: tiles, split widths and chunks as they are launched); and
two sorts of ceilings: those measured on the machine (:mod:`.roofline`) and those of a data sheet (:data:`CHIPS`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

from fpe_kernels.backends.triton import configs
from fpe_kernels.backends.triton.packing import chunks, split_width

from .cases import CAPTURE_COLUMNS, Case, grid_cases, headline_cases
from .rows import Row

RESOURCES = ("matmul", "copy", "exp")


@dataclass(frozen=True)
class Work:
    """Matrix flops, bytes to and from memory, exponentials."""

    flops: int
    bytes: int
    exponentials: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.exponentials + other.exponentials)


@dataclass(frozen=True)
class Ceilings:
    """Floating-point operations, bytes (read and written) and exponentials a second."""

    flops: float
    bytes: float
    exponentials: float

    def seconds(self, work: Work) -> dict[str, float]:
        """Seconds at each ceiling by itself; the largest names what bounds the work."""
        return {
            "matmul": work.flops / self.flops,
            "copy": work.bytes / self.bytes,
            "exp": work.exponentials / self.exponentials,
        }

    def limit(self, work: Work) -> tuple[float, str]:
        """Milliseconds of the resource that takes longest, and its name."""
        seconds = self.seconds(work)
        name = max(seconds, key=lambda resource: seconds[resource])
        return 1e3 * seconds[name], name

    def limit_ms(self, case: Case, itemsize: int) -> float:
        """The shortest time that any exact method could take for ``case``."""
        return self.limit(needed(case, itemsize))[0]

    @classmethod
    def of_rows(cls, rows: list[Row]) -> Ceilings:
        """The machine's own, from rows of the suite `roofline`."""
        rate = {}
        for row in rows:
            if row.suite == "roofline" and row.flops and row.samples_ms:
                rate[row.case] = row.flops / (1e-3 * min(row.samples_ms))
        missing = [kind for kind in RESOURCES if kind not in rate]
        if missing:
            raise ValueError(f"no row of suite 'roofline' for {', '.join(missing)}: run `python -m benchmarks`")
        return cls(*(rate[kind] for kind in RESOURCES))


@dataclass(frozen=True)
class Chip:
    """A chip by its data sheet: dense half-precision tensor rate with float32 sums, memory rate, and its processors.

    Exponentials: every multiprocessor computes 16 a clock ("Throughput of native arithmetic instructions", CUDA C++
    programming guide), at the clock at which the sheet's tensor rate holds: processors × `flops_a_clock` × clock.
    """

    arch: str
    name: str
    matched: str  # part of the device name that PyTorch reports
    tensor_flops: float
    memory_bytes: float
    processors: int
    flops_a_clock: int  # of one processor's tensor cores
    source: str

    @property
    def ceilings(self) -> Ceilings:
        clock = self.tensor_flops / (self.processors * self.flops_a_clock)
        return Ceilings(self.tensor_flops, self.memory_bytes, 16 * self.processors * clock)


SHEETS = (
    Chip("sm_80", "A100 SXM 80 GB", "A100", 312e12, 2039e9, 108, 2048, "NVIDIA A100 80GB data sheet, 2021"),
    Chip("sm_86", "A10", "A10", 125e12, 600e9, 72, 1024, "NVIDIA A10 data sheet, 2021"),
    Chip("sm_89", "L40S", "L40S", 362.05e12, 864e9, 142, 1024, "NVIDIA L40S data sheet, 2023"),
    Chip("sm_90", "H200 SXM", "H200", 989.4e12, 4800e9, 132, 4096, "NVIDIA H200 data sheet, 2024"),
    Chip("sm_90", "H100 SXM", "H100", 989.4e12, 3350e9, 132, 4096, "NVIDIA H100 data sheet, 2023"),
    Chip("sm_100", "B200 (HGX)", "B200", 2250e12, 7700e9, 148, 8192, "NVIDIA HGX B200 specifications, 2025"),
)

CHIPS = {chip.arch: chip for chip in SHEETS}
"""The last sheet of each architecture, by which its predictions are made."""


def needed(case: Case, itemsize: int) -> Work:
    """What no exact method can do without."""
    return Work(case.flops, case.bytes(itemsize), case.exponentials)


def packed(case: Case, itemsize: int, arch: str) -> Work:
    """What the Triton kernels do for ``case`` on ``arch``: a sum over their launches."""
    return sum(launches(case, itemsize, arch), Work(0, 0, 0))


def launches(case: Case, itemsize: int, arch: str) -> Iterator[Work]:
    """The work of every launch, in order: whole tiles, split widths, every operand through memory once.

    Tiles of one head reread keys and values, but find them in the cache: those bytes are not counted.
    """
    if arch not in CHIPS:
        raise ValueError(f"arch must be one of {', '.join(CHIPS)}; got {arch!r}.")
    index, columns = case.map_index, case.head_dim
    if case.op == "capture":
        # The rows that share a map and the captured columns are one wide value of one row.
        index, columns = (0,), case.batch * case.head_dim + CAPTURE_COLUMNS
    known = case.op in ("replay", "adjoint")
    yield from _product(case, index, columns, itemsize, arch, forward=case.op != "adjoint", known=known)
    if case.op == "backward":
        yield from _product(case, index, columns, itemsize, arch, forward=False, known=True)  # for the values
        for _ in ("query", "key"):
            yield from _gradient(case, index, columns, itemsize, arch)


def _product(
    case: Case, index: tuple[int, ...], columns: int, itemsize: int, arch: str, forward: bool, known: bool
) -> Iterator[Work]:
    head, maps = sum(split_width(case.head_dim)), max(index) + 1
    together = forward and configs.joins(arch, index, case.heads, case.tokens, case.head_dim, columns, itemsize, False)
    for chunk in chunks(index, maps, columns, configs.MAX_COLUMNS[itemsize], together):
        width = chunk.branches * (chunk.stop - chunk.start)
        choose = configs.forward_config if forward else configs.resident_config
        config = choose(arch, case.head_dim, width, itemsize, False, len(chunk.table) * case.heads, case.tokens)
        scores = _padded_scores(case, len(chunk.table), config)
        # One exponential a score, and one for each row of a tile of keys to rescale what came before.
        rescales = 0 if known or not chunk.first else scores // config.block_n
        # A row named again to make maps equally wide is multiplied again, but moved once.
        rows = sum(len(set(rows)) for _, *rows in chunk.table)
        moved = 2 * (len(chunk.table) * case.head_dim + rows * (chunk.stop - chunk.start)) * itemsize
        yield Work(
            flops=2 * scores * (head + sum(split_width(width))),
            bytes=case.heads * case.tokens * (moved + 4 * len(chunk.table)),
            exponentials=scores + rescales,
        )


def _gradient(case: Case, index: tuple[int, ...], columns: int, itemsize: int, arch: str) -> Iterator[Work]:
    head = sum(split_width(case.head_dim))
    for chunk in chunks(index, max(index) + 1, columns, configs.MAX_GRADIENT_COLUMNS):
        width = chunk.branches * (chunk.stop - chunk.start)
        config = configs.score_config(arch, case.head_dim, width, itemsize, False)
        scores = _padded_scores(case, len(chunk.table), config)
        yield Work(
            flops=2 * scores * (2 * head + sum(split_width(width))),
            bytes=len(chunk.table) * case.heads * case.tokens * ((3 * case.head_dim + 2 * width) * itemsize + 8),
            exponentials=scores,
        )


def _padded_scores(case: Case, maps: int, config: configs.Config) -> int:
    """Scores in whole tiles."""
    tiles = maps * case.heads * ceil(case.tokens / config.block_m) * ceil(case.tokens / config.block_n)
    return tiles * config.block_m * config.block_n


def flash_attention_2(case: Case, itemsize: int) -> Work:
    """Unedited attention of every row by FlashAttention-2, whose head dims are padded as below."""
    width = next(width for width in (32, 64, 96, 128, 192, 256) if width >= case.head_dim)
    scores = case.batch * case.heads * case.tokens**2
    moved = case.batch * case.heads * case.tokens * (4 * case.head_dim * itemsize + 4)
    return Work(2 * scores * 2 * width, moved, scores)


def chip_of(row: Row) -> Chip | None:
    """The chip that a row was measured on, if its data sheet is here."""
    words = row.device.replace("-", " ").split()
    return next((chip for chip in SHEETS if chip.matched in words), None) if row.on_gpu else None


def percent_of_chip(row: Row) -> float | None:
    """How near the data sheet's limit for what the case needs; None without a time, or for a chip that is not here."""
    chip = chip_of(row)
    if chip is None or row.suite != "kernels" or row.median_ms is None or row.case == "any":
        return None
    if row.dtype not in ("float16", "bfloat16"):
        return None  # the sheets' tensor rates are those of half precision
    return 100 * chip.ceilings.limit_ms(Case.parse(row.case), itemsize=2) / row.median_ms


def table(cases: Iterable[Case], archs: Iterable[str], itemsize: int = 2) -> Iterator[list[str]]:
    """Lines of text cells: a case on a chip, the predicted time, what bounds it, and the padding that it includes."""
    yield ["case", "chip", "ms", "bound by", "matmul ms", "exp ms", "copy ms", "flops ÷ needed", "unedited FA2 ÷ ours"]
    for case in cases:
        for arch in archs:
            work, ceilings = packed(case, itemsize, arch), CHIPS[arch].ceilings
            milliseconds, bound = ceilings.limit(work)
            parts = ceilings.seconds(work)
            unedited = ceilings.limit(flash_attention_2(case, itemsize))[0]
            yield [
                case.name,
                f"{arch} {CHIPS[arch].name}",
                f"{milliseconds:.4f}",
                bound,
                *(f"{1e3 * parts[name]:.4f}" for name in ("matmul", "exp", "copy")),
                f"{work.flops / case.flops:.2f}",
                f"{unedited / milliseconds:.2f}",
            ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", action="append", choices=CHIPS, help="chips (default: all)")
    parser.add_argument("cases", nargs="*", help="case names (default: the headline cases and the grid)")
    arguments = parser.parse_args(argv)
    from .columns import columns

    cases = [Case.parse(name) for name in arguments.cases] or [*headline_cases(), *grid_cases()]
    print(columns(list(table(cases, arguments.arch or CHIPS))))
    print("\n" + "\n".join(f"{arch}: {chip.name}, {chip.source}" for arch, chip in CHIPS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
