"""From an edit and its watchers to what each layer's processor is to do in one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fpe_kernels import LinearMap

from ...edits import Edit
from ...edits.base import merged_products
from ...edits.joint_products import JointPlan, JointProduct, plan_joint_products
from ...edits.products import ProductPlan, plan_products
from ...edits.watchers import Watcher
from ...models.roles import BatchRoles
from ...models.sites import Site
from ...models.steps import Step
from .computing import Rows
from .device_copies import Place
from .joint_computing import JointLayer
from .known_rows import RecordedLayer
from .straight_line import StraightLine, straight_line

__all__ = ["Order", "StandingOrders", "make_orders"]

Compute = Callable[[Rows, Rows, Rows, float, torch.Tensor | None], torch.Tensor]
Deliver = Callable[[Mapping[int, torch.Tensor], Mapping[int, LinearMap]], None]


@dataclass(frozen=True)
class Order:
    """What a processor is to do in the call at hand.

    Args:
        site: the layer.
        plan: its products.
        backend: of ``shared_attention``.
        edited: whether an edit asked for the products; otherwise the layer is only watched.
        columns: for some rows, what their map is to be multiplied with beside the values [M', C]; in joint attention
            that of image queries over text keys [T, C].
        maps: rows whose map is to be delivered as an operator.
        deliver: takes both.
        recorded: what a recording holds of the layer at this step, for the plan's rows that are not in the batch.
        compute: computes the layer's attention [B, H, N, E] from query, key, value, scale and bias, in the place of
            the plan's products.
        receive: is shown a layer of joint attention before its products are computed.
        observe: is shown a layer of joint attention and what its image tokens [B, H, N, E] have become.
        text_lengths: for each row, its text tokens before padding in joint attention; None where none is padding.
        references: tokens of reference pictures, which follow the image's.
        shown: where these stand among the text's tokens instead, the first of each and the one behind its last.
    """

    site: Site
    plan: ProductPlan | JointPlan
    backend: str = "auto"
    edited: bool = True
    columns: Mapping[int, torch.Tensor] = field(default_factory=dict)
    maps: tuple[int, ...] = ()
    deliver: Deliver | None = None
    recorded: RecordedLayer | None = None
    compute: Compute | None = None
    receive: Callable[[JointPlan, JointLayer], None] | None = None
    observe: Callable[[JointLayer, torch.Tensor], None] | None = None
    text_lengths: tuple[int, ...] | None = None
    references: int = 0
    shown: tuple[tuple[int, int], ...] = ()

    def lengths(self, tokens: int) -> tuple[int, ...] | None:
        """As `text_lengths`, in a layer of so many text tokens, with the recorded rows after those of the batch."""
        known = {} if self.recorded is None else self.recorded.text_lengths
        if not known:
            return self.text_lengths
        of_batch = self.text_lengths or (tokens,) * self.plan.rows
        lengths = (*of_batch, *(known.get(row, tokens) for row in range(len(of_batch), max(known) + 1)))
        return lengths if self.text_lengths is not None or set(lengths) != {tokens} else None

    @property
    def row_plan(self) -> ProductPlan:
        """The plan of a layer whose rows have one kind of tokens."""
        assert isinstance(self.plan, ProductPlan), f"{self.site.path} is a layer of joint attention"
        return self.plan

    @cached_property
    def straight_line(self) -> StraightLine | None:
        """The layer in one call, where it is self-attention and nobody asks for more than its output."""
        alone = self.compute is None and self.recorded is None and self.deliver is None and not self.columns
        if not alone or self.site.kind != "self" or self.maps:
            return None
        return straight_line(self.row_plan, self.site.tokens, self.backend)


def make_orders(
    edits: Sequence[tuple[Edit, Sequence[Site]]],
    watchers: Sequence[tuple[Watcher, Sequence[Site]]],
    step: Step,
    roles: BatchRoles,
    backend: str,
    place: Place,
    recorded: Mapping[str, RecordedLayer] | None = None,
    text_lengths: tuple[int, ...] | None = None,
    references: int = 0,
    shown: tuple[tuple[int, int], ...] = (),
) -> dict[str, Order]:
    """Orders by layer path; layers without one are left to the processor that they had.

    Args:
        edits: each with the sites that it selected; none where no edit is active.
        watchers: each with the sites that it selected.
        place: where the layers compute.
        recorded: by layer path, where the roles have recorded rows.
        text_lengths: of each row's text in joint attention, where some of it is padding.
        references: tokens of reference pictures in joint attention.
        shown: where they stand among the text's tokens, if they do.
    """
    asked: dict[str, tuple[Site, list[Edit]]] = {}
    for edit, selected in edits:
        for site in selected:
            asked.setdefault(site.path, (site, []))[1].append(edit)
    asking: dict[str, list[Watcher]] = {}
    for watcher, watched in watchers:
        for site in watched:
            asked.setdefault(site.path, (site, []))
            asking.setdefault(site.path, []).append(watcher)
    orders = {}
    for path, (site, asking_for) in asked.items():
        products = place.products(merged_products(asking_for, site, step, roles))
        wanted = _Wanted(site, step, roles, asking.get(path, ()), place)
        if products or wanted:
            orders[path] = Order(
                site,
                _plan(site, products, roles, wanted, references > 0),
                backend,
                bool(products),
                wanted.columns,
                wanted.maps,
                wanted.deliver if wanted else None,
                None if recorded is None else recorded.get(path),
                observe=wanted.observe if wanted.observed else None,
                text_lengths=text_lengths,
                references=references,
                shown=shown,
            )
    return orders


def _plan(
    site: Site, products: Mapping[int, Any], roles: BatchRoles, wanted: _Wanted, references: bool
) -> ProductPlan | JointPlan:
    if not site.is_joint:
        for row, given in products.items():
            if any(isinstance(term, JointProduct) for term in (given if isinstance(given, Sequence) else (given,))):
                raise TypeError(
                    f"the edit gave a JointProduct for row {row} of {site.path}, which is {site.kind}-attention: there "
                    "an edit gives Products"
                )
        return plan_products(products, roles.batch, roles.recorded)
    if wanted.maps and site.kind != "joint":
        raise ValueError(
            f"{site.path} is {site.kind} attention, of which watchers are shown columns over text tokens "
            "(Watcher.columns) where it has text, and no operators (Watcher.maps)"
        )
    given = {row: _giving(terms, references) for row, terms in products.items()}
    watched = tuple(sorted(row for row in wanted.columns if row >= roles.batch))
    return plan_joint_products(given, roles.batch, roles.recorded, wanted.observed, watched)


def _giving(terms: Any, references: bool) -> Any:
    """A row's terms without those that apply their map to a reference picture alone, where there is none."""
    if not isinstance(terms, Sequence):
        return terms
    return [term for term in terms if not isinstance(term, JointProduct) or term.gives(references=references)]


class StandingOrders:
    """Orders that hold for more than one step: those of steps with equal :meth:`.Edit.phase` in equal circumstances.

    The same objects stay with the processors from step to step, so that what an order is computed by is made once.
    """

    _AT_MOST = 64

    def __init__(self) -> None:
        self._orders: dict[Hashable, dict[str, Order]] = {}

    def orders(
        self, phase: Hashable, circumstances: Hashable, make: Callable[[], dict[str, Order]]
    ) -> dict[str, Order]:
        """Those of a phase, made where there are none yet; made each time where the phase is None."""
        if phase is None:
            return make()
        # Tensors that were placed in inference mode cannot take part in a graph outside it.
        key = (phase, circumstances, torch.is_inference_mode_enabled())
        if key not in self._orders:
            if len(self._orders) >= self._AT_MOST:
                self._orders.clear()
            self._orders[key] = make()
        return self._orders[key]


class _Wanted:
    """What the watchers of a layer want together, and handing each its part."""

    def __init__(self, site: Site, step: Step, roles: BatchRoles, watchers: Sequence[Watcher], place: Place) -> None:
        self._context = (site, step, roles)
        self._parts: list[tuple[Watcher, dict[int, slice], tuple[int, ...]]] = []
        self._observers = [(who, rows) for who in watchers if (rows := tuple(who.observed(site, step, roles)))]
        self.observed = tuple(sorted({row for _, rows in self._observers for row in rows}))
        pieces: dict[int, list[torch.Tensor]] = {}
        for watcher in watchers:
            columns, maps = watcher.columns(site, step, roles), tuple(watcher.maps(site, step, roles))
            where = {}
            for row, given in columns.items():
                start = sum(piece.shape[-1] for piece in pieces.get(row, ()))
                where[row] = slice(start, start + given.shape[-1])
                pieces.setdefault(row, []).append(place.tensor(given))
            if columns or maps:
                self._parts.append((watcher, where, maps))
        self.columns = {row: given[0] if len(given) == 1 else torch.cat(given, -1) for row, given in pieces.items()}
        self.maps = tuple(sorted({row for _, _, maps in self._parts for row in maps}))

    def __bool__(self) -> bool:
        return bool(self._parts or self._observers)

    def observe(self, layer: JointLayer, image: torch.Tensor) -> None:
        for watcher, _ in self._observers:
            watcher.observe(*self._context, layer, image)

    def deliver(self, columns: Mapping[int, torch.Tensor], maps: Mapping[int, LinearMap]) -> None:
        for watcher, where, rows in self._parts:
            watcher.receive(
                *self._context,
                {row: columns[row][..., part] for row, part in where.items()},
                {row: maps[row] for row in rows},
            )
