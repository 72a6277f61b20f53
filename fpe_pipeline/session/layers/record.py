"""What a processor did with its order, as it tells the session."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LayerRecord"]


class LayerRecord(NamedTuple):
    """What became of a layer's order in one call of the model.

    Args:
        skipped: why the order was not carried out; empty where it was.
        itemsize: bytes a number of the layer's values.
        held: bytes of the queries, keys and values that its products were made from.
        maps: bytes of a dense map for every row, which were not stored.
    """

    skipped: str = ""
    itemsize: int = 0
    held: int = 0
    maps: int = 0
