"""Words beside negative prompts of other lengths, which fill a batch up in other places: against dense layers."""

import pytest

from tests.pipeline.edits.test_edited_transformers import (
    EXACT,
    MODELS,
    REFUSED,
    UNSERVED,
    case_of,
    cases,
    farthest,
    pipes,
)
from tests.support.edited_transformers import edited, reference, unedited

__all__ = ["pipes"]

pytestmark = pytest.mark.usefixtures("in_float64")
LONG = "a drawing of a big red house and a dog on a snow mountain in winter"
NEGATIVES = {"longer": [LONG] * 4, "of each length": [LONG, "a", "a drawing", "a red car"]}
EDITS = ("FPE", "Prompt-to-Prompt, replaced words", "Prompt-to-Prompt, refined", "ReFlex", "value injection")
# Guided without a negative prompt, or by its embeddings, or not at all; FLUX.3's negative prompts have tests of theirs.
UNTOLD = {name for name in MODELS if not MODELS[name].is_guided or MODELS[name].family == "sd3"} | {
    "Bria FIBO 2",
    "FLUX.3",
    "GLM-Image",
    "Ideogram 4",
}
PAIRS = [
    (model, edit)
    for model in MODELS
    for edit in EDITS
    if model not in UNTOLD and (model, edit) not in REFUSED.keys() | UNSERVED
]
ALWAYS = {("Bria FIBO", "Prompt-to-Prompt, refined"), ("Lumina 2", "Prompt-to-Prompt, replaced words")}


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize(("model", "edit"), cases(PAIRS, ALWAYS))
def test_targets_are_the_papers(pipes, model, edit, negatives, monkeypatch):
    tiny, family, told = pipes[model], MODELS[model], []
    size = family.fits((6, 12))
    kind, call = type(tiny), type(tiny).__call__

    def calling(self, *args, **options):
        told.append(options["negative_prompt"])
        return call(self, *args, **{**options, "negative_prompt": NEGATIVES[negatives][: len(told[-1])]})

    if model == "Bria FIBO":  # whose texts are as long as the longest of the batch
        most = len(tiny.tokenizer(LONG)["input_ids"])
        monkeypatch.setattr(type(family), "texts", lambda self, longest: max(longest, most))
    case, prompts = case_of(pipes, model, edit, 3, size)
    before = unedited(tiny, family, prompts, size=size)
    monkeypatch.setattr(kind, "__call__", calling)
    actual = edited(tiny, family, case, prompts, size=size)
    assert farthest(actual, reference(tiny, family, case, prompts, size=size)) <= EXACT
    assert len(told) == 2 and farthest(unedited(tiny, family, prompts, size=size), before) > 1e-4
