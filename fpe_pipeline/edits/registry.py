"""The methods by name: the one table that the command line, the evaluation and the README read.

A new method is one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.adapters.families import adapter_of
from ..models.sites import attention_sites
from ..texts import did_you_mean
from .base import Edit, check_whole
from .consist_edit import ConsistEdit
from .free_prompt import JOINT_STEPS, FreePromptEdit
from .image_memory import FreeFluxEdit, StableFlowEdit
from .kv_edit import KVEdit
from .local_blend import LocalBlend
from .masactrl import MasaCtrlEdit
from .masks import WordMask
from .method import REQUIRED, Make, Method, Option, Served, Unfit, Wanted, argument_help
from .method_class import class_method, names_a_class
from .plug_and_play import PlugAndPlayEdit
from .prompt_to_prompt import PromptToPromptEdit
from .reflex import ReFlexEdit
from .style_aligned import StyleAlignedEdit
from .value_injection import ValueInjectionEdit

__all__ = ["METHODS", "find_method", "make_edit", "method_table", "methods_of", "require_edit"]

# What chooses layers, of which a method takes one; a choice of the caller's replaces the method's own.
_SELECTORS = ("levels", "max_tokens", "layers", "start_layer")
# Free-Prompt-Editing's own limit of tokens, which is level 1 and deeper at 512 px.
_MAX_TOKENS = 32**2
_HALF, _HEAT, _FACTOR = 0.5, 0.5, 2.0


def find_method(name: str) -> Method:
    """A method by its name, or by the class of its edit.

    Args:
        name: a key of :data:`METHODS`; or ``package.module:Class``, which is imported from the current directory or
            ``sys.path``. Its fields are its options, but for ``prompts`` and ``tokenizer``, which are the call's.

    Raises:
        ValueError: there is none of that name.
    """
    if names_a_class(name):
        return class_method(name)
    if name not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, or an edit's class as package.module:Class, got "
            f"{name!r}; {did_you_mean([name], METHODS)}".removesuffix("; ").rstrip()
        )
    return METHODS[name]


def make_edit(method: str, prompts: Sequence[str], tokenizer: Any, model: Any = None, **options: Any) -> Edit:
    """The edit of a method, with the layers and the window that suit a model: the edit of ``fpe edit --method``.

    Args:
        method: a key of :data:`METHODS`, or ``package.module:Class``; see :func:`find_method`.
        prompts: the source prompt and its targets.
        tokenizer: the pipeline's; only methods that look for words use it.
        model: the pipeline, its UNet or its transformer. Without it, layers and window are those that suit Stable
            Diffusion with a UNet.
        **options: of the method's edit.

    Raises:
        ValueError: an unknown method, or prompts or options that it cannot serve.
        TypeError: an option that the method does not have.
    """
    entry = find_method(method)
    entry.check_options(list(options))
    chosen = {} if model is None or options.keys() & set(_SELECTORS) else entry.defaults(model)
    window = entry.window
    if model is not None and window is not None and window not in options and _is_joint(model):
        chosen[window] = JOINT_STEPS
    return entry.edit_of(prompts, tokenizer, **chosen, **options)


def _is_joint(model: Any) -> bool:
    return any(site.is_joint for site in adapter_of(model).sites)


def method_table() -> str:
    """The methods as a table in Markdown."""
    lines = ["| `--method` | | settings | UNets | transformers |", "|---|---|---|---|---|"]
    window = f"in the first 80 % of the steps, of transformers in {100 * JOINT_STEPS:g} %"
    for m in _TABLE:
        served = " | ".join("✓" if model in m.serves else "" for model in _BOTH)
        lines.append(f"| `{m.name}` | {m.title} | {m.about.format(window=window)} | {served} |")
    return "\n".join(lines) + "\n"


def _few_tokens(unet: Any) -> Mapping[str, Any]:
    """All levels of a model whose layers are within the authors' limit of tokens at the model's own size."""
    sample = unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    if height * width > _MAX_TOKENS:
        return {}
    return {"levels": tuple(sorted({site.level for site in attention_sites(unet) if site.kind == "self"}))}


def _decoder(unet: Any) -> Mapping[str, Any]:
    """The decoder, where the layer that the authors count to in Stable Diffusion 1.x is past the last, or before it, as
    in SDXL, whose encoder and middle have 34."""
    layers = [site for site in attention_sites(unet) if site.kind == "self"]
    start = MasaCtrlEdit().start_layer
    return {} if start < len(layers) and layers[start].place == "up" else {"layers": ("up_blocks",)}


def _soft(prompts: Sequence[str], tokenizer: Any, strength: Any = _HALF, **options: Any) -> Edit:
    return FreePromptEdit(strength=strength, **options)


def _regional(
    prompts: Sequence[str], tokenizer: Any, word: str | None = None, threshold: float | None = _HEAT, **options: Any
) -> Edit:
    if word is None:
        raise ValueError("no word says where maps are to be replaced: pass one of the source prompt as the option word")
    return FreePromptEdit(mask=WordMask(prompts[0], word, tokenizer, threshold=threshold), **options)


def _prompt_to_prompt(align: str) -> Make:
    def make(prompts: Sequence[str], tokenizer: Any, **options: Any) -> Edit:
        return PromptToPromptEdit(prompts, tokenizer, align, **options)  # type: ignore[arg-type]

    return make


def _reweight(prompts: Sequence[str], tokenizer: Any, weights: Any = None, **options: Any) -> Edit:
    source = prompts[0].split()
    new = dict.fromkeys((word for target in prompts[1:] for word in target.split() if word not in source), _FACTOR)
    if weights is None and not new:
        raise ValueError("the target prompt has no word that the source prompt has not: pass the option weights")
    return PromptToPromptEdit(prompts, tokenizer, weights=new if weights is None else weights, **options)


def _blend(
    prompts: Sequence[str],
    tokenizer: Any,
    words: Any = None,
    threshold: float = 0.3,
    start: float = 0.0,
    compat: Any = None,
    **options: Any,
) -> Edit:
    if words is None:
        raise ValueError(
            'no words say what may change: pass the option words, a word of each prompt, such as words=["red","blue"]'
        )
    blend = LocalBlend(prompts, tokenizer, words, threshold, start=start, compat=compat)
    return PromptToPromptEdit(prompts, tokenizer, compat=compat, **options) + blend


def _object(wanted: Wanted) -> Mapping[str, Any]:
    if wanted.object_word is None:
        raise Unfit("no word says where maps are to be replaced: name it as `object` in the prompts file")
    return {"word": wanted.object_word}


def _region(wanted: Wanted) -> Mapping[str, Any]:
    if wanted.region_words is None:
        raise Unfit("no words say what may change: name `object` and `target_object` in the prompts file")
    return {"words": wanted.region_words}


def _drawn(wanted: Wanted) -> Mapping[str, Any]:
    raise Unfit("no picture says which part of the source is kept: pass the option mask")


def _new(wanted: Wanted) -> Mapping[str, Any]:
    if not wanted.new_words:
        raise Unfit("the target prompt has no word that the source prompt has not")
    return {}


_BOTH: tuple[Served, ...] = ("unet", "transformer")
_TRANSFORMERS: tuple[Served, ...] = ("transformer",)
_P2P = "Prompt-to-Prompt"
_TABLE = (
    Method(
        "fpe",
        "Free-Prompt-Editing",
        "self-attention maps replaced {window}",
        FreePromptEdit,
        layers=_few_tokens,
        window="self_replace_steps",
        serves=_BOTH,
    ),
    Method(
        "fpe-soft",
        "Free-Prompt-Editing, soft",
        f"fpe at strength {_HALF:g}",
        FreePromptEdit,
        _soft,
        further=(Option("strength", _HALF, argument_help(FreePromptEdit)["strength"]),),
        layers=_few_tokens,
        window="self_replace_steps",
        serves=_BOTH,
    ),
    Method(
        "fpe-regional",
        "Free-Prompt-Editing, regional",
        f"fpe where the heat of the source's object is above {_HEAT:g} of its largest",
        FreePromptEdit,
        _regional,
        further=(
            Option("word", REQUIRED, "a word or phrase of the source prompt: maps are replaced where its heat is"),
            Option("threshold", _HEAT, "share of the largest heat from which on they are; null for the heat itself"),
        ),
        taken=("mask",),
        layers=_few_tokens,
        settings=_object,
        window="self_replace_steps",
        serves=_BOTH,
    ),
    Method(
        "p2p-replace",
        f"{_P2P} (replace)",
        "cross-attention to 0.8, self-attention to 0.4 of the steps, words aligned by their place",
        PromptToPromptEdit,
        _prompt_to_prompt("replace"),
        taken=("align",),
        layers=_few_tokens,
        serves=_BOTH,
    ),
    Method(
        "p2p-refine",
        f"{_P2P} (refine)",
        "p2p-replace with the words that both prompts have aligned",
        PromptToPromptEdit,
        _prompt_to_prompt("refine"),
        taken=("align",),
        layers=_few_tokens,
        serves=_BOTH,
    ),
    Method(
        "p2p-reweight",
        f"{_P2P} (re-weight)",
        f"p2p-replace, the new word times {_FACTOR:g}",
        PromptToPromptEdit,
        _reweight,
        further=(
            Option("weights", None, f"factors of words of the targets; none is {_FACTOR:g} for each that is new"),
        ),
        taken=("align",),
        layers=_few_tokens,
        settings=_new,
        serves=_BOTH,
    ),
    Method(
        "p2p-blend",
        f"{_P2P} with local blend",
        "p2p-replace, latents kept outside the heat of the object, or of the place that changes",
        PromptToPromptEdit,
        _blend,
        further=(
            Option("words", REQUIRED, "a word of each prompt, or several, around which latents may change"),
            Option("threshold", 0.3, argument_help(LocalBlend)["threshold"]),
            Option("start", 0.0, argument_help(LocalBlend)["start"]),
        ),
        taken=("align",),
        layers=_few_tokens,
        settings=_region,
        serves=_BOTH,
    ),
    Method("masactrl", "MasaCtrl", "from step 4 on, in the decoder", MasaCtrlEdit, layers=_decoder, serves=_BOTH),
    Method("pnp", "Plug-and-Play", "maps to 0.5, features to 0.8 of the steps", PlugAndPlayEdit),
    Method("style-aligned", "StyleAligned", "the source's tokens among the keys", StyleAlignedEdit),
    Method("consistedit", "ConsistEdit", "image queries and keys of the source", ConsistEdit, serves=_TRANSFORMERS),
    Method(
        "stable-flow",
        "Stable Flow",
        "image keys and values of the source, in vital layers",
        StableFlowEdit,
        serves=_TRANSFORMERS,
    ),
    Method(
        "reflex",
        "ReFlex",
        "blocks of the map after the softmax, words aligned by what both prompts have",
        ReFlexEdit,
        taken=("source_of",),
        serves=_TRANSFORMERS,
    ),
    Method(
        "freeflux",
        "FreeFlux",
        "image keys and values of the source, in layers by task",
        FreeFluxEdit,
        serves=_TRANSFORMERS,
    ),
    Method(
        "value-injection",
        "RF-Solver-Edit, FireFlow",
        "values of the source under the target's own maps, in late layers",
        ValueInjectionEdit,
        serves=_TRANSFORMERS,
    ),
    Method(
        "kv-edit",
        "KV-Edit",
        "image keys, values and latents of the source where a mask is white",
        KVEdit,
        further=(Option("mask", REQUIRED, argument_help(KVEdit)["mask"]),),
        settings=_drawn,
        serves=_TRANSFORMERS,
    ),
)

#: The methods by name.
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def methods_of(model: Served) -> dict[str, Method]:
    """The methods of one kind of model, by name."""
    return {name: method for name, method in METHODS.items() if model in method.serves}


def require_edit(edit: Any) -> Edit:
    """The edit; raises TypeError for its class, the name of a method, half of a protocol, and anything else."""
    if isinstance(edit, Edit):
        check_whole(edit)
        return edit
    if isinstance(edit, str):
        name, there = edit, ""
        if edit not in METHODS:
            name, there = next(iter(METHODS)), f"; {did_you_mean([edit], METHODS)}there are {', '.join(METHODS)}"
        raise TypeError(
            f"expected an Edit, got the text {edit!r}: write make_edit({name!r}, [source, target], "
            f"pipe.tokenizer){there}"
        )
    if isinstance(edit, type) and issubclass(edit, Edit):
        raise TypeError(
            f"expected an Edit, got the class {edit.__name__}: write {edit.__name__}(…), with its arguments"
        )
    raise TypeError(f"expected an Edit, such as FreePromptEdit(), got {type(edit).__name__}")
