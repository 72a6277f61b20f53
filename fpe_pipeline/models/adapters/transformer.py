"""What transformers of every family have in common: what may not stand between an edit and their layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..sites import Kind, Site
from .adapter import ModelAdapter, identity

__all__ = ["TransformerAdapter", "self_and_cross"]

#: By what the names of diffusers' hooks begin with, what they do to a layer.
_HOOKS = {
    "faster_cache": "FasterCache",
    "fbc_": "FirstBlockCache",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "pyramid attention broadcast",
    "sea_cache": "SeaCache",
    "taylorseer_cache": "TaylorSeer",
    "text_kv_cache": "the cache of text keys and values",
    "layer_skip": "layer skipping",
    "smoothed_energy_guidance": "smoothed energy guidance",
    "cp_": "context parallelism",
}


class TransformerAdapter(ModelAdapter):
    """What an edit has to know of a transformer; subclasses describe a family each.

    Args:
        pipe: the pipeline; None for a model alone.
        model: the model; compiled or not.
    """

    word = "transformer"

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of a call of the model by their names."""
        return inspect.signature(type(self.module).forward).bind(None, *args, **kwargs).arguments

    def check(self) -> None:
        """Refuse a model in which layers of some steps are not computed, or not by this process alone."""
        for model in self.models.values():
            kinds = type(identity(model)).__mro__
            if any(kind.__module__.partition(".")[0] == "nunchaku" or "Nunchaku" in kind.__name__ for kind in kinds):
                raise ValueError(
                    f"{kinds[0].__name__} is nunchaku's: its kernels compute projections, norms and attention of a "
                    "block at once from packed weights, so that there are no queries and keys to edit; load diffusers' "
                    "own model, whose linears may be quantised (bitsandbytes, torchao, GGUF)"
                )
        modules = ((of, *found) for of, model in self.models.items() for found in identity(model).named_modules())
        for of, name, module in modules:
            hooks: Any = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            found = [what for begin, what in _HOOKS.items() if any(hook.startswith(begin) for hook in hooks)]
            if found:
                where = ".".join(filter(None, (of, name))) or "the transformer"
                raise ValueError(
                    f"{found[0]} is on in {where}: it computes a layer at some steps only, or from "
                    "parts of its tokens, so that an edit of the layer would not be what was asked; take it off before "
                    "the session (such as pipe.transformer.disable_cache())"
                )


def self_and_cross(
    path: str, blocks: Iterable[Any], patch: int = 1, names: tuple[str, str] = ("attn1", "attn2")
) -> Iterator[Site]:
    """The layers of blocks that attend to the image and then to the text, all of one size.

    Args:
        path: of the list of blocks.
        blocks: in execution order.
        patch: of the sites.
        names: of a block's layers, or their paths in it.
    """
    kinds: tuple[Kind, Kind] = ("self", "cross")
    for index, block in enumerate(blocks):
        for kind, name in zip(kinds, names, strict=True):
            layer: Any = block.get_submodule(name)
            heads = layer.heads if hasattr(layer, "heads") else layer.num_heads
            yield Site(f"{path}.{index}.{name}", "single", kind, index, heads, 0, (), patch=patch)
