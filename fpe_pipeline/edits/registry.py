"""The methods by name: the one table that the command line, the evaluation and the README read.

A new method is one entry here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.sites import attention_sites
from .base import Edit, check_whole
from .free_prompt import FreePromptEdit
from .local_blend import LocalBlend
from .masactrl import MasaCtrlEdit
from .masks import WordMask
from .plug_and_play import PlugAndPlayEdit
from .prompt_to_prompt import PromptToPromptEdit
from .style_aligned import StyleAlignedEdit

__all__ = ["METHODS", "Method", "make_edit", "method_table", "require_edit"]

# What chooses layers, of which a method takes one; a choice of the caller's replaces the method's own.
_SELECTORS = ("levels", "max_tokens", "layers", "start_layer")
# Free-Prompt-Editing's own limit of tokens, which is level 1 and deeper at 512 px.
_MAX_TOKENS = 32**2
_HALF, _HEAT, _FACTOR = 0.5, 0.5, 2.0

Make = Callable[..., Edit]


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: what command lines call it.
        title: its name in pictures.
        about: its settings in words.
        edit: the class of its edit, whose arguments are its options.
        make: a function of the prompts (the source's first), the tokenizer and options.
        aligns: whether it looks for words, and so cannot do without the tokenizer.
        further: options beside the edit's arguments.
        taken: arguments of the edit that the method gives itself.
        layers: options that choose layers for a model, as a function of its UNet; {} where the edit's own choice
            stands.
    """

    name: str
    title: str
    about: str
    edit: type[Edit]
    make: Make
    aligns: bool = False
    further: tuple[str, ...] = ()
    taken: tuple[str, ...] = ("prompts", "tokenizer", "align")
    layers: Callable[[Any], Mapping[str, Any]] = lambda unet: {}

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        made = inspect.signature(self.edit).parameters
        return (*self.further, *(name for name in made if name not in self.taken))

    def defaults(self, model: Any) -> dict[str, Any]:
        """Its options for a model, a pipeline or a UNet, beyond those that the edit has anyway."""
        return dict(self.layers(getattr(model, "unet", model)))


def make_edit(method: str, prompts: Sequence[str], tokenizer: Any, model: Any = None, **options: Any) -> Edit:
    """The edit of a method, with the layers that suit a model.

    Args:
        method: a key of :data:`METHODS`.
        prompts: the source prompt and its targets.
        tokenizer: the pipeline's; only methods that look for words use it.
        model: the pipeline, or its UNet. Without it, layers are those that suit Stable Diffusion.
        **options: of the method's edit.

    Raises:
        ValueError: an unknown method, or prompts or options that it cannot serve.
        TypeError: an option that the method does not have.
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
    entry = METHODS[method]
    unknown = [name for name in options if name not in entry.options]
    if unknown:
        raise TypeError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(entry.options)}")
    chosen = {} if model is None or options.keys() & set(_SELECTORS) else entry.defaults(model)
    return entry.make(prompts, tokenizer, **chosen, **options)


def method_table() -> str:
    """The methods as a table in Markdown."""
    lines = ["| `--method` | | settings |", "|---|---|---|"]
    lines += [f"| `{m.name}` | {m.title} | {m.about.format(window='in the first 80 % of the steps')} |" for m in _TABLE]
    return "\n".join(lines) + "\n"


def _few_tokens(unet: Any) -> Mapping[str, Any]:
    """All levels of a model whose layers are within the authors' limit of tokens at the model's own size."""
    sample = unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    if height * width > _MAX_TOKENS:
        return {}
    return {"levels": tuple(sorted({site.level for site in attention_sites(unet) if site.kind == "self"}))}


def _decoder(unet: Any) -> Mapping[str, Any]:
    """The decoder, where counting layers as the authors do ends before it."""
    count = sum(site.kind == "self" for site in attention_sites(unet))
    return {"layers": ("up_blocks",)} if MasaCtrlEdit().start_layer >= count else {}


def _free_prompt(prompts: Sequence[str], tokenizer: Any, **options: Any) -> Edit:
    return FreePromptEdit(**options)


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


_P2P = "Prompt-to-Prompt"
_TABLE = (
    Method(
        "fpe",
        "Free-Prompt-Editing",
        "self-attention maps replaced {window}",
        FreePromptEdit,
        _free_prompt,
        layers=_few_tokens,
    ),
    Method(
        "fpe-soft",
        "Free-Prompt-Editing, soft",
        f"fpe at strength {_HALF:g}",
        FreePromptEdit,
        _soft,
        layers=_few_tokens,
    ),
    Method(
        "fpe-regional",
        "Free-Prompt-Editing, regional",
        f"fpe where the heat of the source's object is above {_HEAT:g} of its largest",
        FreePromptEdit,
        _regional,
        aligns=True,
        further=("word", "threshold"),
        taken=("mask",),
        layers=_few_tokens,
    ),
    Method(
        "p2p-replace",
        f"{_P2P} (replace)",
        "cross-attention to 0.8, self-attention to 0.4 of the steps, words aligned by their place",
        PromptToPromptEdit,
        _prompt_to_prompt("replace"),
        aligns=True,
        layers=_few_tokens,
    ),
    Method(
        "p2p-refine",
        f"{_P2P} (refine)",
        "p2p-replace with the words that both prompts have aligned",
        PromptToPromptEdit,
        _prompt_to_prompt("refine"),
        aligns=True,
        layers=_few_tokens,
    ),
    Method(
        "p2p-reweight",
        f"{_P2P} (re-weight)",
        f"p2p-replace, the new word times {_FACTOR:g}",
        PromptToPromptEdit,
        _reweight,
        aligns=True,
        layers=_few_tokens,
    ),
    Method(
        "p2p-blend",
        f"{_P2P} with local blend",
        "p2p-replace, latents kept outside the heat of the object, or of the place that changes",
        PromptToPromptEdit,
        _blend,
        aligns=True,
        further=("words", "threshold", "start"),
        layers=_few_tokens,
    ),
    Method(
        "masactrl",
        "MasaCtrl",
        "from step 4 on, in the decoder",
        MasaCtrlEdit,
        lambda prompts, tokenizer, **options: MasaCtrlEdit(**options),
        layers=_decoder,
    ),
    Method(
        "pnp",
        "Plug-and-Play",
        "maps to 0.5, features to 0.8 of the steps",
        PlugAndPlayEdit,
        lambda prompts, tokenizer, **options: PlugAndPlayEdit(**options),
    ),
    Method(
        "style-aligned",
        "StyleAligned",
        "the source's tokens among the keys",
        StyleAlignedEdit,
        lambda prompts, tokenizer, **options: StyleAlignedEdit(**options),
    ),
)

#: The methods by name.
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def require_edit(edit: Any) -> Edit:
    """The edit; raises TypeError for its class, the name of a method, half of a protocol, and anything else."""
    if isinstance(edit, Edit):
        check_whole(edit)
        return edit
    if isinstance(edit, str):
        known = edit in METHODS
        name, there = (edit, "") if known else (next(iter(METHODS)), f"; there are {', '.join(METHODS)}")
        raise TypeError(
            f"expected an Edit, received the text {edit!r}: write make_edit({name!r}, [source, target], "
            f"pipe.tokenizer){there}"
        )
    if isinstance(edit, type) and issubclass(edit, Edit):
        raise TypeError(
            f"expected an Edit, received the class {edit.__name__}: write {edit.__name__}(…), with its arguments"
        )
    raise TypeError(f"expected an Edit, such as FreePromptEdit(), received {type(edit).__name__}")
