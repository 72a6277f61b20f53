"""What an edit needs of its source, found by asking the edit: rows of layers and of features, by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch

from ..edits import Edit
from ..edits.base import begun, features_of, parts_of, prompts_of, watchers_of
from ..edits.joint_products import JointPlan
from ..errors import Lacking
from ..models.adapters.families import adapter_of
from ..models.roles import BatchRoles
from ..models.sites import Site, feature_shape
from ..models.steps import Step
from ..session.layers.device_copies import Place, Placement
from ..session.layers.instructions import Order, make_orders
from .keys import Contents, Part
from .precision import Precision, packed_bytes

__all__ = ["check_held", "contents_bytes", "recorded_steps", "source_needs"]

_MAP = frozenset({"query", "key", "logsumexp"})


class _Read(NamedTuple):
    """Something that an edit takes of its source at a step: a part of a recorded row of a module."""

    path: str
    row: int
    name: str
    step: int


def recorded_steps(contents: Contents) -> set[int]:
    """Steps of which anything is kept."""
    return {step for parts in contents.values() for at in parts.values() for step in at}


def source_needs(
    edits: Iterable[Edit],
    sites: tuple[Site, ...],
    steps: Sequence[Step],
    *,
    targets: int | None = None,
    guided: bool,
    apart: bool = False,
    prompts_first: bool = False,
    placed: bool = True,
) -> Contents:
    """What edits need of their source beside a batch of targets.

    Args:
        edits: each is asked alone.
        sites: attention layers, at the size of the run.
        steps: of the run, one for each call of the UNet.
        targets: how many; default: those that an edit is written for, else one.
        guided: whether there are unconditional rows.
        apart: whether those are in a call of their own.
        prompts_first: whether they come after those that see their prompts.
        placed: whether it is known which words the source's text tokens are, in joint attention.

    Raises:
        ValueError: an edit that asks for the source's map as an operator in joint attention.
        Lacking: one that places words there, where they are not known.
    """
    found: dict[str, dict[Part, set[int]]] = {}
    for edit in edits:
        count = targets or max(1, len(prompts_of(edit)) - 1)
        both = guided and not apart
        roles = BatchRoles.from_recording(count, classifier_free_guidance=both, prompts_first=prompts_first)
        for rows in (roles, roles.all_unconditional()) if guided and apart else (roles,):
            for read in _reads(edit, sites, steps, rows, placed):
                part = Part(rows.conditional[read.row], read.name)
                found.setdefault(read.path, {}).setdefault(part, set()).add(read.step)
    return {path: {part: tuple(sorted(at)) for part, at in parts.items()} for path, parts in found.items()}


def _reads(
    edit: Edit, sites: tuple[Site, ...], steps: Sequence[Step], roles: BatchRoles, placed: bool
) -> Iterator[_Read]:
    """Everything that is read of rows beside the batch."""
    running, place = begun(edit), Place(Placement(), torch.device("cpu"), torch.float64)
    chosen = [(part, part.select(sites)) for part in parts_of(running)]
    watching = [(watcher, watcher.select(sites)) for watcher in watchers_of(running)]
    for step in steps:
        index = step.call
        active = running.active(step)
        orders = make_orders(chosen if active else (), watching, step, roles, "auto", place)
        for path, order in orders.items():
            if order.site.is_joint:
                _check_words(edit, order, placed, roles.batch)
            for row, parts in order.plan.reads.items():
                # A product names rows of text too where the layer has none.
                held = (name for name in parts if order.site.kind != "image" or not name.startswith("text-"))
                yield from (_Read(path, row, name, index) for name in held)
            for row in {*order.columns, *order.maps}:
                if row >= roles.batch and not order.site.is_joint:
                    yield from (_Read(path, row, name, index) for name in _MAP)
        for path, sources in (features_of(running, step, roles) if active else {}).items():
            yield from (_Read(path, row, "feature", index) for row in sources.values() if row >= roles.batch)


def _check_words(edit: Edit, order: Order, placed: bool, batch: int) -> None:
    """Refuse an edit of joint attention that takes of the source's words what a recording does not have.

    Words are placed among the tokens of text encoders, of which recordings of an earlier version say nothing.
    """
    if any(row >= batch for row in order.maps):
        raise ValueError(
            f"{type(edit).__name__} asks for the source's map as an operator (Watcher.maps), which a recording on a "
            "transformer does not give: ask for columns of it, or run source and targets together, pipe(source, "
            "targets, edit=…)"
        )
    asking = [type(part).__name__ for part in parts_of(edit) if prompts_of(part)] or [type(edit).__name__]
    mixes = isinstance(order.plan, JointPlan) and any(term.mixing is not None for term in order.plan.products)
    if not placed and (order.columns or (mixes and prompts_of(edit))):
        raise Lacking(
            f"{', '.join(asking)} looks for words among the tokens of text, and the recording, of an earlier version, "
            "does not hold where those of the source are",
            "Record it again",
        )


def contents_bytes(
    contents: Contents, model: Any, size: tuple[int, int], text_tokens: int, itemsize: int, precision: Precision
) -> int:
    """Bytes of all parts on latents of ``size`` (height, width), at ``itemsize`` bytes a number of the model's."""
    sites = {site.path: site.at(*size) for site in adapter_of(model).sites}
    total = 0
    for path, parts in contents.items():
        for part, steps in parts.items():
            if part.name == "feature":
                channels, height, width = feature_shape(model, path, *size)
                tokens, dim = height * width, channels
            else:
                site = sites[path]
                text = site.kind == "cross" and part.name in ("key", "value")
                tokens = site.heads * (text_tokens if text else cast(int, site.tokens))
                dim = model.get_submodule(path).inner_dim // site.heads
            total += len(steps) * packed_bytes(part.name, tokens, dim, itemsize, precision)
    return total


def check_held(edit: Edit, needed: Contents, held: Contents) -> None:
    """Raise Lacking where a recording does not hold what an edit needs of its source."""
    lack = _lack(needed, held)
    if lack:
        raise Lacking(
            f"the recording lacks what {type(edit).__name__} needs of the source: {lack}",
            "Record it for this edit (pipe.record(…, edit=…) takes several), or give the edit fewer steps or layers",
        )


def _lack(needed: Contents, held: Contents) -> str:
    """What is needed and not held, in words; empty where everything is there."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for path, parts in needed.items():
        held_parts = held.get(path, {})
        missing = {part: sorted(set(at) - set(held_parts.get(part, ()))) for part, at in parts.items()}
        missing = {part: at for part, at in missing.items() if at}
        if missing:
            steps = sorted({step for at in missing.values() for step in at})
            what = (", ".join(sorted(map(str, missing))), f"steps {steps[0]} to {steps[-1]}")
            lacking.setdefault(what, []).append(path)
    return "; ".join(
        f"{names} of {paths[0]}{f' and {len(paths) - 1} more layers' if len(paths) > 1 else ''} at {steps}"
        for (names, steps), paths in lacking.items()
    )
