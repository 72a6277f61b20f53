"""What an edit needs of its source, found by asking the edit: rows of layers and of features, by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from ..edits import Edit
from ..edits.base import begun, features_of, parts_of, prompts_of, watchers_of
from ..models.roles import BatchRoles
from ..models.sites import Site, attention_sites, feature_shape
from ..models.steps import Step
from ..session.device_copies import Place, Placement
from ..session.instructions import make_orders
from .precision import Precision, packed_bytes

__all__ = ["Contents", "contents_bytes", "describe_lack", "part_name", "recorded_steps", "source_needs"]

#: For each module's path, its parts ("conditional query", "unconditional feature", …) with the steps of each: calls of
#: the UNet, of which some schedulers make several a step.
Contents = dict[str, dict[str, tuple[int, ...]]]

_MAP = frozenset({"query", "key", "logsumexp"})


def part_name(conditional: bool, part: str) -> str:
    """The name of a part of the source's conditional or unconditional row."""
    return f"{'conditional' if conditional else 'unconditional'} {part}"


def recorded_steps(contents: Contents) -> set[int]:
    """Steps of which anything is kept."""
    return {step for parts in contents.values() for at in parts.values() for step in at}


def source_needs(
    edits: Iterable[Edit], sites: tuple[Site, ...], steps: Sequence[Step], *, targets: int | None = None, guided: bool
) -> Contents:
    """What edits need of their source beside a batch of targets.

    Args:
        edits: each is asked alone.
        sites: attention layers, at the size of the run.
        steps: of the run, one for each call of the UNet.
        targets: how many; default: those that an edit is written for, else one.
        guided: whether there are unconditional rows.
    """
    found: dict[str, dict[str, set[int]]] = {}
    for edit in edits:
        count = targets or max(1, len(prompts_of(edit)) - 1)
        roles = BatchRoles.from_recording(count, classifier_free_guidance=guided)
        for path, row, part, index in _reads(edit, sites, steps, roles):
            name = part_name(roles.conditional[row], part)
            found.setdefault(path, {}).setdefault(name, set()).add(index)
    return {path: {name: tuple(sorted(at)) for name, at in parts.items()} for path, parts in found.items()}


def _reads(
    edit: Edit, sites: tuple[Site, ...], steps: Sequence[Step], roles: BatchRoles
) -> Iterator[tuple[str, int, str, int]]:
    """(path, recorded row, part, step) of everything that is read."""
    running, place = begun(edit), Place(Placement(), torch.device("cpu"), torch.float64)
    chosen = [(part, part.select(sites)) for part in parts_of(running)]
    watching = [(watcher, watcher.select(sites)) for watcher in watchers_of(running)]
    for step in steps:
        index = step.call
        active = running.active(step)
        orders = make_orders(chosen if active else (), watching, step, roles, "auto", place)
        for path, order in orders.items():
            for row, parts in order.plan.reads.items():
                # A product names rows of text too where the layer has none.
                held = (part for part in parts if order.site.kind != "image" or not part.startswith("text-"))
                yield from ((path, row, part, index) for part in held)
            for row in {*order.columns, *order.maps}:
                if row >= roles.batch:
                    yield from ((path, row, part, index) for part in _MAP)
        for path, sources in (features_of(running, step, roles) if active else {}).items():
            yield from ((path, row, "feature", index) for row in sources.values() if row >= roles.batch)


def contents_bytes(
    contents: Contents, unet: Any, size: tuple[int, int], text_tokens: int, itemsize: int, precision: Precision
) -> int:
    """Bytes of all parts on latents of ``size`` (height, width), at ``itemsize`` bytes a number of the model's."""
    sites = {site.path: site.at(*size) for site in attention_sites(unet)}
    total = 0
    for path, parts in contents.items():
        for name, steps in parts.items():
            part = name.split()[-1]
            if part == "feature":
                channels, height, width = feature_shape(unet, path, *size)
                tokens, dim = height * width, channels
            else:
                site = sites[path]
                text = site.kind == "cross" and part in ("key", "value")
                tokens = site.heads * (text_tokens if text else cast(int, site.tokens))
                dim = unet.get_submodule(path).inner_dim // site.heads
            total += len(steps) * packed_bytes(part, tokens, dim, itemsize, precision)
    return total


def describe_lack(needed: Contents, held: Mapping[str, Mapping[str, Iterable[int]]]) -> str:
    """What is needed and not held, in words; empty where everything is there."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for path, parts in needed.items():
        missing = {name: sorted(set(at) - set(held.get(path, {}).get(name, ()))) for name, at in parts.items()}
        missing = {name: at for name, at in missing.items() if at}
        if missing:
            steps = sorted({step for at in missing.values() for step in at})
            what = (", ".join(sorted(missing)), f"steps {steps[0]} to {steps[-1]}")
            lacking.setdefault(what, []).append(path)
    return "; ".join(
        f"{names} of {paths[0]}{f' and {len(paths) - 1} more layers' if len(paths) > 1 else ''} at {steps}"
        for (names, steps), paths in lacking.items()
    )
