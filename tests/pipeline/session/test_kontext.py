"""Edits of FLUX.1 Kontext, whose image stands before the tokens of a reference picture: against a dense processor."""

import pytest
import torch
from diffusers import FluxKontextPipeline

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    JointProduct,
    MasaCtrlEdit,
    PromptToPromptEdit,
    ReFlexEdit,
    StableFlowEdit,
    editing,
    heat_maps,
)
from fpe_pipeline.prompts.alignment import align_refine, align_replace, tokenize
from tests.support.dense_joint import Blocks, dense
from tests.support.own_maps import OwnMaps
from tests.support.slow_cases import few
from tests.support.tiny_transformers import PROMPTS, tiny_flux_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8


@pytest.fixture(scope="module")
def kontext(pipe):
    return tiny_flux_pipeline(pipe, kind=FluxKontextPipeline)


def draw(pipe, prompts=2, *, size=(8, 8), picture=(6, 10), steps=4, **options):
    """Packed latents; the reference picture's size is in latents, as the image's."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, size[0] * size[1] // 4, 64, generator=generator, dtype=torch.float64)
    image = torch.rand(1, 3, picture[0] * 8, picture[1] * 8, generator=generator, dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(texts), 1, 1).to(pipe.transformer.dtype))
    return pipe(
        image=image,
        prompt=texts,
        height=size[0] * 8,
        width=size[1] * 8,
        max_area=size[0] * size[1] * 64,
        num_inference_steps=steps,
        max_sequence_length=12,
        output_type="latent",
        _auto_resize=False,
        **options,
    ).images


def edited(pipe, edit, **options):
    with editing(pipe, edit) as session:
        out = draw(pipe, **options)
    return out, session.report()


def reference(pipe, rule, steps, *, layers="", **options):
    height, width = options.get("size", (8, 8))
    with dense(pipe, rule, steps=steps, layers=layers, images=height * width // 4):
        return draw(pipe, **options)


def taking(*names):
    return lambda row, rows: [(1.0, dict.fromkeys(names, 0))] if row else None


QUERIES_KEYS, MEMORY = taking("q_image", "k_image"), taking("k_image", "v_image")
WHOLE = taking(*(f"{letter}_{part}" for letter in "qk" for part in ("text", "image", "reference")))
RULES = {
    "image": (FreePromptEdit(0.5), QUERIES_KEYS, (0, 1), ""),
    "joint": (FreePromptEdit(0.5, scope="joint"), WHOLE, (0, 1), ""),
    "consistedit": (ConsistEdit(0.75), QUERIES_KEYS, (0, 1, 2), "single"),
    "masactrl": (MasaCtrlEdit(1, layers=range(5)), MEMORY, (1, 2, 3), ""),
    "stable flow": (StableFlowEdit(layers=range(5)), MEMORY, (0, 1, 2, 3), ""),
}
SIZES = {"1 target": {}, "3 targets": {"prompts": 4}, "not square": {"size": (4, 12), "picture": (8, 4)}}


@pytest.mark.parametrize("options", few(SIZES, "1 target", "3 targets"))
@pytest.mark.parametrize("rule", few(RULES.keys(), "image"))
def test_targets_are_the_papers(kontext, rule, options):
    edit, dense_rule, steps, layers = RULES[rule]
    actual, report = edited(kontext, edit, **options)
    assert (actual - reference(kontext, dense_rule, steps, layers=layers, **options)).abs().max() <= EXACT
    assert (actual - draw(kontext, **options))[1:].abs().amax((1, 2)).min() > 1e-4
    assert report.layers and all(tuple(noted) == steps for noted in report.layers.values())


WRONG = {
    "the reference in the image's place": taking("q_reference", "k_reference"),
    "the reference too": taking("q_image", "k_image", "q_reference", "k_reference"),
    "the whole map": WHOLE,
    "keys alone": taking("k_image"),
    "nothing": taking(),
}


@pytest.mark.parametrize("wrong", few(WRONG, "the reference too"))
def test_other_rules_are_told_apart(kontext, wrong):
    actual, _ = edited(kontext, FreePromptEdit(0.5))
    assert (actual - reference(kontext, wrong, (0, 1))).abs().max() > 1e-6
    assert (actual - reference(kontext, QUERIES_KEYS, (1, 2))).abs().max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("both", few({"conditional": False, "both": True}, "conditional"))
def test_true_guidance(kontext, both):
    """The pipeline names no contexts; its first call of a step sees the prompts."""
    options = {"true_cfg_scale": 3.0, "negative_prompt": ["a drawing"] * 3, "prompts": 3}
    edit = FreePromptEdit(0.5, both_halves=both)
    with editing(kontext, edit):
        first, actual = draw(kontext, **options), draw(kontext, **options)  # every run begins anew
        alone = draw(kontext, prompts=2)
    images = {"images": 16, "steps": (0, 1)}
    with dense(kontext, lambda row, rows: rule(row, rows), **images) as state:

        def rule(row, rows):
            return QUERIES_KEYS(row, rows) if both or state["calls"] % 2 else None

        expected = draw(kontext, **options)
    assert (actual - expected).abs().max() <= EXACT and torch.equal(first, actual)
    assert (alone - reference(kontext, QUERIES_KEYS, (0, 1))).abs().max() <= EXACT
    if not both:
        assert (actual - reference(kontext, QUERIES_KEYS, (0, 1), **options)).abs().max() > 1e-6


@pytest.mark.parametrize("dtype", few({"float64": torch.float64, "float32": torch.float32}, "float32"))
def test_the_source_is_the_one_without_an_edit(pipe, dtype):
    tiny = tiny_flux_pipeline(pipe, dtype, kind=FluxKontextPipeline)
    out, _ = edited(tiny, FreePromptEdit(1.0), prompts=3)
    own, _ = edited(tiny, OwnMaps(), prompts=3)
    plain = draw(tiny, prompts=3)
    bound = 1e-5 if dtype is torch.float32 else 1e-12
    assert (out - own)[0].abs().max() <= bound
    assert (out - plain)[0].abs().max() <= bound and (own - plain).abs().max() <= bound


@pytest.mark.slow
def test_fused_projections(pipe):
    tiny = tiny_flux_pipeline(pipe, kind=FluxKontextPipeline)
    expected, _ = edited(tiny, FreePromptEdit(0.5))
    tiny.transformer.fuse_qkv_projections()
    actual, _ = edited(tiny, FreePromptEdit(0.5))
    assert (actual - expected).abs().max() <= EXACT


def test_heat_of_words(kontext):
    """Columns are those of the text under the whole softmax, the reference's share of it included."""
    kept, place = [], [kontext.tokenizer.decode([token]).strip() for token in tokens_of(kontext)].index("car")
    with heat_maps(kontext, ["car"]) as maps:
        draw(kontext, 1, size=(4, 12), steps=1)
    with dense(kontext, taking(), steps=(), images=12, keep=lambda row, rows, block: kept.append(block)):
        draw(kontext, 1, size=(4, 12), steps=1)
    heat = torch.stack([block[..., place].mean(0) for block in kept]).mean(0).reshape(2, 6).numpy()
    assert abs(maps.word("car") - heat).max() <= 1e-6


def tokens_of(pipe):
    return pipe.tokenizer(PROMPTS[0], max_length=12, truncation=True)["input_ids"]


SWAPPED = [
    "a photo of a red car on a mountain",
    "a photo of a big car on a mountain",
    "a photo of a red dog on a house",
]
T5 = 12


def text_columns(pipe, align, prompts, number):
    source, target = (tokenize(prompt, pipe.tokenizer, T5) for prompt in (prompts[0], prompts[number]))
    alignment = align(source, target)
    return lambda of_source, own: of_source @ alignment.mapper * alignment.kept + own * (1 - alignment.kept)


def words(pipe, align, prompts, image_steps, text_steps):
    """Blocks of the source's map after the softmax; what attends to the reference picture stays the target's own."""
    text = [None, *(text_columns(pipe, align, prompts, number) for number in range(1, len(prompts)))]

    def at(step):
        def rule(row, rows):
            if row == 0 or step not in {*image_steps, *text_steps}:
                return None
            return Blocks(0, image=step in image_steps, text=text[row] if step in text_steps else None)

        return rule

    return at


WORDS = {
    "replaced words": (
        lambda prompts, pipe: PromptToPromptEdit(
            prompts, pipe.tokenizer, cross_replace_steps=0.6, self_replace_steps=0.25
        ),
        align_replace,
        ((0,), (0, 1, 2)),
    ),
    "the image's block too": (
        lambda prompts, pipe: PromptToPromptEdit(
            prompts, pipe.tokenizer, cross_replace_steps=1.0, self_replace_steps=1.0
        ),
        align_replace,
        (range(4), range(4)),
    ),
    "ReFlex": (
        lambda prompts, pipe: ReFlexEdit(prompts, pipe.tokenizer, text_steps=3, image_steps=2, layers=range(5)),
        align_refine,
        ((0, 1), (0, 1, 2)),
    ),
}


@pytest.mark.parametrize("size", few({"square": {}, "not square": {"size": (4, 12), "picture": (8, 4)}}, "not square"))
@pytest.mark.parametrize("name", few(WORDS.keys(), "the image's block too"))
def test_columns_of_words(kontext, name, size):
    make, align, (image_steps, text_steps) = WORDS[name]
    edit = make(SWAPPED, kontext)
    actual, _ = edited(kontext, edit, prompts=SWAPPED, **size)

    def expected(at, fault=None):
        height, width = size.get("size", (8, 8))
        with dense(kontext, lambda *given: at(state["step"])(*given), steps=range(4), images=height * width // 4,
                   fault=fault) as state:  # fmt: skip
            return draw(kontext, SWAPPED, **size)

    at = words(kontext, align, SWAPPED, image_steps, text_steps)
    assert (actual - expected(at)).abs().max() <= EXACT
    late = words(kontext, align, SWAPPED, [step + 1 for step in image_steps], [step + 1 for step in text_steps])
    assert (actual - expected(late)).abs().max() > 1e-6
    for fault in ("swapped", "before places"):
        assert (actual - expected(at, fault)).abs().max() > 1e-6
    assert (actual - draw(kontext, SWAPPED, **size))[1:].abs().amax((1, 2)).min() > 1e-4


def test_what_a_term_applies_its_map_to():
    """A term for the reference picture alone is none where there is no such picture."""
    own = JointProduct((1, 1), (1, 1), (None, None), reference=1)
    assert own.gives(references=True) and not own.gives(references=False)
    assert own.rows_of("value", "text") == (1,) and own.reference_row == 1
    assert JointProduct.own(1).reference_row == 1
    assert JointProduct((0, 0), (0, 0), (None, 1), reference=None).rows_of("value", "text") == (1,)
