"""`FreePromptPipeline` for flow models: diffusers' pipelines of Stable Diffusion 3, FLUX.1, Qwen-Image, Chroma,
Lumina 2 and Z-Image with an edit from one source prompt to many targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import (
    ChromaPipeline,
    FluxPipeline,
    Lumina2Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)

from ..edits import Edit
from ..edits.base import check_prompts
from ..errors import check_generator, check_positive, check_text_length
from ..inversion.flow import check_flow_inversion, invert_flow, warn_of_other_texts, with_size_of
from ..inversion.follow import Followed, check_inversion_options
from ..inversion.trajectory import Inversion
from ..prompts.encoding import encoding_tokenizer
from ..prompts.words import warn_of_unknown_words
from ..recordings.flow_record import record_flow
from ..recordings.flow_replay import edit_flow
from ..sampling.arguments import check_option_names, prompt_list
from ..sampling.flow_models import FlowModel
from ..sampling.flow_sampling import FlowSampling, chosen_flow_edit, flow_start, guidance_of_rows, texts_of_call
from ..sampling.output import FreePromptPipelineOutput
from ..sampling.step_end import Call, DropSource, check_source_can_be_dropped
from ..sampling.text_masks import with_masks_in_order
from ..session.finite import check_latents
from ..session.session import EditingSession, editing, session_of
from ..session.shared_noise import row_generators

__all__ = [
    "FlowEditing",
    "FreePromptChromaPipeline",
    "FreePromptFluxPipeline",
    "FreePromptLumina2Pipeline",
    "FreePromptQwenImagePipeline",
    "FreePromptSD3Pipeline",
    "FreePromptZImagePipeline",
]

_OWN = frozenset(
    {"prompt", "target_prompt", "self_replace_steps", "layers", "edit", "inversion", "keep_source", "backend"}
)


class FlowEditing(FlowSampling):
    """Edits of images, generated or real, mixed into a diffusers pipeline of a flow model."""

    #: What of each row the loop of diffusers keeps beside latents and embeddings, so that none can be dropped from it.
    kept_in_loop: ClassVar[str | None] = None
    #: What a pipeline is told by attributes of its own, beside components.
    told: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Any:
        """As in diffusers, but modules keep their dtypes.

        Args:
            pipeline: a diffusers pipeline around the same kind of transformer.
            **components: in the place of the pipeline's, and ``dtype`` to cast all of them to.
        """
        dtypes = [components.pop(name) for name in ("dtype", "torch_dtype") if name in components]
        taken, settings = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        known = {name: part for name, part in pipeline.components.items() if name in taken}
        known |= {name: pipeline.config[name] for name in settings if name in pipeline.config}
        made: Any = cls(**(known | components))
        for name in cls.told:
            setattr(made, name, getattr(pipeline, name, getattr(made, name)))
        return made.to(dtypes[0]) if dtypes else made

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        target_prompt: str | Sequence[str] | None = None,
        *,
        self_replace_steps: Any = None,
        layers: Any = None,
        edit: Edit | None = None,
        inversion: Inversion | None = None,
        keep_source: bool = True,
        backend: str = "auto",
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        **options: Any,
    ) -> FreePromptPipelineOutput | tuple[Any, ...]:
        """Make the source image and its edits, all from the same noise: a `FreePromptPipelineOutput`, or a tuple.

        Args:
            prompt: the source prompt; or, without `target_prompt`, a list of the source and its targets. A source
                alone is generated as the diffusers pipeline would. Default with `inversion`: its prompt.
            target_prompt: one or more prompts to edit the source into.
            self_replace_steps: steps in which the queries and keys of a target's image tokens are its source's, as
                fractions of the run: s is (0, s). Default: 0.2, the first fifth, of Kandinsky 5 0.8; 0 generates
                without control.
            layers: which layers; see `FreePromptEdit`. Default: all of joint attention, or of self-attention.
            edit: another edit, in place of the `FreePromptEdit` that the two arguments above make.
            inversion: a real image, from `invert`, as the source: denoising starts from its noise by the same solver,
                and the source rows follow it as its method says. It decides latents, size and number of steps.
            keep_source: False drops the source rows after the last step that needs them; FLUX.1 keeps them.
            backend: attention backend, a key of `fpe_kernels.backends()` or "auto".
            num_images_per_prompt: images k of every prompt; image i of a target is an edit of image i of the source.
            generator: one, or a list of k. Prompts share its noise, also that which stochastic samplers add in each
                step.
            latents: noise of one row for everything, k rows with one an image, or prompts · k in the order of the
                images, where rows of the same image must be equal: [rows, C, h, w], of FLUX.2 [rows, 4 · C, h / 2,
                w / 2], or of FLUX.1 as diffusers packs them, [rows, tokens, 4 · C], with `height` and `width`.
            **options: what else the diffusers pipeline takes: `height` and `width` (pixels, multiples of those across
                a token), `num_inference_steps`, `guidance_scale` (of FLUX.1 and FLUX.2 [dev] a list, too, with one for
                each prompt, the source's first), `negative_prompt`, `prompt_2`, `max_sequence_length`, `output_type`,
                `return_dict`, `callback_on_step_end` and so on. Texts are one for all prompts, or a list with one for
                each.

        Raises:
            TypeError: an unknown option, or prompts that are not text.
            ValueError: an edit, a size, latents, an inversion or a combination of arguments that cannot be served;
                before any denoising.
        """
        check_option_names(options, _OWN, self.parent_options())
        check_generator(generator)
        check_text_length(options.get("max_sequence_length"))  # before an inversion's is taken, which may be 0: any
        model = self.flow()
        if inversion is not None:
            check_inversion_options(
                inversion, {"latents": latents, **options}, None, options.get("num_inference_steps"), is_flow=True
            )
            check_flow_inversion(inversion, model)
            prompt = inversion.prompt if prompt is None and options.get("prompt_embeds") is None else prompt
            options = with_size_of(inversion, options)
            latents = model.taken(inversion.noise, (options["height"], options["width"]))
        prompts = prompt_list(prompt, target_prompt, options.get("prompt_embeds"))
        if inversion is not None and prompts:
            warn_of_other_texts(inversion, model, prompts, options.get("max_sequence_length"))
        # Embeddings are a tensor, or Z-Image's list of one a caption.
        call = Call(len(prompts) or len(options["prompt_embeds"]), num_images_per_prompt)
        edit = chosen_flow_edit(self, edit, self_replace_steps, layers)
        arguments = self._arguments(model, call, edit, prompts, latents, generator, options)
        if not keep_source:
            self._check_source_can_be_dropped(call, options)
        as_tuple = not arguments.pop("return_dict", True)
        session = self._session(call, edit, backend)
        followed = Followed.of(self, call, inversion)
        with followed.source, self._guided(arguments, call):
            images = self._sample(call, session, () if keep_source else (DropSource(call, edit),), arguments)
        if not keep_source and not call.source_dropped:  # interrupted before the step at which it is dropped
            images = images[num_images_per_prompt:]
        if as_tuple:
            return (images,)
        report = session.report() if isinstance(session, EditingSession) else None
        return FreePromptPipelineOutput(images, None, num_images_per_prompt, keep_source, report, tuple(prompts))

    invert = invert_flow
    record = record_flow
    edit = edit_flow

    def _arguments(
        self,
        model: FlowModel,
        call: Call,
        edit: Edit,
        prompts: list[str],
        latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """What the parent's call takes; raises ValueError where it cannot be served."""
        if options.get("image") is not None:
            raise ValueError(
                "image= shows the model a reference picture, which neither a real image's inversion nor a recording "
                "holds: leave it out and invert the picture that is to be edited, or put `with editing(pipe, edit):` "
                f"around calls of {self.parent.__name__}, in which reference pictures stay each row's own"
            )
        if prompts:
            check_prompts(edit, prompts, encoding_tokenizer(self))
        check_positive(num_images_per_prompt=call.images_per_prompt)
        check_positive(num_inference_steps=options.get("num_inference_steps", 1))
        check_latents(latents)
        texts = texts_of_call(self, options, call.prompts)
        start = flow_start(model, call, latents, options.get("height"), options.get("width"))
        if call.prompts == 1 and session_of(self) is None:  # a session warns of those that it watches
            warn_of_unknown_words(prompts, encoding_tokenizer(self))
        if call.prompts > 1:
            call.generators = row_generators(generator, call.prompts, call.images_per_prompt)
        return {
            **options,
            **texts,
            **start,
            "prompt": list(prompts) or None,  # Z-Image's pipeline writes into the list
            "num_images_per_prompt": call.images_per_prompt,
            "generator": call.generators or generator,
        }

    def _session(self, call: Call, edit: Edit, backend: str) -> AbstractContextManager[Any]:
        if call.prompts == 1:
            return nullcontext()
        return editing(self, edit, images_per_prompt=call.images_per_prompt, noise="separate", backend=backend)

    def _guided(self, arguments: dict[str, Any], call: Call) -> AbstractContextManager[Any]:
        """What tells the model a guidance for each prompt, beside ``arguments`` of the parent's call, which may change.

        Raises:
            ValueError: another number of them than of prompts, or a model that is not told its guidance.
        """
        scales = arguments.get("guidance_scale")
        if not isinstance(scales, Sequence):
            return nullcontext()
        if len(scales) != call.prompts:
            raise ValueError(
                f"expected one guidance_scale, or one for each of the {call.prompts} prompts (the source's first), got "
                f"{len(scales)}"
            )
        arguments["guidance_scale"] = scales[-1]
        return guidance_of_rows(self, scales, call.images_per_prompt)

    def _check_source_can_be_dropped(self, call: Call, options: Mapping[str, Any]) -> None:
        """Raise ValueError where source rows would stay behind in the loop."""
        check_source_can_be_dropped(self, call.prompts, dict(options))


class FreePromptSD3Pipeline(FlowEditing, StableDiffusion3Pipeline):
    """Edit an image, generated or real, into target prompts, on Stable Diffusion 3 and 3.5.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.

    Example:
        >>> from diffusers import StableDiffusion3Pipeline
        >>> from fpe_pipeline import FreePromptPipeline, flow_scheduler
        >>> sd3 = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
        >>> pipe = FreePromptPipeline.from_pipe(sd3)
        >>> out = pipe("a photo of a red car on the beach", "a photo of a blue car on the beach")
        >>> out.source.size == out.targets[0].size
        True

    A real image is inverted first, by the solver of the scheduler:
        >>> pipe.scheduler = flow_scheduler(pipe.scheduler, "fireflow")
        >>> inversion = pipe.invert("beach.jpg", "a photo of a red car on the beach")
        >>> out = pipe(inversion=inversion, target_prompt="a photo of a blue car on the beach")
    """

    parent = StableDiffusion3Pipeline
    # A saved pipeline without T5 names no T5, which diffusers would ask for.
    _optional_components: ClassVar = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]

    def _check_source_can_be_dropped(self, call: Call, options: Mapping[str, Any]) -> None:
        super()._check_source_can_be_dropped(call, options)
        if options.get("skip_guidance_layers") is not None:
            raise ValueError(
                "keep_source=False cannot drop the source's rows from the calls of skip-layer guidance, whose "
                "embeddings diffusers keeps to itself: use keep_source=True"
            )


class FreePromptFluxPipeline(FlowEditing, FluxPipeline):
    """Edit an image, generated or real, into target prompts, on FLUX.1.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an image that was inverted at guidance 1 may stay there while its targets are
    guided: ``pipe(inversion=inversion, target_prompt=target, guidance_scale=[1.0, 3.5])``.
    """

    parent = FluxPipeline
    kept_in_loop = "pooled embeddings and guidance"


class FreePromptQwenImagePipeline(FlowEditing, QwenImagePipeline):
    """Edit an image, generated or real, into target prompts, on Qwen-Image.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; it guides where ``negative_prompt`` is passed, by ``true_cfg_scale``. Recordings
    serve edits that take image tokens of the source.
    """

    parent = QwenImagePipeline
    kept_in_loop = "masks of padding"
    parts = ("transformer", "vae", "text_encoder")
    encode_prompt = with_masks_in_order(QwenImagePipeline.encode_prompt)


class FreePromptChromaPipeline(FlowEditing, ChromaPipeline):
    """Edit an image, generated or real, into target prompts, on Chroma.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an inversion that is guided is so by the empty prompt. Recordings serve edits that
    take image tokens of the source.
    """

    parent = ChromaPipeline
    kept_in_loop = "masks of padding"
    parts = ("transformer", "vae", "text_encoder")


class FreePromptLumina2Pipeline(FlowEditing, Lumina2Pipeline):
    """Edit an image, generated or real, into target prompts, on Lumina 2.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`; an inversion that is guided is so by the empty prompt, and scaled as the pipeline
    scales its guidance. Recordings serve edits that take image tokens of the source.
    """

    parent = Lumina2Pipeline
    kept_in_loop = "masks of padding"
    parts = ("transformer", "vae", "text_encoder")
    told = ("system_prompt",)
    encode_prompt = with_masks_in_order(Lumina2Pipeline.encode_prompt)


class FreePromptZImagePipeline(FlowEditing, ZImagePipeline):
    """Edit an image, generated or real, into target prompts, on Z-Image.

    Made by ``FreePromptPipeline.from_pipe(pipe)`` of a pipeline of diffusers; loads, saves and offloads as that does.
    Used as `FreePromptSD3Pipeline`, but that its pipeline counts guidance from 0 on, at which there is none (Z-Image
    Turbo's). Recordings serve edits that take image tokens of the source.
    """

    parent = ZImagePipeline
    kept_in_loop = "captions"
    parts = ("transformer", "vae", "text_encoder")
    unguided = 0.0
