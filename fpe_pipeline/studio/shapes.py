"""A model's work and memory, from its shapes alone: nothing is computed and nothing is allocated."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..models.twins import shape_of
from ..runs.making import is_flow, model_of

__all__ = ["Cost", "Shapes"]


@dataclass(frozen=True)
class Cost:
    """Of one call of a module.

    Args:
        flops: of its products and convolutions.
        peak: bytes that it holds at once, without its weights.
        maps: bytes of its attention maps, of which it holds none.
    """

    flops: int
    peak: int
    maps: int


class Shapes:
    """The UNet or transformer and the decoder of a pipeline, on the ``meta`` device.

    Args:
        pipe: of Stable Diffusion's or FLUX.1's kind, unedited; it is left as it is.
    """

    def __init__(self, pipe: Any) -> None:
        model = model_of(pipe)
        # Of the parts' shapes alone: a model that is replaced is not held here.
        self._call = (_flow_call if is_flow(pipe) else _unet_call)(pipe, shape_of(model))
        self._dtype: torch.dtype = model.dtype if is_flow(pipe) else pipe.autoencoder_dtype
        self._vae: Any = shape_of(pipe.vae).to(self._dtype)
        self._factor: int = pipe.vae_scale_factor
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self.weights = sum(tensor.nbytes for tensor in tensors)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - as many as a page asks for; they live as long as its model
    def step(self, rows: int, size: tuple[int, int]) -> Cost:
        """One call of the model for ``rows`` latents of images of (width, height) px."""
        width, height = size
        return cost_of(self._call(rows, height // self._factor, width // self._factor))

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def decode(self, images: int, size: tuple[int, int]) -> Cost:
        """Decoding ``images`` latents of images of (width, height) px."""
        width, height = size
        shape = (images, self._vae.config.latent_channels, height // self._factor, width // self._factor)
        latents = torch.empty(shape, device="meta", dtype=self._dtype)
        return cost_of(lambda: self._vae.decode(latents, return_dict=False))


#: From rows, height and width of latents to a call of a model for them.
_Call = Callable[[int, int, int], Callable[[], object]]


def _unet_call(pipe: Any, unet: Any) -> _Call:
    told, like = pipe.conditions("", False, pipe.native_size).to("meta"), {"device": "meta", "dtype": unet.dtype}

    def call(rows: int, height: int, width: int) -> Callable[[], object]:
        latents = torch.empty(1, unet.config.in_channels, height, width, **like)
        return lambda: told.repeated(rows).predict(unet, latents, torch.empty((), device="meta"))

    return call


def _flow_call(pipe: Any, transformer: Any) -> _Call:
    flow = pipe.flow()
    packed, across, like = flow.is_packed, flow.multiple // pipe.vae_scale_factor, torch.device("meta")
    known = flow.velocity("", 1.0, flow.native_size, flow.text_length).conditions
    conditions = {name: each.to("meta") for name, each in known.items() if each is not None}

    def call(rows: int, height: int, width: int) -> Callable[[], object]:
        tokens, channels = (height // across) * (width // across), transformer.config.in_channels
        shape = (rows, tokens, channels) if packed else (rows, channels, height, width)
        given = {n: e if n in _PLACES else e.expand(rows, *e.shape[1:]) for n, e in conditions.items()}
        if packed:
            given["img_ids"] = torch.empty((tokens, *known_places), device=like)
        latents = torch.empty(shape, dtype=transformer.dtype, device=like)
        timestep = torch.empty(rows, device=like)
        return lambda: transformer(hidden_states=latents, timestep=timestep, **given, return_dict=False)

    known_places = conditions["img_ids"].shape[1:] if packed else ()
    return call


#: Arguments of FLUX.1's transformer that are one for all rows.
_PLACES = ("txt_ids", "img_ids")


def cost_of(call: Callable[[], object]) -> Cost:
    """What a call on the ``meta`` device would cost elsewhere, its attention fused."""
    held, attention, products = _Held(), _FusedAttention(), FlopCounterMode(display=False)
    with torch.no_grad(), attention, products, held:
        call()
    return Cost(products.get_total_flops() + attention.flops, held.peak, attention.maps)


class _FusedAttention(TorchFunctionMode):
    """`scaled_dot_product_attention` as shapes: on ``meta`` PyTorch would write its map out."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.maps = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (args[place] if len(args) > place else kwargs[name] for place, name in enumerate(_NAMES))
        scores = query.shape[:-1].numel() * key.shape[-2]
        self.flops += 2 * scores * (query.shape[-1] + value.shape[-1])
        self.maps += scores * query.element_size()
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


_NAMES = ("query", "key", "value")


class _Held(TorchDispatchMode):
    """The largest sum of the bytes of all storages that live at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen and storage not in given:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, count: int) -> None:
        self.now -= count
