"""What an editor is, and how it is registered: the names of MasaCtrl's ``masactrl_utils``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...models.sites import Site
from ..controlled import Compat, ControlledLayers, LayerCall
from ..given import check_made
from ..lazy import LazyMap, summable
from ..names import unknown_name
from ..switch import chosen_compat
from .scores import LazyScores

__all__ = ["AttentionBase", "AttentionStore", "regiter_attention_editor_diffusers"]

__getattr__ = unknown_name(
    __name__,
    "masactrl_utils",
    __all__,
    {"regiter_attention_editor_ldm": "it patches CompVis' modules; load the checkpoint with diffusers"},
)


class AttentionBase:
    """An editor, which computes every attention layer of a UNet; this one as it is.

    A subclass writes ``forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)``: queries, keys and
    values [rows · heads, N | M, D], scores and map [rows · heads, N, M] that are lazy, and ``kwargs["scale"]``; it
    gives the layer's output [rows, N, heads · D].

    Attributes:
        cur_step: the step, raised after its last layer.
        cur_att_layer: the layer, self and cross in turns, in the order of execution.
        num_att_layers: how many there are; -1 before the editor is registered.
        site: the layer at hand: its path and grid.
        guided: whether the batch holds an unconditional half, which comes first.
        compat: as it was registered.
    """

    def __init__(self) -> None:
        self.cur_step = 0
        self.num_att_layers = -1
        self.cur_att_layer = 0
        self.guided = True
        self.compat: Compat = None
        self.backend = "auto"
        self.site: Site | None = None

    def after_step(self) -> None:
        """Called when a step is over."""

    def begin(self, sites: Sequence[Site]) -> None:
        """Called when the editor is registered, with the UNet's layers."""

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        sim: Any,
        attn: Any,
        is_cross: bool,
        place_in_unet: str,
        num_heads: int,
        **kwargs: Any,
    ) -> Any:
        out = self.forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)
        self.cur_att_layer += 1
        if self.cur_att_layer == self.num_att_layers:
            self.cur_att_layer = 0
            self.cur_step += 1
            self.after_step()
        return out

    def forward(
        self,
        q: Any,
        k: Any,
        v: Any,
        sim: Any,
        attn: Any,
        is_cross: bool,
        place_in_unet: str,
        num_heads: int,
        **kwargs: Any,
    ) -> Any:
        """The layer's output [rows, N, heads · D]."""
        return merged(attn @ v, num_heads)

    def reset(self) -> None:
        """Begin at the first layer of the first step."""
        self.cur_step = 0
        self.cur_att_layer = 0

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the layer's image tokens."""
        return None if self.site is None else self.site.grid


class AttentionStore(AttentionBase):
    """Sums the maps of steps between two; of half precision in float32.

    Args:
        res: kept as it is.
        min_step, max_step: maps count of steps whose number, from 1, lies between the two.
    """

    def __init__(self, res: Sequence[int] = (32,), min_step: int = 0, max_step: int = 1000) -> None:
        super().__init__()
        self.res, self.min_step, self.max_step = list(res), min_step, max_step
        self.valid_steps = 0
        self.self_attns: list[Any] = []
        self.cross_attns: list[Any] = []
        self.self_attns_step: list[Any] = []
        self.cross_attns_step: list[Any] = []

    def after_step(self) -> None:
        if self.min_step < self.cur_step < self.max_step:
            self.valid_steps += 1
            if not self.self_attns and self.compat == "original":
                self.self_attns, self.cross_attns = self.self_attns_step, self.cross_attns_step
            elif not self.self_attns:
                self.self_attns = [summable(attention) for attention in self.self_attns_step]
                self.cross_attns = [summable(attention) for attention in self.cross_attns_step]
            else:
                for sums, maps in ((self.self_attns, self.self_attns_step), (self.cross_attns, self.cross_attns_step)):
                    for index, attention in enumerate(maps):
                        sums[index] += attention
        if self.compat == "original":  # which clears the list that the sums are, too
            self.self_attns_step.clear()
            self.cross_attns_step.clear()
        self.self_attns_step, self.cross_attns_step = [], []

    def reset(self) -> None:
        """Begin at the first layer of the first step; sums of steps that have ended stay, as in the original."""
        super().reset()
        self.self_attns_step, self.cross_attns_step = [], []

    def forward(
        self,
        q: Any,
        k: Any,
        v: Any,
        sim: Any,
        attn: Any,
        is_cross: bool,
        place_in_unet: str,
        num_heads: int,
        **kwargs: Any,
    ) -> Any:
        if attn.shape[1] <= 64**2:
            (self.cross_attns_step if is_cross else self.self_attns_step).append(attn)
        return super().forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)


def regiter_attention_editor_diffusers(
    model: Any, editor: AttentionBase, compat: Compat = None, backend: str = "auto"
) -> ControlledLayers:
    """Let an editor compute every attention layer of a pipeline's UNet from here on.

    Args:
        model: a diffusers pipeline with a UNet.
        editor: such as `MutualSelfAttentionControl`, or one of a user's own.
        compat: "original" takes every batch for two halves, guidance or not, resizes masks to squares, and adds soft
            masks to scores.
        backend: of ``fpe_kernels``.

    Returns:
        What puts the layers back as they were: ``.restore()``, or a ``with`` block.

    Raises:
        TypeError: no editor, or the class of one.
        ValueError: layers that the UNet has not, a backend that is not known, or a UNet that another tool or session
            edits.
    """
    compat = chosen_compat(compat)
    check_made("an editor, an AttentionBase", editor)

    def compute(call: LayerCall) -> torch.Tensor:
        query, key, value = (part.flatten(0, 1) for part in (call.query, call.key, call.value))
        bias, heads = call.bias, call.query.shape[1]
        if bias is not None:
            bias = bias.expand(-1, heads, -1, -1).expand(call.query.shape[0], -1, -1, -1).flatten(0, 1)
        scores = LazyScores(query, key, call.scale, bias, backend)
        editor.site, editor.guided, editor.backend = call.site, call.guided or compat == "original", backend
        is_cross = call.site.kind == "cross"
        out = editor(query, key, value, scores, call.lazy_map(), is_cross, call.site.place, heads, scale=call.scale)
        expected = (call.query.shape[0], call.query.shape[2], heads * call.value.shape[-1])
        if (
            isinstance(out, LazyMap) and tuple(out.shape) == expected
        ):  # of a product as wide as the map has keys, which einsum takes for a mixing
            out = out.numbers("the editor's output")
        if not isinstance(out, torch.Tensor) or tuple(out.shape) != expected:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise TypeError(
                f"{type(editor).__name__} gave {got} for {call.site.path}: an editor gives [rows, N, heads · D], here "
                f"{expected}"
            )
        return out.to(value.dtype).unflatten(-1, (heads, -1)).transpose(1, 2)

    layers = ControlledLayers(model, compute, guided=True if compat == "original" else None, backend=backend)
    try:
        editor.num_att_layers, editor.compat = layers.layers, compat
        if hasattr(editor, "begin"):
            editor.begin(layers.sites)
    except BaseException:
        layers.restore()
        raise
    return layers


def merged(out: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[rows · heads, N, D] as [rows, N, heads · D]."""
    return out.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)
