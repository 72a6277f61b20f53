"""The session of a recording in layers of joint attention: it keeps tokens by segment, after norm and RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from ..edits import Edit
from ..edits.joint_products import JointPlan, plan_joint_products
from ..models.adapter import ModelCall
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..session.computing import Rows
from ..session.instructions import Order
from ..session.joint_computing import JointLayer, JointOutput, SegmentProjections, evaluate_joint
from ..session.known_rows import Packed, unpack
from .capture import Capture
from .contents import Contents
from .precision import Precision, packed_bytes
from .source_text import SourceText, source_text

__all__ = ["JointCapture", "joint_bytes"]

#: What models turn that turn images by their texts.
_PLACED = ("image-query", "image-key")


class JointCapture(Capture):
    """Keeps image and text tokens of a source while a transformer's pipeline denoises it, unedited."""

    @property
    def source_text(self) -> SourceText:
        """What the text encoders received of the source."""
        return source_text(self._encoding)

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
            own = {name: _kept_of(layer, name, row) for name in names}
            kept[row] = self._pack(path, own)
            self._keep(path, roles.conditional[row], kept[row])
        if self._precision != "exact":
            exact, rounded = (evaluate_joint(plan, one) for one in (layer, _rounded(layer, kept)))
            for row in wanted:
                self._note_error(_whole(rounded, row), _whole(exact, row))


def joint_bytes(
    contents: Contents,
    sites: Mapping[str, Site],
    dim: int,
    text_tokens: int,
    itemsize: int,
    precision: Precision,
    key_heads: int | None = None,
) -> int:
    """Bytes of all parts of layers of joint attention.

    Args:
        contents: what is kept.
        sites: by path, at the size of the run.
        dim: of a head.
        text_tokens: of a prompt, padding included.
        itemsize: bytes of a number of the model's.
        precision: of the recording.
        key_heads: of keys and values; None where they are as many as those of queries.
    """
    total = 0
    for path, parts in contents.items():
        site = sites[path]
        for kept, steps in parts.items():
            segment, _, part = kept.name.partition("-")
            tokens = site.tokens if segment == "image" else text_tokens
            heads = site.heads if part == "query" else key_heads or site.heads
            total += len(steps) * packed_bytes(part, heads * (tokens or 0), dim, itemsize, precision)
    return total


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
                    tensor[rows.rows.index(row)] = (layer.placed(back, row) if f"{name}-{part}" in _PLACED else back)[0]
            parts.append(Rows(tensor, rows.rows))
        return SegmentProjections(*parts)

    text = None if layer.text is None else segment("text", layer.text)
    return replace(layer, image=segment("image", layer.image), text=text)


def _whole(rows: JointOutput, row: int) -> torch.Tensor:
    """A row's image tokens and text tokens, one after the other [H, N, E]."""
    return torch.cat([part[row] for part in (rows.image, rows.text) if part is not None], dim=1)
