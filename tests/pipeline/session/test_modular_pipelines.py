"""Edits of diffusers' modular pipelines are those of the ordinary ones that have the same parts."""

import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PerturbedAttentionGuidance
from PIL import Image

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    FreePromptPipeline,
    LocalBlend,
    MasaCtrlEdit,
    PromptToPromptEdit,
    WordMask,
    concept_maps,
    editing,
    heat_maps,
)
from fpe_pipeline.compat.prompt_to_prompt import AttentionReplace, ptp_utils
from fpe_pipeline.prompts.encoding import encoding_tokenizer
from tests.support.modular_twins import GUIDANCE, OF_WORDS, PROMPTS, SIZE, TWINS, last_latents, modular

TOLERANCE = 1e-4
FAST = ("flux", "sdxl")


def words(pipe):
    return PromptToPromptEdit(PROMPTS, pipe.tokenizer, cross_replace_steps=0.6, self_replace_steps=0.4)


def models(names, fast=FAST):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def held(twins, edit):
    """The edit in both pipelines; the modular one's latents without it too."""
    one, twin, call, modular_call = twins
    with editing(one, edit(one), images_per_prompt=None if one.text_encoder is not None else 1):
        expected = last_latents(one, **call)
    blocks = twin._blocks
    with editing(twin, edit(twin)) as session:
        found = last_latents(twin, **modular_call)
    assert twin._blocks is blocks
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    return found, session


@pytest.mark.parametrize("name", models(TWINS))
def test_free_prompt_editing(pipe, name):
    twins = TWINS[name](pipe)
    found, session = held(twins, lambda _: FreePromptEdit(0.5))
    assert "steps 0-1" in session.explain()
    same = [torch.Generator().manual_seed(0) for _ in PROMPTS]
    unedited = last_latents(twins[1], same, **twins[3])
    torch.testing.assert_close(found[0], unedited[0], rtol=0, atol=TOLERANCE)
    assert (found[1] - unedited[1]).abs().max() > 5 * TOLERANCE


@pytest.mark.parametrize("name", models(OF_WORDS, fast=("flux", "sdxl", "z_image")))
def test_words(pipe, name):
    twins = OF_WORDS[name](pipe)
    found, _ = held(twins, words)
    assert twins[3]["prompt"] == ["a photo of a red car", "a photo of a blue car"]  # the caller's list, as it was
    unedited = last_latents(twins[1], [torch.Generator().manual_seed(0) for _ in PROMPTS], **twins[3])
    assert (found[1] - unedited[1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", models(["qwen", "klein", "z_image"], fast=("klein",)))
def test_words_of_blocks_without_a_text_encoder(pipe, name):
    twin = TWINS[name](pipe)[1]
    with pytest.raises(ValueError, match="do not say what text they encode prompts in, so that no word"):
        editing(twin, PromptToPromptEdit(PROMPTS, pipe.tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("sdxl", lambda pipe: MasaCtrlEdit(1)),
        ("sdxl", lambda pipe: words(pipe) + LocalBlend(PROMPTS, pipe.tokenizer, ["car", "car"], start=0.2)),
        ("sd3", lambda pipe: ConsistEdit()),
        ("flux", lambda pipe: MasaCtrlEdit(0, layers=[1, 2])),
    ],
    ids=["masactrl", "blend", "consistedit", "image tokens"],
)
def test_other_edits(pipe, name, edit):
    held(TWINS[name](pipe), edit)


#: Heat is of one picture.
PICTURES = [name for name in OF_WORDS if not name.startswith(("wan", "ltx"))]


@pytest.mark.parametrize("name", models(PICTURES, fast=("flux", "sdxl", "z_image")))
def test_where_words_act(pipe, name):
    one, twin, call, modular_call = OF_WORDS[name](pipe)
    seen = []
    for each, given in ((one, call), (twin, modular_call)):
        with heat_maps(each, ["car", "red"]) as maps:
            last_latents(each, **copy.deepcopy(given))
        seen.append(np.stack([maps.word("car"), maps.word("car", 1), maps.word("red")]))
    np.testing.assert_allclose(seen[1], seen[0], rtol=0, atol=TOLERANCE / 10)
    assert min(np.abs(seen[0][0] - other).max() for other in seen[0][1:]) > TOLERANCE / 5


@pytest.mark.parametrize("name", models([name for name in PICTURES if name != "sdxl"], fast=("flux", "z_image")))
def test_words_that_weigh_and_places_that_are_kept(pipe, name):
    """The re-weighted word, latents that a blend of words keeps, and a mask of one, are the ordinary pipeline's."""
    twins, edits = OF_WORDS[name](pipe), []
    tokenizer = encoding_tokenizer(twins[0])
    weighed = PromptToPromptEdit(PROMPTS, tokenizer, "refine", weights={"blue": 4.0})
    for edit in (
        weighed,
        weighed + LocalBlend(PROMPTS, tokenizer, ["car", "car"], 0.8, start=0.2),
        FreePromptEdit(0.8, mask=WordMask(PROMPTS[0], "car", tokenizer, threshold=0.8)),
    ):
        edits.append(held(twins, lambda _, edit=edit: edit)[0])
    apart = [(first - second).abs().max() for first, second in itertools.pairwise(edits)]
    assert min(apart) > 5 * TOLERANCE


def test_several_images_of_a_prompt_start_alike(pipe):
    """Image i of the target from the noise of image i of the source, as in ordinary pipelines."""
    _, twin, _, call = TWINS["flux"](pipe)
    starts = []
    handle = twin.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: starts.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with editing(twin, FreePromptEdit(0.5)):
        twin(**call | {"num_images_per_prompt": 2, "num_inference_steps": 2}, output="latents", output_type="latent")
    handle.remove()
    first = starts[0]
    assert first.shape[0] == 4 and torch.equal(first[:2], first[2:]) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", models([name for name in OF_WORDS if name != "sdxl"]))
def test_stochastic_steps_draw_alike(pipe, name):
    """Blocks of flow models hand no generator to their scheduler's steps; a seed decides all the same."""
    _, twin, _, call = OF_WORDS[name](pipe)
    twin.update_components(scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    call = {**call, "prompt": [PROMPTS[0], PROMPTS[1], PROMPTS[0]], "output_type": "latent"}
    call.pop("latents", None)
    if isinstance(call.get("negative_prompt"), list):
        call["negative_prompt"] = call["negative_prompt"][:1] * 3

    def drawn(seed, **options):
        with editing(twin, FreePromptEdit(1.0), **options):
            return twin(**call, generator=torch.Generator().manual_seed(seed), output="latents")

    first, apart = drawn(0), drawn(0, noise="separate")
    torch.testing.assert_close(first[0], first[2], rtol=0, atol=TOLERANCE)
    assert (first[0] - first[1]).abs().max() > 100 * TOLERANCE
    assert torch.equal(drawn(0), first) and (drawn(1) - first).abs().max() > 0.1
    assert (apart[0] - apart[2]).abs().max() > 0.1


def test_guidance_that_ends(pipe):
    """Calls of a step without guidance hold the prompts' rows."""
    _, twin, _, call = TWINS["sdxl"](pipe)
    full = last_latents(twin, [torch.Generator().manual_seed(0) for _ in PROMPTS], **call)
    twin.update_components(guider=twin.guider.new(stop=0.5))
    with editing(twin, FreePromptEdit(0.9)) as session:
        ended = last_latents(twin, **call)
    assert (ended - full).abs().max() > TOLERANCE
    assert "row 1 = A(q 0, k 0) @ v 1" in session.explain()


def test_a_guider_that_comes_later(pipe):
    """Into a session, which listens to it from the next call on, and leaves both as they were."""
    _, twin, _, call = TWINS["sdxl"](pipe)
    with editing(twin, FreePromptEdit(0.5)):
        expected = last_latents(twin, **call)
        first = twin.guider
        twin.update_components(guider=first.new())
        assert torch.equal(last_latents(twin, **call), expected)
    assert not {"prepare_models", "cleanup_models"} & {*vars(first), *vars(twin.guider)}


def test_a_guider_with_further_conditions(pipe):
    _, twin, _, call = TWINS["sdxl"](pipe)
    layers = {"fqn": "mid_block.attentions.0.transformer_blocks", "indices": [0]}
    guider = PerturbedAttentionGuidance(
        guidance_scale=GUIDANCE,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config={**layers, "skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    )
    twin.update_components(guider=guider)
    message = r"PerturbedAttentionGuidance calls the model for \['pred_cond', 'pred_uncond', 'pred_cond_skip'\]"
    with pytest.raises(ValueError, match=message), editing(twin, FreePromptEdit(0.5)):
        last_latents(twin, **call)
    assert not any(hasattr(module, "order") for module in twin.unet.attn_processors.values())


def test_calls_that_no_guider_prepares(pipe):
    """Blocks of somebody's own that call the model twice a step say of neither call whose rows it holds."""
    _, twin, _, call = TWINS["flux"](pipe)
    before = twin.transformer.register_forward_pre_hook(_once_more, with_kwargs=True)
    message = "Flux.* call the model 2 times in a step, and no guider says which call sees the prompts"
    with pytest.raises(ValueError, match=message), editing(twin, FreePromptEdit(0.5)):
        last_latents(twin, **call)
    before.remove()


def _once_more(module, args, kwargs):
    if not vars(module).get("repeats"):
        module.repeats = True
        module(*args, **kwargs)
        del module.repeats


def test_another_modular_pipeline_with_the_model(pipe):
    one, twin, _, call = TWINS["sdxl"](pipe)
    other = modular("StableDiffusionXLAutoBlocks", one)
    message = "another StableDiffusionXLModularPipeline calls the model that they share"
    with editing(twin, FreePromptEdit(0.5)):
        last_latents(twin, **call)
        with pytest.raises(RuntimeError, match=message):
            last_latents(other, **call)


def test_blocks_are_what_they_were(pipe):
    """Inside a session as well: what a pipeline tells of its blocks, and what a copy of them is."""
    _, twin, _, call = TWINS["flux"](pipe)
    blocks = twin._blocks
    with editing(twin, FreePromptEdit(0.5)):
        assert type(twin.blocks) is type(copy.deepcopy(twin._blocks)) is type(blocks)
        assert isinstance(twin._blocks, type(blocks)) and str(twin) == str(twin)
        last_latents(twin, **call)
        with pytest.raises(TypeError, match="unsupported operand"):
            twin(**call | {"num_inference_steps": "fifty"}, output="latents")
    assert twin._blocks is blocks


@pytest.mark.parametrize("name", ["flux", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_from_a_picture(pipe, name):
    """Its noise is each row's own generator's, of which the session makes none: the same encodes the picture."""
    _, twin, _, call = TWINS[name](pipe)
    call = call | {"image": [Image.radial_gradient("L").convert("RGB").resize((64, 64))] * 2, "strength": 0.5}
    with editing(twin, FreePromptEdit(1.0)) as session:
        with pytest.raises(ValueError, match="pass a list of generators, one a row, with the same seed"):
            last_latents(twin, **call)
        edited = last_latents(twin, [torch.Generator().manual_seed(0) for _ in PROMPTS], **call)
    assert "steps 2-3" in session.explain()
    plain = last_latents(twin, [torch.Generator().manual_seed(0) for _ in PROMPTS], **call)
    assert torch.equal(edited[0], plain[0]) or (edited[0] - plain[0]).abs().max() < TOLERANCE
    assert (edited[1] - plain[1]).abs().max() > TOLERANCE


def test_other_tools(pipe):
    """What is written for ordinary pipelines says how to get one."""
    flux, sdxl = (TWINS[name](pipe)[1] for name in ("flux", "sdxl"))
    message = "encodes prompts in its blocks, where concepts cannot"
    with pytest.raises(ValueError, match=message), concept_maps(flux, ["car", "sky"]):
        pass
    controller = AttentionReplace(PROMPTS, 4, 0.8, 0.4, tokenizer=pipe.tokenizer)
    with pytest.raises(ValueError, match="whose guider calls the model for each half of the rows, and code written"):
        ptp_utils.register_attention_control(sdxl, controller)


@pytest.mark.parametrize("name", ["flux", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_pipeline_takes_their_parts(pipe, name):
    one, twin, _, _ = TWINS[name](pipe)
    pictures = []
    for each in (one, twin):
        ours = FreePromptPipeline.from_pipe(each)
        ours.set_progress_bar_config(disable=True)
        drawn = ours(*PROMPTS, **SIZE, generator=torch.Generator().manual_seed(0))
        pictures.append(np.asarray(drawn.targets[0]))
    assert np.array_equal(*pictures)
