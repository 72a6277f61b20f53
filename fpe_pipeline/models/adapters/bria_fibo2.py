"""Bria FIBO 2: blocks with one sequence of gist tokens, image tokens and those of pictures that are edited.

The model makes some hundred gist tokens of a prompt, more of a longer one, and some blocks read the text itself beside
them, by cross-attention. Gist tokens stand first; where a batch has several numbers of them, the shorter ones are
padded and all of them stand last. No caption moves an image, whose tokens stand in a plane of their own. A few layers
of image tokens alone come before. The pipeline guides by a second call, with the prompts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import TextPart
from ..sites import Kind, Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .padding import counted_tokens

__all__ = ["BriaFibo2Adapter"]

#: What layers attend to, by the list of blocks that they stand in.
_KINDS: dict[str, Kind] = {"noise_refiner": "image", "layers": "joint"}


class BriaFibo2Adapter(NamedCallsAdapter):
    """diffusers' ``BriaFibo2Transformer2DModel``."""

    family = "bria_fibo2"
    text_parts = (TextPart("processor", ("text_encoder",)),)
    words_refused = (
        "Bria FIBO 2 makes gist tokens of a prompt, so that no word is looked for among them: use an edit that looks "
        "for no words, such as FreePromptEdit or ConsistEdit"
    )

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        patch = int(module.config.patch_size)
        return tuple(
            Site(f"{name}.{index}.attention", "single", kind, index, block.attention.heads, 0, (), patch=patch)
            for name, kind in _KINDS.items()
            for index, block in enumerate(getattr(module, name))
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample, patch = given["hidden_states"], self.sites[0].patch
        mask = given.get("encoder_attention_mask")
        gist = () if mask is None else self._gist_tokens(counted_tokens(mask))
        shown = (picture.shape[-2:] for picture in given.get("context_latents") or ())
        return ModelCall(
            sample,
            given["timestep"],
            sample.shape[-2:],
            half=self._half(),
            text_lengths=gist if len(set(gist)) > 1 else None,
            references=sum((height // patch) * (width // patch) for height, width in shown),
            arguments=(args, kwargs),
        )

    def _gist_tokens(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """As the model counts them, for texts of so many tokens."""
        from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count  # of no earlier diffusers

        config: Any = self.module.config
        return tuple(
            compute_gist_count(
                list(lengths),
                config.min_num_gist_tokens,
                config.max_num_gist_tokens,
                config.gist_step,
                config.gist_min_text_len,
                config.gist_max_text_len,
            )
        )
