"""Kandinsky 5: blocks of self-attention over all tokens of a picture or a video, and of cross-attention over its text.

Latents have their channels last, with those of a given first frame or picture behind them in models that take one. The
text's tokens attend to each other beforehand, padding included. A prompt is encoded inside a template, of which the
first tokens are dropped. Pipelines guide by a second call, after the one that sees the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import Template, TextPart
from ..sites import Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .transformer import self_and_cross

__all__ = ["Kandinsky5Adapter"]

_NABLA = (
    'block-sparse attention ("nabla") is on: a layer chooses from its own queries and keys which blocks of its map it '
    "computes, so that there is no whole map to give to another row; edit with a model whose config says "
    'attention_type="regular"'
)


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    before, _, after = pipe.prompt_template.partition("{}")
    return Template(before, after, pipe.prompt_template_encode_start_idx)


class Kandinsky5Adapter(NamedCallsAdapter):
    """diffusers' ``Kandinsky5Transformer3DModel``."""

    family = "kandinsky5"
    channels_last = True
    tells_all_it_encodes = False
    text_parts = (TextPart("tokenizer", ("text_encoder",), _template),)

    @property
    def kind(self) -> str:
        """Pipelines of pictures from texts are served; those of videos, and from pictures, are not."""
        names = (kind.__name__ for kind in type(self.pipe).__mro__)
        return "kandinsky5" if "Kandinsky5T2IPipeline" in names else "kandinsky5_videos"

    def check(self) -> None:
        super().check()
        module: Any = self.module
        # Pipelines of pictures compute whole maps, whatever the model's config says.
        if hasattr(self.pipe, "get_sparse_params") and module.config.attention_type == "nabla":
            raise ValueError(_NABLA)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        _, patch, _ = module.config.patch_size
        names = "self_attention", "cross_attention"
        return tuple(self_and_cross("visual_transformer_blocks", module.visual_transformer_blocks, patch, names))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        if given.get("sparse_params") is not None:
            raise ValueError(_NABLA)
        module: Any = self.module
        sample = given["hidden_states"]
        frames, height, width = sample.shape[1:4]
        size = (height, width, frames // module.config.patch_size[0])
        return ModelCall(sample, given["timestep"], size, half=self._half(), arguments=(args, kwargs))
