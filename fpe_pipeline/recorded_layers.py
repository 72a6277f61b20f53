"""The layers of a recording: what keeps their maps while the source is denoised, and what replays them later."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fpe_kernels import AttentionMap, shared_attention

from .evaluation import Rows
from .map_store import MapStore, Packed, Precision, pack, unpack
from .orders import Order
from .processors import EditAttnProcessor, unsupported_reasons
from .products import ProductPlan, plan_products
from .schedule import Step, locate_step
from .sites import Site

__all__ = ["Capture", "Replay"]


class _Layers:
    """Processors on some layers for the length of a ``with`` block, with an order for each call of the UNet."""

    def __init__(self, pipe: Any, sites: Sequence[Site], steps: range, backend: str) -> None:
        self._pipe = pipe
        self._sites = tuple(sites)
        self._steps = steps
        self._backend = backend
        self._processors: dict[str, _Processor] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the processors in; on leaving, by an exception too, those that were there are back."""
        unet = self._pipe.unet
        before = dict(unet.attn_processors)
        self._refuse_unsupported(unet, before)
        self._processors = {
            site.path: _Processor(before[f"{site.path}.processor"], site.path, self) for site in self._sites
        }
        hooks: list[Any] = []
        try:
            unet.set_attn_processor({**before, **{f"{path}.processor": p for path, p in self._processors.items()}})
            hooks.append(unet.register_forward_pre_hook(torch.compiler.disable(self._before_unet), with_kwargs=True))
            hooks.append(unet.register_forward_hook(torch.compiler.disable(self._after_unet)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            unet.set_attn_processor(dict(before))

    def _refuse_unsupported(self, unet: Any, processors: dict[str, Any]) -> None:
        refused = {}
        for site in self._sites:
            reasons = unsupported_reasons(unet.get_submodule(site.path), processors[f"{site.path}.processor"])
            if reasons:
                refused[site.path] = "; ".join(reasons)
        if refused:
            lines = "\n".join(f"  {path}: {why}" for path, why in refused.items())
            raise ValueError(f"these layers cannot be recorded or replayed:\n{lines}")

    def _before_unet(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        step = locate_step(self._pipe.scheduler, timestep)
        active = step.index in self._steps
        if active:
            self.begin(step, sample)
        for site in self._sites:
            order = Order(site, self.plan(sample.shape[0]), self._backend) if active else None
            self._processors[site.path].order = order

    def _after_unet(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if any(processor.order is not None for processor in self._processors.values()):
            self.end()

    def begin(self, step: Step, sample: torch.Tensor) -> None:
        """Called before a UNet call of a recorded step."""
        raise NotImplementedError

    def end(self) -> None:
        """Called after it."""

    def plan(self, rows: int) -> ProductPlan:
        """Which rows of the batch are projected."""
        raise NotImplementedError

    def attend(
        self, path: str, query: Rows, key: Rows, value: Rows, scale: float, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """A layer's attention [B, H, N, E]."""
        raise NotImplementedError


class _Processor(EditAttnProcessor):
    """An editing processor whose attention is computed by the layers' owner."""

    def __init__(self, inner: Any, path: str, owner: _Layers) -> None:
        super().__init__(inner)
        self._path = path
        self._owner = owner

    def attend(
        self, order: Order, query: Rows, key: Rows, value: Rows, scale: float, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if bias is not None:
            raise ValueError(f"{self._path} receives an attention mask, which recordings do not hold")
        return self._owner.attend(self._path, query, key, value, scale, bias)


class Capture(_Layers):
    """Keep the map of the last row, the source's conditional one, of every layer at every recorded step.

    Args:
        pipe: denoises one source.
        sites: layers to record.
        steps: indices of the steps to record.
        store: receives the maps, a step at a time.
        precision: see `map_store`.
        backend: of the attention.
    """

    def __init__(
        self, pipe: Any, sites: Sequence[Site], steps: range, store: MapStore, precision: Precision, backend: str
    ) -> None:
        super().__init__(pipe, sites, steps, backend)
        self._store = store
        self._precision = precision
        self._step = 0
        self._maps: dict[str, Packed] = {}
        self._errors: list[torch.Tensor] = []

    @property
    def error(self) -> float:
        """Largest relative error (2-norm) that the precision made in the source's own output of a layer."""
        return max((float(error) for error in self._errors), default=0.0)

    def begin(self, step: Step, sample: torch.Tensor) -> None:
        self._step, self._maps = step.index, {}

    def end(self) -> None:
        self._store.write(self._step, self._maps)
        self._maps = {}

    def plan(self, rows: int) -> ProductPlan:
        return plan_products({}, rows)

    def attend(
        self, path: str, query: Rows, key: Rows, value: Rows, scale: float, bias: torch.Tensor | None
    ) -> torch.Tensor:
        attention = AttentionMap(query.tensor, key.tensor, scale=scale, backend=self._backend)
        out = attention @ value.tensor
        source = attention[len(query.rows) - 1]
        self._maps[path] = packed = pack(source, self._precision)
        if self._precision != "exact":
            rounded = unpack(packed, attention.dtype, scale, self._backend) @ value.tensor[-1:]
            exact = out[-1:]
            self._errors.append((rounded - exact).float().norm() / exact.float().norm())
        return out


class Replay(_Layers):
    """Apply the recorded maps to the values of the conditional rows; unconditional rows keep their own.

    Args:
        pipe: denoises targets alone.
        sites: the recorded layers.
        steps: indices of the steps to replay.
        store: where the maps are.
        targets: how many; the last rows of the batch.
        backend: of the attention.
    """

    def __init__(
        self, pipe: Any, sites: Sequence[Site], steps: range, store: MapStore, targets: int, backend: str
    ) -> None:
        super().__init__(pipe, sites, steps, backend)
        self._store = store
        self._targets = targets
        self._maps: dict[str, Packed] = {}

    def begin(self, step: Step, sample: torch.Tensor) -> None:
        self._maps = self._store.read(step.index, sample.device)

    def end(self) -> None:
        self._maps = {}

    def plan(self, rows: int) -> ProductPlan:
        # Queries and keys of the conditional rows are not even projected.
        own = tuple(range(rows - self._targets))
        return dataclasses.replace(plan_products({}, rows), queries=own, keys=own)

    def attend(
        self, path: str, query: Rows, key: Rows, value: Rows, scale: float, bias: torch.Tensor | None
    ) -> torch.Tensor:
        first = len(value.rows) - self._targets
        source = unpack(self._maps[path], value.tensor.dtype, scale, self._backend)
        # One pass over the scores for all targets: their values stand side by side.
        parts = list(source @ tuple(value.tensor[row : row + 1] for row in range(first, len(value.rows))))
        if first:
            own = shared_attention(
                query.tensor, key.tensor, value.tensor[:first], range(first), scale=scale, backend=self._backend
            )
            parts.insert(0, own)
        return torch.cat(parts)
