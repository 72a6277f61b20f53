"""The families of models that `FreePromptPipeline` serves, and what they differ in before any weights are read.

A new family is one entry of :data:`FAMILIES`: whoever loads a model, fills in what was not said or refuses what cannot
be asked for reads it there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

__all__ = [
    "FAMILIES",
    "FAMILY_OF",
    "FLOW_INVERSIONS",
    "FLOW_WINDOW",
    "SHORT_WINDOW",
    "UNET_INVERSIONS",
    "Distilled",
    "Family",
    "Served",
    "ServedFamily",
    "family_of",
    "titles",
]

Family = Literal[
    "unet", "sdxl", "pixart_alpha", "pixart_sigma", "sd3", "flux", "flux2", "flux2_klein", "ovis", "longcat", "bria",
    "qwen", "qwen21", "chroma", "lumina2", "z_image", "cogview4", "krea2", "aura_flow",
    "ideogram4", "nucleus", "hunyuan_image", "kandinsky5", "bria_fibo", "cogview3",
]  # fmt: skip
#: By which layers a model is edited: self- and cross-attention, or joint attention. Methods say which they serve.
Served = Literal["unet", "transformer"]

_OfUNets = Literal["ddim", "direct", "null-text", "negative-prompt"]
_OfFlows = Literal["direct", "reference", "free"]
#: How models of each kind invert pictures, the default first; those of `fpe_pipeline.inversion`, which takes seconds to
#: import.
UNET_INVERSIONS: tuple[_OfUNets, ...] = get_args(_OfUNets)
FLOW_INVERSIONS: tuple[_OfFlows, ...] = get_args(_OfFlows)
#: The steps in which Shin et al. replace maps of joint attention.
FLOW_WINDOW = (0.0, 0.2)
#: Of runs so short that a fifth of their steps is none.
SHORT_WINDOW = (0.0, 0.25)


class Distilled(NamedTuple):
    """How a model says that it was distilled to do without guidance.

    Args:
        part: of the pipeline whose configuration says it; "" for the pipeline's own.
        entry: of that.
        value: of the entry.
        hears_guidance: whether its pipeline guides it all the same where it is told to.
    """

    part: str
    entry: str
    value: bool = True
    hears_guidance: bool = False


#: In what a model is called, that it was distilled to few steps without guidance.
_TURBO = re.compile(r"(?<![a-z])turbo(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class ServedFamily:
    """What a family's models have in common.

    Args:
        title: what lists of families call it.
        words: what its models are, after "is".
        classes: pipelines by the names that diffusers saves; those of this package save the same.
        defaults: of a run, where they are not those of Stable Diffusion with a UNet: ``steps``, ``guidance``.
        kind: by which layers it is edited.
        is_flow: whether its noise is taken away along a flow, and not by DDIM.
        is_unet: whether its layers are of several sizes, and edits choose among levels.
        inversions: of pictures, the default first.
        patch: latent pixels across a token: a number, or the entry of the transformer's configuration that says it.
        guidance: what its calls name the guidance.
        unguided: the guidance up to which there is none.
        guides: whether guidance is by rows, or calls, that do not see their prompts; else the model is told it.
        no_negative: why there is no negative prompt, after what the model is; None where there is one.
        distilled: how models say that they do without guidance; None where there are none, or none that say it.
        of_distilled: defaults of such models.
        of_turbo: defaults of models that are called "Turbo", which say it nowhere else.
        cuda_dtype: in which it runs on GPUs where nothing is said; others overflow in float16.
        is_recorded: whether what a run computes of its source can be kept, for edits that are known later.
    """

    title: str
    words: str
    classes: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    kind: Served = "unet"
    is_flow: bool = False
    is_unet: bool = False
    inversions: tuple[str, ...] = UNET_INVERSIONS
    patch: int | str = 1
    guidance: Literal["guidance_scale", "true_cfg_scale"] = "guidance_scale"
    unguided: float = 1.0
    guides: bool = True
    no_negative: str | None = None
    distilled: Distilled | None = None
    of_distilled: Mapping[str, Any] = field(default_factory=dict)
    of_turbo: Mapping[str, Any] = field(default_factory=dict)
    cuda_dtype: Literal["float16", "bfloat16"] = "float16"
    is_recorded: bool = True

    @property
    def public_name(self) -> str:
        """Of the class of this package that edits with its models."""
        name = self.classes[0].replace("StableDiffusion3", "SD3").replace("StableDiffusion", "")
        return f"FreePrompt{name}"

    def is_distilled(self, config_of: Callable[[str], Mapping[str, Any]]) -> bool:
        """Whether a model says that it does without guidance.

        Args:
            config_of: the configuration of a part of its pipeline; of "", the pipeline's own.
        """
        said = self.distilled
        return said is not None and config_of(said.part).get(said.entry) is said.value

    def is_turbo(self, name: str) -> bool:
        """Whether a model is called "Turbo": a hub's name, or the last part of a path."""
        return (
            bool(self.of_turbo) and _TURBO.search(name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]) is not None
        )

    def told(self, guidance: float, negative: str | None) -> dict[str, Any]:
        """Options of a call: how strongly it is guided, and by what it is guided away.

        Where guidance is by a negative prompt alone, the empty one stands for none, as in other families.
        """
        if negative is None and self.guidance == "true_cfg_scale" and guidance > self.unguided:
            negative = ""
        return {self.guidance: guidance} | ({} if negative is None else {"negative_prompt": negative})


def _flow(title: str, *classes: str, **different: Any) -> ServedFamily:
    defaults = {"self_replace": FLOW_WINDOW, "inversion": "direct", "steps": 28, **different.pop("defaults")}
    given = {
        "words": f"a transformer of {title}'s kind",
        "inversions": FLOW_INVERSIONS,
        "cuda_dtype": "bfloat16",
        **different,
    }
    return ServedFamily(title, classes=classes, defaults=defaults, kind="transformer", is_flow=True, **given)


def _pixart(name: str) -> ServedFamily:
    return ServedFamily(
        "PixArt",
        "a transformer of PixArt's kind",
        (f"PixArt{name}Pipeline",),
        {"steps": 20, "guidance": 4.5},
        inversions=tuple(each for each in UNET_INVERSIONS if each != "null-text"),
        patch="patch_size",
    )


_TOLD = "which is told its guidance and has no unconditional half"
#: The families by name.
FAMILIES: dict[Family, ServedFamily] = {
    "unet": ServedFamily("Stable Diffusion 1.x and 2.x", "a UNet", ("StableDiffusionPipeline",), is_unet=True),
    "sdxl": ServedFamily(
        "SDXL", "a UNet of SDXL's kind", ("StableDiffusionXLPipeline",), {"guidance": 5.0}, is_unet=True
    ),
    "pixart_alpha": _pixart("Alpha"),
    "pixart_sigma": _pixart("Sigma"),
    "sd3": _flow(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        defaults={"guidance": 7.0},
        patch="patch_size",
        of_turbo={"steps": 4, "guidance": 0.0, "self_replace": SHORT_WINDOW},
        cuda_dtype="float16",
    ),
    "flux": _flow(
        "FLUX.1",
        "FluxPipeline",
        defaults={"guidance": 3.5},
        patch=2,
        guides=False,
        no_negative=_TOLD,
        distilled=Distilled("transformer", "guidance_embeds", False),
        of_distilled={"steps": 4, "guidance": 0.0, "self_replace": SHORT_WINDOW},
        cuda_dtype="float16",
    ),
    "flux2": _flow(
        "FLUX.2", "Flux2Pipeline", defaults={"steps": 50, "guidance": 4.0}, patch=2, guides=False, no_negative=_TOLD
    ),
    "flux2_klein": _flow(
        "FLUX.2",
        "Flux2KleinPipeline",
        defaults={"steps": 50, "guidance": 4.0},
        patch=2,
        no_negative="which is guided by the empty prompt alone",
        distilled=Distilled("", "is_distilled"),
        of_distilled={"steps": 4, "guidance": 1.0, "self_replace": SHORT_WINDOW},
    ),
    "ovis": _flow("Ovis-Image", "OvisImagePipeline", defaults={"steps": 50, "guidance": 5.0}, patch=2),
    "longcat": _flow("LongCat-Image", "LongCatImagePipeline", defaults={"steps": 50, "guidance": 4.5}, patch=2),
    "bria": _flow("Bria", "BriaPipeline", defaults={"steps": 30, "guidance": 5.0}, patch=2),
    "qwen": _flow(
        "Qwen-Image", "QwenImagePipeline", defaults={"steps": 50, "guidance": 4.0}, patch=2, guidance="true_cfg_scale"
    ),
    "qwen21": _flow(
        "Qwen-Image 2.1",
        "QwenImage21Pipeline",
        defaults={"steps": 40, "guidance": 1.0},
        patch=2,
        guidance="true_cfg_scale",
    ),
    "chroma": _flow("Chroma", "ChromaPipeline", defaults={"steps": 35, "guidance": 5.0}, patch=2),
    "lumina2": _flow(
        "Lumina 2",
        "Lumina2Pipeline",
        "Lumina2Text2ImgPipeline",  # as diffusers called it once
        defaults={"steps": 30, "guidance": 4.0},
        patch="patch_size",
    ),
    "z_image": _flow(
        "Z-Image",
        "ZImagePipeline",
        defaults={"steps": 50, "guidance": 5.0},
        patch="all_patch_size",
        unguided=0.0,
        of_turbo={"steps": 9, "guidance": 0.0, "self_replace": SHORT_WINDOW},
    ),
    "cogview4": _flow("CogView 4", "CogView4Pipeline", defaults={"steps": 50, "guidance": 5.0}, patch="patch_size"),
    "krea2": _flow(
        "Krea 2",
        "Krea2Pipeline",
        defaults={"guidance": 4.5},
        patch=2,
        unguided=0.0,
        distilled=Distilled("", "is_distilled", hears_guidance=True),
        of_distilled={"steps": 8, "guidance": 0.0, "self_replace": SHORT_WINDOW},
    ),
    "aura_flow": _flow("AuraFlow", "AuraFlowPipeline", defaults={"steps": 50, "guidance": 3.5}, patch="patch_size"),
    "ideogram4": _flow(
        "Ideogram 4",
        "Ideogram4Pipeline",
        defaults={"steps": 48, "guidance": 7.0},
        patch=2,
        no_negative="which is guided by a model of its own that sees no text",
        is_recorded=False,
    ),
    "nucleus": _flow(
        "Nucleus-Image", "NucleusMoEImagePipeline", defaults={"steps": 50, "guidance": 4.0}, patch="patch_size"
    ),
    "hunyuan_image": _flow(
        "HunyuanImage 2.1",
        "HunyuanImagePipeline",
        defaults={"steps": 50, "guidance": 3.5},
        patch=2,
        distilled=Distilled("transformer", "guidance_embeds", hears_guidance=True),
        of_distilled={"steps": 8, "guidance": 3.25, "self_replace": SHORT_WINDOW},
    ),
    "kandinsky5": ServedFamily(
        "Kandinsky 5",
        "a transformer of Kandinsky 5's kind",
        ("Kandinsky5T2IPipeline",),
        {"inversion": "direct", "steps": 50, "guidance": 3.5},
        is_flow=True,
        inversions=FLOW_INVERSIONS,
        patch=2,
        cuda_dtype="bfloat16",
    ),
    "cogview3": ServedFamily(
        "CogView 3 Plus",
        "a transformer of CogView 3 Plus's kind",
        ("CogView3PlusPipeline",),
        {"guidance": 5.0, "self_replace": FLOW_WINDOW},
        kind="transformer",
        inversions=tuple(each for each in UNET_INVERSIONS if each != "null-text"),
        patch="patch_size",
        cuda_dtype="bfloat16",
    ),
    "bria_fibo": _flow("Bria FIBO", "BriaFiboPipeline", defaults={"steps": 30, "guidance": 5.0}),
}
#: The family of a pipeline by the name of its class, as diffusers or this package calls it.
FAMILY_OF: dict[str, Family] = {name: family for family, served in FAMILIES.items() for name in served.classes}
FAMILY_OF |= {served.public_name: family for family, served in FAMILIES.items()}


def family_of(pipe: Any) -> Family:
    """The family of a loaded pipeline, of diffusers' or of this package's; of another one that of UNets."""
    return next((FAMILY_OF[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in FAMILY_OF), "unet")


def titles(kind: Served | None = None) -> str:
    """What the families of a kind, or all of them, are called, in a sentence."""
    found = dict.fromkeys(served.title for served in FAMILIES.values() if kind in (None, served.kind))
    *most, last = found
    return f"{', '.join(most)} and {last}"
