"""Edits of Chroma, whose texts are padded in the middle of a layer's tokens: against dense layers, to 1e-8 in float64.

diffusers' pipeline makes numbers of its mask, which attention adds to scores; of truth values, padding takes none.
"""

import itertools

import diffusers
import pytest
import torch

if not hasattr(diffusers, "ChromaInpaintPipeline"):
    pytest.skip("this diffusers has no inpainting with Chroma", allow_module_level=True)

from diffusers import ChromaImg2ImgPipeline, ChromaInpaintPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from fpe_pipeline import (
    ConsistEdit,
    FreeFluxEdit,
    FreePromptEdit,
    KVEdit,
    LocalBlend,
    ReFlexEdit,
    StableFlowEdit,
    ValueInjectionEdit,
    WordMask,
    concept_maps,
    editing,
    heat_maps,
)
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.dense_joint import DenseChroma, dense
from tests.support.edited_transformers import EDITS, STEPS, Model, edited, placed, reference, unedited
from tests.support.own_maps import OwnMaps
from tests.support.tiny_chroma import draw_chroma, tiny_chroma, tiny_chroma_pipeline, tiny_masked_chroma
from tests.support.tiny_transformers import FLUX

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT, SHOWS, HEAT = 1e-8, 1e-6, 1e-6
SIZE, GRID, TEXTS = (6, 12), (3, 6), 12
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "a drawing"}
MODELS = {
    "numbers": Model(tiny_chroma_pipeline, draw_chroma, is_guided=False, family="chroma"),
    "numbers, guided": Model(tiny_chroma_pipeline, draw_chroma, GUIDED, family="chroma"),
    "truth values": Model(tiny_masked_chroma, draw_chroma, is_guided=False, family="chroma"),
    "truth values, guided": Model(tiny_masked_chroma, draw_chroma, GUIDED, family="chroma"),
}
PROMPTS = {
    "other lengths": ("a red car on a mountain", "a red car", "a photo of a red dog on a house"),
    "one length": ("a red car on a mountain", "a red dog on a house", "a blue car on a mountain"),
}
# Every mask with every edit; these always.
ALWAYS = {
    ("numbers", "one length", "FPE"),
    ("numbers, guided", "other lengths", "FPE, the whole map"),
    ("numbers, guided", "other lengths", "Prompt-to-Prompt, refined"),
    ("truth values, guided", "other lengths", "FPE"),
    ("truth values", "other lengths", "ReFlex"),
}


@pytest.fixture(scope="module")
def pipes(pipe):
    return {name: model.make(pipe) for name, model in MODELS.items()}


def farthest(one, other):
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


@pytest.mark.parametrize(
    ("model", "words", "edit"),
    [
        pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.slow)
        for case in itertools.product(MODELS, PROMPTS, EDITS)
        if case[1:] != ("other lengths", "Prompt-to-Prompt, replaced words")  # which is of as many words
    ],
)
def test_targets_are_the_papers(pipes, model, words, edit):
    tiny, of, prompts = pipes[model], MODELS[model], PROMPTS[words]
    case = EDITS[edit][0](of, tiny, prompts, SIZE)
    actual = edited(tiny, of, case, prompts, size=SIZE)
    plain = unedited(tiny, of, prompts, size=SIZE)
    assert farthest(actual, reference(tiny, of, case, prompts, size=SIZE)) <= EXACT
    assert farthest(actual[0], plain[0]) <= EXACT
    assert all(farthest(actual[row], plain[row]) > 1e-4 for row in (1, 2))


@pytest.mark.parametrize("blind", [("dual", "single"), ("single",), ("dual",)], ids=" and ".join)
@pytest.mark.parametrize("model", ["numbers", "truth values, guided"])
def test_masks_that_are_not_looked_at_show(pipes, model, blind, monkeypatch):
    tiny, of, prompts = pipes[model], MODELS[model], PROMPTS["other lengths"]
    case = EDITS["FPE"][0](of, tiny, prompts, SIZE)
    actual = edited(tiny, of, case, prompts, size=SIZE)
    monkeypatch.setattr(DenseChroma, "blind", blind)
    wrong = reference(tiny, of, case, prompts, size=SIZE)
    assert all(farthest(actual[row], wrong[row]) > SHOWS for row in range(3))


def test_the_two_masks_are_two_edits(pipes):
    prompts, runs = PROMPTS["other lengths"], []
    for model in ("numbers", "truth values"):
        case = EDITS["FPE"][0](MODELS[model], pipes[model], prompts, SIZE)
        runs.append(edited(pipes[model], MODELS[model], case, prompts, size=SIZE))
    assert farthest(*runs) > SHOWS


@pytest.mark.parametrize("model", ["numbers", "truth values"])
def test_whether_padding_takes_attention(pipes, model):
    """Whatever stands behind the one token of padding that counts: of truth values it says nothing, in any row."""
    tiny, prompts = pipes[model], list(PROMPTS["other lengths"])
    embeds, _, mask, *_ = tiny.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXTS)
    assert mask.sum(1).tolist() == [len(tiny.tokenizer(prompt)["input_ids"]) + 1 for prompt in prompts]
    assert mask.sum(1)[:2].max() < TEXTS
    other = torch.where(mask[..., None] == 0, 3 * embeds.flip(-1) + 1, embeds)
    counting = other.clone()
    counting[0, int(mask[0].sum()) - 1] += 1  # which is padding too

    def run(texts):
        noise = torch.randn(1, 18, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        given = {"prompt_embeds": texts, "prompt_attention_mask": mask, "latents": noise.repeat(3, 1, 1)}
        options = {"height": 48, "width": 96, "num_inference_steps": 2, "guidance_scale": 1.0}
        with editing(tiny, FreePromptEdit(1.0)):
            return tiny(**given, **options, output_type="latent").images

    first, second, third = map(run, (embeds, other, counting))
    assert (farthest(first, second) <= EXACT) is (model == "truth values")
    assert farthest(second, third) > SHOWS


@pytest.mark.parametrize("model", ["numbers", "truth values"])
def test_the_source_is_bit_for_bit_that_of_an_edit_of_nothing(pipe, model):
    """In float64 that is in test_source_rows.py, with tables of places as diffusers has them."""
    of, prompts = MODELS[model], PROMPTS["other lengths"]
    tiny = of.make(pipe, torch.float32)
    with editing(tiny, FreePromptEdit(1.0)):
        out = unedited(tiny, of, prompts)
    with editing(tiny, OwnMaps()):
        own = unedited(tiny, of, prompts)
    stock = unedited(tiny, of, prompts)
    assert torch.equal(out[0], own[0]) and farthest(out[1:], own[1:]) > 1e-4
    assert farthest(own, stock) <= 1e-5
    with editing(tiny, FreePromptEdit(0.0)):  # no step is edited
        assert torch.equal(unedited(tiny, of, prompts), stock)


def test_two_images_a_prompt(pipes):
    """Masks are repeated beside their texts."""
    tiny, of, prompts = pipes["truth values"], MODELS["truth values"], PROMPTS["other lengths"][:2]
    one, noise = {}, torch.randn(2, 18, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with editing(tiny, FreePromptEdit(1.0)):
        both = unedited(tiny, of, prompts, size=SIZE, images=2, latents=noise.repeat(2, 1, 1))
        for image in range(2):
            latents = noise[image : image + 1].repeat(2, 1, 1)
            one[image] = unedited(tiny, of, prompts, size=SIZE, latents=latents)
    for image in range(2):
        assert farthest(both[image::2], one[image]) <= EXACT


@pytest.mark.parametrize("kind", [ChromaImg2ImgPipeline, pytest.param(ChromaInpaintPipeline, marks=pytest.mark.slow)])
def test_of_pictures(pipe, kind):
    tiny = tiny_chroma_pipeline(pipe, kind=kind)
    picture = torch.rand(1, 3, 48, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = list(PROMPTS["other lengths"][:2])
    options = {"strength": 0.75, "num_inference_steps": 4, "max_sequence_length": TEXTS, "output_type": "latent"}
    options |= {"height": 48, "width": 96, "guidance_scale": 3.0, "negative_prompt": ["a drawing"] * 2}
    if kind is ChromaInpaintPipeline:
        tiny.transformer.register_to_config(guidance_embeds=False)  # which diffusers 0.42 asks for here
        options["mask_image"] = (torch.arange(96) >= 48).double().expand(1, 1, 48, 96)

    def run(image, generator):
        return tiny(prompts, image=image, generator=generator, **options).images

    def rule(row, rows):
        return [(1.0, {"q_image": 0, "k_image": 0})] if row and state["calls"] % 2 else None

    with editing(tiny, FreePromptEdit(1.0)) as session:
        actual = run(picture, torch.Generator().manual_seed(0))
    assert all(noted == [1, 2, 3] for noted in session.report().layers.values()) and len(session.report().layers) == 5

    def run_alike():
        return run(picture.repeat(2, 1, 1, 1), [torch.Generator().manual_seed(0) for _ in range(2)])

    with dense(tiny, rule, steps=range(4)) as state:
        expected = run_alike()
    plain = run_alike()
    assert farthest(actual, expected) <= EXACT
    assert farthest(actual[0], plain[0]) <= EXACT and farthest(actual[1], plain[1]) > 1e-4


class TestWords:
    PROMPTS = ("a photo of a red car", "a big dog on a house")

    @pytest.fixture(params=["numbers, guided", pytest.param("truth values, guided", marks=pytest.mark.slow)])
    def of(self, request, pipes):
        return MODELS[request.param], pipes[request.param]

    def densely(self, of, rule=lambda *given: None, **options):
        """Latents, and by row the block of the map over text keys, mean over heads and summed."""
        model, tiny = of
        kept = {"sums": [0, 0], "count": 0}

        def keep(row, rows, block):
            if kept["calls"]() % 2:
                kept["sums"][row] = kept["sums"][row] + block.mean(0)
                kept["count"] += row == 0

        def followed(row, rows):
            return rule(kept, state["step"], row) if state["calls"] % 2 else None

        with dense(tiny, followed, steps=range(STEPS), keep=keep) as state:
            kept["calls"] = lambda: state["calls"]
            return unedited(tiny, model, self.PROMPTS, size=SIZE, **options), kept

    def heat(self, of, kept, number, word):
        tokens = list(placed(*of, self.PROMPTS)[number][0].find(word))
        return (kept["sums"][number] / kept["count"])[:, tokens].sum(1).reshape(GRID)

    def test_heat(self, of):
        model, tiny = of
        with heat_maps(tiny, ["car", "dog", "a"]) as maps:
            out = unedited(tiny, model, self.PROMPTS, size=SIZE)
        expected, kept = self.densely(of)
        assert farthest(out, expected) <= EXACT
        for word, image in (("car", 0), ("dog", 1), ("a", 0), ("a", 1)):
            assert farthest(maps.word(word, image), self.heat(of, kept, image, word)) <= HEAT
        assert farthest(maps.word("car"), self.heat(of, kept, 0, "red")) > 20 * HEAT

    def test_a_mask_of_a_word(self, of):
        model, tiny = of
        with editing(tiny, FreePromptEdit(1.0, mask=WordMask(self.PROMPTS[0], "car", tiny.tokenizer))):
            actual = unedited(tiny, model, self.PROMPTS, size=SIZE)

        def expected(word):
            shares = {}

            def rule(kept, step, row):
                if step not in shares:
                    heat = self.heat(of, kept, 0, word) if kept["count"] else torch.ones(GRID).double()
                    shares[step] = (heat / heat.amax()).flatten()
                return [(shares[step], {"q_image": 0, "k_image": 0}), (1 - shares[step], {})] if row else None

            return self.densely(of, rule)[0]

        assert farthest(actual, expected("car")) <= 10 * HEAT  # the heat is float32, and steps pass its rounding on
        assert farthest(actual, expected("photo")) > 100 * HEAT

    @pytest.mark.slow
    def test_a_local_blend(self, of):
        model, tiny = of
        blend = LocalBlend(self.PROMPTS, tiny.tokenizer, ["car", "dog"], 0.9)
        with editing(tiny, FreePromptEdit(0.0) + blend):
            actual = unedited(tiny, model, self.PROMPTS, size=SIZE)
        kept, seen = {}, []

        def keep_what_is_kept(given, step, row):
            kept.update(given, sums=given["sums"])
            return

        def after_step(pipe, step, timestep, values):
            mask = False
            for number, word in enumerate(("car", "dog")):
                heat = self.heat(of, counted(kept), number, word)
                heat = torch.nn.functional.max_pool2d(heat[None, None], 3, stride=1, padding=1)[0, 0]
                mask = mask | (heat / heat.amax() > 0.9)
            seen.append(float(mask.double().mean()))
            latents, mask = values["latents"], mask.reshape(-1, 1)
            return {"latents": torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])}

        def counted(kept):
            return {"sums": kept["sums"], "count": 1}  # of a heat, only what it is beside its largest counts

        expected, _ = self.densely(of, keep_what_is_kept, callback_on_step_end=after_step)
        assert len(seen) == STEPS and all(0 < share < 1 for share in seen)
        assert farthest(actual, expected) <= EXACT
        assert farthest(actual, unedited(tiny, model, self.PROMPTS, size=SIZE)) > 1e-4


def test_layers_that_were_found_for_flux1_are_chromas(pipe):
    """It has as many blocks of each kind, and its weights come from FLUX.1's."""
    size = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 8, "num_attention_heads": 1}
    chroma, flux = (
        adapter_of(model).sites
        for model in (tiny_chroma(torch.float32, **size), FluxTransformer2DModel(**{**FLUX, **size}))
    )
    assert len(chroma) == 57 and [site.path for site in chroma] == [site.path for site in flux]
    for edit in (
        StableFlowEdit(),
        FreeFluxEdit("add", mask=torch.ones(8, 8)),
        FreeFluxEdit("non-rigid"),
        ReFlexEdit(["a cat", "a dog"], pipe.tokenizer),
        ValueInjectionEdit(),
        KVEdit(mask=torch.ones(8, 8)),
        ConsistEdit(),
    ):
        assert [site.path for site in edit.select(chroma)] == [site.path for site in edit.select(flux)] != []


class TestRefused:
    def test_concepts(self, pipes):
        with pytest.raises(TypeError, match="ChromaTransformer2DModel is not known to"):
            concept_maps(pipes["numbers"], ["car", "background"]).__enter__()

    def test_image_prompts(self, pipe):
        tiny = tiny_chroma_pipeline(pipe, torch.float32)
        adapter = FluxIPAdapterAttnProcessor(hidden_size=16, cross_attention_dim=16)
        tiny.transformer.transformer_blocks[0].attn.set_processor(adapter)
        message = r"transformer_blocks\.0\.attn: its processor FluxIPAdapterAttnProcessor"
        with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit(0.5)):
            draw_chroma(tiny)

    def test_layers_of_other_depths(self, pipes):
        with pytest.raises(ValueError, match="layers="), editing(pipes["numbers"], StableFlowEdit()):
            draw_chroma(pipes["numbers"])
