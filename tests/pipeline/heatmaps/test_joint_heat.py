"""Heat of words in joint attention, masks and blends made of it: against maps that are written out, in float64."""

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    LocalBlend,
    PromptToPromptEdit,
    WordMask,
    editing,
    heat_maps,
)
from fpe_pipeline.prompts.alignment import align_replace, tokenize
from tests.support.dense_joint import Blocks, dense
from tests.support.tiny_transformers import draw, draw_flux, tiny_flux_pipeline, tiny_sd3_pipeline

# diffusers turns queries and keys of FLUX in float32: a last bit may fall either way there. Heat is float32.
EXACT = {"sd3": 1e-8, "flux": 1e-6}
HEAT = 1e-6
SOURCE, TARGET = "a photo of a red car on a mountain", "a photo of a big dog on a mountain"
PROMPTS = [SOURCE, TARGET]
CLIP, T5 = 77, 12
GRID, STEPS = (3, 6), 4
SIZE = {"size": (6, 12)}
MODELS = pytest.mark.parametrize("model", ["sd3", "flux"])


@pytest.fixture(scope="module")
def models(pipe):
    return {"sd3": (tiny_sd3_pipeline(pipe), draw), "flux": (tiny_flux_pipeline(pipe), draw_flux)}


class Kept:
    """Blocks of a dense run over text keys, of the conditional rows: summed over heads, layers and steps."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.sums, self.count = model, tokenizer, {}, {}
        self.state = {"step": 0}
        self.before, self.step = ({}, {}), 0

    def __call__(self, row, rows, block):
        self.at_start()
        first = rows // 2 if self.model == "sd3" else 0
        if row >= first:
            number = row - first
            self.sums[number] = self.sums.get(number, 0) + block.mean(0)  # [image tokens, text tokens]
            self.count[number] = self.count.get(number, 0) + 1

    def at_start(self):
        """Sums and counts as they were when the step at hand began."""
        if self.state["step"] != self.step:
            self.step, self.before = self.state["step"], (dict(self.sums), dict(self.count))
        return self.before

    def heat(self, number, word, sums=None, count=None):
        """[h, w]: mean over layers and steps so far of the columns of a word, of CLIP and of T5."""
        sums, count = sums or self.sums, count or self.count
        prompt, columns, start = PROMPTS[number], [], 0
        for length in (CLIP, T5) if self.model == "sd3" else (T5,):
            tokens = tokenize(prompt, self.tokenizer, length)
            columns += [start + token for token in tokens.find(word)]
            start += length
        mean = sums[number] / count[number]
        return mean[:, columns].sum(1).reshape(GRID)


def draw_densely(models, model, kept, rule=lambda row, rows: None, **options):
    pipe, run = models[model]
    with dense(pipe, lambda row, rows: rule(row, rows), steps=range(STEPS), keep=kept) as state:
        kept.state = state
        return run(pipe, PROMPTS, **SIZE, **options)


def is_target(model, row, rows):
    return row == rows - 1


def farthest(one, other):
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


class TestHeatMaps:
    @MODELS
    def test_words(self, models, pipe, model):
        tiny, run = models[model]
        with heat_maps(tiny, ["car", "dog", "mountain"]) as maps:
            out = run(tiny, PROMPTS, **SIZE)
        kept = Kept(model, pipe.tokenizer)
        plain = draw_densely(models, model, kept)
        assert farthest(out, plain) <= EXACT[model]
        for word, image in (("car", 0), ("dog", 1), ("mountain", 0), ("mountain", 1)):
            assert farthest(maps.word(word, image), kept.heat(image, word)) <= HEAT
        assert farthest(maps.word("mountain", 0), maps.word("mountain", 1)) > 20 * HEAT
        assert farthest(maps.word("car"), maps.word("mountain")) > 20 * HEAT

    def test_text_that_stands_first_is_told_from_text_that_stands_last(self, models, pipe):
        """Columns of the other order would be those of other words: the image's own tokens, or T5's for CLIP's."""
        tiny, run = models["sd3"]
        with heat_maps(tiny, ["car"]) as maps:
            run(tiny, PROMPTS, **SIZE)
        kept = Kept("sd3", pipe.tokenizer)
        draw_densely(models, "sd3", kept)
        mean = kept.sums[0] / kept.count[0]
        word = list(tokenize(SOURCE, pipe.tokenizer).find("car"))
        assert farthest(maps.word("car"), mean[:, word].sum(1).reshape(GRID)) > 20 * HEAT
        shifted = [T5 + token for token in word] + word
        assert farthest(maps.word("car"), mean[:, shifted].sum(1).reshape(GRID)) > 20 * HEAT

    @MODELS
    def test_edited_maps(self, models, pipe, model):
        tiny, run = models[model]
        edit = PromptToPromptEdit(PROMPTS, pipe.tokenizer, cross_replace_steps=1.0, self_replace_steps=0)
        with editing(tiny, edit), heat_maps(tiny, ["dog"]) as maps:
            run(tiny, PROMPTS, **SIZE)
        lengths = (CLIP, T5) if model == "sd3" else (T5,)
        parts = [[tokenize(prompt, pipe.tokenizer, length) for prompt in PROMPTS] for length in lengths]
        mapper = torch.block_diag(*(align_replace(*part).mapper for part in parts))

        def rule(row, rows):
            if not is_target(model, row, rows):
                return None
            return Blocks(rows // 2 if model == "sd3" else 0, text=lambda of_source, own: of_source @ mapper)

        kept, plain = Kept(model, pipe.tokenizer), Kept(model, pipe.tokenizer)
        draw_densely(models, model, kept, rule)
        draw_densely(models, model, plain)
        assert farthest(maps.word("dog", 1), kept.heat(1, "dog")) <= HEAT
        assert farthest(maps.word("dog", 1), plain.heat(1, "dog")) > 20 * HEAT

    def test_steps(self, models, pipe):
        tiny, run = models["sd3"]
        with heat_maps(tiny, "car", steps=(0.5, 1.0)) as maps:
            run(tiny, PROMPTS, **SIZE)
        kept = Kept("sd3", pipe.tokenizer)
        keep = Kept("sd3", pipe.tokenizer)
        draw_densely(models, "sd3", _Late(kept, keep))
        assert farthest(maps.word("car"), kept.heat(0, "car")) <= HEAT
        assert farthest(maps.word("car"), keep.heat(0, "car")) > 20 * HEAT

    def test_calls_of_unconditional_rows_alone(self, models, pipe):
        tiny, run = models["flux"]
        negative = {"true_cfg_scale": 3.0, "negative_prompt": ["a house"] * 2}
        with heat_maps(tiny, "car") as maps:
            run(tiny, PROMPTS, **SIZE, **negative)
        kept = Kept("flux", pipe.tokenizer)
        draw_densely(models, "flux", _Conditional(kept), **negative)
        assert farthest(maps.word("car"), kept.heat(0, "car")) <= HEAT

    def test_what_is_not_read(self, models):
        tiny, _ = models["sd3"]
        with (
            pytest.raises(ValueError, match="pixels and components are of self-attention"),
            heat_maps(tiny, pixels=[(1, 1)]),
        ):
            pass
        with pytest.raises(ValueError, match="tell resolutions apart"), heat_maps(tiny, "car", levels=1):
            pass


class _Late:
    """Keeps what belongs to the last two of four steps in one, and all in another."""

    def __init__(self, late, whole):
        self.late, self.whole = late, whole

    def __call__(self, *given):
        self.whole(*given)
        if self.state["step"] >= 2:
            self.late(*given)


class _Conditional:
    """Keeps every other call, the first among them."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, *given):
        if self.state["calls"] % 2:
            self.kept(*given)


class TestWordMasks:
    @MODELS
    @pytest.mark.parametrize("threshold", [None, 0.9])
    def test_free_prompt_edit(self, models, pipe, model, threshold):
        tiny, run = models[model]
        mask = WordMask(SOURCE, "car", pipe.tokenizer, threshold=threshold)
        with editing(tiny, FreePromptEdit(1.0, mask=mask)):
            actual = run(tiny, PROMPTS, **SIZE)

        def share(heat):
            of_largest = heat / heat.amax()
            return of_largest if threshold is None else (of_largest >= threshold).double()

        def expected(share):
            kept, weights = Kept(model, pipe.tokenizer), {}

            def rule(row, rows):
                step = kept.state["step"]
                if step not in weights:
                    weights[step] = share(kept.heat(0, "car")).flatten() if kept.sums else torch.ones(18).double()
                if not is_target(model, row, rows):
                    return None
                source = rows // 2 if model == "sd3" else 0
                return [(weights[step], {"q_image": source, "k_image": source}), (1 - weights[step], {})]

            return draw_densely(models, model, kept, rule)

        # A threshold may fall between two roundings of a heat; the soft mask passes on the rounding of its float32.
        assert farthest(actual, expected(share)) <= max(EXACT[model], HEAT)
        assert farthest(actual, expected(lambda heat: 1 - share(heat))) > 20 * HEAT
        assert farthest(actual, expected(torch.ones_like)) > 20 * HEAT

    @MODELS
    def test_consist_edit(self, models, pipe, model):
        """What is not the word is kept; until a step has passed, all of it is."""
        tiny, run = models[model]
        mask = WordMask(SOURCE, "car", pipe.tokenizer, threshold=0.9, invert=True)
        with editing(tiny, ConsistEdit(0.25, mask=mask, both_halves=False)) as session:
            actual = run(tiny, PROMPTS, **SIZE)
        layers = "single_transformer_blocks" if model == "flux" else ""
        assert all(path.startswith(layers) for path in session.report().layers)
        kept, shares = Kept(model, pipe.tokenizer), {}

        def rule(row, rows):
            step = kept.state["step"]
            if step not in shares:
                shares[step] = torch.ones(18).double()
                if step:
                    heat = kept.heat(0, "car", *kept.at_start())
                    shares[step] = (heat / heat.amax() < 0.9).double().flatten()
            if not is_target(model, row, rows):
                return None
            source = rows // 2 if model == "sd3" else 0
            mixed = (source, row, shares[step])
            structure = source if step < 1 else mixed
            return [(1.0, {"v_image": mixed, "q_image": structure, "k_image": structure})]

        with dense(tiny, rule, steps=range(STEPS), layers=layers, keep=kept) as state:
            kept.state = state
            expected = run(tiny, PROMPTS, **SIZE)
        assert farthest(actual, expected) <= EXACT[model]
        assert 0 < shares[2].mean() < 1

    def test_levels(self, models, pipe):
        edit = FreePromptEdit(mask=WordMask(SOURCE, "car", pipe.tokenizer, levels=1))
        with pytest.raises(ValueError, match="a transformer has one"), editing(models["sd3"][0], edit):
            pass


class TestLocalBlend:
    @MODELS
    def test_blend(self, models, pipe, model):
        tiny, run = models[model]
        blend = LocalBlend(PROMPTS, pipe.tokenizer, ["car", "dog"], 0.9, start=0.25)
        with editing(tiny, FreePromptEdit(0.0) + blend):
            actual = run(tiny, PROMPTS, **SIZE)

        def expected(start, words=("car", "dog"), threshold=0.9):
            kept = Kept(model, pipe.tokenizer)

            def callback(pipe, step, timestep, values):
                if step >= start:
                    mask = False
                    for number, word in enumerate(words):
                        heat = F.max_pool2d(kept.heat(number, word)[None, None], 3, stride=1, padding=1)[0, 0]
                        mask = mask | (heat / heat.amax() > threshold)
                    wide = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
                    mask = wide if model == "sd3" else mask.reshape(-1, 1)
                    latents = values["latents"]
                    values["latents"] = torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])
                    kept.mask = mask
                return values

            out = draw_densely(models, model, kept, callback_on_step_end=callback)
            assert 0 < kept.mask.double().mean() < 1
            return out

        assert farthest(actual, expected(1)) <= EXACT[model]
        assert farthest(actual, expected(0)) > 20 * EXACT[model]
        assert farthest(actual, expected(2)) > 20 * EXACT[model]

    def test_after_a_call_of_unconditional_rows(self, models, pipe):
        tiny, run = models["flux"]
        negative = {"true_cfg_scale": 3.0, "negative_prompt": ["a house"] * 2}
        blend = LocalBlend(PROMPTS, pipe.tokenizer, ["car", "dog"], 1.0)
        with editing(tiny, FreePromptEdit(0.0) + blend):
            actual = run(tiny, PROMPTS, **SIZE, **negative)
        plain = run(tiny, PROMPTS, **SIZE, **negative)
        assert farthest(actual[0], plain[0]) <= EXACT["flux"]
        assert torch.equal(actual[1], actual[0])  # nothing is above its largest: all stays the source's
