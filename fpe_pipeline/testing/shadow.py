"""The dense side of a run: it stands beside a session, computes every layer anew from the same inputs, and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..edits import Edit
from ..edits.base import begun, feature_modules_of, features_of, parts_of, watchers_of
from ..edits.joint_products import AnyProduct
from ..edits.products import Product
from ..edits.watchers import Watcher
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from .dense import DenseLayer, edited_map, edited_operator, finished, projected, value_tokens

__all__ = ["Compared", "Equation", "Shadow"]

#: ``(site, step, roles, layer) -> {row: attention [H, N, E]}``, rows left out being as they were.
Equation = Callable[[Site, Step, BatchRoles, DenseLayer], Mapping[int, torch.Tensor]]


@dataclass(frozen=True)
class Compared:
    """One comparison: the largest difference of a row, as a share of the largest value that there should be."""

    error: float
    what: str
    step: Step
    row: int
    said: str
    edited: bool


class Shadow:
    """An edit's twin in a run: it asks the edit at every step and layer, and writes every map out.

    Args:
        unet: in float64.
        edit: any.
        sites: the UNet's attention layers, at the size of the run.
        roles: of every batch.
        equation: in place of the edit's products.
    """

    def __init__(
        self, unet: Any, edit: Edit, sites: Sequence[Site], roles: BatchRoles, equation: Equation | None
    ) -> None:
        self.compared: list[Compared] = []
        self._unet, self._roles, self._equation = unet, roles, equation
        self._sites = {site.path: site for site in sites}
        self._running = begun(edit)
        self._parts = [(part, {site.path for site in part.select(tuple(sites))}) for part in parts_of(self._running)]
        self._watchers = [
            (watcher, {site.path for site in watcher.select(tuple(sites))}) for watcher in watchers_of(self._running)
        ]
        self._step = Step(0, 1)
        self._products: dict[str, dict[int, tuple[Product, ...]]] = {}
        self._asked: dict[str, list[tuple[Watcher, Mapping[int, torch.Tensor], tuple[int, ...]]]] = {}
        self._features: Mapping[str, Mapping[int, int]] = {}
        self._plain: dict[str, torch.Tensor] = {}  # outputs of modules before features are injected
        for watcher, _ in self._watchers:
            watcher.begin()

    def at(self, step: Step) -> None:
        """A UNet call at ``step`` is about to be made: ask the edit and its watchers for all of it."""
        self._step = step
        active = [(part, paths) for part, paths in self._parts if part.active(step)]
        self._products = {
            path: {
                row: _terms(given)
                for part, paths in active
                if path in paths
                for row, given in part.products(site, step, self._roles).items()
            }
            for path, site in self._sites.items()
        }
        self._asked = {
            path: [
                (watcher, watcher.columns(site, step, self._roles), tuple(watcher.maps(site, step, self._roles)))
                for watcher, paths in self._watchers
                if path in paths
            ]
            for path, site in self._sites.items()
        }
        self._features = features_of(self._running, step, self._roles) if self._running.active(step) else {}

    def after(self, before: torch.Tensor, latents: torch.Tensor) -> None:
        """Compare the latents that the session gave after a step with those of the twin's watchers."""
        expected = before
        for watcher, _ in self._watchers:
            if watcher.blends:
                expected = watcher.blend(expected, self._step, self._roles)
        changed = not torch.equal(expected, before)
        self._compare("the latents after it", latents, expected, {}, changed)

    @contextmanager
    def beside(self, enter: Any) -> Iterator[Any]:
        """A session, with hooks before its own and after them."""
        handles = []
        modules = {path: self._unet.get_submodule(path) for path in feature_modules_of(self._running)}
        try:
            for path, module in modules.items():
                handles.append(module.register_forward_hook(self._keep(path)))
            with enter as session:
                for path, module in modules.items():
                    handles.append(module.register_forward_hook(self._feature(path)))
                for path in self._sites:
                    layer = self._unet.get_submodule(path)
                    handles.append(layer.register_forward_hook(self._layer(path), with_kwargs=True))
                yield session
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, path: str) -> Callable[..., None]:
        def keep(module: Any, args: Any, output: torch.Tensor) -> None:
            self._plain[path] = output

        return keep

    def _feature(self, path: str) -> Callable[..., None]:
        def compare(module: Any, args: Any, output: torch.Tensor) -> None:
            plain, sources = self._plain[path], self._features.get(path, {})
            expected = torch.stack([plain[sources.get(row, row)] for row in range(len(plain))])
            said = {row: f"the feature of row {source}" for row, source in sources.items()}
            self._compare(f"the features of {path}", output, expected, said, bool(sources))

        return compare

    def _layer(self, path: str) -> Callable[..., None]:
        def compare(module: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            layer = projected(module, hidden_states, context, kwargs.get("temb"))
            attention, said = self._attention(self._sites[path], layer)
            expected = finished(module, attention, hidden_states)
            self._compare(path, output, expected, said, bool(said))
            self._tell(path, layer)

        return compare

    def _attention(self, site: Site, layer: DenseLayer) -> tuple[torch.Tensor, dict[int, str]]:
        """The layer's attention [rows, H, N, E], and in words what became of the rows that are edited."""
        rows = range(len(layer.query))
        if self._equation is not None:
            by_hand = self._equation(site, self._step, self._roles, layer)
            out = [by_hand[row] if row in by_hand else layer.own(row) for row in rows]
            return torch.stack(out), dict.fromkeys(by_hand, "the equation")
        products = self._products[site.path]
        written = [
            sum(
                (edited_map(term, layer) @ value_tokens(term, layer) for term in products[row]),
                torch.zeros(()).double(),
            )
            if row in products
            else layer.own(row)
            for row in rows
        ]
        said = {row: " + ".join(term.describe() for term in terms) for row, terms in products.items()}
        return torch.stack([out.expand_as(layer.own(row)) for row, out in zip(rows, written, strict=True)]), said

    def _tell(self, path: str, layer: DenseLayer) -> None:
        """Give the watchers what they asked for, from written-out maps."""
        products = self._products[path]

        def terms(row: int) -> tuple[Product, ...]:
            return products.get(row, (Product(row, (row,), (row,)),))

        for watcher, columns, maps in self._asked[path]:
            if not (columns or maps):
                continue
            heat = {
                row: torch.stack([edited_map(term, layer) @ given.to(layer.query) for term in terms(row)]).sum(0)
                for row, given in columns.items()
            }
            operators = {row: edited_operator(terms(row), layer) for row in maps}
            watcher.receive(self._sites[path], self._step, self._roles, heat, operators)

    def _compare(
        self, what: str, actual: torch.Tensor, expected: torch.Tensor, said: Mapping[int, str], edited: bool
    ) -> None:
        if actual.shape != expected.shape:
            raise AssertionError(
                f"{what} at step {self._step.index} is of shape {tuple(actual.shape)}, and should be of "
                f"{tuple(expected.shape)}"
            )
        largest = expected.abs().amax().clamp_min(torch.finfo(expected.dtype).tiny)
        errors = ((actual - expected).abs().flatten(1).amax(1) / largest).nan_to_num(nan=float("inf"))
        row = int(errors.argmax())
        self.compared.append(Compared(float(errors[row]), what, self._step, row, said.get(row, "as it was"), edited))


def _terms(given: AnyProduct | Sequence[AnyProduct]) -> tuple[Product, ...]:
    """What a row becomes, as the sum of its products."""
    terms = tuple(given) if isinstance(given, Sequence) else (given,)
    plain = tuple(term for term in terms if isinstance(term, Product))
    if len(plain) != len(terms):
        raise TypeError("the edit gave a JointProduct for a layer of a UNet: there an edit gives Products")
    return plain
