"""Edits at once, edits by name, word edits on bad input, and what a session explains."""

import pytest
import torch

from fpe_pipeline import (
    CombinedEdit,
    FreePromptEdit,
    LocalBlend,
    MasaCtrlEdit,
    PlugAndPlayEdit,
    PromptToPromptEdit,
    editing,
    make_edit,
)
from fpe_pipeline.edits.registry import methods_of
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline
from tests.support.tiny_unets import tiny_unet, unet_inputs

METHODS = methods_of("unet")

PAIR = PROMPTS[:2]


@pytest.fixture(scope="module")
def tiny(pipe):
    tiny = tiny_pipeline(pipe)
    with torch.no_grad():  # at this scale random weights tell prompts apart
        for name, parameter in tiny.unet.named_parameters():
            if "attn" in name and name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(3.0)
    return tiny


def run(tiny, edit, prompts=2, **kwargs):
    with editing(tiny, edit) as session:
        return sample(tiny, prompts, **kwargs), session


def test_self_by_one_edit_and_cross_by_another(tiny):
    words = PromptToPromptEdit(PAIR, tiny.tokenizer, self_replace_steps=0)
    both = PromptToPromptEdit(PAIR, tiny.tokenizer, self_replace_steps=0.8, levels=1)
    fpe = FreePromptEdit(0.8, levels=1)
    combined, session = run(tiny, fpe + words)
    assert torch.equal(combined, run(tiny, CombinedEdit([words, fpe]))[0])
    assert torch.equal(combined, run(tiny, both)[0])
    assert (combined - run(tiny, fpe)[0])[1].abs().max() > 1e-4
    assert (combined - run(tiny, words)[0])[1].abs().max() > 1e-4
    assert {site.kind for site in session.sites if site.path in session.report().layers} == {"self", "cross"}


def test_parts_that_contradict_one_another(tiny):
    with pytest.raises(ValueError, match="FreePromptEdit and MasaCtrlEdit both replace row 3"):
        run(tiny, FreePromptEdit(1.0, levels=1) + MasaCtrlEdit(0, levels=(0, 1)))
    with pytest.raises(ValueError, match="replace features of the same rows"):
        run(tiny, PlugAndPlayEdit(0.0, 1.0) + PlugAndPlayEdit(0.0, 0.5))
    run(tiny, FreePromptEdit(0.3, levels=1) + MasaCtrlEdit(start_step=1, levels=1))  # one after the other


def test_what_can_be_combined():
    parts = FreePromptEdit() + MasaCtrlEdit() + PlugAndPlayEdit()
    assert [type(part) for part in parts.edits] == [FreePromptEdit, MasaCtrlEdit, PlugAndPlayEdit]
    with pytest.raises(TypeError):
        FreePromptEdit() + 1
    with pytest.raises(TypeError, match="expected edits"):
        CombinedEdit(["fpe"])
    with pytest.raises(ValueError, match="at least one"):
        CombinedEdit([])


@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_a_local_blend_keeps_the_source_outside_its_words(tiny, size):
    words = PromptToPromptEdit(PAIR, tiny.tokenizer)
    blend = LocalBlend(PAIR, tiny.tokenizer, ("red", "blue"), 0.999)
    inside = LocalBlend(PAIR, tiny.tokenizer, ("red", "blue"), 0.0)
    edited, _ = run(tiny, words, size=size)
    blended, _ = run(tiny, words + blend, size=size)
    same = (blended[1] == blended[0]).all(0)  # [h, w]
    assert 0.3 < same.float().mean() < 1
    assert not torch.equal(blended[1], blended[0])
    torch.testing.assert_close(run(tiny, words + inside, size=size)[0], edited, rtol=0, atol=1e-4)
    assert "step" not in vars(tiny.scheduler)


def test_a_blend_is_of_its_own_pipeline(pipe, tiny):
    """Another one in the block, which has the same scheduler and a UNet of its own, is left alone."""
    other, edit = (
        tiny_pipeline(pipe, scheduler=tiny.scheduler),
        LocalBlend(PAIR, tiny.tokenizer, ("red", "blue"), 0.999),
    )
    expected, plain = run(tiny, edit)[0], sample(other)
    with editing(tiny, edit):
        assert torch.equal(sample(tiny), expected)
        assert torch.equal(sample(other), plain)
        with editing(other, FreePromptEdit(0.5)):
            edited = sample(other)
        assert torch.equal(sample(tiny), expected)
    assert torch.equal(run(other, FreePromptEdit(0.5))[0], edited)


def test_a_blend_that_no_scheduler_step_reached(tiny):
    unet = tiny.unet
    with (
        pytest.warns(RuntimeWarning, match="blended after each step"),
        torch.no_grad(),
        editing(tiny, LocalBlend(PAIR, tiny.tokenizer, ("red", "blue")), classifier_free_guidance=True) as session,
    ):
        session.step(0, 1)
        unet(torch.zeros(4, 4, 8, 8), 7, torch.zeros(4, 77, 32))


BAD = {
    "equally many": lambda t: PromptToPromptEdit(["a red car", "a very red car"], t),
    "shares no word": lambda t: PromptToPromptEdit(["red cars", "green ducks"], t, "refine"),
    "in none of the target prompts": lambda t: PromptToPromptEdit(PAIR, t, weights={"ducks": 2.0}),
    "'red' is in none": lambda t: PromptToPromptEdit(PAIR, t, cross_replace_steps={"red": 0.4}),
    "finite factors": lambda t: PromptToPromptEdit(PAIR, t, weights={"blue": float("inf")}),
    "name the word of each factor": lambda t: PromptToPromptEdit(PAIR, t, weights=[3.0]),
    "'blue': 'strong'": lambda t: PromptToPromptEdit(PAIR, t, weights={"blue": "strong"}),
    "at least one target": lambda t: PromptToPromptEdit(PAIR[:1], t),
    "expected align": lambda t: PromptToPromptEdit(PAIR, t, "swap"),
    "expected compat": lambda t: PromptToPromptEdit(PAIR, t, compat="old"),
    "source for each": lambda t: PromptToPromptEdit(PAIR, t, source_of=(0, 5)),
    "'red' is not in the prompt": lambda t: LocalBlend(PAIR, t, ("red", "red")),
    "for each of 2 prompts": lambda t: LocalBlend(PAIR, t, ("red",)),
    "a word, or several, for each of 2 prompts, got": lambda t: LocalBlend(PAIR, t, ("red", None)),
    "threshold": lambda t: LocalBlend(PAIR, t, ("red", "blue"), 1.5),
    "start_layer": lambda t: MasaCtrlEdit(start_layer=-1),
    "one of fpe": lambda t: make_edit("magic", PAIR, t),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(tiny, message):
    with pytest.raises(ValueError, match=message):
        BAD[message](tiny.tokenizer)


def test_prompts_have_to_be_a_list_of_text(tiny):
    with pytest.raises(TypeError, match="list of prompts"):
        PromptToPromptEdit(PAIR[0], tiny.tokenizer)
    with pytest.raises(TypeError, match="must be text"):
        PromptToPromptEdit([PAIR[0], 3], tiny.tokenizer)
    with pytest.raises(TypeError, match=r"expected a tokenizer .* such as pipe\.tokenizer, got NoneType"):
        PromptToPromptEdit(PAIR, None)


def test_layers_that_are_not_there(tiny):
    with pytest.raises(ValueError, match="start_layer=99 is past"):
        editing(tiny, MasaCtrlEdit(start_layer=99))
    with (
        pytest.raises(ValueError, match=r"no module 'up_blocks\.7'"),
        editing(tiny, PlugAndPlayEdit(feature_modules="up_blocks.7")),
    ):
        pass
    assert not any(module._forward_hooks for module in tiny.unet.modules())


def test_a_batch_with_other_prompts_than_the_edits(tiny):
    with pytest.raises(ValueError, match="is written for the prompts"):
        run(tiny, PromptToPromptEdit(PAIR, tiny.tokenizer), prompts=3)


def test_hooks_are_gone_after_an_error(tiny):
    edit = PlugAndPlayEdit() + LocalBlend(PAIR, tiny.tokenizer, ("red", "blue"))
    with pytest.raises(KeyError), editing(tiny, edit):
        raise KeyError
    assert not any(module._forward_hooks for module in tiny.unet.modules())
    assert "step" not in vars(tiny.scheduler)


def test_several_targets_and_images_have_their_own_words(tiny):
    prompts = ["a red car", "a blue car", "a red bus"]

    def call(edit, prompts):
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(len(prompts), 1, 1, 1)
        with editing(tiny, edit, images_per_prompt=2):
            return tiny(
                prompts,
                latents=noise,
                height=64,
                width=64,
                num_inference_steps=3,
                num_images_per_prompt=2,
                output_type="latent",
            ).images

    together = call(PromptToPromptEdit(prompts, tiny.tokenizer, weights={"blue": 3.0}), prompts)
    for number, weights in ((1, {"blue": 3.0}), (2, {})):
        pair = [prompts[0], prompts[number]]
        alone = call(PromptToPromptEdit(pair, tiny.tokenizer, weights=weights), pair)
        torch.testing.assert_close(together[2 * number : 2 * number + 2], alone[2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_methods_by_name(tiny, method):
    options = {
        "masactrl": {"start_step": 1, "start_layer": 2},
        "fpe-regional": {"word": "car"},
        "p2p-blend": {"words": ("red", "blue")},
    }.get(method, {})
    edit = make_edit(method, PAIR, tiny.tokenizer, **options)
    latents, session = run(tiny, edit)
    assert (latents - sample(tiny))[1].abs().max() > 1e-4
    assert session.report().layers


def test_explain(tiny):
    _, session = run(tiny, FreePromptEdit(0.7, levels=1) + PlugAndPlayEdit(0.0, 1.0))
    text = session.explain()
    assert "steps 0-1: row 3 = A(q 2, k 2) @ v 3" in text
    assert "up_blocks.1.resnets.1.conv2: features, steps 0-2" in text
    assert "left alone: 7 of 7 cross-attention layers" in text
    assert session.report().explain() == text  # all that a pipeline's output has
    memory = session.report().memory
    heads, tokens, dim = 2, 16, 8
    (held,) = {memory[path].held for path in memory if "down_blocks.1" in path}
    assert held == (3 + 3 + 4) * heads * tokens * dim * 4  # a target's query and key are not made
    (maps,) = {memory[path].maps for path in memory if "down_blocks.1" in path}
    assert maps == 4 * heads * tokens * tokens * 4


@torch.no_grad()
def test_explain_says_what_was_skipped():
    unet = tiny_unet("sd1")
    args, kwargs = unet_inputs(unet, 4)
    with editing(unet, FreePromptEdit(levels=1), classifier_free_guidance=True) as session:
        session.step(0, 2)
        path = session.sites[0].path
        layer = next(site.path for site in session.sites if site.kind == "self" and site.level == 1)
        wrapper = unet.get_submodule(layer).processor
        unet.get_submodule(layer).processor = wrapper.inner
        with pytest.warns(RuntimeWarning, match="without their editing processor"):
            unet(*args, **kwargs)
        unet.get_submodule(layer).processor = wrapper
    assert f"not replaced: {layer}, steps 0: its processor was replaced or not called" in session.explain()
    assert path not in session.report().layers
