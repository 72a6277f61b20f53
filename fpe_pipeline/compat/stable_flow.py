"""Stable Flow: the repository's ``FluxPipeline``, on current diffusers.

``from diffusers import FluxPipeline``, which is the repository's own there, becomes
``from fpe_pipeline.compat.stable_flow import FluxPipeline``. See ``docs/compat/stable-flow.md``.

Reference: Avrahami et al., "Stable Flow: Vital Layers for Training-Free Image Editing", CVPR 2025, arXiv 2411.14430.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline as DiffusersFluxPipeline

from ..edits.image_memory import StableFlowEdit
from ..errors import check_generator, check_guidance, check_positive
from ..models.flow_solvers import flow_nodes, require_flow, solver_of
from ..sampling.flow_models import flow_model
from ..sampling.flow_sampling import guidance_of_rows
from ..sampling.step_end import StepEnd
from ..session.session import editing
from ..session.unedited import unedited
from .given import numbers
from .names import unknown_name
from .switch import chosen_compat

__all__ = ["FluxPipeline"]

__getattr__ = unknown_name(__name__, "Stable Flow", __all__)


class FluxPipeline(DiffusersFluxPipeline):
    """diffusers' pipeline of FLUX.1, whose calls also copy the first image's keys and values, and invert pictures.

    It loads, saves and offloads as that one does, and needs no repository of its own.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *arguments: Any,
        mm_copy_blocks: Iterable[int] | None = None,
        single_copy_blocks: Iterable[int] | None = None,
        invert_image: bool = False,
        inverted_latent_list: Sequence[torch.Tensor] | None = None,
        compat: str | None = None,
        **options: Any,
    ) -> Any:
        """Images as diffusers gives them; of an inversion the list of latents.

        Args:
            prompt: the source prompt and its targets; for an inversion the source's alone.
            *arguments: as in diffusers.
            mm_copy_blocks, single_copy_blocks: dual and single blocks, each counted from 0, in which the targets'
                images attend to the source's keys and values; None for none.
            invert_image: go from the image's ``latents`` [1, N, C], packed and at σ = 0, to noise.
            inverted_latent_list: what an inversion of as many steps gave; the source's row is put onto it after each
                step but the last.
            compat: "original" puts the row onto ``inverted_latent_list[-i]`` after step i, as the authors' code does,
                which are the latents of two steps before.
            **options: what else diffusers takes; ``guidance_scale`` may be a list, one for each prompt.

        Returns:
            diffusers' output; or, of an inversion, latents [1, N, C] after each step, the noise last.

        Raises:
            ValueError: blocks that the transformer has not or that are no list, several prompts or a scheduler that
                cannot be followed for an inversion, a list of other steps or of other latents, or guidance that is no
                number, or for another number of prompts.
            TypeError: inverted latents that are no tensors, or a seed as generator.
        """
        compat = chosen_compat(compat)
        prompt = list(prompt) if isinstance(prompt, tuple) else prompt  # diffusers takes lists alone
        check_generator(options.get("generator"))
        if invert_image:
            return self._inverted(prompt, *arguments, **options)
        layers = self._copied(mm_copy_blocks, single_copy_blocks)
        rows = _count(prompt, options)
        with ExitStack() as around:
            around.enter_context(self._guided(options, rows))
            if layers and rows > 1:
                around.enter_context(editing(self, StableFlowEdit(layers=layers)))
            if inverted_latent_list is not None:
                followed = _Followed(_as_latents(inverted_latent_list), compat)
                options |= self._following(followed, options)
            return super().__call__(prompt, *arguments, **options)

    def _copied(self, dual: Iterable[int] | None, single: Iterable[int] | None) -> tuple[int, ...]:
        """The numbers among all layers of the blocks of either kind."""
        first = len(self.transformer.transformer_blocks)
        counts = {"mm_copy_blocks": first, "single_copy_blocks": len(self.transformer.single_transformer_blocks)}
        layers: list[int] = []
        for (name, count), blocks in zip(counts.items(), (dual, single), strict=True):
            chosen = [] if blocks is None else numbers(name, blocks)
            if not all(0 <= block < count for block in chosen):
                raise ValueError(f"expected {name} to be among 0 to {count - 1}, this transformer's, got {chosen}")
            layers += [block + (first if name == "single_copy_blocks" else 0) for block in chosen]
        return tuple(layers)

    def _guided(self, options: dict[str, Any], rows: int) -> AbstractContextManager[Any]:
        """What tells the transformer a guidance for each prompt; diffusers' call gets one of them."""
        scales = options.get("guidance_scale", 3.5)
        scales = scales.tolist() if hasattr(scales, "tolist") else scales
        if isinstance(scales, str) or not isinstance(scales, Sequence):
            check_guidance(scales)
            return nullcontext()
        if len(scales) != rows:
            raise ValueError(f"expected one guidance_scale, or one for each of the {rows} prompts, got {len(scales)}")
        options["guidance_scale"] = scales[-1]
        return guidance_of_rows(self, scales, options.get("num_images_per_prompt", 1))

    def _following(self, followed: _Followed, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a call after whose steps the source's row is put onto an inversion."""
        end = StepEnd(
            options.get("callback_on_step_end"),
            options.get("callback_on_step_end_tensor_inputs", ("latents",)),
            (followed,),
            ("latents",),
        )
        return {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": end.tensor_inputs}

    def _inverted(
        self,
        prompt: str | Sequence[str] | None,
        *,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        max_sequence_length: int = 512,
        output_type: str = "pil",
    ) -> list[torch.Tensor]:
        """The latents after each step from an image at σ = 0 to its noise at σ = 1.

        A step's velocity is asked for at the σ that it goes to, as denoising asks for it.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if len(prompts) != 1 or latents is None or latents.shape[0] != 1:
            raise ValueError(
                f"expected one prompt and the packed latents [1, N, C] of one image to invert, got {len(prompts)} "
                f"prompts and latents {None if latents is None else tuple(latents.shape)}"
            )
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"expected latents to be a tensor [1, N, C], got {type(latents).__name__}")
        check_positive(num_inference_steps=num_inference_steps)
        check_guidance(guidance_scale)
        require_flow(self.scheduler, "inversion")
        if solver_of(self.scheduler) != "euler":
            raise ValueError(
                f"Stable Flow's inversion goes by Euler steps, got {type(self.scheduler).__name__}: set "
                'pipe.scheduler = fpe_pipeline.flow_scheduler(pipe.scheduler, "euler")'
            )
        model = flow_model(self)
        native = model.native_size
        size = height or native[0], width or native[1]
        tokens = (size[0] // model.multiple) * (size[1] // model.multiple)
        expected = (1, tokens, self.transformer.config.in_channels)
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"expected packed latents {expected} for {size[0]} × {size[1]}: {tokens} tokens of latents, got "
                f"{tuple(latents.shape)}"
            )
        model.set_timesteps(num_inference_steps, size)
        nodes = flow_nodes(self.scheduler).cpu()
        latents = latents.to(self._execution_device)
        reached: list[torch.Tensor] = []
        with unedited(self), self.progress_bar(total=num_inference_steps) as bar:
            velocity = model.velocity(prompts[0], guidance_scale, size, max_sequence_length)
            for index in reversed(range(num_inference_steps)):
                width_of_step = nodes[index].item() - nodes[index + 1].item()
                latents = latents + width_of_step * velocity(latents, nodes[index])
                reached.append(latents)
                bar.update()
        self.maybe_free_model_hooks()
        return reached


@dataclass(frozen=True)
class _Followed:
    """Puts the source's row onto an inversion at the end of each step.

    Args:
        inverted: latents [1, N, C] by step of the inversion, the noise last.
        compat: "original" for the authors' index.
    """

    inverted: tuple[torch.Tensor, ...]
    compat: str | None

    def __call__(self, pipe: Any, index: int, tensors: dict[str, Any]) -> None:
        steps = len(pipe.scheduler.timesteps)
        if len(self.inverted) != steps:
            raise ValueError(
                f"inverted_latent_list has {len(self.inverted)} latents for {steps} steps: pass the list that a call "
                "with invert_image=True gave, of as many steps"
            )
        if self.compat == "original":
            known = self.inverted[-index]
        elif index + 1 < steps:
            known = self.inverted[steps - 2 - index]
        else:
            return  # to the image itself, which no inversion gives
        latents = tensors["latents"].clone()
        if tuple(known.shape) != (1, *latents.shape[1:]):
            raise ValueError(
                f"inverted_latent_list: expected latents {(1, *latents.shape[1:])}, got {tuple(known.shape)}: pass "
                "what an inversion of the same height and width gave"
            )
        latents[0] = known[0].to(latents)
        tensors["latents"] = latents


def _as_latents(given: Any) -> tuple[torch.Tensor, ...]:
    """An inversion's latents; TypeError for what is none."""
    if isinstance(given, torch.Tensor) and given.ndim == 3:
        given = given[:, None]  # a stack of [N, C]
    latents = tuple(given) if isinstance(given, Iterable) else ()
    if not latents or not all(isinstance(one, torch.Tensor) for one in latents):
        raise TypeError(
            "expected inverted_latent_list to be the tensors [1, N, C] that a call with invert_image=True gave, got "
            f"{type(given).__name__}"
        )
    return latents


def _count(prompt: Any, options: dict[str, Any]) -> int:
    """How many prompts a call has."""
    embeddings = options.get("prompt_embeds")
    if prompt is None and embeddings is not None:
        return int(embeddings.shape[0])
    return 1 if prompt is None or isinstance(prompt, str) else len(prompt)
