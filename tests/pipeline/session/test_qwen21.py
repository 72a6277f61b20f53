"""Qwen-Image 2.1: what a call is, pictures among its text, what is kept of texts, words, and what is refused.

Every edit of it is tested with those of other models.
"""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AttnProcessor,
    QwenImage21FlexAttnProcessor,
)
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21
from PIL import Image
from torch.nn import functional as F

from fpe_pipeline import (
    FreePromptEdit,
    LocalBlend,
    MasaCtrlEdit,
    PromptToPromptEdit,
    ValueInjectionEdit,
    WordMask,
    editing,
    heat_maps,
)
from fpe_pipeline.models.adapters.families import adapter_of
from fpe_pipeline.prompts.alignment import align_refine
from tests.support.dense_joint import Blocks
from tests.support.placed_words import columns, placed
from tests.support.slow_cases import few
from tests.support.tiny_qwen21 import QWEN21, draw_qwen21, tiny_qwen21_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
PROMPTS = ["a photo of a red car on a mountain", "a photo of a red dog on a mountain", "a house in winter"]
SIZE, GRID = (8, 12), (4, 6)
SHOWN = (128, 64)  # pixels, width and height
PICTURE = Image.linear_gradient("L").resize((80, 40)).convert("RGB")


@pytest.fixture(scope="module")
def qwen():
    return tiny_qwen21_pipeline()


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch):
    """The pipeline brings what it is shown to some megapixels, these to a few tokens."""
    monkeypatch.setattr(pipeline_qwenimage21, "calculate_dimensions", lambda area, ratio: (*SHOWN, None))


def draw(qwen, prompts=PROMPTS, **options):
    return draw_qwen21(qwen, prompts, **{"size": SIZE, "guidance": 1.0, **options})


def edited(qwen, edit, prompts=PROMPTS, **options):
    with editing(qwen, edit):
        return draw(qwen, prompts, **options)


def by_hand(qwen, at, prompts=PROMPTS, keep=None, **options):
    """A dense run: ``at(row, step)`` gives what a row of a call that sees the prompts becomes."""

    def rule(row, rows):
        return at(row, state["step"]) if row and (state["calls"] % 2 or options.get("guidance", 1.0) == 1.0) else None

    with QWEN21["Qwen-Image 2.1"].dense(qwen, rule, "", None, keep) as state:
        return draw(qwen, prompts, **options)


def early(*names):
    return lambda row, step: [(1.0, dict.fromkeys(names, 0))] if step < 2 else None


def farthest(one, other):
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


class Words:
    """Where the model's text has words, behind so many pictures: of these it has no tokens among its text's."""

    family = "qwen21"

    def __init__(self, pictures):
        self.pictures = pictures

    def template(self, pipe):
        before, after = pipe.prompt_template_t2i.split("{}")
        shown = " ".join(f"<image{number + 1}><|vision_start|><|vision_end|>" for number in range(self.pictures))
        return before + shown, after, pipe._drop_idx

    def tokenizer(self, pipe):
        return pipe.processor.tokenizer

    def texts(self, longest):
        return longest

    def place(self, pipe, number, word):
        ((prompt,),) = placed(self, pipe, PROMPTS[number : number + 1])
        (token,) = prompt.find(word)
        return token


class TestACall:
    def call(self, qwen, slots, pictures=(), mask=None):
        given = {"hidden_states": torch.zeros(2, 24, 16), "encoder_hidden_states": torch.zeros(2, 6, 16), "timestep": 1}
        slots = torch.tensor([slots + [1] * 6] * 2).bool()
        given |= {"img_shapes": [[*pictures, (1, 4, 6)]], "img_mask": slots, "encoder_hidden_states_mask": mask}
        return adapter_of(qwen.transformer).read((), given)

    def test_without_pictures(self, qwen):
        call = self.call(qwen, [0] * 6, mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]))
        assert (call.size, call.text_lengths, call.references, call.shown) == ((4, 6), (6, 4), 0, ())
        assert call.keeps_texts and self.call(qwen, [0] * 6).text_lengths is None

    @pytest.mark.parametrize(
        ("slots", "shown"),
        [([0, 1, 1, 1, 0, 0], ((1, 5), (5, 13))), ([0, 1, 0, 1, 1, 0], ((1, 5), (6, 14)))],
    )
    def test_pictures(self, qwen, slots, shown):
        mask = torch.tensor([[1] * 6, [1] * 5 + [0]])
        call = self.call(qwen, slots, [(1, 2, 2), (1, 2, 4)], mask)
        assert (call.size, call.text_lengths, call.references, call.shown) == ((4, 6), (3, 2), 12, shown)

    def test_size_of_tokens(self, qwen):
        sites = adapter_of(qwen.transformer).sites
        assert [site.at(*GRID).tokens for site in sites] == [24] * 3 and {site.kind for site in sites} == {"joint"}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_and_what_is_kept(qwen, keeps, guidance):
    options = {"use_kv_cache": keeps, "guidance": guidance}
    actual = edited(qwen, FreePromptEdit(0.5), **options)
    assert farthest(actual, by_hand(qwen, early("q_image", "k_image"), **options)) <= EXACT
    assert farthest(actual, by_hand(qwen, lambda row, step: None, **options)) > 1e-3


def test_texts_stay_what_they_are(qwen):
    """What is kept of them after the first step is what the unedited run keeps, of every layer."""

    def kept(run):
        caches = []
        take = qwen.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: caches.append(kwargs["kv_cache"]), with_kwargs=True
        )
        run()
        take.remove()
        assert len({id(cache) for cache in caches}) == 1
        return [part for layer in caches[0].layer_caches for part in layer.get()]

    pairs = zip(kept(lambda: edited(qwen, FreePromptEdit(1.0))), kept(lambda: draw(qwen)), strict=True)
    assert max(farthest(*pair) for pair in pairs) <= 1e-12


def test_several_images_a_prompt(qwen):
    """The pipeline describes one layout a prompt, and the model computes as many rows as there are images."""
    noise = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(3)).double()
    options = {"num_images_per_prompt": 2, "latents": noise.repeat(2, 1, 1)}
    actual = edited(qwen, FreePromptEdit(0.5), PROMPTS[::2], **options)

    def at(row, step):
        return [(1.0, {"q_image": row - 2, "k_image": row - 2})] if row >= 2 and step < 2 else None

    assert farthest(actual, by_hand(qwen, at, PROMPTS[::2], **options)) <= EXACT
    assert farthest(actual[0], actual[1]) > 1e-3


class TestPictures:
    """They stand among the text's tokens, look at themselves and at what is before, and stay each row's own."""

    @pytest.mark.parametrize("pictures", [1, 2])
    @pytest.mark.parametrize("keeps", few({"kept": True, "nothing kept": False}, "kept"))
    def test_free_prompt_edit(self, qwen, pictures, keeps):
        options = {"image": [PICTURE] * pictures, "use_kv_cache": keeps}
        actual = edited(qwen, FreePromptEdit(0.5), **options)
        assert farthest(actual, by_hand(qwen, early("q_image", "k_image"), **options)) <= EXACT
        assert farthest(actual, by_hand(qwen, early("q_image", "k_text"), **options)) > 1e-6
        assert farthest(actual, edited(qwen, FreePromptEdit(0.5))) > 1e-3

    @pytest.mark.parametrize("pictures", few({"one": 1, "two": 2}, "two"))
    def test_words_stand_behind_them(self, qwen, pictures):
        read, prompts, options = qwen.processor.tokenizer, PROMPTS[::2], {"image": [PICTURE] * pictures}
        edit = PromptToPromptEdit(prompts, read, "refine", cross_replace_steps=0.5, self_replace_steps=0.0)
        actual = edited(qwen, edit, prompts, **options)

        def expected(behind):
            text = columns(Words(behind), qwen, align_refine, prompts, 1)
            return by_hand(qwen, lambda row, step: Blocks(0, text=text) if step < 2 else None, prompts, **options)

        assert farthest(actual, expected(pictures)) <= EXACT < 1e-6 < farthest(actual, draw(qwen, prompts, **options))


class Kept:
    """Blocks of a dense run's image queries over text keys, summed over heads, layers and steps."""

    def __init__(self, qwen, pictures=0):
        self.qwen, self.pictures, self.sums, self.count = qwen, pictures, {}, 0

    def __call__(self, row, rows, block):
        self.sums[row] = self.sums.get(row, 0) + block.mean(0)
        self.count += not row

    def heat(self, row, word, behind=0):
        place = Words(self.pictures).place(self.qwen, row, word) + behind
        return (self.sums[row] / self.count)[:, place].reshape(GRID)


class TestWords:
    @pytest.mark.parametrize("pictures", [0, 2])
    def test_heat(self, qwen, pictures):
        shown = {"image": [PICTURE] * pictures or None, "steps": 2}
        with heat_maps(qwen, ["mountain", "winter"]) as maps:
            draw(qwen, **shown)
        kept = Kept(qwen, pictures)
        by_hand(qwen, lambda row, step: None, keep=kept, **shown)
        for word, row in (("mountain", 0), ("mountain", 1), ("winter", 2)):
            assert farthest(maps.word(word, row), kept.heat(row, word)) <= 1e-6
            assert farthest(maps.word(word, row), kept.heat(row, word, behind=1)) > 2e-5

    def test_a_mask_of_a_word(self, qwen):
        mask = WordMask(PROMPTS[0], "mountain", qwen.processor.tokenizer, threshold=0.9)
        actual = edited(qwen, FreePromptEdit(1.0, mask=mask))

        def expected(word):
            kept, shares = Kept(qwen), {0: torch.ones(24).double()}

            def at(row, step):
                if step not in shares:
                    heat = kept.heat(0, word)
                    shares[step] = (heat / heat.amax() >= 0.9).double().flatten()
                return [(shares[step], {"q_image": 0, "k_image": 0}), (1 - shares[step], {})]

            out = by_hand(qwen, at, keep=kept)
            assert 0 < shares[3].mean() < 1
            return out

        assert farthest(actual, expected("mountain")) <= EXACT < farthest(actual, expected("red"))

    def test_a_blend_where_words_are(self, qwen):
        prompts = PROMPTS[:2]
        blend = LocalBlend(prompts, qwen.processor.tokenizer, ["photo", "mountain"], 0.9, start=0.25)
        actual = edited(qwen, FreePromptEdit(0.0) + blend, prompts)

        def expected(words):
            kept = Kept(qwen)

            def blended(pipe, step, timestep, values):
                latents, mask = values["latents"], False
                for row, word in enumerate(words):
                    heat = F.max_pool2d(kept.heat(row, word)[None, None], 3, stride=1, padding=1)[0, 0]
                    mask = mask | (heat / heat.amax() > 0.9).reshape(-1, 1)
                assert mask.any() and not mask.all()
                both = torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])
                return {"latents": both if step >= 1 else latents}

            return by_hand(qwen, lambda row, step: None, prompts, kept, callback_on_step_end=blended)

        assert farthest(actual, expected(("photo", "mountain"))) <= EXACT < farthest(actual, expected(("red", "red")))


def test_a_processor_is_told_by_its_class(qwen):
    """By which the model chooses what masks it makes: a layer of flex attention without its own sees everything."""
    layer = qwen.transformer.transformer_blocks[1].attn
    flex = QwenImage21FlexAttnProcessor()
    layer.set_processor(flex)
    try:
        with pytest.warns(RuntimeWarning, match="without a call"), editing(qwen, FreePromptEdit(0.5)):
            kinds = [isinstance(block.attn.processor, type(flex)) for block in qwen.transformer.transformer_blocks]
            assert layer.processor is not flex and kinds == [False, True, False]
        assert layer.processor is flex
    finally:
        layer.set_processor(QwenImage21AttnProcessor())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("flex", few({"all": (0, 1, 2), "some": (0, 1), "one": (2,)}))
@pytest.mark.parametrize("options", few({"text": {}, "a picture": {"image": [PICTURE]}}))
def test_flex_attention(qwen, flex, options):
    """The model tells by a processor's class what it gives layers, edited or not, and the edit is the same."""
    edit, options = MasaCtrlEdit(1, layers=[1]) + FreePromptEdit(0.5, layers=[2]), {**options, "steps": 2}
    expected, plain = edited(qwen, edit, **options), draw(qwen, **options)
    layers = [block.attn for block in qwen.transformer.transformer_blocks]
    try:
        for index in flex:
            layers[index].set_processor(QwenImage21FlexAttnProcessor())
        for each in ({}, {"use_kv_cache": False}):
            assert farthest(edited(qwen, edit, **options, **each), expected) <= EXACT
        assert farthest(draw(qwen, **options), plain) <= EXACT < farthest(expected, plain)
    finally:
        for layer in layers:
            layer.set_processor(QwenImage21AttnProcessor())


class _InOneLayer(FreePromptEdit):
    """Gives whole maps of the source to the last layer alone."""

    def products(self, site, step, roles):
        return super().products(site, step, roles) if site.index == 2 else {}


class TestRefusals:
    @pytest.mark.parametrize("keeps", [True, False])
    @pytest.mark.parametrize(
        "edit",
        [
            FreePromptEdit(0.5, scope="joint"),
            ValueInjectionEdit((0.5, 1.0), layers=range(3)),
            _InOneLayer(0.5, scope="joint"),
        ],
        ids=["the whole map", "values, later", "one layer"],
    )
    def test_what_changes_texts(self, qwen, edit, keeps):
        steps = []
        with pytest.raises(ValueError, match=r"changes what text tokens become, row 1 = .*use an edit of image tokens"):
            edited(qwen, edit, use_kv_cache=keeps, callback_on_step_end=lambda *given: steps.append(1) or {})
        assert not steps and all(
            type(block.attn.processor) is QwenImage21AttnProcessor for block in qwen.transformer.transformer_blocks
        )

    def test_words_of_embeddings(self, qwen):
        given, mask, _ = qwen.encode_prompt(PROMPTS)
        edit = PromptToPromptEdit(PROMPTS[:2], qwen.processor.tokenizer, cross_replace_steps=0.5)
        with pytest.raises(ValueError, match="pass prompts and not embeddings"), editing(qwen, edit):
            qwen(prompt_embeds=given[:2], prompt_embeds_mask=mask[:2], height=64, width=64, num_inference_steps=1)
