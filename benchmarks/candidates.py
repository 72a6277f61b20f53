"""What may be chosen for the launches of a shape, and the shapes for which it is worth choosing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from typing import Any, Protocol

from . import hopper_tiles
from .cases import Case

REGISTERS = 65536  # of a multiprocessor since Kepler


class Choice(Protocol):
    """Something to measure; `str` of it names the row's provider after an `@`."""

    @property
    def program(self) -> Choice:
        """What is compiled for it: choices that agree in this differ in how many programs are launched."""
        ...

    def installed(self) -> AbstractContextManager[None]:
        """Forward launches inside the block are made so."""
        ...


@dataclass(frozen=True, order=True)
class Candidate:
    """A launch configuration."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False
    specialised: bool = False
    maxnreg: int = 0
    gluon: bool = False
    single: bool = False

    def __str__(self) -> str:
        marks = zip("dsgo", (self.descriptors, self.specialised, self.gluon, self.single), strict=True)
        fetched = "".join(mark for mark, marked in marks if marked)
        bound = f"r{self.maxnreg}" if self.maxnreg else ""
        return f"{self.block_m}x{self.block_n}w{self.warps}s{self.stages}{fetched}{bound}"

    @classmethod
    def of(cls, config: Any) -> Candidate:
        """What of a launch's configuration the tuner chooses."""
        return cls(*(getattr(config, field.name) for field in fields(cls)))

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """The inverse of `str`."""
        found = re.fullmatch(r"(\d+)x(\d+)w(\d+)s(\d+)(d?)(s?)(g?)(o?)(?:r(\d+))?", text)
        if found is None:
            raise ValueError(
                f"expected a configuration such as 128x64w8s3, 128x64w4s2ds, 128x128w4s2go or 64x64w4s2r168, "
                f"got {text!r}"
            )
        block_m, block_n, warps, stages = map(int, found.groups()[:4])
        fetched = bool(found[5]), bool(found[6])
        return cls(block_m, block_n, warps, stages, *fetched, int(found[9] or 0), *map(bool, found.groups()[6:8]))

    def fits(self, head_dim: int, branches: int, shared_bytes: int, itemsize: int = 2) -> bool:
        """Whether the tiles can be held at all; what compiles but spills shows in its time.

        Shared memory holds the query tile and `stages` key and value tiles; registers hold the accumulator,
        the scores and their half-precision copy. Descriptors fetch boxes, whose edges are powers of two.
        """
        if self.gluon:
            from fpe_kernels.backends.triton import hopper
            from fpe_kernels.backends.triton.configs import Config

            return hopper.most_branches(head_dim, head_dim, Config(*astuple(self))) > 0
        columns = branches * head_dim
        shared = (self.block_m * head_dim + self.stages * self.block_n * (head_dim + columns)) * itemsize
        registers = self.block_m * (columns + 1.5 * self.block_n)
        a_thread = registers / (32 * self.warps)
        boxes = head_dim.bit_count() == 1 and branches <= 4
        # Beside what is counted here a thread holds addresses, statistics and operands.
        most = self.maxnreg - 48 if self.maxnreg else 224
        held = shared <= shared_bytes and registers <= 0.9 * REGISTERS and a_thread <= most
        return held and (boxes or not self.descriptors)

    @property
    def program(self) -> Candidate:
        return replace(self, single=False)

    def installed(self) -> AbstractContextManager[None]:
        from fpe_kernels.backends.triton.configs import Config

        return _replaced("apply_config", Config(*astuple(self)))


@dataclass(frozen=True)
class Launches:
    """A mixed batch as one launch or as one for each number of rows, with the committed configurations."""

    together: bool

    def __str__(self) -> str:
        return "one-launch" if self.together else "two-launches"

    @property
    def program(self) -> Launches:
        return self

    def installed(self) -> AbstractContextManager[None]:
        return _replaced("one_launch", self.together)


@cache
def _answering(answer: Any) -> Callable[..., Any]:
    # One function for an answer: what was worked out by it once is kept.
    return lambda *arguments, **keywords: answer


@contextmanager
def _replaced(name: str, answer: Any) -> Iterator[None]:
    """The function `name` of the configurations answers this inside the block, whatever it is asked."""
    from fpe_kernels.backends.triton import configs

    before = getattr(configs, name)
    setattr(configs, name, _answering(answer))
    try:
        yield
    finally:
        setattr(configs, name, before)


ALL = [Candidate(*c) for c in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]
DESCRIBED = [Candidate(*c, descriptors=True) for c in itertools.product((64, 128), (64, 128), (4, 8), (2, 3))]
# Four warps that compute are what the compiler adds fetching warps to; where it refuses, there is no such candidate.
SPECIALISED = [Candidate(*c, 4, stages, True, True) for c in ((64, 64), (64, 128), (128, 64)) for stages in (2, 3)]
# Registers at which three or four programs of four warps share a multiprocessor.
BOUNDED = [Candidate(*c, maxnreg=most) for c in itertools.product((64,), (32, 64), (4,), (2, 3)) for most in (128, 168)]

# What a first run on Hopper left of the pointer kernel's candidates: no other was among the fastest there.
PLAUSIBLE = [
    Candidate(*c)
    for c in (
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (128, 32, 8, 3),
    )
]


def choices(case: Case, arch: str = "sm_90") -> Sequence[Choice]:
    """What is measured for `case` on `arch`: descriptors where a copy engine reads them, bounds where they exist.

    On Hopper, of which measurements are known, few, and every tile of the kernel made for it; where this Triton lacks
    what that is written in, descriptors in its place.
    """
    from fpe_kernels.backends.triton import hopper
    from fpe_kernels.backends.triton.chips import SHARED_MEMORY

    if case.layout == "guided":
        return [Launches(True), Launches(False)]
    branches = case.batch // case.maps
    if arch == "sm_90":
        made = hopper_tiles.offered(case.head_dim, branches)
        other = DESCRIBED if isinstance(hopper.kernels(), str) else [Candidate.of(config) for config in made]
        every = [*PLAUSIBLE, *other]
    else:
        nvidia = arch.startswith("sm_")
        engine = nvidia and int(arch.removeprefix("sm_")) >= 90
        every = [*ALL, *(BOUNDED if nvidia else []), *(DESCRIBED + SPECIALISED if engine else [])]
    return [c for c in every if c.fits(case.head_dim, branches, SHARED_MEMORY[arch])]


def tuning_plan() -> list[Case]:
    """The shapes that decide, the most telling first.

    Two maps of a source and a target, and of one row each, at every length class; more targets; then mixed batches,
    which are one launch or two by what has been found before.
    """

    def cases(tokens: int, targets: int, layout: str, head_dims: Sequence[int] = (64, 40, 80, 128, 160)) -> list[Case]:
        # SD 2's and SDXL's heads are 64 wide, and there are twice as many of them where tokens are few; transformers
        # have twelve and more of 128.
        heads = {64: 10 if tokens >= 4096 else 20, 128: 12}
        side = int(tokens**0.5)
        return [Case("tune", 8 * side, tokens, heads.get(d, 8), d, targets, layout) for d in head_dims]

    plan = [case for tokens in (4096, 1024, 16384) for targets in (1, 0) for case in cases(tokens, targets, "halves")]
    plan += cases(256, 1, "halves", (160, 80, 64)) + cases(256, 0, "halves", (160, 80, 64))
    plan += cases(4096, 3, "pair") + cases(1024, 3, "pair")
    plan += [case for tokens in (1024, 4096, 256) for case in cases(tokens, 1, "guided")]
    return plan + cases(16384, 1, "guided") + cases(1024, 3, "guided")
