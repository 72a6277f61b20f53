"""HunyuanImage 2.1 as a flow model: it takes latents [B, C, h, w] and two texts, and is guided by guiders.

A guider may look back at earlier steps, so that there is no guided velocity at a σ; plain guidance has one. A distilled
model is told its guidance, and may be told both ends of a step, whose mean velocity it then gives.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..models.guiders import guiders_of
from .flow_model import FlowModel, GuidedByTwoCalls, Latents, Velocity
from .kin_models import reading

__all__ = ["HunyuanImage", "guided_by"]


class _HunyuanImageVelocity(Velocity):
    def _timestep(self, timestep: torch.Tensor, latents: Latents) -> torch.Tensor:
        return timestep.expand(latents.shape[0]).to(latents.dtype)


class HunyuanImage(FlowModel):
    guidance_unit = 1000.0
    trimmed = frozenset({"text-key"})  # what asks, and values, an edit may take of padding too

    @property
    def text_length(self) -> int:
        """Tokens of a text, which the pipeline is told by an attribute."""
        return int(self.pipe.tokenizer_max_length)

    def text_tokens(self, text_length: int) -> int:
        return text_length + int(self.pipe.tokenizer_2_max_length)

    def own_text_tokens(self, prompt: str, text_length: int, *, conditional: bool = True) -> int:
        tokens = self.pipe.tokenizer(self.pipe.prompt_template_encode.format(prompt))["input_ids"]
        own = len(tokens) - int(self.pipe.prompt_template_encode_start_idx)
        return min(own, text_length) + self._quoted_tokens(prompt)

    def _quoted_tokens(self, prompt: str) -> int:
        """Tokens of what a prompt quotes, which an encoder of its own reads."""
        from diffusers.pipelines.hunyuan_image import pipeline_hunyuanimage  # of no earlier diffusers

        quoted = pipeline_hunyuanimage.extract_glyph_text(prompt)
        if quoted is None:
            return 0
        return min(len(self.pipe.tokenizer_2(quoted)["input_ids"]), int(self.pipe.tokenizer_2_max_length))

    @property
    def multiple(self) -> int:
        """As the pipeline says; its model has a token for each latent."""
        return 2 * int(self.pipe.vae_scale_factor)

    def tokens(self, size: tuple[int, int]) -> int:
        height, width = (side // patch for side, patch in zip(self.latent_size(size), self._patch, strict=True))
        return height * width

    @property
    def _patch(self) -> tuple[int, int]:
        high, wide = self.pipe.transformer.config.patch_size
        return int(high), int(wide)

    def set_timesteps(self, steps: int, size: tuple[int, int]) -> None:
        sigmas = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)[:-1].numpy()
        self.pipe.scheduler.set_timesteps(sigmas=sigmas, device=self.pipe._execution_device)

    def encoded(self, pixels: torch.Tensor) -> Latents:
        scaled: Latents = self.pipe.vae.encode(pixels).latent_dist.mean * self.pipe.vae.config.scaling_factor
        return scaled

    def check_recorded(self, parts: Collection[str], is_guided: bool) -> None:
        for guider in _guiders(self.pipe).values():
            if is_guided and (guider._start, guider._stop) != (0.0, 1.0):
                raise ValueError(
                    "a recording holds a source that is guided in all of its steps, or in none, got a guider from "
                    f"start={guider._start:g} to stop={guider._stop:g} of them: load the pipeline with one that guides "
                    "from 0 to 1, or leave guidance out with guidance_scale=1"
                )

    @contextmanager
    def beside(self, source: str, targets: Sequence[str], text_length: int) -> Iterator[None]:
        """One guider for a source and its targets: prompts that quote something have that of all in their call."""
        guiders = _guiders(self.pipe)
        if "ocr_guider" not in guiders:
            yield
            return
        if not self._quoted_tokens(source):
            for target in targets:
                if self._quoted_tokens(target):
                    raise ValueError(
                        f"the target {target!r} quotes something, and the recorded source does not: beside it the "
                        "source would have been guided by ocr_guider too, and been another image. Record a source that "
                        "quotes something, or make both together, pipe(source, targets)"
                    )
            yield
            return
        with _in_the_place(self.pipe, {"guider": guiders["ocr_guider"]}):
            yield

    def velocity(self, prompt: str, guidance_scale: float, size: tuple[int, int], text_length: int) -> Velocity:
        transformer, device = self.pipe.transformer, self.pipe._execution_device
        if transformer.config.use_meanflow:
            raise ValueError(
                "expected a model of the velocity at a time, which an inversion follows back, got a HunyuanImage that "
                "was distilled to mean velocities of whole steps (use_meanflow): invert with the model that was not "
                "distilled; what this one generates, it edits"
            )
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.tensor([guidance_scale], dtype=transformer.dtype, device=device) * self.guidance_unit

        def of(text: str, name: str) -> Velocity:
            with reading(self.pipe, text_length):
                texts, mask, quoted, quoted_mask = self.pipe.encode_prompt(text, device)
            conditions = {
                "encoder_hidden_states": texts.to(transformer.dtype),
                "encoder_attention_mask": mask,
                "encoder_hidden_states_2": quoted.to(transformer.dtype),
                "encoder_attention_mask_2": quoted_mask,
                "guidance": guidance,
            }
            return _HunyuanImageVelocity(self.pipe, conditions, None, name)

        towards = of(prompt, "pred_cond")
        if not self.pipe.is_guided_at(guidance_scale):
            return towards
        guiders = _guiders(self.pipe)
        _check_plain(guiders.get("ocr_guider" if self._quoted_tokens(prompt) else "guider", guiders["guider"]))
        return GuidedByTwoCalls(towards, of("", "pred_uncond"), guidance_scale)


def _check_plain(guider: Any) -> None:
    """Raise ValueError for a guider by which there is no velocity at a σ alone."""
    plain = type(guider).__name__ == "ClassifierFreeGuidance" and guider.guidance_rescale == 0
    if plain and (guider._start, guider._stop) == (0.0, 1.0):
        return
    raise ValueError(
        "an inversion that is guided follows plain guidance (ClassifierFreeGuidance without rescaling, in all steps), "
        f"got {type(guider).__name__}, which may look at the step it is in, or back at earlier ones: leave "
        "guidance_scale at 1, and guide the edits with it"
    )


def _guiders(pipe: Any) -> dict[str, Any]:
    """The guiders of a pipeline by where it keeps them.

    Raises:
        ValueError: one for prompts that quote something alone, or one that counts guidance from 0.
    """
    found = guiders_of(pipe)
    if found and "guider" not in found:
        raise ValueError(
            "expected a guider, or neither guider nor ocr_guider, got an ocr_guider alone, which guides nothing but "
            "prompts that quote something: pass guider= to from_pipe too"
        )
    for guider in found.values():
        if getattr(guider, "use_original_formulation", False):
            raise ValueError(
                f"expected a guider that counts guidance from 1, got {type(guider).__name__} with "
                "use_original_formulation=True, which counts it from 0: make one without, of a guidance_scale larger "
                "by 1, which guides the same"
            )
    return found


@contextmanager
def _in_the_place(pipe: Any, parts: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(pipe, name) for name in parts}
    for name, part in parts.items():
        setattr(pipe, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(pipe, name, part)


@contextmanager
def guided_by(pipe: Any, scale: float | None) -> Iterator[None]:
    """Let the guiders of a pipeline guide a call in a block as they are, or by this scale.

    They begin anew: guiders remember the step of a run, by which a call decides what it encodes.

    Args:
        pipe: of HunyuanImage.
        scale: None for each guider's own.
    """
    guiders = {name: copy.copy(guider) for name, guider in _guiders(pipe).items()}
    for guider in guiders.values():
        guider._step = guider._num_inference_steps = guider._timestep = None
        if scale is not None:
            guider.guidance_scale = scale
            guider._enabled = guider._enabled and pipe.is_guided_at(scale)
    with _in_the_place(pipe, guiders):
        yield
