"""What an edit has to know of a model, whatever its family: its layers, what a call of it is, and its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from ...text_parts import TextPart
from ..sites import Site
from ..steps import Step, locate_step

__all__ = ["Half", "ModelAdapter", "ModelCall", "identity", "is_compiled", "is_guided", "model_inputs"]

#: Which rows a call holds: as the pipeline's guidance says, those that see their prompts, or those that do not.
Half = Literal["as guided", "conditional", "unconditional"]


@dataclass(frozen=True)
class ModelCall:
    """What one call of a model says of itself.

    Args:
        sample: the latents, as the model receives them: [B, C, h, w], [B, C, frames, h, w], [B, frames, h, w, C]
            or tokens [B, N, C].
        timestep: as the model receives it.
        size: (height, width) of the latents, or (height, width, frames) of a video's, as :meth:`.Site.at` takes them.
        half: which rows are in the batch.
        left_out: paths of the blocks that this call does not compute.
        text_lengths: for each row, its text tokens before padding; None where none is padding.
        references: tokens of reference pictures, or of padding that is attended to, which follow those of the image
            that is denoised and are each row's own.
        attends_to_padding: whether texts end in padding that is attended to, so that of texts of several lengths some
            have tokens that others have not.
        shown: of reference pictures that stand among the text's tokens and not behind the image's, the first token of
            each and the one behind its last.
        keeps_texts: whether text tokens look at no image and are computed once for all steps, so that no edit changes
            what they become.
        arguments: positional and keyword arguments of the call.
    """

    sample: torch.Tensor
    timestep: Any
    size: tuple[int, ...]
    half: Half = "as guided"
    left_out: tuple[str, ...] = ()
    text_lengths: tuple[int, ...] | None = None
    references: int = 0
    attends_to_padding: bool = False
    shown: tuple[tuple[int, int], ...] = ()
    keeps_texts: bool = False
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = field(default=((), {}), repr=False)

    @property
    def rows(self) -> int:
        """The batch size."""
        return self.sample.shape[0]

    def computes(self, path: str) -> bool:
        """Whether a layer is computed in this call."""
        return not any(path.startswith(f"{block}.") for block in self.left_out)


class ModelAdapter(ABC):
    """A model of some family, and the pipeline around it.

    A subclass a family says which of the model's modules attend and to what (:meth:`find_sites`), and how a call of the
    model is read (:meth:`read`): its latents and their size, its timestep, which rows it holds. The processors that
    compute its edited layers are the session's, by :attr:`family`.

    Args:
        pipe: the pipeline; None for a model alone.
        model: the model; compiled or not.
    """

    #: What the model is called in messages.
    word: ClassVar[str]
    #: Whose processors compute its edited layers.
    family: ClassVar[
        Literal[
            "unet",
            "sd3",
            "flux",
            "flux_kin",
            "flux2",
            "flux3",
            "chroma",
            "allegro",
            "aura_flow",
            "bria_fibo",
            "bria_fibo2",
            "cogvideox",
            "cogview4",
            "cosmos",
            "easyanimate",
            "glm_image",
            "hidream",
            "hunyuan_video",
            "ideogram4",
            "joyimage",
            "kandinsky5",
            "kandinsky6",
            "krea2",
            "qwen",
            "qwen21",
            "ltx",
            "ltx2",
            "lumina2",
            "mochi",
            "motif_video",
            "nucleus",
            "sana",
            "wan",
            "z_image",
        ]
    ]
    #: Whether its pipelines guide by a call of the model of their own, whose prompts they encode by one of their own.
    guides_apart: ClassVar[bool] = False
    #: Whether each call holds rows of one half and shows of which, whoever makes it.
    shows_half: ClassVar[bool] = False
    #: Whether its pipelines encode each part of the text by a call of its own.
    encodes_in_parts: ClassVar[bool] = False
    #: Whether the place of its image's tokens, and with it their rotary embedding, follows the length of the caption.
    turns_by_caption: ClassVar[bool] = False
    #: Whether rows that see their prompts come first in a guided call, and are alone in calls without guidance.
    prompts_first: ClassVar[bool] = False
    #: Whether every call of its pipelines encodes, embeddings too, and tells its encoder of the images a prompt.
    tells_all_it_encodes: ClassVar[bool] = True
    #: Whether its pipelines repeat a picture for every row themselves, where each row has a generator.
    repeats_pictures: ClassVar[bool] = False
    #: Whether its latents have their channels last, [B, frames, h, w, C].
    channels_last: ClassVar[bool] = False
    #: The parts of the text that its layers see, in order, where there are several or attention is joint.
    text_parts: tuple[TextPart, ...] = ()
    #: Why no word is looked for among its text tokens; empty where words are.
    words_refused: str = ""

    def __init__(self, pipe: Any | None, model: Any) -> None:
        self.pipe, self.model = pipe, model

    @property
    def kind(self) -> str:
        """By which conveniences its pipelines are served: those of its family, unless other runs share its layers."""
        return self.family

    @property
    def module(self) -> torch.nn.Module:
        """The model itself, without a wrapper."""
        return identity(self.model)

    @property
    def models(self) -> Mapping[str, Any]:
        """The models that a run calls, by what the paths of their layers begin with: "" where there is one."""
        return {"": self.model}

    def layer(self, path: str) -> Any:
        """The attention layer at a path."""
        return self.module.get_submodule(path)

    def call_of(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        """What a call of one of the models is; layers of the others are not computed in it.

        Raises:
            ValueError: a pipeline's call in which rows have no text of their own.
        """
        call, others = self.read(args, kwargs), tuple(other for other in self.models if other != name)
        if self.pipe is not None and call.half == "as guided":  # HunyuanVideo has one negative prompt for all rows
            _check_texts(args, kwargs)
        return replace(call, left_out=(*call.left_out, *others)) if others else call

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The attention layers, of no size, in execution order."""
        return self.find_sites()

    @abstractmethod
    def find_sites(self) -> tuple[Site, ...]:
        """The attention layers in execution order; raises TypeError for a model of another family."""

    @abstractmethod
    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        """What a call with these arguments is."""

    def longer_texts(self, kwargs: Mapping[str, Any], tokens: Mapping[bool, int]) -> dict[str, Any]:
        """What of a call's named arguments gives its texts at least so many tokens, by padding that is masked.

        Args:
            kwargs: of the call.
            tokens: of calls that see their prompts (True), and of those that do not.

        Returns:
            New values of some arguments; none where texts are as long, or padding has no place behind them.
        """
        return {}

    def step(self, call: ModelCall) -> Step:
        """The step of the scheduler's run that a call belongs to.

        Raises:
            ValueError: a model alone, which has no schedule, or a timestep that is not in it.
        """
        if self.pipe is None:
            raise ValueError(
                f"a {self.word} alone has no schedule: call session.step(index, total) before each {self.word} call"
            )
        return locate_step(self.pipe.scheduler, call.timestep)

    def follow(self) -> Callable[[], None]:
        """Begin to listen to what the pipeline says of its calls; what is returned ends it."""
        return _nothing

    def called(self) -> None:  # noqa: B027  nothing, where calls say of themselves what they are
        """Take note that a call of the pipeline begins."""

    def stepped(self) -> None:  # noqa: B027
        """Take note that the scheduler has made a step."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError for a model, or a pipeline, whose calls an edit cannot describe."""


def _nothing() -> None:
    """What there is to end where nothing was begun."""


def identity(model: Any) -> torch.nn.Module:
    """The module itself, without the wrapper of ``torch.compile``."""
    return getattr(model, "_orig_mod", model)


def is_compiled(model: Any) -> bool:
    """Whether ``torch.compile`` computes a model or some of its blocks."""
    module = identity(model)
    return module is not model or any(part._compiled_call_impl is not None for part in module.modules())


def model_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Latents and text embeddings of a call, or lists of them: a UNet's first and third argument, or named ones."""

    def given(place: int, *names: str) -> Any:
        return args[place] if len(args) > place else next((kwargs[name] for name in names if name in kwargs), None)

    texts = ("encoder_hidden_states", "encoder_hidden_states_t5", "cap_feats")
    return given(0, "sample", "hidden_states", "x"), given(2, *texts)


def _check_texts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a call whose texts are not those of its rows: one text would be spread over all of them."""
    sample, texts = model_inputs(args, kwargs)
    if not (isinstance(sample, torch.Tensor) and isinstance(texts, torch.Tensor)) or len(texts) == len(sample):
        return
    raise ValueError(
        f"expected a text for each of the {len(sample)} rows of latents, got {len(texts)}: where guidance is to end, "
        "diffusers' callbacks (SDCFGCutoffCallback and its like) keep the text of the last prompt alone, for all rows; "
        "in a callback of your own set pipe._guidance_scale = 0.0 and keep the conditional half of each tensor, "
        'such as tensors["prompt_embeds"].chunk(2)[1]'
    )


def is_guided(pipe: Any | None, encoded: bool | None = None) -> bool:
    """Whether the batches of a pipeline's call hold an unconditional half; asked while the call is under way.

    Args:
        pipe: the pipeline.
        encoded: what it encoded, which counts where the pipeline itself does not say.

    Raises:
        ValueError: it cannot be told, or the batch has further parts.
    """
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        raise ValueError("perturbed-attention guidance adds rows to the batch: describe its layout with roles=")
    try:
        guided = bool(pipe.do_classifier_free_guidance)  # type: ignore[union-attr]
    except AttributeError:
        if encoded is not None:
            return encoded
        what = "a model alone" if pipe is None else type(pipe).__name__
        raise ValueError(
            f"{what} does not say whether the batch holds an unconditional half: pass "
            "editing(..., classifier_free_guidance=True or False)"
        ) from None
    if guided and hasattr(type(pipe), "image_guidance_scale"):
        raise ValueError(
            f"{type(pipe).__name__} guides by image too, so its batch has three parts and not two: describe "
            "its layout with roles="
        )
    return guided
