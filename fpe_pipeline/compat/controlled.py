"""Attention layers whose attention somebody else's code computes or edits, until they are restored.

The originals swap the ``forward`` of every attention module for good. Here each layer's processor is wrapped, by the
session's own processor (group norm, masks, IP-Adapters, residuals are as they were), and restored as the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from fpe_kernels import AttentionMap

from ..edits.products import plan_products
from ..models.adapters.adapter import ModelAdapter, is_guided
from ..models.adapters.families import adapter_of
from ..models.adapters.modular import is_modular
from ..models.sites import Site
from ..prompts.encoding import encoding_tokenizer
from ..session.entry import check_backend
from ..session.installation import NO_ORDERS, LayerProcessors
from ..session.layers.computing import Rows
from ..session.layers.instructions import Order
from ..session.session import session_of
from .given import check_made
from .lazy import LazyMap
from .lazy.numbers import forget_lines
from .switch import chosen_compat

__all__ = ["ControlledLayers", "LayerCall", "controlled_layers", "register_controller"]

Compat = Literal["original"] | None


@dataclass(frozen=True)
class LayerCall:
    """One layer in one call of the model.

    Args:
        site: the layer, at the size of the call; its kind is "self" or "cross", its place "down", "mid" or "up".
        number: its place among the layers, in execution order.
        layers: how many there are.
        query: [B, H, N, D], projected; key: [B, H, M, D]; value: [B, H, M, E].
        scale: factor of the scores.
        bias: added to them, [B, 1 | H, 1 | N, M], or None.
        guided: whether the batch holds an unconditional half, which comes first.
        backend: of ``fpe_kernels``.
    """

    site: Site
    number: int
    layers: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    bias: torch.Tensor | None
    guided: bool
    backend: str

    @property
    def attention(self) -> AttentionMap:
        """The layer's map [B, H, N, M] as an operator."""
        return AttentionMap(self.query, self.key, scale=self.scale, bias=self.bias, backend=self.backend)

    def lazy_map(self) -> LazyMap:
        """The layer's map as the originals lay it out, [B·H, N, M], batch row by batch row and head by head."""
        batch = self.query.shape[0]
        half = batch // 2 if self.guided else 0
        view = LazyMap(self.attention, halves=(half, batch - half))
        view.guided, view.heads, view.layer_grid = self.guided, self.query.shape[1], self.site.grid
        return view


#: A layer's attention [B, H, N, E].
Compute = Callable[[LayerCall], torch.Tensor]

_CONTROLLED: WeakKeyDictionary[torch.nn.Module, ControlledLayers] = WeakKeyDictionary()


class ControlledLayers:
    """The UNet's attention layers, computed by ``compute`` in every call until :meth:`restore` or the end of ``with``.

    What stood there before comes back, the same objects, after an exception too. Installing on a UNet that is
    controlled already takes the earlier one off first, as registering anew does in the originals. A call whose layers
    other processors computed, such as ``pipe.fuse_qkv_projections()`` puts there, ends with a RuntimeWarning.

    Args:
        pipe: a diffusers pipeline with a UNet, or a UNet.
        compute: gives each layer's attention.
        guided: whether batches hold an unconditional half, throughout; or a function of their number of rows that says
            it, or None. Default: asked of the pipeline, and yes where it cannot say.
        backend: of ``fpe_kernels``.
        before: called before each call of the model, with its timestep.
        kinds: "self", "cross" or both: the layers that ``compute`` gets.

    Raises:
        ValueError: a UNet in an editing session, a model that is no UNet, layers whose processors do more than
            attention, a backend that is not known.
        RuntimeError: a backend that cannot run here.
    """

    def __init__(
        self,
        pipe: Any,
        compute: Compute,
        *,
        guided: bool | Callable[[int], bool | None] | None = None,
        backend: str = "auto",
        before: Callable[[Any], None] | None = None,
        kinds: tuple[str, ...] = ("self", "cross"),
    ) -> None:
        if is_modular(pipe):
            raise ValueError(
                f"{type(pipe).__name__} is a modular pipeline, whose guider calls the model for each half of the rows, "
                "and code written for this tool expects both in one call: pass an ordinary pipeline of the same parts, "
                "such as FreePromptPipeline.from_pipe(pipe)"
            )
        self._adapter: ModelAdapter = adapter_of(pipe)
        if self._adapter.family != "unet":
            raise ValueError(
                f"expected a pipeline with a UNet, got one with {type(self._adapter.module).__name__}: this tool edits "
                "UNets; for transformers see fpe_pipeline.editing"
            )
        if session_of(pipe) is not None:
            raise ValueError(
                "this UNet is in an editing session: leave it before registering another tool's controller"
            )
        check_backend(backend)
        self._adapter.check()
        self.guided, self._compute, self._backend, self._before = guided, compute, backend, before
        self._sites = tuple(site for site in self._adapter.sites if site.kind in kinds)
        earlier = controlled_layers(pipe)
        if earlier is not None:
            earlier.restore()
        self._layers = LayerProcessors(self._adapter, lambda: self._layers.check(self._sites, ()))
        self._layers.wrap(self._sites)
        self._handles: list[Any] = []
        self._is_paused = False
        try:
            self._layers.check(self._sites, ())
            hook = torch.compiler.disable(lambda module, args, kwargs: self._give(args, kwargs))
            self._handles.append(self._adapter.model.register_forward_pre_hook(hook, with_kwargs=True))
            ended = torch.compiler.disable(lambda *call: self._layers.warn_of_bypassed())
            self._handles.append(self._adapter.model.register_forward_hook(ended))
        except BaseException:
            self.restore()
            raise
        forget_lines()
        _CONTROLLED[self._adapter.module] = self

    @property
    def sites(self) -> tuple[Site, ...]:
        """The layers, in execution order, of no size."""
        return self._sites

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self._sites)

    def restore(self) -> None:
        """Give the layers back the processors that they had; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._layers.restore()
        if _CONTROLLED.get(self._adapter.module) is self:
            del _CONTROLLED[self._adapter.module]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave calls of the model alone in a ``with`` block."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextmanager
    def guided_as(self, guided: bool) -> Iterator[None]:
        """Say of the calls in a ``with`` block whether they hold an unconditional half, where that was not said."""
        before = self.guided
        self.guided = before if isinstance(before, bool) else guided
        try:
            yield
        finally:
            self.guided = before

    def __enter__(self) -> ControlledLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _give(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_paused:
            self._layers.give(NO_ORDERS)
            return
        call = self._adapter.read(args, kwargs)
        if self._before is not None:
            self._before(call.timestep)
        plan, guided = plan_products({}, call.rows), self._is_guided(call.rows)
        if guided and call.rows % 2:
            raise ValueError(
                f"a batch of {call.rows} rows has no two halves: register the controller with guided=False for calls "
                "without classifier-free guidance"
            )
        orders = {}
        for number, site in enumerate(self._sites):
            compute = partial(self._attend, site.at(*call.size), number, guided)
            orders[site.path] = Order(site.at(*call.size), plan, self._backend, compute=compute)
        self._layers.give(orders)

    def _is_guided(self, rows: int) -> bool:
        guided = self.guided(rows) if callable(self.guided) else self.guided
        if guided is not None:
            return guided
        try:
            return is_guided(self._adapter.pipe)
        except (ValueError, AttributeError, TypeError):
            return True  # a loop of the user's own, which the originals write for guidance

    def _attend(
        self,
        site: Site,
        number: int,
        guided: bool,
        query: Rows,
        key: Rows,
        value: Rows,
        scale: float,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        tensors = (query.tensor, key.tensor, value.tensor)
        return self._compute(LayerCall(site, number, self.layers, *tensors, scale, bias, guided, self._backend))


def controlled_layers(pipe: Any) -> ControlledLayers | None:
    """What controls a pipeline's layers; None where nothing does."""
    return _CONTROLLED.get(adapter_of(pipe).module)


def register_controller(
    pipe: Any, controller: Any, compat: Compat = None, backend: str = "auto", compute: Compute | None = None
) -> ControlledLayers:
    """Let a Prompt-to-Prompt controller see and edit every attention map: ``controller(attn, is_cross, place)``.

    ``attn`` is a :class:`.LazyMap` [rows · heads, N, M] of the whole batch; what the controller returns, a map or a
    tensor, is multiplied with the values. ``controller.num_att_layers`` is set to the number of layers.

    Args:
        pipe: a diffusers pipeline with a UNet.
        controller: an ``AttentionControl`` of Prompt-to-Prompt, or anything that is called so.
        compat: ``"original"`` takes the second half of every batch for the conditional one, as the authors' code does.
        backend: of ``fpe_kernels``.
        compute: in place of calling the controller, where it is known what it does.

    Returns:
        What restores the layers: by ``restore()``, or as a ``with`` block.

    Raises:
        TypeError: no controller, or the class of one.
    """
    compat = chosen_compat(compat)
    check_made("a controller(attn, is_cross, place_in_unet)", controller)
    prepare = getattr(controller, "prepare", None)
    if prepare is not None:
        prepare(encoding_tokenizer(pipe))
    rows_of, begins = getattr(controller, "batch_size", None), getattr(controller, "call_begins", None)

    def guided(rows: int) -> bool | None:
        if rows_of is None:
            return None
        if rows not in (rows_of, 2 * rows_of):
            raise ValueError(
                f"the controller is made for {rows_of} prompts; the UNet got a batch of {rows} rows: make a "
                "controller with the prompts of the call"
            )
        return rows == 2 * rows_of

    layers = ControlledLayers(
        pipe,
        partial(_controlled, controller) if compute is None else compute,
        guided=True if compat == "original" else guided,
        backend=backend,
        before=lambda timestep: None if begins is None else begins(),
    )
    controller.num_att_layers = layers.layers
    return layers


def _controlled(controller: Any, call: LayerCall) -> torch.Tensor:
    """A layer's attention [B, H, N, E] with the map that a controller makes of its own."""
    view = call.lazy_map()
    edited = controller(view, call.site.kind == "cross", call.site.place)
    if not isinstance(edited, LazyMap | torch.Tensor) or tuple(edited.shape) != tuple(view.shape):
        got = tuple(edited.shape) if hasattr(edited, "shape") else type(edited).__name__
        raise TypeError(
            f"{type(controller).__name__} returned {got} for the map {tuple(view.shape)} of {call.site.path}: a "
            "controller returns the map that it got, or one of its shape"
        )
    value = call.value.flatten(0, 1)
    out = edited @ (value if isinstance(edited, LazyMap) else value.to(edited))
    layer_ends = getattr(controller, "layer_ends", None)
    if layer_ends is not None:
        layer_ends()
    return out.to(value).unflatten(0, call.value.shape[:2])
