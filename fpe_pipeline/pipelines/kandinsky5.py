"""`FreePromptPipeline` for the pictures of Kandinsky 5, whose layers are of a UNet's kinds."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from diffusers import Kandinsky5T2IPipeline

from ..sampling.text_masks import with_masks_in_order
from ..text_parts import plain_tokenizer
from .flow import FlowEditing

__all__ = ["FreePromptKandinsky5T2IPipeline"]

_encoded = with_masks_in_order(Kandinsky5T2IPipeline.encode_prompt)
#: Arguments of embeddings and of where they end.
_EMBEDDED = frozenset(
    f"{half}{name}"
    for half in ("", "negative_")
    for name in ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens")
)


class FreePromptKandinsky5T2IPipeline(FlowEditing, Kandinsky5T2IPipeline):
    """Edit an image, generated or real, into target prompts, on Kandinsky 5 of pictures.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`, but that ``self_replace_steps`` is 0.8 where nothing is said, as with UNets, whose
    kinds of layers it has; that sizes are those of ``pipe.resolutions``, to the nearest of which a real image is cut;
    and that ``latents`` are [rows, C, h, w]. It takes prompts, and no embeddings, and of several
    prompts none that it would have to cut. An inversion that is guided is so by
    the empty prompt. Texts of a call are padded to the longest, and padding is attended to: the source of an inversion
    or of a recording is encoded alone, so that prompts of about one length serve it best, and a replay refuses targets
    that are longer than their source. Recordings serve edits of self-attention and of words.
    """

    parent = Kandinsky5T2IPipeline
    kept_in_loop = "the number of its rows"
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    told = ("prompt_template", "prompt_template_encode_start_idx", "resolutions")
    default_window: ClassVar[float] = 0.8

    @classmethod
    def parent_options(cls) -> frozenset[str]:
        """The arguments of a call in diffusers but for embeddings."""
        return super().parent_options() - _EMBEDDED

    @property
    def vae_scale_factor(self) -> int:
        """Pixels across a latent."""
        return int(self.vae_scale_factor_spatial)

    @property
    def plain_tokenizer(self) -> Any:
        """The tokenizer inside of the processor."""
        return plain_tokenizer(self.tokenizer)

    @functools.wraps(Kandinsky5T2IPipeline.encode_prompt, assigned=("__name__", "__annotations__"))
    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As in diffusers, but that several images a prompt each have their own prompt's pooled text, and that texts
        end where their padding does, which is what the pipeline looks for."""
        texts, pooled, ends = _encoded(self, *args, **kwargs)
        return texts, pooled, torch.arange(len(texts) + 1, device=ends.device, dtype=ends.dtype) * texts.shape[1]

    def _loop(self, arguments: dict[str, Any]) -> Any:
        for name in ("prompt", "negative_prompt"):
            texts = arguments.get(name) or ()
            if len(set(texts)) > 1:
                self.flow().check_texts(texts, arguments.get("max_sequence_length") or self.flow().text_length)
        latents = arguments.get("latents")
        if latents is not None:
            arguments = {**arguments, "latents": self.flow().held(latents)}
        return super()._loop(arguments)
