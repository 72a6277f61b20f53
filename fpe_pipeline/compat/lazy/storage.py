"""What several views of a map share, as tensors share memory: what is assigned through one of them, all of them see."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fpe_kernels import AttentionMap, LinearMap, concatenate

from .numbers import as_known, converted, entries

__all__ = ["Storage"]


#: So many of the columns that were handed out last are kept, others only as long as the borrower has them.
KEPT = 8


class _Lent:
    """Numbers of a column that were handed out as a view; ``write`` puts them back into a storage.

    It is told the storage and does not hold it: in a circle, queries and keys would outlive their layer.
    """

    def __init__(self, numbers: torch.Tensor, write: Callable[[Storage, torch.Tensor], None]) -> None:
        self.kept: torch.Tensor | None = numbers  # also of a borrower who changes them and lets go of them
        self._numbers, self._write = weakref.ref(numbers), write
        self._note(numbers)

    def _note(self, numbers: torch.Tensor) -> None:
        # An inference tensor does not count its changes.
        self._before = numbers.clone() if numbers.is_inference() else numbers._version

    def collect(self, storage: Storage) -> bool:
        """Put them back where the borrower has changed them; whether there still is a borrower."""
        numbers = self._numbers()
        if numbers is None:
            return False
        before = self._before
        if numbers._version != before if isinstance(before, int) else not torch.equal(numbers, before):
            self._note(numbers)
            self._write(storage, numbers)
        return True


@dataclass
class _Cut:
    """Where a storage's rows come from that are a cut of another's, and to where an assignment goes back."""

    parent: Storage
    make: Callable[[], LinearMap]
    write: Callable[[Storage], None]
    seen: int


class Storage:
    """R rows [N, M], each the map of one batch row and head, as a map [R, 1, N, M].

    Args:
        whole: the layer's map [B, H, N, M], whose rows it holds batch row by batch row and head by head; or a map
            [R, 1, N, M], whose rows they are.
        halves: the number of batch rows of each part that is to be kept apart, so that what keeps one part's rows
            does not keep the others' in memory. Default: one part.
    """

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
        self._cut: _Cut | None = None
        self._sums = 0
        self._version = 0
        self.settled = False
        self.shape = (whole.shape[0] * whole.shape[1], *whole.shape[2:])
        self.dtype, self.device = whole.dtype, whole.device

    @property
    def rows(self) -> LinearMap:
        """The map [R, 1, N, M]."""
        self._refresh()
        if self._rows is None:
            assert self._whole is not None
            is_by_head = self._whole.shape[1] == 1 and len(self._halves) == 1
            self._rows = self._whole if is_by_head else _head_by_head(self._whole, self._halves)
        return self._rows

    @property
    def untouched(self) -> LinearMap | None:
        """The layer's map [B, H, N, M] as it was given; None once rows were assigned."""
        self._refresh()
        return self._whole

    def take(self, index: torch.Tensor) -> LinearMap:
        """The rows ``index``, as a map [len(index), 1, N, M]."""
        chosen = index.flatten().tolist()
        rows = self.rows
        return rows if chosen == list(range(rows.shape[0])) else rows.take(chosen)

    def assign(self, index: torch.Tensor, rows: LinearMap) -> None:
        """Let the rows ``index`` be those of ``rows`` [len(index), 1, N, M] from here on."""
        chosen = index.flatten().tolist()
        count, old, rows = self.shape[0], self.rows, converted(rows, self.dtype)
        self._whole = None
        self._version += 1
        if chosen == list(range(count)):
            self._rows = rows
        else:
            place = list(range(count))
            for position, row in enumerate(chosen):
                place[row] = count + position
            self._rows = concatenate([old, rows]).take(place)
        if self._cut is not None:
            self._cut.write(self)
            self._cut.seen = self._cut.parent._version

    def accumulated(self) -> bool:
        """Note a sum in place. From the second on it is a sum over steps, which is held as numbers as soon as they are
        fewer bytes than what it is made from; whether it is now.
        """
        self._sums += 1
        return self._sums > 1 and self.settle()

    def settle(self) -> bool:
        """Hold the rows as numbers where these are fewer bytes than what they are made from; whether they are now."""
        matrix = self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize
        if self.rows.nbytes <= matrix:
            return False
        self.settled = True
        self._rows, self._whole = as_known(entries(self.rows)), None
        return True

    def kept(self, index: torch.Tensor) -> Storage:
        """The rows ``index`` in a storage of their own, which holds no others, in the fewest bytes."""
        storage = Storage(self.take(index))
        storage.settled = self.settled
        storage.settle()
        return storage

    def to(self, device: torch.device | str) -> Storage:
        """The rows on another device, in a storage of their own."""
        rows: Any = self.rows
        storage = Storage(rows.to(device))
        storage.settled = self.settled
        return storage

    def lend(self, numbers: torch.Tensor, write: Callable[[Storage, torch.Tensor], None]) -> torch.Tensor:
        """``numbers`` of some entries, which are put back by ``write`` where the borrower changes them in place."""
        self._lent.append(_Lent(numbers, write))
        return numbers

    def follow(self, parent: Storage, make: Callable[[], LinearMap], write: Callable[[Storage], None]) -> None:
        """Be a cut of another storage's rows from here on, as a view of a tensor is.

        Args:
            parent: whose rows they are cut from.
            make: cuts them anew, after an assignment to the parent's.
            write: assigns those of the storage that it is given to the parent's, after an assignment here.
        """
        self._cut = _Cut(parent, make, write, parent._version)

    def _refresh(self) -> None:
        """Be what it is by now: by what was assigned to the rows that it is cut from, and through its own columns."""
        cut = self._cut
        if cut is not None:
            cut.parent._refresh()
            if cut.seen != cut.parent._version:
                self._rows, self._whole, cut.seen = cut.make(), None, cut.parent._version
        lent, self._lent = self._lent, []
        lent = [view for view in lent if view.collect(self)]
        for view in lent[:-KEPT]:
            view.kept = None
        self._lent = lent + self._lent


def _head_by_head(whole: LinearMap, halves: Sequence[int]) -> LinearMap:
    """[B, H, N, M] -> [B·H, 1, N, M], of several ``halves`` of the batch a copy of queries and keys for each."""
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
                _own(part.query.flatten(0, 1).unsqueeze(1), len(halves) > 1),
                _own(key.flatten(0, 1).unsqueeze(1), len(halves) > 1),
                scale=part.scale,
                bias=bias,
                backend=part.backend,
                key_lengths=None if lengths is None else [length for length in lengths for _ in range(heads)],
            )
        )
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _own(part: torch.Tensor, is_cut: bool) -> torch.Tensor:
    """A tensor; a copy where it is a view that would keep the rest of its batch in memory."""
    return part.clone() if is_cut and part.untyped_storage().nbytes() > part.numel() * part.element_size() else part
