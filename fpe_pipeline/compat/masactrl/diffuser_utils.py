"""MasaCtrl's pipeline: the name of its ``diffuser_utils``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..free_prompt_editing import FreePromptPipeline
from ..names import unknown_name

__all__ = ["MasaCtrlPipeline"]

__getattr__ = unknown_name(__name__, "diffuser_utils", __all__)


class MasaCtrlPipeline(FreePromptPipeline):
    """The repository's pipeline: sampling of several prompts, and DDIM inversion.

    Free-Prompt-Editing's is made of it, and both take the same arguments but for ``eta``, which has to be 0.
    """

    def __call__(self, prompt: str | Sequence[str], *args: Any, **options: Any) -> Any:
        """Images [prompts, 3, H, W] in [0, 1]; see `FreePromptPipeline` for the other arguments.

        Args:
            prompt: the source prompt and its targets.
            *args: in MasaCtrl's order: ``batch_size, height, width, num_inference_steps, guidance_scale, eta, latents,
                unconditioning, neg_prompt, ref_intermediate_latents, return_intermediates``.
            **options: the same by name.
        """
        names = ("batch_size", "height", "width", "num_inference_steps", "guidance_scale", "eta", "latents")
        return super().__call__(prompt, **_options(args, options, names))

    def invert(self, image: Any, prompt: str | Sequence[str], *args: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        """DDIM inversion; see `FreePromptPipeline`. ``num_inference_steps, guidance_scale, eta,
        return_intermediates`` come in this order."""
        names = ("num_inference_steps", "guidance_scale", "eta", "return_intermediates")
        return super().invert(image, prompt, **_options(args, options, names))


_LAST = ("unconditioning", "neg_prompt", "ref_intermediate_latents", "return_intermediates")


def _options(args: tuple[Any, ...], options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    names = names if names[-1] in _LAST else (*names, *_LAST)
    given = {**dict(zip(names, args, strict=False)), **options}
    if len(args) > len(names):
        raise TypeError(f"expected at most {len(names)} arguments after the first, {', '.join(names)}, got {len(args)}")
    if given.pop("eta", 0.0):
        raise ValueError("expected eta to be 0: MasaCtrl samples by DDIM without noise, whatever eta it is given")
    if given.pop("dir", None):
        raise ValueError("dir= shifts the last prompt's embedding in the original; pass embeddings of your own instead")
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise TypeError(f"MasaCtrlPipeline takes no {', '.join(unknown)}; it takes {', '.join(names)}")
    return given
