"""What several views of a map share, as tensors share memory: what is assigned through one of them, all of them see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fpe_kernels import AttentionMap, LinearMap, concatenate, known_columns

from .numbers import entries

__all__ = ["Storage"]


@dataclass
class _Lent:
    """Numbers of single columns that were handed out as a view; ``write`` puts them back where they were changed."""

    numbers: torch.Tensor
    version: int
    write: Callable[[torch.Tensor], None]


class Storage:
    """R rows [N, M], each the map of one batch row and head, as a map [R, 1, N, M].

    Args:
        whole: the layer's map [B, H, N, M], whose rows it holds batch row by batch row and head by head; or a map
            [R, 1, N, M], whose rows they are.
        halves: the number of batch rows of each part that is to be kept apart, so that what keeps one part's rows
            does not keep the others' in memory. Default: one part.
    """

    #: Called after an assignment, where it holds a cut of another storage's rows.
    changed: Callable[[], None] | None = None

    def __init__(self, whole: LinearMap, halves: Sequence[int] = ()) -> None:
        if whole.shape[1] != 1 and not isinstance(whole, AttentionMap):
            raise TypeError(
                f"expected an AttentionMap, or a map [rows, 1, N, M] with a head a row, got {whole!r}: heads of "
                "combined maps cannot be told apart"
            )
        self._whole: LinearMap | None = whole
        self._halves = tuple(size for size in halves if size) or (whole.shape[0],)
        self._rows: LinearMap | None = None
        self._lent: list[_Lent] = []
        self._sums = 0
        self.settled = False
        self.shape = (whole.shape[0] * whole.shape[1], *whole.shape[2:])
        self.dtype, self.device = whole.dtype, whole.device

    @property
    def rows(self) -> LinearMap:
        """The map [R, 1, N, M]."""
        self._collect()
        if self._rows is None:
            assert self._whole is not None
            self._rows = self._whole if self._whole.shape[1] == 1 else _head_by_head(self._whole, self._halves)
        return self._rows

    @property
    def untouched(self) -> LinearMap | None:
        """The layer's map [B, H, N, M] as it was given; None once rows were assigned."""
        self._collect()
        return self._whole

    def take(self, index: torch.Tensor) -> LinearMap:
        """The rows ``index``, as a map [len(index), 1, N, M]."""
        chosen = index.flatten().tolist()
        rows = self.rows
        return rows if chosen == list(range(rows.shape[0])) else rows.take(chosen)

    def assign(self, index: torch.Tensor, rows: LinearMap) -> None:
        """Let the rows ``index`` be those of ``rows`` [len(index), 1, N, M] from here on."""
        chosen = index.flatten().tolist()
        count, old = self.shape[0], self.rows
        self._whole = None
        if chosen == list(range(count)):
            self._rows = rows
        else:
            place = list(range(count))
            for position, row in enumerate(chosen):
                place[row] = count + position
            self._rows = concatenate([old, rows]).take(place)
        if self.changed is not None:
            self.changed()

    def accumulated(self) -> bool:
        """Note a sum in place. From the second on it is a sum over steps, which is held as numbers as soon as they are
        fewer bytes than what it is made from; whether it is now.
        """
        self._sums += 1
        matrix = self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize
        if self._sums < 2 or self.rows.nbytes <= matrix:
            return False
        self.settled = True
        numbers = entries(self.rows)
        self._rows, self._whole = known_columns(numbers[:, None], range(self.shape[2]), self.shape[2]), None
        return True

    def lend(self, numbers: torch.Tensor, write: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """``numbers`` of some entries, which are put back by ``write`` where the borrower changes them in place."""
        if not numbers.is_inference():  # those do not record that they were changed
            self._lent.append(_Lent(numbers, numbers._version, write))
        return numbers

    def _collect(self) -> None:
        lent, self._lent = self._lent, []
        for view in lent:
            if view.numbers._version != view.version:
                view.write(view.numbers)


def _head_by_head(whole: LinearMap, halves: Sequence[int]) -> LinearMap:
    """[B, H, N, M] -> [B·H, 1, N, M], a copy of queries and keys for each of the ``halves`` of the batch."""
    assert isinstance(whole, AttentionMap)
    parts, start = [], 0
    for size in halves:
        part = whole[start : start + size]
        start += size
        heads = part.shape[1]
        key = part.key if part.key_heads == heads else part.key.repeat_interleave(heads // part.key_heads, dim=1)
        bias = part.bias
        if bias is not None:
            bias = bias.expand(size, heads, -1, -1).flatten(0, 1).unsqueeze(1)
        lengths = part.key_lengths
        parts.append(
            AttentionMap(
                part.query.flatten(0, 1).unsqueeze(1),
                key.flatten(0, 1).unsqueeze(1),
                scale=part.scale,
                bias=bias,
                backend=part.backend,
                key_lengths=None if lengths is None else [length for length in lengths for _ in range(heads)],
            )
        )
    return parts[0] if len(parts) == 1 else concatenate(parts)
