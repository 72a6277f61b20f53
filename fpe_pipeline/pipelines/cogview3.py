"""`FreePromptPipeline` for CogView 3 Plus: layers of joint attention, and noise that DDIM takes away."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogView3PlusPipeline

from ..edits.free_prompt import JOINT_STEPS
from ..recordings import record_run
from ..sampling.unet_conditions import UNetConditions
from .unet_editing import UNetEditing

__all__ = ["FreePromptCogView3PlusPipeline"]


class FreePromptCogView3PlusPipeline(UNetEditing, CogView3PlusPipeline):
    """Edit an image, generated or real, into target prompts, on CogView 3 Plus.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptPipeline`, but that ``self_replace_steps`` is 0.2 where nothing is said, as with other models of
    joint attention. Its own DDIM (`CogVideoXDDIMScheduler`) is undone as any other, and `ddim_scheduler` makes it of
    another scheduler of its kind. `keep_source=False` and "null-text" inversion, which change rows or texts between
    steps, are refused: the loop of diffusers' pipeline keeps the sizes that rows are told to itself, and takes no
    embeddings in the place of negative prompts. An inversion that is guided is so by zeros, which stand for no negative
    prompt. Recordings serve edits of words too.
    """

    parent = CogView3PlusPipeline
    denoiser_name = "transformer"
    parts = ("transformer", "vae", "text_encoder")
    kept_in_loop = "sizes of images"

    def __call__(
        self,
        prompt: Any = None,
        target_prompt: Any = None,
        *,
        self_replace_steps: Any = None,
        edit: Any = None,
        **options: Any,
    ) -> Any:
        """As of `FreePromptPipeline`, which says what the options are.

        Args:
            prompt, target_prompt, edit: as there.
            self_replace_steps: default: 0.2.
            **options: as there, with those of diffusers' `CogView3PlusPipeline`, such as ``max_sequence_length``.
        """
        steps = _window(self_replace_steps, edit)
        return super().__call__(prompt, target_prompt, self_replace_steps=steps, edit=edit, **options)

    def record(self, prompt: Any = None, *, self_replace_steps: Any = None, edit: Any = None, **options: Any) -> Any:
        """As of `FreePromptPipeline`; ``self_replace_steps`` is 0.2 where nothing is said."""
        return record_run.record(
            self, prompt, self_replace_steps=_window(self_replace_steps, edit), edit=edit, **options
        )

    @property
    def pixel_multiple(self) -> int:
        """Of what the sides of images are multiples, in pixels: of a token, which is several latent pixels."""
        return int(self.vae_scale_factor * self.transformer.config.patch_size)

    @property
    def text_tokens(self) -> int:
        """Of a prompt, with its padding."""
        return int(self.parent_default("max_sequence_length"))

    @torch.no_grad()
    def conditions(self, prompt: str, guided: bool, size: tuple[int, int]) -> UNetConditions:
        """The prompt's embeddings [1, tokens, channels], behind zeros where it is guided, and the size of images."""
        texts, away = self.encode_prompt(prompt, None, guided, device=self._execution_device)
        states = torch.cat([away, texts]) if guided else texts
        told = {"original_size": size, "target_size": size, "crop_coords": (0, 0)}
        sizes = {name: states.new_tensor([pair]).expand(len(states), -1) for name, pair in told.items()}
        return UNetConditions(states, sizes, named=True)

    def _loop(self, callback: Any, tensor_inputs: list[str], arguments: dict[str, Any]) -> tuple[Any, ...]:
        if arguments.get("negative_prompt_embeds") is not None:
            raise ValueError(
                f"{self.parent.__name__} of diffusers 0.42 puts zeros in the place of negative_prompt_embeds: pass "
                "negative_prompt, or leave both out"
            )
        return super()._loop(callback, tensor_inputs, arguments)


def _window(steps: Any, edit: Any) -> Any:
    """Steps of the plain edit; beside another edit what stands for none."""
    if steps is not None:
        return steps
    return JOINT_STEPS if edit is None else 0.8
