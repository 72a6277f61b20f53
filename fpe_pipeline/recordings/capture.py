"""The session of a recording under way, which keeps what edits need of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fpe_kernels import AttentionMap

from ..edits import Edit
from ..edits.base import Features, Windows
from ..edits.products import Product, plan_products
from ..edits.watchers import Watcher
from ..models.adapters.adapter import ModelCall
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..session.layers.computing import Rows
from ..session.layers.instructions import Order
from ..session.layers.known_rows import Packed, unpack
from ..session.session import EditingSession
from .keys import Contents, Part, TensorKey, Tensors
from .precision import HALF_LIMIT, Precision, half_reach, pack
from .requirements import UNWATCHED
from .source_text import SourceText, source_text
from .store import MapStore

__all__ = ["Capture"]


@dataclass(frozen=True)
class _Kept(Edit):
    """Edits nothing: it names the layers, steps and modules of a recording."""

    contents: Contents = field(compare=False)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in sites if site.path in self.contents)

    def active(self, step: Step) -> bool:
        return any(step.call in steps for parts in self.contents.values() for steps in parts.values())

    def windows(self) -> Windows:
        return ()

    @property
    def pairs_pixels(self) -> bool:
        return False

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        return {}

    @property
    def feature_modules(self) -> tuple[str, ...]:
        return tuple(path for path, parts in self.contents.items() if any(part.name == "feature" for part in parts))

    def features(self, step: Step, roles: BatchRoles) -> Features:
        return {}

    def wanted(self, path: str, step: Step, roles: BatchRoles) -> dict[int, list[str]]:
        """For each row of a batch of sources, the parts of a module that are kept at a step."""
        parts = self.contents.get(path, {})
        wanted: dict[int, list[str]] = {}
        for row, conditional in enumerate(roles.conditional):
            for part, steps in parts.items():
                if part.conditional == conditional and step.call in steps:
                    wanted.setdefault(row, []).append(part.name)
        return wanted


class Capture(EditingSession):
    """Keeps parts of a source while a pipeline denoises it, unedited.

    Args:
        pipe: denoises one source.
        contents: what to keep.
        store: receives it, a step at a time.
        precision: see `packing`.
        backend: of the attention.

    Attributes:
        text_lengths, origins: what a recording of joint attention says of text tokens; empty of other layers.
    """

    unwatched = UNWATCHED

    def __init__(self, pipe: Any, contents: Contents, store: MapStore, precision: Precision, backend: str) -> None:
        self._kept = _Kept(contents)
        self.text_lengths: dict[str, int] = {}
        self.origins: dict[str, torch.Tensor] = {}
        super().__init__(pipe, self._kept, backend=backend)
        self._store = store
        self._precision = precision
        self._tensors: Tensors = {}
        # Of a model that is called once for each half: its step, and what the step's calls so far gave.
        self._held: tuple[int, Tensors] | None = None
        self._errors: list[torch.Tensor] = []
        self._reaches: dict[str, torch.Tensor] = {}  # by path, of the step under way; read together, for one wait

    @property
    def error(self) -> float:
        """Largest relative error (2-norm) that the precision made in a source's attention output or feature."""
        return float(torch.stack(self._errors).amax()) if self._errors else 0.0

    @property
    def source_text(self) -> SourceText:
        """What the text encoders received of the source."""
        return source_text(self._encoding)

    def _install(self, watchers: Sequence[Watcher]) -> None:
        super()._install(watchers)
        assert self._hooks is not None
        self._hooks.features.receive = self._keep_feature

    def _orders(self, edit: Edit | None, call: ModelCall, step: Step, roles: BatchRoles) -> dict[str, Order]:
        orders = {}
        for site in self._instructor.selected.of(self._kept, call.size):
            wanted = self._kept.wanted(site.path, step, roles)
            if wanted:
                compute = partial(self._keep_layer, site.path, wanted, roles)
                plan = plan_products({}, roles.rows)
                orders[site.path] = Order(site, plan, self.backend, edited=False, compute=compute)
        return orders

    def _after_call(self, output: Any) -> None:
        super()._after_call(output)
        if self.current_step is not None and self._tensors:
            self._check_reaches()
            self._write(self.current_step.call, self._tensors)
        self._tensors = {}

    def _write(self, call: int, tensors: Tensors) -> None:
        """Keep what a call of the model gave; where another one may belong to its step, once the step is over."""
        if not self.adapter.guides_apart:
            self._store.write(call, tensors)
            return
        before = self._held
        if before is not None and before[0] == call:
            tensors = before[1] | tensors
        elif before is not None:
            self._store.write(*before)
        self._held = call, tensors

    def _restore(self) -> None:
        super()._restore()
        if self._held is not None:
            self._store.write(*self._held)
            self._held = None

    def _check_reaches(self) -> None:
        """Raise ValueError where this step's values do not fit the precision: they would come back as infinities."""
        if self._reaches:
            largest = dict(zip(self._reaches, torch.stack(list(self._reaches.values())).tolist(), strict=True))
            beyond = [f"{path} (up to {reach:.3g})" for path, reach in largest.items() if not reach <= HALF_LIMIT]
            if beyond:
                raise ValueError(
                    f"precision={self._precision!r} keeps values up to {HALF_LIMIT:g}, and the source's are larger in "
                    f"{', '.join(beyond)}: record with precision='exact'"
                )
        self._reaches = {}

    def _keep_layer(
        self,
        path: str,
        wanted: Mapping[int, list[str]],
        roles: BatchRoles,
        query: Rows,
        key: Rows,
        value: Rows,
        scale: float,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        if bias is not None:
            raise ValueError(f"{path} receives an attention mask, which recordings do not hold")
        attention = AttentionMap(query.tensor, key.tensor, scale=scale, backend=self.backend)
        out = attention @ value.tensor
        for row, parts in wanted.items():
            own = {name: given.tensor[row : row + 1] for name, given in _named(query, key, value)}
            packed = self._pack(path, {name: own[name] for name in parts if name != "logsumexp"})
            statistics = None
            if self._precision != "exact":
                own |= unpack(packed, query.tensor.dtype)
                rounded = AttentionMap(own["query"], own["key"], scale=scale, backend=self.backend)
                self._note_error(rounded @ own["value"], out[row : row + 1])
                statistics = rounded.logsumexp
            if "logsumexp" in parts:
                packed["logsumexp"] = attention.logsumexp[row : row + 1] if statistics is None else statistics
            self._keep(path, roles.conditional[row], packed)
        return out

    def _keep_feature(self, path: str, output: torch.Tensor) -> None:
        step, roles = self.current_step, self._now.roles
        if step is None or roles is None:
            return
        for row in self._kept.wanted(path, step, roles):
            exact = output[row : row + 1].detach()
            packed = self._pack(path, {"feature": exact})
            if self._precision != "exact":
                self._note_error(unpack(packed, exact.dtype)["feature"], exact)
            self._keep(path, roles.conditional[row], packed)

    def _pack(self, path: str, parts: Packed) -> Packed:
        reach = half_reach(parts, self._precision)
        if reach is not None:
            known = self._reaches.get(path, reach)
            self._reaches[path] = torch.maximum(known, reach)  # not a number where either is none
        return pack(parts, self._precision)

    def _keep(self, path: str, conditional: bool, packed: Packed) -> None:
        self._tensors |= {TensorKey(path, Part(conditional, name)): t.detach() for name, t in packed.items()}

    def _note_error(self, rounded: torch.Tensor, exact: torch.Tensor) -> None:
        error = (rounded - exact).float().norm()
        self._errors.append(torch.where(error == 0, error, error / exact.float().norm()))  # 0, not 0/0, where all is 0


def _named(query: Rows, key: Rows, value: Rows) -> tuple[tuple[str, Rows], ...]:
    return ("query", query), ("key", key), ("value", value)
