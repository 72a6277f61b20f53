"""The session of a recording in layers of joint attention: it keeps tokens by segment, after norm and RoPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..edits import Edit
from ..edits.joint_products import JointPlan, plan_joint_products
from ..edits.watchers import Watcher
from ..models.adapters.adapter import ModelCall
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..session.layers.computing import Rows
from ..session.layers.instructions import Order
from ..session.layers.joint_computing import JointLayer, JointOutput, SegmentProjections, evaluate_joint
from ..session.layers.known_rows import Packed, unpack
from .capture import Capture
from .contents import Contents
from .keys import HALVES, Part
from .padded_texts import pad_texts
from .precision import Precision, packed_bytes
from .store import MapStore

__all__ = ["JointCapture", "recorded_bytes"]

#: What models turn that turn images by their texts.
_PLACED = ("image-query", "image-key")
_TEXTS = frozenset({"text-query", "text-key", "text-value"})


class JointCapture(Capture):
    """Keeps image and text tokens of a source while a transformer's pipeline denoises it, unedited.

    Args:
        pipe, contents, store, precision, backend: as of `Capture`.
        trimmed: parts of text tokens that are kept without the padding behind them; of the others there is as much
            padding as a text may have tokens.
        text_tokens: how many that are.

    Attributes:
        text_lengths: of the source's "conditional" and "unconditional" row, its text tokens that are no padding.
        origins: of the same, as `Recording` has them.
    """

    def __init__(
        self,
        pipe: Any,
        contents: Contents,
        store: MapStore,
        precision: Precision,
        backend: str,
        trimmed: frozenset[str] = frozenset(),
        text_tokens: int = 0,
    ) -> None:
        super().__init__(pipe, contents, store, precision, backend)
        self._trimmed = trimmed
        whole = {part for parts in contents.values() for part in parts if part.name in _TEXTS - trimmed}
        self._padded = {part.conditional: text_tokens for part in whole} if trimmed else {}
        self._unpad: Callable[[], None] = _nothing

    def _install(self, watchers: Sequence[Watcher]) -> None:
        super()._install(watchers)
        self._unpad = pad_texts(self.adapter, self._padded) if self._padded else _nothing

    def _take_off(self) -> None:
        super()._take_off()
        self._unpad()

    def _orders(self, edit: Edit | None, call: ModelCall, step: Step, roles: BatchRoles) -> dict[str, Order]:
        orders = {}
        for site in self._instructor.selected.of(self._kept, call.size):
            wanted = self._kept.wanted(site.path, step, roles)
            if wanted:
                receive = partial(self._keep_tokens, site.path, wanted, roles)
                plan = plan_joint_products({}, roles.rows)
                orders[site.path] = Order(
                    site,
                    plan,
                    self.backend,
                    edited=False,
                    receive=receive,
                    text_lengths=call.text_lengths,
                    references=call.references,
                )
        return orders

    def _keep_tokens(
        self, path: str, wanted: Mapping[int, list[str]], roles: BatchRoles, plan: JointPlan, layer: JointLayer
    ) -> None:
        kept: dict[int, Packed] = {}
        for row, names in wanted.items():
            end = self._end_of_text(layer, row, roles.conditional[row])
            own = {name: _kept_of(layer, name, row) for name in names}
            own |= {name: own[name][:, :, :end] for name in names if name in self._trimmed}
            kept[row] = self._pack(path, own)
            self._keep(path, roles.conditional[row], kept[row])
        if self._precision != "exact":
            exact, rounded = (evaluate_joint(plan, one) for one in (layer, _rounded(layer, kept)))
            for row in wanted:
                self._note_error(_whole(rounded, row), _whole(exact, row))

    def _end_of_text(self, layer: JointLayer, row: int, conditional: bool) -> int | None:
        """Where the padding of a row's text begins, among the text's tokens; None in a layer without text."""
        if layer.text is None:
            return None
        half = HALVES[conditional]
        if half not in self.text_lengths:
            self.text_lengths[half] = _length_of(layer, row)
            if layer.origins is not None:
                self.origins[half] = torch.view_as_real(layer.origins[row]).clone()
        return layer.text_tokens[0] + self.text_lengths[half]


def recorded_bytes(
    contents: Contents,
    sites: Mapping[str, Site],
    dim: int,
    text_tokens: Callable[[Part], int],
    itemsize: int,
    precision: Precision,
    key_heads: int | None = None,
) -> int:
    """Bytes of all parts of layers along a flow.

    Args:
        contents: what is kept.
        sites: by path, at the size of the run.
        dim: of a head.
        text_tokens: how many are kept for a part of text.
        itemsize: bytes of a number of the model's.
        precision: of the recording.
        key_heads: of keys and values; None where they are as many as those of queries.
    """
    total = 0
    for path, parts in contents.items():
        site = sites[path]
        for kept, steps in parts.items():
            segment, _, part = kept.name.rpartition("-")  # of layers of rows there is no segment
            is_text = segment == "text" or (not segment and site.kind == "cross" and part in ("key", "value"))
            tokens = text_tokens(kept) if is_text else site.tokens
            heads = site.heads if part == "query" else key_heads or site.heads
            total += len(steps) * packed_bytes(part, heads * (tokens or 0), dim, itemsize, precision)
    return total


def _length_of(layer: JointLayer, row: int) -> int:
    if layer.seen is not None:
        return int(layer.seen[row].sum())
    start, stop = layer.text_tokens
    return stop - start if layer.text_lengths is None else layer.text_lengths[row]


def _rows_of(layer: JointLayer, name: str) -> Rows:
    """Rows of a layer by the name of a part, such as "image-query"."""
    segment, _, part = name.partition("-")
    rows: Rows = getattr(getattr(layer, segment), part)
    return rows


def _kept_of(layer: JointLayer, name: str, row: int) -> torch.Tensor:
    """A part of a row as a recording holds it, which may stand beside another text."""
    rows = _rows_of(layer, name)
    return layer.unplaced(rows, row) if name in _PLACED else rows.take([row])


def _rounded(layer: JointLayer, kept: Mapping[int, Packed]) -> JointLayer:
    """A layer with some of its rows as they come back from a recording."""

    def segment(name: str, own: SegmentProjections) -> SegmentProjections:
        parts: list[Rows] = []
        for part, rows in zip(("query", "key", "value"), own, strict=True):
            tensor = rows.tensor.clone()
            for row, packed in kept.items():
                back = unpack(packed, tensor.dtype).get(f"{name}-{part}")
                if back is not None:
                    back = layer.placed(back, row) if f"{name}-{part}" in _PLACED else back
                    tensor[rows.rows.index(row), :, : back.shape[2]] = back[0]
            parts.append(Rows(tensor, rows.rows))
        return SegmentProjections(*parts)

    text = None if layer.text is None else segment("text", layer.text)
    return replace(layer, image=segment("image", layer.image), text=text)


def _nothing() -> None:
    """What there is to end where no text is padded."""


def _whole(rows: JointOutput, row: int) -> torch.Tensor:
    """A row's image tokens and text tokens, one after the other [H, N, E]."""
    return torch.cat([part[row] for part in (rows.image, rows.text) if part is not None], dim=1)
