"""Every edit of joint attention on every family of transformers, once by the package and once by dense layers.

A rule says what tokens, or what blocks of the map, a target's row takes of its source at a step. It is written from the
papers for one source and one target; where the rows of a call are which is the family's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fpe_pipeline import (
    ConsistEdit,
    FreeFluxEdit,
    FreePromptEdit,
    KVEdit,
    MasaCtrlEdit,
    PromptToPromptEdit,
    ReFlexEdit,
    StableFlowEdit,
    ValueInjectionEdit,
    editing,
)
from fpe_pipeline.prompts.alignment import align_refine, align_replace
from tests.support.dense_joint import Blocks, dense
from tests.support.flow_pipelines import edited_with, solving
from tests.support.placed_words import T5, columns, placed
from tests.support.tiny_chroma import draw_chroma, tiny_chroma_pipeline, tiny_masked_chroma
from tests.support.tiny_flux2 import CONVERSATION, INSTRUCTION, READ
from tests.support.tiny_language import draw_prompts, tiny_lumina_that_reads, tiny_qwen_that_reads
from tests.support.tiny_lumina import dense_lumina
from tests.support.tiny_transformers import draw, draw_flux, tiny_flux_pipeline, tiny_sd3_pipeline

__all__ = ["EDITS", "FAULTS", "LONGER", "MODELS", "SOURCE", "STEPS", "Case", "Model"]
__all__ += ["edited", "inverted", "placed", "reference", "shows", "unedited"]

STEPS = 4
SOURCE = "a photo of a red car on a mountain"
#: Of as many words as the source, and of other numbers of words.
SWAPPED = ("a photo of a big car on a mountain", "a photo of a red dog on a house", "a drawing of a red car on a house")
LONGER = ("a photo of a red car on a snow mountain in winter", "a red car", "a house in winter, a photo of a red dog")
_WHOLE = ("q_image", "k_image", "q_text", "k_text", "q_pad", "k_pad")  # Z-Image fills images up


@dataclass(frozen=True)
class Model:
    """A family, and how its pipeline is called.

    Args:
        make: the pipeline, from the one whose tokenizer it takes.
        run: its latents for prompts; takes ``size`` as latents have it.
        options: of every call.
        is_doubled: whether a call holds both halves; otherwise the first of a step's two calls sees the prompts.
        is_guided: whether there are rows that see the negative prompt at all.
        norms: whether queries are normed or turned before they attend.
    """

    make: Callable[[Any], Any]
    run: Callable[..., torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    is_doubled: bool = False
    is_guided: bool = True
    norms: bool = True
    family: str = "flux"

    def roles(self, row: int, rows: int, calls: int, prompts: int) -> tuple[int, int, bool]:
        """The source's row, the number of the row's prompt, and whether it sees its prompt."""
        source = row // prompts * prompts
        seen = source > 0 or rows == prompts if self.is_doubled else calls % 2 == 1 or not self.is_guided
        return source, row - source, seen

    def dense(self, pipe: Any, rule: Any, layers: str, fault: str | None) -> Any:
        """A block in which layers whose paths begin so follow a rule, written out; its state says where a run is."""
        if self.family == "lumina":
            return dense_lumina(pipe, rule, fault=fault)
        return dense(pipe, rule, steps=range(STEPS), layers=layers, fault=fault)

    def template(self, pipe: Any) -> Any:
        """The text before and after a prompt, and how many of its first tokens the model does not receive."""
        if self.family == "qwen":
            return *pipe.prompt_template_encode.split("{}"), pipe.prompt_template_encode_start_idx
        said = {"klein": CONVERSATION, "flux2": INSTRUCTION}.get(self.family)
        before, _, after = (said or f"{pipe.system_prompt} <Prompt Start> {{}}").rpartition("{}")
        return before, after, 0

    def tokenizer(self, pipe: Any) -> Any:
        return pipe.tokenizer

    def fits(self, size: tuple[int, int]) -> tuple[int, int]:
        """A size of latents that the model makes, near another."""
        return size

    def texts(self, longest: int) -> int:
        return READ if self.family in ("klein", "flux2") else longest  # that the model receives


def _sd3(shape: str) -> Callable[[Any], Any]:
    return lambda pipe: tiny_sd3_pipeline(pipe, shape)


_SKIP = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
_GUIDED = {"guidance_scale": 3.0, "negative_prompt": "a drawing"}
_NEGATIVE = {"true_cfg_scale": 3.0, "negative_prompt": "a drawing"}
MODELS = {
    "SD3": Model(_sd3("sd3"), draw, is_doubled=True, norms=False, family="sd3"),
    "SD3.5": Model(_sd3("sd3.5"), draw, is_doubled=True, family="sd3"),
    "SD3.5, a layer skipped": Model(_sd3("sd3.5"), draw, _SKIP, is_doubled=True, family="sd3"),
    "FLUX": Model(tiny_flux_pipeline, draw_flux, is_guided=False),
    "FLUX, guided": Model(tiny_flux_pipeline, draw_flux, _NEGATIVE),
    "Chroma": Model(tiny_chroma_pipeline, draw_chroma, _GUIDED, family="chroma"),
    "Chroma, padding left out": Model(tiny_masked_chroma, draw_chroma, is_guided=False, family="chroma"),
    "Qwen-Image": Model(lambda pipe: tiny_qwen_that_reads(), draw_prompts, family="qwen"),
    "Lumina 2": Model(lambda pipe: tiny_lumina_that_reads(), draw_prompts, family="lumina"),
}


@dataclass(frozen=True)
class Case:
    """An edit and its rule.

    Args:
        edit: of the package.
        at: from step, number of the target's prompt, and rows of source and target to what the target becomes.
        both: whether rows that see the negative prompt follow it as well.
        layers: the beginning of the paths of the layers that do.
        pastes: by token, whether the target's latents are the source's after a step.
    """

    edit: Any
    at: Callable[[int, int, int, int], Any]
    both: bool = False
    layers: str = ""
    pastes: torch.Tensor | None = None


def _taking(*names: str) -> Callable[[int, int], Any]:
    return lambda source, target: [(1.0, dict.fromkeys(names, source))]


def _within(steps: Any, rule: Callable[[int, int], Any]) -> Callable[[int, int, int, int], Any]:
    return lambda step, number, source, target: rule(source, target) if step in steps else None


def _left(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask as a picture, and by token: white in the first two columns of tokens."""
    height, width = size[0] // 2, size[1] // 2
    tokens = torch.zeros(height, width, dtype=torch.float64)
    tokens[:, :2] = 1
    return tokens.repeat_interleave(16, 0).repeat_interleave(16, 1), tokens.flatten()


def _mixed(share: torch.Tensor, *names: str, whole: tuple[str, ...] = ()) -> Callable[[int, int], Any]:
    return lambda source, target: [(1.0, dict.fromkeys(names, (source, target, share)) | dict.fromkeys(whole, source))]


def _fpe(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    return Case(FreePromptEdit(0.5), _within((0, 1), _taking("q_image", "k_image")))


def _fpe_whole(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    return Case(FreePromptEdit(0.5, scope="joint"), _within((0, 1), _taking(*_WHOLE)))


def _fpe_mask(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    picture, share = _left(size)

    def rule(source: int, target: int) -> Any:
        return [(share, {"q_image": source, "k_image": source}), (1 - share, {})]

    return Case(FreePromptEdit(1.0, mask=picture), _within(range(STEPS), rule))


def _consistedit(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    return Case(ConsistEdit(0.5), _within((0, 1), _taking("q_image", "k_image")), both=True, layers=_single(model))


def _consistedit_mask(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    picture, share = _left(size)
    early = _mixed(share, "v_image", whole=("q_image", "k_image"))
    late = _mixed(share, "q_image", "k_image", "v_image")

    def at(step: int, number: int, source: int, target: int) -> Any:
        return (early if step < 2 else late)(source, target)

    return Case(ConsistEdit(0.5, mask=picture), at, both=True, layers=_single(model))


def _single(model: Model) -> str:
    """ConsistEdit edits FLUX's single blocks, and all layers of a model that has none."""
    if model.family == "hidream":
        return "single_stream_blocks"
    if model.family == "easyanimate":
        return "transformer_blocks.2"
    families = ("flux", "flux2", "klein", "chroma", "hunyuan_video", "ovis", "longcat", "aura", "fibo", "motif_video")
    return "single_transformer_blocks" if model.family in families else ""


def _all(pipe: Any) -> Any:
    """A name for all layers of joint attention."""
    from fpe_pipeline.models.adapters.families import adapter_of

    return [site.index for site in adapter_of(pipe).sites if site.kind == "joint"]


def _masactrl(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    edit = MasaCtrlEdit(1, layers=_all(pipe))
    return Case(edit, _within((1, 2, 3), _taking("k_image", "v_image")), both=True)


def _stable_flow(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    edit = StableFlowEdit(0.75, layers=_all(pipe))
    return Case(edit, _within(range(3), _taking("k_image", "v_image")), both=True)


def _free_flux(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    picture, share = _left(size)
    edit = FreeFluxEdit("add", mask=picture, layers=_all(pipe), steps=0.75)
    return Case(edit, _within(range(3), _mixed(share, "k_image", "v_image")), both=True)


def _background(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    picture, share = _left(size)
    edit = FreeFluxEdit("background", mask=picture, layers=_all(pipe), steps=0.75)
    return Case(edit, _within(range(3), _mixed(share, "v_image")), both=True)


def _values(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    edit = ValueInjectionEdit(0.5, layers=_all(pipe))
    return Case(edit, _within((0, 1), _taking("v_image", "v_text", "v_pad")), both=True)


def _kv_edit(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    picture, share = _left(size)
    at = _within(range(STEPS), _mixed(share, "k_image", "v_image"))
    return Case(KVEdit(mask=picture), at, both=True, pastes=share.bool())


def _words(align: Any, image_steps: Any, text_steps: Any) -> Callable[..., Callable[..., Any]]:
    def rule(model: Model, pipe: Any, prompts: Any) -> Callable[..., Any]:
        text = [None, *(columns(model, pipe, align, prompts, number) for number in range(1, len(prompts)))]

        def at(step: int, number: int, source: int, target: int) -> Any:
            taken = text[number] if step in text_steps else None
            image = step in image_steps
            return Blocks(source, image=image, text=taken) if image or taken is not None else None

        return at

    return rule


def _p2p(kind: str, align: Any) -> Callable[..., Case]:
    def case(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
        edit = PromptToPromptEdit(
            prompts, model.tokenizer(pipe), kind, cross_replace_steps=0.6, self_replace_steps=0.25
        )
        return Case(edit, _words(align, (0,), (0, 1, 2))(model, pipe, prompts))

    return case


def _reflex(model: Model, pipe: Any, prompts: Any, size: Any) -> Case:
    edit = ReFlexEdit(prompts, model.tokenizer(pipe), text_steps=3, image_steps=2, layers=_all(pipe))
    return Case(edit, _words(align_refine, (0, 1), (0, 1, 2))(model, pipe, prompts))


#: By name, what makes a case from a model, its pipeline, the prompts and a size of latents; the prompts that it takes.
EDITS: dict[str, tuple[Callable[..., Case], tuple[str, ...]]] = {
    "FPE": (_fpe, LONGER),
    "FPE, the whole map": (_fpe_whole, LONGER),
    "FPE, a mask": (_fpe_mask, LONGER),
    "ConsistEdit": (_consistedit, LONGER),
    "ConsistEdit, a mask": (_consistedit_mask, LONGER),
    "MasaCtrl": (_masactrl, LONGER),
    "Stable Flow": (_stable_flow, LONGER),
    "FreeFlux, add": (_free_flux, LONGER),
    "FreeFlux, background": (_background, LONGER),
    "value injection": (_values, LONGER),
    "KV-Edit": (_kv_edit, LONGER),
    "Prompt-to-Prompt, replaced words": (_p2p("replace", align_replace), SWAPPED),
    "Prompt-to-Prompt, refined": (_p2p("refine", align_refine), LONGER),
    "ReFlex": (_reflex, LONGER),
}
#: Mistakes that the dense run is made with: each has to show.
FAULTS = ("swapped", "before places", "the other half", "a step off")
_WHOLE_SEQUENCE = {"FPE, the whole map", "value injection"}
_OWN_QUERIES = {"MasaCtrl", "Stable Flow", "FreeFlux, add", "FreeFlux, background", "value injection", "KV-Edit"}


def shows(fault: str, model: Model, edit: str) -> bool:
    """Whether a mistake is one: some say nothing where a model or an edit has nothing that it could confuse."""
    if fault == "swapped":
        return edit not in _WHOLE_SEQUENCE
    if fault == "before places":
        return model.norms and edit not in _OWN_QUERIES
    if model.family == "ideogram4" and edit.startswith("Prompt-to-Prompt"):
        # Its other half reads no text: while only the first step's images are edited, all of its rows are alike.
        return fault != "the other half"
    return fault != "the other half" or model.is_guided


def edited(pipe: Any, model: Model, case: Case, prompts: Any, **options: Any) -> torch.Tensor:
    """Latents by the package."""
    with editing(pipe, case.edit):
        return unedited(pipe, model, prompts, **options)


def unedited(pipe: Any, model: Model, prompts: Any, **options: Any) -> torch.Tensor:
    """Latents by diffusers."""
    return model.run(pipe, prompts, **_options(model, prompts), **options)


def reference(
    pipe: Any, model: Model, case: Case, prompts: Any, fault: str | None = None, held: Any = None, **options: Any
) -> torch.Tensor:
    """Latents by dense layers.

    Args:
        fault: of :data:`FAULTS`.
        held: the source's latents after each step, where it follows an inverted image.
    """

    def rule(row: int, rows: int) -> Any:
        source, number, seen = model.roles(row, rows, state["calls"], len(prompts))
        follows = seen or case.both
        if fault == "the other half":
            follows = seen if case.both else True
        step = state["step"] - (fault == "a step off")
        return case.at(step, number, source, row) if number and follows else None

    def between(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents = tensors["latents"].clone()
        if held is not None:
            latents[0] = held[index]
        if case.pastes is not None:
            white = case.pastes[:, None]
            if latents.ndim > 3:
                height, width = (side // 2 for side in latents.shape[-2:])
                white = torch.kron(case.pastes.reshape(height, width), torch.ones(2, 2, dtype=torch.bool))
            latents[1:] = torch.where(white, latents[:1], latents[1:])
        return {"latents": latents}

    planted = fault if fault in ("swapped", "before places") else None
    with model.dense(pipe, rule, case.layers, planted) as state:
        return unedited(pipe, model, prompts, callback_on_step_end=between, **options)


def _options(model: Model, prompts: Any) -> dict[str, Any]:
    options = dict(model.options)
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(prompts)
    return options


def inverted(
    pipe: Any, model: Model, case: Case, prompts: Any, size: tuple[int, int]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The edit of an inverted image by the package's pipeline, and how a dense run follows it."""
    ours = solving(edited_with(pipe), "euler")
    pipe.scheduler = ours.scheduler
    if model.family == "qwen":  # as long as the tiny tokenizer makes it
        ours.prompt_template_encode_start_idx = pipe.prompt_template_encode_start_idx
    photo = torch.rand(3, size[0] * 8, size[1] * 8, generator=torch.Generator().manual_seed(3))
    given = {"num_inference_steps": STEPS, "height": size[0] * 8, "width": size[1] * 8}
    texts = {} if model.family in ("qwen", "lumina") else {"max_sequence_length": T5}
    inversion = ours.invert(photo, SOURCE, **given, **texts)
    options = {**_options(model, prompts), **texts, "output_type": "latent"}
    if model.family in ("qwen", "lumina"):
        told = "true_cfg_scale" if model.family == "qwen" else "guidance_scale"
        options |= {"negative_prompt": "a drawing", told: 3.0}
    if model.is_doubled:
        options["guidance_scale"] = 4.0
    actual = ours(inversion=inversion, target_prompt=list(prompts[1:]), edit=case.edit, **options).images
    noise = inversion.noise.repeat(len(prompts), *[1] * (inversion.noise.ndim - 1))
    return actual, {"held": inversion.latents[:-1].flip(0)[:, 0], "latents": noise, "size": size}
