"""The sessions of a recording: one that keeps what edits need of the source, and one that replays it to targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fpe_kernels import AttentionMap

from ..edits import Edit
from ..edits.base import Windows
from ..edits.products import Product, plan_products
from ..edits.watchers import Watcher
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, run_steps
from ..prompts.encoding import Encoding
from ..session.computing import Rows
from ..session.instructions import Order
from ..session.session import EditingSession
from .contents import Contents, part_name, source_needs
from .precision import HALF_LIMIT, Packed, Precision, RecordedLayer, half_reach, pack, unpack
from .store import MapStore

__all__ = ["Capture", "Replay"]

_UNWATCHED = (
    "heat maps are read from a run of source and targets together, and a recording runs them apart: put heat_maps "
    "around pipe(source, targets, edit=…)"
)


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
        return tuple(path for path, parts in self.contents.items() if any(name.endswith(" feature") for name in parts))

    def wanted(self, path: str, step: Step, roles: BatchRoles) -> dict[int, list[str]]:
        """For each row of a batch of sources, the parts of a module that are kept at a step."""
        parts = self.contents.get(path, {})
        wanted: dict[int, list[str]] = {}
        for row, conditional in enumerate(roles.conditional):
            prefix = part_name(conditional, "")
            for name, steps in parts.items():
                if name.startswith(prefix) and step.call in steps:
                    wanted.setdefault(row, []).append(name.removeprefix(prefix))
        return wanted


class Capture(EditingSession):
    """Keeps parts of a source while a pipeline denoises it, unedited.

    Args:
        pipe: denoises one source.
        contents: what to keep.
        store: receives it, a step at a time.
        precision: see `packing`.
        backend: of the attention.
    """

    unwatched = _UNWATCHED

    def __init__(self, pipe: Any, contents: Contents, store: MapStore, precision: Precision, backend: str) -> None:
        self._kept = _Kept(contents)
        super().__init__(pipe, self._kept, backend=backend)
        self._store = store
        self._precision = precision
        self._tensors: Packed = {}
        self._errors: list[torch.Tensor] = []
        self._reaches: dict[str, torch.Tensor] = {}  # by path, of the step under way; read together, for one wait

    @property
    def error(self) -> float:
        """Largest relative error (2-norm) that the precision made in a source's attention output or feature."""
        return float(torch.stack(self._errors).amax()) if self._errors else 0.0

    def _install(self, watchers: Sequence[Watcher]) -> None:
        super()._install(watchers)
        assert self._features is not None
        self._features.receive = self._keep_feature

    def _orders(self, sample: torch.Tensor, step: Step, roles: BatchRoles, active: bool) -> dict[str, Order]:
        orders = {}
        for site in self._sites_for(self._kept, (sample.shape[-2], sample.shape[-1])):
            wanted = self._kept.wanted(site.path, step, roles)
            if wanted:
                compute = partial(self._keep_layer, site.path, wanted, roles)
                plan = plan_products({}, roles.rows)
                orders[site.path] = Order(site, plan, self.backend, edited=False, compute=compute)
        return orders

    def _after_unet(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        super()._after_unet(module, args, output)
        if self._step is not None and self._tensors:
            self._check_reaches()
            self._store.write(self._step.call, self._tensors)
        self._tensors = {}

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
        if self._step is None or self._current_roles is None:
            return
        for row in self._kept.wanted(path, self._step, self._current_roles):
            exact = output[row : row + 1].detach()
            packed = self._pack(path, {"feature": exact})
            if self._precision != "exact":
                self._note_error(unpack(packed, exact.dtype)["feature"], exact)
            self._keep(path, self._current_roles.conditional[row], packed)

    def _pack(self, path: str, parts: Packed) -> Packed:
        reach = half_reach(parts, self._precision)
        if reach is not None:
            known = self._reaches.get(path, reach)
            self._reaches[path] = torch.maximum(known, reach)  # not a number where either is none
        return pack(parts, self._precision)

    def _keep(self, path: str, conditional: bool, packed: Packed) -> None:
        self._tensors |= {f"{path}|{part_name(conditional, part)}": t.detach() for part, t in packed.items()}

    def _note_error(self, rounded: torch.Tensor, exact: torch.Tensor) -> None:
        error = (rounded - exact).float().norm()
        self._errors.append(torch.where(error == 0, error, error / exact.float().norm()))  # 0, not 0/0, where all is 0


class Replay(EditingSession):
    """Edits targets alone, from a source that is recorded: its rows are numbered after those of the batch.

    Args:
        pipe: denoises the targets.
        edit: asked as if the source were in the batch.
        store: what is recorded of the source.
        latents: the source's [calls of the UNet + 1, 1, C, h, w].
        targets: how many.
        guided: whether there are unconditional rows.
        backend: of the attention.

    Attributes:
        needed: what the edit takes of the source.
    """

    unwatched = _UNWATCHED

    def __init__(
        self,
        pipe: Any,
        edit: Edit,
        store: MapStore,
        latents: torch.Tensor,
        targets: int,
        guided: bool,
        backend: str,
    ) -> None:
        super().__init__(pipe, edit, backend=backend)
        self._store = store
        self._latents = latents
        self._recorded_roles = BatchRoles.from_recording(targets, classifier_free_guidance=guided)
        self._device = latents.device
        sites = tuple(site.at(*latents.shape[-2:]) for site in self.sites)
        self.needed = source_needs([edit], sites, run_steps(pipe.scheduler), targets=targets, guided=guided)

    def after_step(self, latents: torch.Tensor) -> torch.Tensor:
        """As the session's; blends see the source's latents of the recorded run behind the targets'."""
        if self._step is None:
            return latents
        source = self._latents[self._step.call + 1].to(latents)
        return super().after_step(torch.cat([latents, source]))[: latents.shape[0]]

    def _encoded(self, encoding: Encoding) -> None:
        """The call encodes the targets alone; the edit was written for the source as well, and checked before."""

    def _before_unet(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._device = (args[0] if args else kwargs["sample"]).device
        super()._before_unet(module, args, kwargs)

    def _restore(self) -> None:
        super()._restore()
        self._store.release()

    def _read_roles(self, rows: int) -> BatchRoles:
        if self._recorded_roles.batch != rows:
            raise ValueError(
                f"expected a batch of {self._recorded_roles.batch} rows, the targets of a recording, received {rows}"
            )
        return self._recorded_roles

    def _recorded(self, step: Step, roles: BatchRoles) -> Mapping[str, RecordedLayer]:
        tensors = self._store.read(step.call, self._device)
        rows = {part_name(roles.conditional[row], ""): row for row in range(roles.batch, roles.rows)}
        found: dict[str, dict[int, Packed]] = {}
        for path, parts in self.needed.items():
            for name in parts:
                half, part = name.split()
                tensor = tensors.get(f"{path}|{name}")
                if tensor is not None:
                    packed = found.setdefault(path, {}).setdefault(rows[f"{half} "], {})
                    packed[part] = tensor
                    if (scale := tensors.get(f"{path}|{name}_scale")) is not None:
                        packed[f"{part}_scale"] = scale
        assert self._features is not None
        self._features.recorded = {
            path: {row: unpack(packed, self.unet.dtype)["feature"] for row, packed in known.items()}
            for path, known in found.items()
            if path in self._running.feature_modules
        }
        return {path: RecordedLayer(known, _in_words(known, roles)) for path, known in found.items()}


def _named(query: Rows, key: Rows, value: Rows) -> tuple[tuple[str, Rows], ...]:
    return ("query", query), ("key", key), ("value", value)


def _in_words(known: Mapping[int, Packed], roles: BatchRoles) -> str:
    return "; ".join(part_name(roles.conditional[row], ", ".join(packed)) for row, packed in known.items())
