"""FLUX.2 [dev] and [klein]: every edit, against dense layers, to 1e-8 in float64."""

import itertools

import diffusers
import pytest
import torch

if not hasattr(diffusers, "Flux2KleinKVPipeline"):
    pytest.skip("this diffusers has no FLUX.2 [klein]", allow_module_level=True)

from fpe_pipeline import (
    FreePromptEdit,
    LocalBlend,
    PromptToPromptEdit,
    WordMask,
    editing,
    heat_maps,
)
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.dense_joint import dense
from tests.support.dense_rows import narrow
from tests.support.edited_transformers import (
    EDITS,
    FAULTS,
    LONGER,
    SOURCE,
    STEPS,
    Model,
    edited,
    placed,
    reference,
    shows,
)
from tests.support.tiny_flux2 import (
    draw_flux2,
    embedded,
    tiny_dev_that_reads,
    tiny_flux2_pipeline,
    tiny_klein_pipeline,
    tiny_klein_that_reads,
)

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8
MODELS = {
    "dev": Model(lambda pipe: tiny_flux2_pipeline(), draw_flux2, is_guided=False),
    "klein": Model(lambda pipe: tiny_klein_pipeline(), draw_flux2, {"negative": "a drawing"}),
    "klein, distilled": Model(lambda pipe: tiny_klein_pipeline(), draw_flux2, {"guidance_scale": 1.0}, is_guided=False),
}
READING = {
    "klein": Model(lambda pipe: tiny_klein_that_reads(), draw_flux2, {"guidance_scale": 3.0}, family="klein"),
    "dev": Model(lambda pipe: tiny_dev_that_reads(), draw_flux2, is_guided=False, family="flux2"),
    "dev, padded behind": Model(
        lambda pipe: tiny_dev_that_reads(padding_side="right"), draw_flux2, is_guided=False, family="flux2"
    ),
}
WORDS = {"Prompt-to-Prompt, replaced words", "Prompt-to-Prompt, refined", "ReFlex"}
WITHOUT_WORDS = [edit for edit in EDITS if edit not in WORDS]
SIZE = (6, 12)


@pytest.fixture(scope="module")
def pipes():
    return {name: model.make(None) for name, model in MODELS.items()}


def case_of(pipes, model, edit, targets=2):
    make, texts = EDITS[edit]
    prompts = (SOURCE, *texts[:targets])
    return make(MODELS[model], pipes[model], prompts, SIZE), prompts


def farthest(one, other):
    return float((one - other).abs().max())


ALWAYS = {("dev", "FPE"), ("klein", "FPE"), ("klein", "ConsistEdit, a mask"), ("dev", "KV-Edit")}
CASES = [
    pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.slow)
    for case in itertools.product(MODELS, WITHOUT_WORDS)
]


@pytest.mark.parametrize(("model", "edit"), CASES)
def test_targets_are_the_papers(pipes, model, edit):
    case, prompts = case_of(pipes, model, edit)
    pipe, of = pipes[model], MODELS[model]
    plain = of.run(pipe, prompts, size=SIZE, **of.options)
    actual = edited(pipe, of, case, prompts, size=SIZE)
    assert farthest(actual, reference(pipe, of, case, prompts, size=SIZE)) <= EXACT
    assert farthest(actual[0], plain[0]) <= EXACT
    assert all(farthest(actual[row], plain[row]) > 1e-4 for row in (1, 2))
    assert farthest(of.run(pipe, prompts, size=SIZE, **of.options), plain) == 0.0


@pytest.fixture(scope="module")
def reading():
    return {name: of.make(None) for name, of in READING.items()}


@pytest.mark.parametrize("model", READING)
@pytest.mark.parametrize(
    "edit", [pytest.param(each, marks=() if "refined" in each else pytest.mark.slow) for each in sorted(WORDS)]
)
def test_words_are_found_in_a_conversation(reading, model, edit):
    pipe, of, (make, texts) = reading[model], READING[model], EDITS[edit]
    prompts = (SOURCE, *texts[:2])
    case = make(of, pipe, prompts, SIZE)
    actual = edited(pipe, of, case, prompts, size=SIZE)
    assert farthest(actual, reference(pipe, of, case, prompts, size=SIZE)) <= EXACT
    assert farthest(actual, draw_flux2(pipe, prompts, size=SIZE, **of.options)) > 1e-4
    wrong = reference(pipe, of, case, prompts, "a step off", size=SIZE)
    assert farthest(actual, wrong) > 1e3 * EXACT


@pytest.mark.parametrize("model", READING)
def test_heat_of_a_word_is_in_its_own_columns(reading, model):
    """The share that its tokens have of the map that is written out."""
    pipe, of = reading[model], READING[model]
    prompts, sums = [SOURCE, "a big dog on a house in winter"], []

    def keep(row, rows, block):
        if of.roles(row, rows, state["calls"], 2)[2] and row == 1:
            sums.append(block.mean(0))

    with heat_maps(pipe, ["car", "dog"]) as maps:
        draw_flux2(pipe, prompts, size=SIZE, **of.options)
    with dense(pipe, lambda row, rows: None, steps=range(STEPS), keep=keep) as state:
        draw_flux2(pipe, prompts, size=SIZE, **of.options)
    ((dog,),) = [placed(of, pipe, prompts)[1][0].find("dog")]
    heat = (sum(sums) / len(sums))[:, dog - 1 : dog + 2].unflatten(0, (3, 6))
    assert farthest(torch.as_tensor(maps.word("dog", 1)), heat[..., 1]) <= 1e-6
    assert all(farthest(heat[..., 1], heat[..., beside]) > 1e-5 for beside in (0, 2))


@pytest.mark.parametrize("model", ["klein", "dev"])
def test_masks_and_blends_of_words(reading, model):
    """Of the word's own columns: a mask of another word is another edit, and so is a blend."""
    pipe, prompts = reading[model], [SOURCE, "a photo of a big car on a mountain"]

    def drawn(edit):
        with editing(pipe, edit):
            return draw_flux2(pipe, prompts, size=SIZE, **READING[model].options)

    masked = [drawn(FreePromptEdit(1.0, mask=WordMask(SOURCE, word, pipe.tokenizer, 0.5))) for word in ("car", "on")]
    blends = [LocalBlend(prompts, pipe.tokenizer, [word] * 2, 0.5, start=0.3) for word in ("car", "on")]
    blended = [drawn(FreePromptEdit(1.0) + blend) for blend in blends]
    for one, other in (masked, blended):
        assert farthest(one[0], other[0]) <= EXACT and farthest(one[1], other[1]) > 1e-4


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("edit", ["FPE", "MasaCtrl", "ConsistEdit, a mask"])
def test_mistakes_show(pipes, edit, fault):
    of = MODELS["klein"]
    if not shows(fault, of, edit):
        pytest.skip("no mistake there")
    case, prompts = case_of(pipes, "klein", edit)
    actual = edited(pipes["klein"], of, case, prompts, size=SIZE)
    wrong = reference(pipes["klein"], of, case, prompts, fault, size=SIZE)
    assert farthest(actual, wrong) > 1e3 * EXACT


def test_what_rows_share_is_computed_once(pipes):
    pipe = pipes["dev"]
    with editing(pipe, FreePromptEdit(1.0)) as session:
        draw_flux2(pipe, (SOURCE, *LONGER[:2]), size=SIZE)
    report = session.report()
    assert len(report.layers) == 5 and all(steps == list(range(STEPS)) for steps in report.layers.values())
    assert report.batch == 3


def test_rows_of_one_image_draw_the_same_noise(pipes):
    pipe = pipes["dev"]
    with editing(pipe, FreePromptEdit(0.0)):
        out = pipe(
            prompt_embeds=embedded(["a cat", "a cat"], torch.float64),
            height=48,
            width=96,
            num_inference_steps=1,
            output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).images
    assert farthest(out[0], out[1]) <= EXACT


def test_a_reference_picture_stays_each_rows_own(pipes):
    """Its tokens follow the image's, which its places tell."""
    pipe = pipes["dev"]
    noise = torch.randn(1, 18, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(2, 1, 1)
    others = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own, reference = (
        torch.cartesian_prod(torch.tensor([picture]), torch.arange(3), torch.arange(width), torch.tensor([0]))
        for picture, width in ((0, 6), (10, 3))
    )
    places = torch.cat([own, reference])
    texts = embedded([SOURCE, LONGER[0]], torch.float64)

    def call(reference):
        return pipe.transformer(
            hidden_states=torch.cat([noise, reference], dim=1),
            encoder_hidden_states=texts,
            timestep=torch.full((2,), 0.5, dtype=torch.float64),
            guidance=torch.full((2,), 3.0, dtype=torch.float64),
            img_ids=places.expand(2, -1, -1),
            txt_ids=torch.cartesian_prod(*[torch.tensor([0])] * 3, torch.arange(12)).expand(2, -1, -1),
            return_dict=False,
        )[0][:, :18]

    call_of = adapter_of(pipe.transformer).read((), {"hidden_states": noise, "img_ids": places, "timestep": 0.5})
    assert (call_of.size, call_of.references) == ((6, 12), 9)
    with torch.no_grad():
        plain = call(others)
        with editing(pipe.transformer, FreePromptEdit(1.0), classifier_free_guidance=False) as session:
            session.step(0, 2)
            actual = call(others)
            session.step(1, 2)
            alike = call(others[:1].expand(2, -1, -1))
    assert farthest(actual[0], plain[0]) <= EXACT and farthest(actual[1], plain[1]) > 1e-4
    assert farthest(alike[1], actual[1]) > 1e-4  # its own reference is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrower_weights(pipes, dtype):
    """The edit is as far from the exact one as the unedited picture is from the exact one, and is seen beside it."""
    prompts, narrow = (SOURCE, LONGER[0]), tiny_flux2_pipeline(dtype)
    exact, rounded = (draw_flux2(pipe, prompts).double() for pipe in (pipes["dev"], narrow))
    with editing(pipes["dev"], FreePromptEdit(1.0)):
        expected = draw_flux2(pipes["dev"], prompts)
    with editing(narrow, FreePromptEdit(1.0)):
        actual = draw_flux2(narrow, prompts).double()
    assert farthest(actual, expected) <= 3 * farthest(rounded, exact)
    if dtype is torch.float32:  # bfloat16 is too coarse for weights of no training
        assert farthest(actual[1], exact[1]) > 100 * farthest(actual, expected)


def test_fused_projections_of_dual_blocks(pipes):
    pipe = tiny_flux2_pipeline()
    with editing(pipe, FreePromptEdit(0.5)):
        expected = draw_flux2(pipe, (SOURCE, LONGER[0]))
    for block in pipe.transformer.transformer_blocks:
        block.attn.fuse_projections()
    with editing(pipe, FreePromptEdit(0.5)):
        assert farthest(draw_flux2(pipe, (SOURCE, LONGER[0])), expected) <= EXACT


@pytest.mark.slow
def test_a_compiled_transformer():
    pipe = tiny_flux2_pipeline(torch.float32)
    with narrow():  # the compiler reads PyTorch's own methods
        with editing(pipe, FreePromptEdit(0.5)):
            expected = draw_flux2(pipe, (SOURCE, LONGER[0]))
        pipe.transformer.compile(backend="eager", fullgraph=True)
        with editing(pipe, FreePromptEdit(0.5)):
            assert farthest(draw_flux2(pipe, (SOURCE, LONGER[0])), expected) <= 1e-5


class TestRefused:
    def test_words_of_embeddings(self, pipes, pipe):
        prompts, message = [SOURCE, "a photo of a big car on a mountain"], "pass prompts and not embeddings"
        for edit in (
            PromptToPromptEdit(prompts, pipe.tokenizer),
            FreePromptEdit(mask=WordMask(SOURCE, "car", pipe.tokenizer)),
        ):
            with pytest.raises(ValueError, match=message), editing(pipes["dev"], edit):
                draw_flux2(pipes["dev"], prompts)

    def test_a_conversation_that_another_tokenizer_wrote(self, reading):
        tiny, prompts = reading["dev"], [SOURCE, "a photo of a big car on a mountain"]
        edit = PromptToPromptEdit(prompts, tiny.tokenizer)
        said = tiny.tokenizer.apply_chat_template
        with pytest.MonkeyPatch.context() as within:
            within.setattr(tiny, "system_message", "Draw of {}")
            within.setattr(
                tiny.tokenizer, "apply_chat_template", lambda given, **options: said(given[:1] * len(given), **options)
            )
            with pytest.raises(ValueError, match="encodes other tokens than those of the prompt"), editing(tiny, edit):
                draw_flux2(tiny, prompts, size=SIZE)

    def test_keys_and_values_that_are_kept_from_step_to_step(self):
        tiny = tiny_flux2_pipeline(name="Flux2KleinKVPipeline")
        message = "Flux2KVAttnProcessor may do more than attention"
        with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit(0.5)):
            draw_flux2(tiny, [SOURCE, LONGER[0]])
        with pytest.raises(ValueError, match="keeps keys and values of its reference pictures"):
            adapter_of(tiny).read((), {"kv_cache_mode": "cached"})

    def test_layers_that_were_found_for_flux1(self, pipes):
        from fpe_pipeline import StableFlowEdit

        with pytest.raises(ValueError, match="layers="), editing(pipes["dev"], StableFlowEdit()):
            draw_flux2(pipes["dev"], [SOURCE, LONGER[0]])
