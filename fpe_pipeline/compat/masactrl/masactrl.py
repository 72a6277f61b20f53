"""Mutual self-attention: the names of MasaCtrl's ``masactrl``."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch

from fpe_kernels import AttentionMap

from ...edits.selection import unit_number
from ...models.sites import Site
from ..given import folder, number, numbers
from ..names import unknown_name
from .masactrl_utils import AttentionBase, merged
from .masks import on_grid, read_masks, save_mask, score_biases

__all__ = [
    "MutualSelfAttentionControl",
    "MutualSelfAttentionControlMask",
    "MutualSelfAttentionControlMaskAuto",
    "MutualSelfAttentionControlUnion",
]

__getattr__ = unknown_name(__name__, "masactrl", __all__)


#: What an editor's ``forward`` gets behind queries, keys and values: scores, map, is_cross, place_in_unet, num_heads.
_Rest = tuple[Any, Any, bool, str, int]


class MutualSelfAttentionControl(AttentionBase):
    """Late in the run, in late layers, all rows ask for the first row's keys and values, in either half of the batch.

    Args:
        start_step, start_layer: the first step and self-attention layer, from 0.
        layer_idx, step_idx: the layers and steps themselves, in the place of those.
        total_steps: of the run.
        model_type: "SD" or "SDXL", of whose 16 or 70 layers the original speaks; here the UNet says how many it has.

    Raises:
        ValueError: steps or layers that are no whole numbers, a negative start or step, or no list.
    """

    MODEL_TYPE = {"SD": 16, "SDXL": 70}  # noqa: RUF012  the original's name and value

    def __init__(
        self,
        start_step: int = 4,
        start_layer: int = 10,
        layer_idx: Sequence[int] | None = None,
        step_idx: Sequence[int] | None = None,
        total_steps: int = 50,
        model_type: str = "SD",
    ) -> None:
        super().__init__()
        start_step, start_layer = number("start_step", start_step), number("start_layer", start_layer)
        total_steps = number("total_steps", total_steps)
        self.total_steps, self.total_layers = total_steps, self.MODEL_TYPE.get(model_type, 16)
        self.start_step, self.start_layer = start_step, start_layer
        self._names_layers = layer_idx is not None
        own = range(start_layer, self.total_layers)
        self.layer_idx = list(own) if layer_idx is None else numbers("layer_idx", layer_idx)
        self.step_idx = list(range(start_step, total_steps)) if step_idx is None else numbers("step_idx", step_idx)
        if min(start_step, start_layer, *self.step_idx) < 0:
            raise ValueError(
                f"expected steps and layers from 0 on, got start_step={start_step}, start_layer={start_layer}, "
                f"step_idx={self.step_idx}"
            )

    def begin(self, sites: Sequence[Site]) -> None:
        """Take the number of layers from the UNet."""
        layers = sum(site.kind == "self" for site in sites)
        if not self._names_layers and self.compat is None:
            self.total_layers, self.layer_idx = layers, list(range(self.start_layer, layers))
        wrong = [index for index in self.layer_idx if not 0 <= index < layers] if self._names_layers else []
        if wrong or not any(index < layers for index in self.layer_idx):
            asked = f"layer_idx={wrong}" if wrong else f"start_layer={self.start_layer}"
            raise ValueError(
                f"{asked}: the UNet has {layers} self-attention layers, 0 to {layers - 1}; name some of them"
            )

    def attn_batch(
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
    ) -> torch.Tensor:
        """Every row of queries asks for the tokens of all rows of keys: [rows, N, heads · D].

        ``sim`` and ``attn`` are not looked at; ``bias`` is added to the scores of the keys [M].
        """
        rows = q.shape[0] // num_heads
        query, key, value = (self._side_by_side(part, num_heads) for part in (q, k, v))
        bias = kwargs.get("bias")
        if bias is not None:
            bias = bias.to(query).reshape(1, 1, 1, -1)
        attention = AttentionMap(query, key, scale=kwargs["scale"], bias=bias, backend=self.backend)
        out = attention @ value  # [1, H, rows · N, E]
        return out[0].unflatten(1, (rows, -1)).permute(1, 2, 0, 3).flatten(2)

    @staticmethod
    def _side_by_side(part: torch.Tensor, num_heads: int) -> torch.Tensor:
        """[rows · heads, N, D] as [1, heads, rows · N, D]."""
        return part.unflatten(0, (-1, num_heads)).transpose(0, 1).flatten(1, 2)[None]

    def is_edited(self, is_cross: bool) -> bool:
        """Whether the layer at hand is one of those, at this step."""
        return not is_cross and self.cur_step in self.step_idx and self.cur_att_layer // 2 in self.layer_idx

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
        if not self.is_edited(is_cross):
            return super().forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)
        halves = 2 if self.guided else 1
        parts = zip(*(part.chunk(halves) for part in (q, k, v)), strict=True)
        rest = (sim, attn, is_cross, place_in_unet, num_heads)
        return torch.cat([self.half(query, key, value, rest, **kwargs) for query, key, value in parts])

    def half(self, q: Any, k: Any, v: Any, rest: _Rest, **kwargs: Any) -> torch.Tensor:
        """The output of one half of the batch [rows, N, heads · D], whose first row is the source."""
        num_heads = rest[-1]
        return self.attn_batch(q, k[:num_heads], v[:num_heads], *rest, **kwargs)


class MutualSelfAttentionControlUnion(MutualSelfAttentionControl):
    """Targets ask for the source's keys and values beside their own. The original raises at its first step."""

    def half(self, q: Any, k: Any, v: Any, rest: _Rest, **kwargs: Any) -> torch.Tensor:
        num_heads, rows = rest[-1], []
        for start in range(0, q.shape[0], num_heads):
            own = slice(start, start + num_heads)
            keys, values = (
                part[:num_heads] if start == 0 else torch.cat([part[:num_heads], part[own]]) for part in (k, v)
            )
            rows.append(self.attn_batch(q[own], keys, values, *rest, **kwargs))
        return torch.cat(rows)


class _Masked(MutualSelfAttentionControl):
    """Targets' objects ask for the source's object, and what is around them for what is around it."""

    def half(self, q: Any, k: Any, v: Any, rest: _Rest, **kwargs: Any) -> torch.Tensor:
        num_heads = rest[-1]
        key, value = k[:num_heads], v[:num_heads]
        grid = self._square(q.shape[1])
        source = self.source_mask(grid)
        if source is None:
            return self.attn_batch(q, key, value, *rest, **kwargs)
        targets = q.shape[0] // num_heads - 1
        self.check_targets(targets)
        out = [self.attn_batch(q[:num_heads], key, value, *rest, **kwargs)]
        if targets == 0:  # a call of one prompt, which no map of no query rows is asked for
            return out[0]
        biases = score_biases(source.to(q.device), self.compat)
        inside, outside = (self._branch(q[num_heads:], key, value, rest, bias, kwargs) for bias in biases)
        for target, (object_, around) in enumerate(zip(inside, outside, strict=True)):
            share = self.target_mask(grid, target).to(q)[:, None]
            out.append((object_ * share + around * (1 - share))[None])
        return torch.cat(out)

    def _branch(
        self, q: Any, key: Any, value: Any, rest: _Rest, bias: torch.Tensor | None, kwargs: Any
    ) -> torch.Tensor:
        """[targets, N, heads · D]."""
        if bias is None and self.compat == "original":  # scores of the dtype's least number throughout
            mean = merged(value.mean(1, keepdim=True), rest[-1])
            return mean.expand(q.shape[0] // rest[-1], q.shape[1], -1)
        return self.attn_batch(q, key, value, *rest, **kwargs, bias=bias)

    def _square(self, tokens: int) -> tuple[int, int]:
        if self.grid is None or self.compat == "original":
            if isqrt(tokens) ** 2 != tokens:
                raise ValueError(
                    f"MasaCtrl's masks are for squares, and this layer has {tokens} tokens: leave "
                    'compat="original" out'
                )
            return isqrt(tokens), isqrt(tokens)
        return self.grid

    def source_mask(self, grid: tuple[int, int]) -> torch.Tensor | None:
        """The source's object on a layer's tokens [N]; None where there is no mask."""
        raise NotImplementedError

    def target_mask(self, grid: tuple[int, int], target: int) -> torch.Tensor:
        """A target's object on a layer's tokens [N]."""
        raise NotImplementedError

    def check_targets(self, targets: int) -> None:
        """Refuse a call of so many targets where the masks are of others."""


class MutualSelfAttentionControlMask(_Masked):
    """With masks of the object, in the source and in the targets.

    Args:
        mask_s, mask_t: [h, w], 1 on the object and 0 elsewhere, tensors, arrays, PIL images or paths; of several
            targets ``mask_t`` may be [targets, h, w], or a list.
        mask_save_dir: where both are saved as pictures.
        start_step, start_layer, layer_idx, step_idx, total_steps, model_type: as `MutualSelfAttentionControl`.

    Raises:
        ValueError: one mask without the other, or masks of other shapes or values.
        TypeError: what is no mask.
    """

    def __init__(
        self,
        start_step: int = 4,
        start_layer: int = 10,
        layer_idx: Sequence[int] | None = None,
        step_idx: Sequence[int] | None = None,
        total_steps: int = 50,
        mask_s: Any = None,
        mask_t: Any = None,
        mask_save_dir: str | None = None,
        model_type: str = "SD",
    ) -> None:
        super().__init__(start_step, start_layer, layer_idx, step_idx, total_steps, model_type)
        if (mask_s is None) != (mask_t is None):
            raise ValueError("expected mask_s and mask_t, got one of them: the original returns rows that do not fit")
        self.mask_s = None if mask_s is None else read_masks("mask_s", mask_s)
        self.mask_t = None if mask_t is None else read_masks("mask_t", mask_t, several=True)
        kept = folder("mask_save_dir", mask_save_dir)
        if kept is not None and self.mask_s is not None and self.mask_t is not None:
            save_mask(self.mask_s, kept / "mask_s.png")
            save_mask(self.mask_t if self.mask_t.ndim == 2 else self.mask_t[0], kept / "mask_t.png")

    def source_mask(self, grid: tuple[int, int]) -> torch.Tensor | None:
        return None if self.mask_s is None else on_grid(self.mask_s, grid)

    def check_targets(self, targets: int) -> None:
        assert self.mask_t is not None
        if self.mask_t.ndim == 3 and self.mask_t.shape[0] != targets:
            raise ValueError(
                f"mask_t {tuple(self.mask_t.shape)} has masks of {self.mask_t.shape[0]} targets, and the call has "
                f"{targets}: pass one for each prompt after the first, or one [h, w] for all of them"
            )

    def target_mask(self, grid: tuple[int, int], target: int) -> torch.Tensor:
        assert self.mask_t is not None
        return on_grid(self.mask_t if self.mask_t.ndim == 2 else self.mask_t[target], grid)


class MutualSelfAttentionControlMaskAuto(_Masked):
    """With masks from cross-attention: where tokens act in this step's earlier layers of one size.

    Args:
        thres: share of the spread between a map's least and most from which a pixel is the object's.
        ref_token_idx, cur_token_idx: positions of the object's tokens in the source's prompt, and in the targets'.
        mask_save_dir: where masks are saved as pictures.
        start_step, start_layer, layer_idx, step_idx, total_steps, model_type: as `MutualSelfAttentionControl`.
    """

    def __init__(
        self,
        start_step: int = 4,
        start_layer: int = 10,
        layer_idx: Sequence[int] | None = None,
        step_idx: Sequence[int] | None = None,
        total_steps: int = 50,
        thres: float = 0.1,
        ref_token_idx: Sequence[int] = (1,),
        cur_token_idx: Sequence[int] = (1,),
        mask_save_dir: str | None = None,
        model_type: str = "SD",
    ) -> None:
        super().__init__(start_step, start_layer, layer_idx, step_idx, total_steps, model_type)
        self.thres, self.mask_save_dir = unit_number(thres, "thres"), folder("mask_save_dir", mask_save_dir)
        self.ref_token_idx, self.cur_token_idx = (
            numbers("ref_token_idx", ref_token_idx),
            numbers("cur_token_idx", cur_token_idx),
        )
        #: Of the layers that were read in this step: head means of both groups of tokens [rows, N, 2].
        self.cross_attns: list[torch.Tensor] = []
        self._read_grid: tuple[int, int] | None = None
        self._level = 2

    def begin(self, sites: Sequence[Site]) -> None:
        super().begin(sites)
        self._level = min(2, max(site.level for site in sites if site.kind == "cross" and site.place != "mid"))

    def after_step(self) -> None:
        self.cross_attns = []

    def reset(self) -> None:
        super().reset()
        self.cross_attns = []  # of a step that was broken off

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
        if is_cross and self._is_read(q.shape[1]):
            self._read_grid = self._square(q.shape[1])
            tokens = torch.zeros(k.shape[1], 2, dtype=q.dtype, device=q.device)
            for group, places in enumerate((self.ref_token_idx, self.cur_token_idx)):
                if not all(-k.shape[1] <= place < k.shape[1] for place in places):
                    raise ValueError(f"the prompts have {k.shape[1]} tokens, and of these {places} are to be read")
                tokens[places, group] = 1.0
            self.cross_attns.append((attn @ tokens).unflatten(0, (-1, num_heads)).mean(1))
        return super().forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)

    def _is_read(self, tokens: int) -> bool:
        if self.site is None or self.compat == "original":
            return tokens == 16 * 16
        return self.site.level == self._level

    def source_mask(self, grid: tuple[int, int]) -> torch.Tensor | None:
        return self._mask(grid, 0, "ref") if self.cross_attns else None

    def target_mask(self, grid: tuple[int, int], target: int) -> torch.Tensor:
        return self._mask(grid, 1 + target, "cur")

    def _mask(self, grid: tuple[int, int], row: int, group: str) -> torch.Tensor:
        """The object of a conditional row on a layer's tokens [N]: 0 or 1."""
        assert self._read_grid is not None
        heat = torch.stack(self.cross_attns).mean(0)  # [rows, N, 2]
        first = heat.shape[0] // 2 if self.guided else 0
        heat = heat[first + row, :, int(group == "cur")].float()
        spread = heat.max() - heat.min()
        share = (heat - heat.min()) / spread if self.compat == "original" or spread > 0 else torch.zeros_like(heat)
        share = on_grid(share.reshape(self._read_grid), grid)
        if self.mask_save_dir is not None:
            name = f"mask_{'s' if group == 'ref' else 't'}_{self.cur_step}_{self.cur_att_layer}.png"
            save_mask(share.reshape(grid), self.mask_save_dir / name)
        return (share >= self.thres).to(share)
