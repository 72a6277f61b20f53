"""The cases: every self-attention shape of the models that people edit with.

A *layer shape* is what one attention layer works on: tokens, heads, head dimension. A *case* adds the batch
that an edit makes of it (how many targets, which rows share a map) and the operation. Nothing here depends
on a device or on torch, so a row in `results/` can be read back into the case that it measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

TARGETS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Level:
    """Self-attention layers of one UNet resolution: `factor` is pixels per token along a side."""

    factor: int
    heads: int
    head_dim: int
    layers: int


# Counted from the published configurations (two transformer blocks on the way down, one in the middle, three
# on the way up; SDXL has 2 and 10 layers in each block of its two levels with attention).
MODELS: dict[str, tuple[Level, ...]] = {
    "sd15": (Level(8, 8, 40, 5), Level(16, 8, 80, 5), Level(32, 8, 160, 5), Level(64, 8, 160, 1)),
    "sd21": (Level(8, 5, 64, 5), Level(16, 10, 64, 5), Level(32, 20, 64, 5), Level(64, 20, 64, 1)),
    "sdxl": (Level(16, 10, 64, 10), Level(32, 20, 64, 60)),
}
PIXELS: dict[str, tuple[int, ...]] = {"sd15": (512, 768, 1024), "sd21": (768,), "sdxl": (1024, 1536, 2048)}

LAYOUTS = {
    "pair": "the rows that share one map, alone: the source's and every target's",
    "halves": "two maps, each shared by all rows of its half (methods that edit both halves under guidance)",
    "guided": "a whole guided batch: unconditional rows with maps of their own, conditional rows sharing one",
}

OPS = {
    "apply": "out[b] = A[map_index[b]] @ value[b]",
    "replay": "apply, with the log-sum-exp of an earlier pass known",
    "capture": "apply, with 16 capture columns for the source row in the same pass",
    "adjoint": "A.T @ weight, one column block a row; log-sum-exp known, by SDPA as its values' gradient",
    "backward": "apply, then the gradients of query, key and value",
}
CAPTURE_COLUMNS = 16


@dataclass(frozen=True)
class Case:
    """One measurement's shape. `name` and `Case.parse` are inverse to each other."""

    model: str
    pixels: int
    tokens: int
    heads: int
    head_dim: int
    targets: int = 1
    layout: str = "pair"
    op: str = "apply"
    layers: int = field(default=1, compare=False)

    @property
    def name(self) -> str:
        shape = f"{self.tokens}x{self.heads}x{self.head_dim}"
        return f"{self.model}-{self.pixels}/{shape}/{self.layout}-{self.targets}/{self.op}"

    @classmethod
    def parse(cls, name: str) -> Case:
        model_pixels, shape, layout_targets, op = name.split("/")
        model, pixels = model_pixels.rsplit("-", 1)
        layout, targets = layout_targets.rsplit("-", 1)
        tokens, heads, head_dim = map(int, shape.split("x"))
        return cls(model, int(pixels), tokens, heads, head_dim, int(targets), layout, op)

    @property
    def map_index(self) -> tuple[int, ...]:
        """Which map each batch row takes; rows in a pipeline's order, unconditional half first."""
        rows = 1 + self.targets
        if self.layout == "pair":
            return (0,) * rows
        if self.layout == "halves":
            return (0,) * rows + (1,) * rows
        if self.layout == "guided":
            return (*range(rows), *([rows] * rows))
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {self.layout!r}")

    @property
    def maps(self) -> int:
        return max(self.map_index) + 1

    @property
    def batch(self) -> int:
        return len(self.map_index)

    @property
    def scores(self) -> int:
        """Entries of the distinct maps: what no exact method can do without computing once."""
        return self.maps * self.heads * self.tokens**2

    @property
    def flops(self) -> int:
        """Floating-point operations that the case needs, each map's scores once and nothing padded."""
        score_products = 2 * self.scores * self.head_dim
        value_products = 2 * self.batch * self.heads * self.tokens**2 * self.head_dim
        if self.op == "capture":
            return score_products + value_products + 2 * self.scores * CAPTURE_COLUMNS
        if self.op == "backward":
            # The scores again, dQ and dK for each map; dP and dV for each row.
            return 4 * score_products + 3 * value_products
        return score_products + value_products

    @property
    def exponentials(self) -> int:
        return self.scores * (2 if self.op == "backward" else 1)

    def bytes(self, itemsize: int) -> int:
        """Bytes that must move: distinct queries and keys in, values in, outputs out."""
        per_map = self.heads * self.tokens * self.head_dim * itemsize
        moved = (2 * self.maps + 2 * self.batch) * per_map
        return 3 * moved if self.op == "backward" else moved

    def dense_bytes(self, itemsize: int) -> int:
        """Bytes of one copy of the maps as the original materialises them: one for every row and head."""
        return self.batch * self.heads * self.tokens**2 * itemsize


def layer_shapes(model: str, pixels: int) -> Iterator[Case]:
    """The model's distinct self-attention shapes at a square size, largest first."""
    for level in MODELS[model]:
        side = pixels // level.factor
        yield Case(model, pixels, side * side, level.heads, level.head_dim, layers=level.layers)


def kernel_cases(
    *,
    targets: Iterable[int] = TARGETS,
    layouts: Iterable[str] = ("pair", "guided"),
    ops: Iterable[str] = ("apply",),
    models: Iterable[str] = tuple(MODELS),
    max_scores: int | None = None,
) -> list[Case]:
    """Every shape of every model, combined with the batches and operations asked for.

    `max_scores` drops cases whose maps have more entries in all than a machine can compute in sensible time.
    """
    cases = [
        Case(s.model, s.pixels, s.tokens, s.heads, s.head_dim, t, layout, op, s.layers)
        for model in models
        for pixels in PIXELS[model]
        for s in layer_shapes(model, pixels)
        for layout in layouts
        for t in targets
        for op in ops
    ]
    if max_scores is not None:
        cases = [c for c in cases if c.batch * c.heads * c.tokens**2 <= max_scores]
    return cases


def headline_cases() -> list[Case]:
    """The two shapes that the README leads with: 4096 tokens, 8 heads, one source and one target.

    The first is SD 1.5's finest level at 512 px. The second has its eight heads at dimension 64, so that the
    two differ in nothing but the head dimension.
    """
    return [Case("sd15", 512, 4096, 8, 40, 1, "pair"), Case("d64", 512, 4096, 8, 64, 1, "pair")]


#: Tokens, heads and head dim of FLUX.1 and Stable Diffusion 3.5 at 1024 px, of Kontext and of Wan 2.1 at 480p.
TRANSFORMERS = ((4608, 24, 128), (4429, 24, 64), (8704, 24, 128), (32760, 12, 128))


def grid_cases() -> list[Case]:
    """Head dimensions against lengths at batch 4: the table that kernels are tuned and judged by.

    Beside it: twice the heads of SD 1.5, which keep every multiprocessor busy for several waves, and what transformers
    attend over: FLUX.1's image and text at 1024 px, Stable Diffusion 3.5's, FLUX.1 Kontext's with its reference, and
    the frames of Wan 2.1 (1.3B) at 480p.
    """
    heads = [(8, 40), (8, 80), (8, 160), (10, 64), (20, 64), (12, 128)]
    shapes = [(tokens, *shape) for tokens in (1024, 4096, 16384) for shape in heads]
    return [
        Case("grid", 8 * int(tokens**0.5), tokens, heads, head_dim, 1, layout)
        for tokens, heads, head_dim in [*shapes, (4096, 16, 40), *TRANSFORMERS]
        for layout in ("halves", "pair")
    ]


def length_cases(tokens: Iterable[int], *, heads: int = 8, head_dim: int = 64, targets: int = 1) -> list[Case]:
    """One shape at growing length: how time and memory scale."""
    return [Case("length", 8 * int(n**0.5), n, heads, head_dim, targets, "pair") for n in tokens]
