"""What tests of models ask that attend to their image and, by layers of their own, to their text: edits and words held
against maps that are written out, in float64."""

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline import FreePromptEdit, LocalBlend, MasaCtrlEdit, PromptToPromptEdit, WordMask, editing, heat_maps
from fpe_pipeline.prompts.alignment import align_refine
from tests.support.dense_rows import farthest, memory_of_source, of_source
from tests.support.placed_words import columns, placed

__all__ = ["EXACT", "PAPERS", "CrossModel", "Heat", "papers", "words_in_template"]

EXACT = 1e-8
#: Of the papers' edits, by name: the edit, what dense layers do, in which steps, and whether in both halves.
PAPERS = {
    "FPE": lambda model, pipe, prompts: (FreePromptEdit(0.5), {"attn1": of_source}, (0, 1), False),
    "MasaCtrl": lambda model, pipe, prompts: (
        MasaCtrlEdit(1, start_layer=0),
        {"attn1": memory_of_source},
        (1, 2, 3),
        True,
    ),
    "Prompt-to-Prompt": lambda model, pipe, prompts: (
        PromptToPromptEdit(prompts, pipe.tokenizer, "refine", cross_replace_steps=0.6, self_replace_steps=0.25),
        {"attn1": of_source, "attn2": model.of_words(pipe, prompts)},
        {"attn1": (0,), "attn2": (0, 1, 2)},
        False,
    ),
}


def papers(calls, always):
    """(call, edit) for some calls and each of the papers' edits; those that are not to be run always are slow."""
    return [
        pytest.param(call, edit, marks=() if (call, edit) in always else pytest.mark.slow)
        for call in calls
        for edit in PAPERS
    ]


def words_in_template(model, prompts):
    """The last arguments of a `CrossModel` whose prompts stand in a template, by what `placed` asks of ``model``."""

    def words(pipe, row):
        (prompt,) = placed(model, pipe, prompts[:2])[row]
        return prompt

    return words, lambda pipe, given, row: columns(model, pipe, align_refine, given, row)


class CrossModel:
    """A tiny model of such a kind.

    Args:
        draw: ``(pipe, prompts, **options)`` to images, of four steps and a guidance of 3 unless said.
        dense: ``(pipe, rules, steps)``, a block in which layers follow rules, as `tests.support.dense_rows` says.
        prompts: of a source and three targets.
        words: ``(pipe, row)`` to the tokens of a prompt's words.
        refined: ``(pipe, prompts, row)`` to a function of the source's map and of the row's own.
    """

    def __init__(self, draw, dense, prompts, words, refined):
        self.draw, self.dense, self.prompts, self.words, self.refined = draw, dense, prompts, words, refined

    def of_words(self, pipe, prompts):
        """The rule by which words that prompts share are looked for as the source looks for them."""

        def rule(row, rows, map_of, value):
            return self.refined(pipe, prompts, row)(map_of(0, 0), map_of(row, row)) @ value[row] if row else None

        return rule

    def edited(self, pipe, edit, **options):
        with editing(pipe, edit) as session:
            out = self.draw(pipe, **options)
        return out, session.report()

    def reference(self, pipe, rules, steps, *, both=False, **options):
        """A guided step's first call sees the prompts."""
        guided, followed = options.get("guidance_scale", 3.0) > 1, {}

        def of_halves(rule):
            return lambda *given: rule(*given) if both or not guided or state["calls"] % 2 else None

        with self.dense(pipe, followed, steps) as state:
            followed |= {kind: of_halves(rule) for kind, rule in rules.items()}
            return self.draw(pipe, **options)

    def check_targets(self, pipe, paper, **options):
        """Targets are what a paper says, and the source is what it is without an edit."""
        prompts = self.prompts[: options.get("prompts", 2)]
        edit, rules, steps, both = PAPERS[paper](self, pipe, prompts)
        plain, (actual, report) = self.draw(pipe, **options), self.edited(pipe, edit, **options)
        assert farthest(actual, self.reference(pipe, rules, steps, both=both, **options)) <= EXACT
        assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-4
        assert len(report.layers) == 2 * len(rules) and farthest(actual[0], plain[0]) <= EXACT

    def check_told_apart(self, pipe, wrong):
        """A dense run by another rule, (both halves, rules, steps), is another one."""
        both, rules, steps = wrong
        actual, _ = self.edited(pipe, FreePromptEdit(0.5))
        assert farthest(actual, self.reference(pipe, rules, steps, both=both)) > 1e-5

    def check_heat(self, pipe, known, other):
        """Heat of (word, row) pairs is that of dense maps, and not that of another word of the source."""
        with heat_maps(pipe, sorted({word for word, _ in known})) as maps:
            self.draw(pipe, size=Heat.size)
        heat = Heat(self, pipe)
        self.reference(pipe, {"attn2": heat}, range(4), size=Heat.size)
        for word, row in known:
            assert farthest(maps.word(word, row), heat.of(row, word)) <= 1e-6
        assert farthest(maps.word(known[0][0], 0), heat.of(0, other)) > 1e-4

    def check_mask_of_a_word(self, pipe, right, wrong):
        """Maps are replaced where the heat of a word so far is strong."""
        mask = WordMask(self.prompts[0], right, pipe.tokenizer, threshold=0.9)
        actual, _ = self.edited(pipe, FreePromptEdit(1.0, mask=mask), size=Heat.size)

        def expected(word):
            heat, shares = Heat(self, pipe), {0: torch.ones(24, 1).double()}

            def of_self(row, rows, map_of, value):
                step = pipe.scheduler.step_index or 0
                if step not in shares:
                    found = heat.of(0, word)
                    shares[step] = (found / found.amax() >= 0.9).double().reshape(-1, 1)
                share = shares[step]
                return (share * map_of(0, 0) + (1 - share) * map_of(row, row)) @ value[row] if row else None

            out = self.reference(pipe, {"attn1": of_self, "attn2": heat}, range(4), size=Heat.size)
            assert 0 < shares[3].mean() < 1
            return out

        assert farthest(actual, expected(right)) <= EXACT < farthest(actual, expected(wrong))

    def check_blend_where_words_are(self, pipe, right, wrong, *, channels_last=False):
        """Latents are the source's but where one of two words, the source's and the target's, is."""
        blend = LocalBlend(self.prompts[:2], pipe.tokenizer, list(right), 0.9, start=0.25)
        actual, _ = self.edited(pipe, FreePromptEdit(0.0) + blend, size=Heat.size)

        def expected(words):
            heat = Heat(self, pipe)

            def blended(pipe, step, timestep, values):
                latents, mask = values["latents"], False
                for row, word in enumerate(words):
                    found = F.max_pool2d(heat.of(row, word)[None, None], 3, stride=1, padding=1)
                    found = F.interpolate(found, size=Heat.size)[0, 0]
                    mask = mask | (found / found.amax() > 0.9)
                mask = mask[..., None] if channels_last else mask
                both = torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])
                assert mask.any() and not mask.all()
                return {"latents": both if step >= 1 else latents}

            options = {"size": Heat.size, "callback_on_step_end": blended}
            return self.reference(pipe, {"attn2": heat}, range(4), **options)

        assert farthest(actual, expected(right)) <= EXACT < farthest(actual, expected(wrong))


class Heat:
    """Where a dense run's rows look for words, averaged over heads, layers and the steps so far."""

    grid, size = (4, 6), (8, 12)

    def __init__(self, model, pipe):
        self.model, self.pipe, self.sums, self.count = model, pipe, {}, 0

    def __call__(self, row, rows, map_of, value):
        self.sums[row] = self.sums.get(row, 0) + map_of(row, row).mean(0)
        self.count += not row

    def of(self, row, word):
        places = list(self.model.words(self.pipe, row).find(word))
        return (self.sums[row] / self.count)[:, places].sum(-1).reshape(self.grid)
