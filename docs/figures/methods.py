"""Which map goes to which row, drawn from what the edits themselves answer."""

from __future__ import annotations

from collections.abc import Sequence

from fpe_pipeline.edits.base import Edit, Products, begun
from fpe_pipeline.edits.free_prompt import FreePromptEdit
from fpe_pipeline.edits.masactrl import MasaCtrlEdit
from fpe_pipeline.edits.products import MapSpec, Product
from fpe_pipeline.edits.prompt_to_prompt import PromptToPromptEdit
from fpe_pipeline.edits.style_aligned import StyleAlignedEdit
from fpe_pipeline.embedded import embedded_path
from fpe_pipeline.models.roles import BatchRoles
from fpe_pipeline.models.sites import Kind, Site
from fpe_pipeline.models.steps import Step

from .svg import OURS, PALE, SOURCE, TARGET, Drawing

#: The rows of a guided batch of a source and a target, and the colours that they are told apart by.
ROWS = ("source, no text", "target, no text", "source", "target")
COLOURS = (SOURCE, TARGET, SOURCE, TARGET)
HEIGHT, TOP = 46, 58
LEFT, MIDDLE, RIGHT = 20, 300, 560


def site(kind: Kind) -> Site:
    """A layer of 16 × 16 tokens in a decoder."""
    return Site("up_blocks.1.attentions.0", "up", kind, 8, 8, 2, ("down", "down"), (16, 16), (64, 64))


def drawn(title: str, edit: Edit, kind: Kind, index: int = 10) -> str:
    """The picture of a step ``index`` of 50 of a layer: maps on the left, values on the right, outputs between."""
    roles = BatchRoles.from_batch(len(ROWS), classifier_free_guidance=True)
    running = begun(edit)
    answer = running.products(site(kind), Step(index, 50), roles)
    terms = {row: _terms(answer, row) for row in range(len(ROWS))}
    maps = sorted({term.map for row in terms for term in terms[row]}, key=lambda spec: (spec.query, spec.keys))
    picture = Drawing(760, TOP + HEIGHT * len(ROWS) + 26, title)
    picture.words(LEFT, 18, title, size=14)
    for x, words in ((LEFT, "maps, each computed once"), (MIDDLE, "output = map @ values"), (RIGHT, "values")):
        picture.words(x, 42, words, size=11)
    places = {spec: _height(number, len(maps)) for number, spec in enumerate(maps)}
    for row, products in terms.items():
        for term in products:
            edited = term != Product(row, (row,), (row,))
            out = _height(row, len(ROWS))
            picture.line((LEFT + 200, places[term.map]), (MIDDLE, out), strong=edited)
            for value in term.values:
                picture.line((MIDDLE + 170, out), (RIGHT, _height(value, len(ROWS))), strong=edited)
            if term.mixing is not None:
                picture.words(MIDDLE + 204, out + 14, "mixed", size=10, colour=OURS, anchor="middle")
    for spec, y in places.items():
        picture.box(LEFT, y - 15, 200, 30, _named(spec), COLOURS[spec.query])
    for row, name in enumerate(ROWS):
        y = _height(row, len(ROWS))
        picture.box(MIDDLE, y - 15, 170, 30, name, PALE)
        picture.box(RIGHT, y - 15, 170, 30, f"v of {name}", COLOURS[row])
    return picture.text()


def _terms(answer: Products, row: int) -> tuple[Product, ...]:
    named = answer.get(row, Product(row, (row,), (row,)))
    terms = tuple(named) if isinstance(named, Sequence) else (named,)
    return tuple(term for term in terms if isinstance(term, Product))


def _height(place: int, places: int) -> float:
    return TOP + HEIGHT * (len(ROWS) - places) / 2 + HEIGHT * (place + 0.5)


def _named(spec: MapSpec) -> str:
    keys = " ‖ ".join(ROWS[row].replace(", no text", "") for row in spec.keys)
    free = "no text" in ROWS[spec.query]
    return f"A(q {ROWS[spec.query].replace(', no text', '')}, k {keys}){' ∅' if free else ''}"


def free_prompt() -> str:
    return drawn("Free-Prompt-Editing, self-attention", FreePromptEdit(0.8), "self")


def prompt_to_prompt() -> str:
    from transformers import CLIPTokenizer

    prompts = ["a photo of a car on the beach", "a photo of a red car on the beach"]
    tokenizer = CLIPTokenizer.from_pretrained(embedded_path() / "tokenizer")
    return drawn(
        "Prompt-to-Prompt (refine), cross-attention", PromptToPromptEdit(prompts, tokenizer, align="refine"), "cross"
    )


def masactrl() -> str:
    return drawn("MasaCtrl, self-attention from its first step on", MasaCtrlEdit(), "self")


def style_aligned() -> str:
    return drawn("StyleAligned, self-attention", StyleAlignedEdit(), "self")
