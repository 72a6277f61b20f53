"""Prompt-to-Prompt and ReFlex on joint attention: words' columns of maps that are written out, in float64."""

import pytest
import torch

from fpe_pipeline import PromptToPromptEdit, ReFlexEdit, editing
from fpe_pipeline.prompts.alignment import align_refine, align_replace, tokenize
from tests.support.dense_joint import Blocks, dense
from tests.support.tiny_transformers import draw, draw_flux, tiny_flux, tiny_flux_pipeline, tiny_sd3_pipeline

# diffusers turns queries and keys of FLUX in float32: a last bit may fall either way there.
EXACT = {"sd3": 1e-8, "flux": 1e-6}
# The tiny tokenizer spells some of these words, so that a word of one token stands for one of several.
SOURCE = "a photo of a red car on a mountain"
SWAPPED = ["a photo of a big car on a mountain", "a photo of a red dog on a house"]
LONGER = ["a photo of a red car on a snow mountain in winter", "a red car"]
CLIP, T5 = 77, 12
MODELS = pytest.mark.parametrize("model", ["sd3", "flux"])


@pytest.fixture(scope="module")
def models(pipe):
    return {"sd3": (tiny_sd3_pipeline(pipe), draw), "flux": (tiny_flux_pipeline(pipe), draw_flux)}


def edited(models, model, edit, prompts, **options):
    pipe, run = models[model]
    with editing(pipe, edit) as session:
        out = run(pipe, prompts, **options)
    return out, session.report()


def columns(model, tokenizer, align, source, target, factors=()):
    """The block over text keys, from the source's and the target's own: each encoder's tokens by themselves."""
    lengths = (CLIP, T5) if model == "sd3" else (T5,)
    mappers, kept, factor = [], [], []
    for length in lengths:
        first, second = (tokenize(prompt, tokenizer, length) for prompt in (source, target))
        alignment = align(first, second)
        mappers.append(alignment.mapper)
        kept.append(alignment.kept)
        factor.append(torch.ones(length, dtype=torch.float64))
        for word, number in dict(factors).items():
            if second.contains(word):
                factor[-1][list(second.find(word))] = number
    mapper, kept, factor = torch.block_diag(*mappers), torch.cat(kept), torch.cat(factor)
    return lambda of_source, own: (of_source @ mapper * kept + own * (1 - kept)) * factor


def by_hand(models, model, prompts, at, layers=""):
    """A dense run: ``at(step, target number)`` gives a target's blocks."""
    pipe, run = models[model]

    def rule(row, rows):
        source = rows // 2 if model == "sd3" else 0
        if row <= source:
            return None
        given = at(state["step"], row - source)
        return given and Blocks(source, **given)

    with dense(pipe, rule, steps=range(4), layers=layers) as state:
        return run(pipe, prompts)


def farthest(one, other):
    return float((one - other).abs().max())


class TestPromptToPrompt:
    @MODELS
    @pytest.mark.parametrize("kind", ["replace", "refine"])
    @pytest.mark.parametrize("targets", [1, 2])
    def test_columns(self, models, pipe, model, kind, targets):
        align = {"replace": align_replace, "refine": align_refine}[kind]
        prompts = [SOURCE, *(SWAPPED if kind == "replace" else LONGER)[:targets]]
        edit = PromptToPromptEdit(prompts, pipe.tokenizer, kind, cross_replace_steps=0.5, self_replace_steps=0)
        actual, report = edited(models, model, edit, prompts)
        text = [None, *(columns(model, pipe.tokenizer, align, SOURCE, target) for target in prompts[1:])]
        steps = range(int(5 * 0.5))
        expected = by_hand(models, model, prompts, lambda step, n: {"text": text[n]} if step in steps else None)
        assert farthest(actual, expected) <= EXACT[model]
        assert all(noted == list(steps) for noted in report.layers.values())
        late = by_hand(models, model, prompts, lambda step, n: {"text": text[n]} if step in (1, 2) else None)
        assert farthest(actual, late) > 20 * EXACT[model]
        image = by_hand(models, model, prompts, lambda step, n: {"image": True} if step in steps else None)
        assert farthest(actual, image) > 20 * EXACT[model]

    @MODELS
    def test_both_blocks(self, models, pipe, model):
        """The block over image keys in its own window and layers; that over text keys everywhere."""
        prompts = [SOURCE, SWAPPED[0]]
        edit = PromptToPromptEdit(prompts, pipe.tokenizer, self_replace_steps=0.25, cross_replace_steps=1.0)
        actual, _ = edited(models, model, edit, prompts)
        text = columns(model, pipe.tokenizer, align_replace, *prompts)
        expected = by_hand(models, model, prompts, lambda step, n: {"text": text, "image": step == 0})
        assert farthest(actual, expected) <= EXACT[model]
        alone = by_hand(models, model, prompts, lambda step, n: {"text": text})
        assert farthest(actual, alone) > 20 * EXACT[model]

    @MODELS
    def test_the_image_block_alone(self, models, pipe, model):
        prompts = [SOURCE, SWAPPED[0]]
        edit = PromptToPromptEdit(
            prompts, pipe.tokenizer, self_replace_steps=0.5, cross_replace_steps=0, layers="transformer_blocks"
        )
        actual, report = edited(models, model, edit, prompts)
        assert all(path.startswith("transformer_blocks") for path in report.layers)
        image = by_hand(
            models, model, prompts, lambda step, n: {"image": True} if step < 2 else None, "transformer_blocks"
        )
        assert farthest(actual, image) <= EXACT[model]

    @MODELS
    def test_factors(self, models, pipe, model):
        prompts = [SOURCE, SWAPPED[0]]
        edit = PromptToPromptEdit(
            prompts, pipe.tokenizer, cross_replace_steps=1.0, self_replace_steps=0, weights={"big": 3.0}
        )
        actual, _ = edited(models, model, edit, prompts)
        expected, plain, first = (
            columns(model, pipe.tokenizer, align_replace, *prompts, factors)
            for factors in ({"big": 3.0}, {}, {"photo": 3.0})
        )
        assert farthest(actual, by_hand(models, model, prompts, lambda *_: {"text": expected})) <= EXACT[model]
        for wrong in (plain, first):
            assert farthest(actual, by_hand(models, model, prompts, lambda *_: {"text": wrong})) > 20 * EXACT[model]  # noqa: B023

    def test_a_word_of_one_encoder_alone_is_another_edit(self, models, pipe):
        """In SD3 a word has columns of CLIP and of T5: replacing those of one of them is not enough."""
        prompts = [SOURCE, SWAPPED[0]]
        edit = PromptToPromptEdit(prompts, pipe.tokenizer, cross_replace_steps=1.0, self_replace_steps=0)
        actual, _ = edited(models, "sd3", edit, prompts)
        both = columns("sd3", pipe.tokenizer, align_replace, *prompts)
        for part in (slice(0, CLIP), slice(CLIP, CLIP + T5)):

            def one(of_source, own, part=part):
                changed = own.clone()
                changed[..., part] = both(of_source, own)[..., part]
                return changed

            assert farthest(actual, by_hand(models, "sd3", prompts, lambda *_: {"text": one})) > 1e-4

    @MODELS
    def test_the_source_is_left_alone(self, models, pipe, model):
        prompts = [SOURCE, *SWAPPED]
        plain = models[model][1](models[model][0], prompts)
        actual, _ = edited(models, model, PromptToPromptEdit(prompts, pipe.tokenizer), prompts)
        assert farthest(actual[0], plain[0]) <= EXACT[model]

    def test_a_pipeline_without_its_largest_encoder(self, pipe):
        """SD3 puts zeros in the place of T5's tokens: they stand for no word."""
        prompts = [SOURCE, SWAPPED[0]]
        tiny = tiny_sd3_pipeline(pipe)
        tiny.text_encoder_3 = tiny.tokenizer_3 = None
        given = {"sd3": (tiny, draw)}
        edit = PromptToPromptEdit(prompts, pipe.tokenizer, cross_replace_steps=1.0, self_replace_steps=0)
        actual, _ = edited(given, "sd3", edit, prompts)
        first, second = (tokenize(prompt, pipe.tokenizer) for prompt in prompts)
        mapper = torch.block_diag(align_replace(first, second).mapper, torch.eye(T5, dtype=torch.float64))
        expected = by_hand(given, "sd3", prompts, lambda *_: {"text": lambda of_source, own: of_source @ mapper})
        assert farthest(actual, expected) <= EXACT["sd3"]


class TestReFlex:
    @MODELS
    def test_blocks(self, models, pipe, model):
        prompts = [SOURCE, LONGER[0]]
        edit = ReFlexEdit(prompts, pipe.tokenizer, text_steps=3, image_steps=2, layers="transformer_blocks")
        actual, report = edited(models, model, edit, prompts)
        text = columns(model, pipe.tokenizer, align_refine, *prompts)

        def expected(text_steps, image_steps):
            def at(step, number):
                return {"text": text if step < text_steps else None, "image": step < image_steps}

            return by_hand(models, model, prompts, at, "transformer_blocks")

        assert farthest(actual, expected(3, 2)) <= EXACT[model]
        assert all(noted == [0, 1, 2] for noted in report.layers.values())
        for wrong in ((2, 2), (3, 3), (2, 3)):
            assert farthest(actual, expected(*wrong)) > 20 * EXACT[model]

    def test_layers_of_each_block(self, models, pipe):
        prompts = [SOURCE, SWAPPED[0], SWAPPED[1]]
        edit = ReFlexEdit(prompts, pipe.tokenizer, "replace", text_layers=[0, 1], image_layers=[1])
        _, report = edited(models, "flux", edit, prompts)
        first, second = report.layers
        assert (first, second) == ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
        pipe_, run = models["flux"]
        text = [None, *(columns("flux", pipe.tokenizer, align_replace, SOURCE, target) for target in prompts[1:])]

        def rule(row, rows, image):
            return Blocks(0, image=image, text=text[row]) if row else None

        from tests.support import dense_joint

        def processor(image):
            return dense_joint.DenseFlux(lambda row, rows: rule(row, rows, image), lambda: T5)

        before = dict(pipe_.transformer.attn_processors)
        plain = {name: dense_joint.DenseFlux(dense_joint.own, lambda: T5) for name in before}
        chosen = {f"{path}.processor": processor(image) for path, image in ((first, False), (second, True))}
        pipe_.transformer.set_attn_processor({**plain, **chosen})
        expected = run(pipe_, prompts)
        pipe_.transformer.set_attn_processor(before)
        actual, _ = edited(models, "flux", edit, prompts)
        assert farthest(actual, expected) <= EXACT["flux"]

    def test_the_authors_layers(self, pipe):
        from fpe_pipeline.models.adapters.families import adapter_of

        sites = adapter_of(tiny_flux(torch.float32, num_layers=19, num_single_layers=38)).sites
        prompts = [SOURCE, SWAPPED[0]]
        assert [site.index for site in ReFlexEdit(prompts, pipe.tokenizer).select(sites)] == list(range(13, 45))
        images = ReFlexEdit(prompts, pipe.tokenizer, text_steps=0)
        assert [site.index for site in images.select(sites)] == list(range(20, 45))
        assert images.phases(28) == (range(7), range(7, 28))

    def test_what_needs_the_map_itself(self, pipe):
        with pytest.raises(ValueError, match=r"topk=20 keeps the target's entries by their rank .* never made"):
            ReFlexEdit([SOURCE, SWAPPED[0]], pipe.tokenizer, topk=20)
        with pytest.raises(ValueError, match="layers= is for both blocks"):
            ReFlexEdit([SOURCE, SWAPPED[0]], pipe.tokenizer, layers=0, text_layers=1)


class TestRefusals:
    @MODELS
    def test_embeddings_of_a_length_that_nobody_told(self, models, pipe, model):
        tiny, _ = models[model]
        prompts = [SOURCE, SWAPPED[0]]
        width = {"sd3": 8 + 8, "flux": 8}[model]
        given = {
            "prompt_embeds": torch.zeros(2, 30, 32, dtype=torch.float64),
            "pooled_prompt_embeds": torch.zeros(2, width, dtype=torch.float64),
        }
        if model == "sd3":
            given |= {f"negative_{name}": value for name, value in given.items()}
        steps = []
        message = r"placed among 77 text tokens, and the layer receives 30: .* pass prompts and not embeddings"
        with pytest.raises(ValueError, match=message), editing(tiny, PromptToPromptEdit(prompts, pipe.tokenizer)):
            tiny(
                **given,
                height=64,
                width=64,
                num_inference_steps=2,
                callback_on_step_end=lambda *arguments: steps.append(arguments) or {},
            )
        assert not steps

    @MODELS
    def test_other_prompts(self, models, pipe, model):
        tiny, run = models[model]
        edit = PromptToPromptEdit([SOURCE, SWAPPED[0]], pipe.tokenizer)
        with pytest.raises(ValueError, match="is written for the prompts"), editing(tiny, edit):
            run(tiny, [SOURCE, SWAPPED[1]])

    def test_prompts_that_differ_by_encoder(self, models, pipe):
        tiny, run = models["sd3"]
        edit = PromptToPromptEdit([SOURCE, SWAPPED[0]], pipe.tokenizer)
        with pytest.raises(ValueError, match="encodes other tokens than those of the prompt"), editing(tiny, edit):
            run(tiny, [SOURCE, SWAPPED[0]], prompt_3=["a house", "a dog"])

    def test_levels(self, models, pipe):
        with pytest.raises(ValueError, match="tell resolutions apart, and a transformer has one"):
            editing(models["sd3"][0], PromptToPromptEdit([SOURCE, SWAPPED[0]], pipe.tokenizer, levels=1))

    def test_a_unet(self, pipe):
        with pytest.raises(ValueError, match="ReFlexEdit edits layers in which"):
            editing(pipe, ReFlexEdit([SOURCE, SWAPPED[0]], pipe.tokenizer))
