"""The column of fields: what is to be made. Every tab works from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ..edits.method import REQUIRED
from ..edits.registry import METHODS, methods_of
from ..models.served_families import FAMILIES, Family
from ..runs.settings import Settings
from .choices import AnyOf, ManyOf
from .labels import LABELS
from .models import vocabulary
from .prompts import EXAMPLES, differences, with_word
from .requests import FIELDS, MOST_OPTIONS, Limits, defaults, fields_of, first_fields, new_seed, options_of

__all__ = ["Recipe", "build"]

_WINDOW = """
<div class="fpe-window" style="--a:${value[0]};--b:${value[1]}">
<div class="top"><span>Steps with the source's self-attention</span><output>${value[0]} – ${value[1]}</output></div>
<div class="track"><i></i>
<input type="range" min="0" max="1" step="0.05" value="${value[0]}" aria-label="first step, as a share of all">
<input type="range" min="0" max="1" step="0.05" value="${value[1]}" aria-label="last step, as a share of all">
</div></div>
"""
# A value that is set draws the template anew, which takes the focus from the handle: it is given back.
_WINDOW_JS = """
const ends = () => [...element.querySelectorAll('input')];
const order = () => ends().map(input => Number(input.value)).sort((a, b) => a - b);
element.addEventListener('input', () => {
  const [a, b] = order(), box = element.querySelector('.fpe-window');
  box.style.setProperty('--a', a); box.style.setProperty('--b', b);
  element.querySelector('output').textContent = a + ' – ' + b;
});
element.addEventListener('change', event => {
  const which = ends().indexOf(event.target);
  props.value = order();
  requestAnimationFrame(() => { if (ends()[which]) ends()[which].focus(); });
});
"""


@dataclass
class Recipe:
    """The fields by name, and what stands beside them.

    Args:
        fields: by the names of :data:`~fpe_pipeline.studio.requests.FIELDS`.
        about: what the method does.
        words: that the model draws, where these are known.
        options: text fields, of which a method with n options shows the first n.
    """

    model: Any
    fields: dict[str, Any]
    about: Any
    words: Any
    options: list[Any]
    locked: Any
    inputs: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = [self.model, *(self.fields[name] for name in FIELDS), *self.options]

    def updates(
        self, settings: Settings, family: Family | None = None, layers: Sequence[tuple[str, str]] = ()
    ) -> list[Any]:
        """What puts settings into the fields, in the order of :attr:`restored`.

        Args:
            family, layers: of the settings' model, where the fields offer what another one has.
        """
        fields = fields_of(settings)
        choices: dict[str, Any] = {}
        if family is not None:
            choices = {"method": {"choices": _titles(family)}, "layers": {"choices": list(layers)}}
        choices["self_replace"] = {"visible": METHODS[settings.method].window is not None}
        return [
            *(gr.update(value=fields[name], **choices.get(name, {})) for name in FIELDS),
            *_option_fields(settings.method, fields["options"]),
            _about(settings.method),
            gr.update(visible=bool(vocabulary(settings.model))),
        ]

    @property
    def restored(self) -> list[Any]:
        """What :meth:`updates` fills."""
        return [*self.inputs[1:], self.about, self.words]

    @property
    def of_the_model(self) -> list[Any]:
        """Fields that :func:`model_changed` fills."""
        named = ("layers", "method", "self_replace", "guidance")
        return [self.words, *(self.fields[name] for name in named), self.about, *self.options]


def model_changed(model: str, family: Family, layers: list[tuple[str, str]], method: str) -> list[Any]:
    """What another model makes of the fields that are a model's own, in the order of `Recipe.of_the_model`."""
    start, names = defaults(model=model), methods_of(FAMILIES[family].kind)
    if method in names:
        kept: list[Any] = [gr.skip()] * (1 + MOST_OPTIONS)
    else:
        method = start["method"]
        kept = [_about(method), *_option_fields(method, {})]
    return [
        gr.update(visible=bool(vocabulary(model))),
        gr.update(choices=layers, value=[]),
        gr.update(choices=_titles(family), value=method),
        gr.update(value=start["self_replace"], visible=METHODS[method].window is not None),
        start["guidance"],
        *kept,
    ]


def _titles(family: Family) -> list[tuple[str, str]]:
    return [(method.title, name) for name, method in methods_of(FAMILIES[family].kind).items()]


def build(
    models: Sequence[str],
    family: Family,
    layers: list[tuple[str, str]],
    limits: Limits,
) -> Recipe:
    """The column; ``family`` and ``layers`` are of the first model."""
    start = first_fields(models[0])
    fields: dict[str, Any] = {}
    model = gr.Dropdown(list(models), value=models[0], label=LABELS["model"], visible=len(models) > 1)
    fields["source"] = gr.Textbox(start["source"], label=LABELS["source"], lines=2, max_lines=6, elem_id="source")
    fields["targets"] = gr.Textbox(start["targets"], label=LABELS["targets"], lines=2, max_lines=8, elem_id="targets")
    difference = gr.HTML(shown(start["source"], start["targets"]), elem_classes="fpe-diff")
    words = _vocabulary(models, fields)
    _examples(fields)
    with gr.Accordion("Method and layers", open=False):
        fields["method"] = AnyOf(_titles(family), value=start["method"], label=LABELS["method"])
        about = gr.HTML(_about(start["method"]))
        fields["self_replace"] = gr.HTML(
            value=start["self_replace"], html_template=_WINDOW, js_on_load=_WINDOW_JS, elem_id="window"
        )
        fields["layers"] = ManyOf(layers, value=[], label=LABELS["layers"], elem_classes="fpe-layers")
        with gr.Accordion("Options of the method", open=False):
            options = [gr.Textbox(**_option_field(start["method"], n, {})) for n in range(MOST_OPTIONS)]
    with gr.Accordion("Sampling", open=False):
        with gr.Row():
            fields["seed"] = gr.Number(start["seed"], label=LABELS["seed"], min_width=90)  # the desk says what is wrong
            dice = gr.Button("New seed", min_width=80, elem_classes="fpe-dice")
        locked = gr.Checkbox(True, label="Keep this seed for the next picture")
        fields["steps"] = gr.Slider(1, limits.steps, value=start["steps"], step=1, label=LABELS["steps"])
        fields["guidance"] = gr.Slider(*limits.guidance, value=start["guidance"], step=0.5, label=LABELS["guidance"])
        fields["size"] = gr.Textbox("", label=LABELS["size"], placeholder="the model's own", lines=1)
        fields["negative"] = gr.Textbox("", label=LABELS["negative"], lines=1)
        fields["control"] = gr.Checkbox(True, label="Also make the targets without the edit")
    recipe = Recipe(model, fields, about, words, options, locked)
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    prompts = [fields["source"], fields["targets"]]
    gr.on([each.change for each in prompts], shown, prompts, difference, **quiet)
    dice.click(new_seed, None, fields["seed"], **quiet)
    window = fields["self_replace"]
    fields["method"].input(_method_changed, fields["method"], [about, window, *options], **quiet)
    return recipe


def shown(source: str, targets: str) -> str:
    """The targets, with what is new in them."""
    lines = [line.strip() for line in targets.splitlines() if line.strip()]
    return f"<ul aria-label='what changes'>{differences(source, lines)}</ul>" if lines else ""


def _vocabulary(models: Sequence[str], fields: dict[str, Any]) -> Any:
    """Words to choose from, which are the same of all models that have them; they show with these."""
    words: dict[str, tuple[str, ...]] = next(filter(None, map(vocabulary, models)), {})
    with gr.Accordion("Words that this model draws", open=False, visible=bool(vocabulary(models[0]))) as shown_words:
        for kind, each in words.items():
            gr.HTML(f'<p class="fpe-label">{kind}</p>')
            with gr.Row(elem_classes="fpe-chips"):
                for word in each:
                    chip = gr.Button(word, size="sm", elem_classes="fpe-chip")
                    chip.click(
                        _word_changer(word, words),
                        [fields["source"], fields["targets"]],
                        fields["targets"],
                        queue=False,
                        show_progress="hidden",
                        api_visibility="private",
                    )
    return shown_words


def _word_changer(word: str, words: dict[str, tuple[str, ...]]) -> Any:
    def changed(source: str, targets: str) -> str:
        *before, last = targets.rstrip().splitlines() or [source]
        return "\n".join([*before, with_word(last, word, words)])

    return changed


def _examples(fields: dict[str, Any]) -> None:
    with gr.Row(elem_classes="fpe-chips"):
        for title, *prompts in EXAMPLES:
            example = gr.Button(title, size="sm", elem_classes="fpe-chip")
            example.click(
                lambda prompts=tuple(prompts): prompts,
                None,
                [fields["source"], fields["targets"]],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )


def _about(method: str) -> str:
    about = METHODS[method].about.format(window="in the window's steps")
    return f'<p class="fpe-note">{about}</p>'


def _method_changed(method: str) -> list[Any]:
    return [_about(method), gr.update(visible=METHODS[method].window is not None), *_option_fields(method, {})]


def _option_fields(method: str, values: dict[str, str]) -> list[Any]:
    return [gr.update(**_option_field(method, number, values)) for number in range(MOST_OPTIONS)]


def _option_field(method: str, number: int, values: dict[str, str]) -> dict[str, Any]:
    """What the text field of a method's option shows; fields past its last are hidden."""
    known = options_of(method)
    if number >= len(known):
        return {"visible": False, "value": "", "label": "", "info": "", "placeholder": ""}
    option = known[number]
    hint = "needed" if option.default is REQUIRED else _spelled(option.default)
    return {
        "visible": True,
        "value": values.get(option.name, ""),
        "label": option.name,
        "info": option.about or None,
        "placeholder": hint,
    }


def _spelled(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        return str(value)
