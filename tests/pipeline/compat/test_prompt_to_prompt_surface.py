"""What Prompt-to-Prompt's repository and notebooks offer beside their controllers: loops, words, looks at maps."""

import copy
import importlib
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fpe_kernels import AttentionMap
from fpe_pipeline.compat.free_prompt_editing import SelfAttentionControlEdit
from fpe_pipeline.compat.lazy import LazyMap
from fpe_pipeline.compat.pnp_inversion import direct_inversion_p2p_guidance_forward
from fpe_pipeline.compat.prompt_to_prompt import (
    AttentionReplace,
    AttentionReweight,
    AttentionStore,
    EmptyControl,
    LocalBlend,
    NullInversion,
    SpatialReplace,
    aggregate_attention,
    get_equalizer,
    make_controller,
    ptp_utils,
    seq_aligner,
    show_cross_attention,
    show_self_attention_comp,
)
from fpe_pipeline.errors import EditWarning
from tests.support.dropin_cases import compare
from tests.support.golden_cases import load_case, source_image
from tests.support.tiny_pipelines import unedited

PROMPTS = ["A painting of a squirrel eating a burger", "A painting of a lion eating a burger"]


def noise(*size):
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))


def run(pipe, controller, prompts=PROMPTS, steps=2, latent=None, **options):
    latent = noise(16, 16) if latent is None else latent
    return ptp_utils.text2image_ldm_stable(
        pipe, prompts, controller, steps, latent=latent, return_type="latent", **options
    )[0]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"latent": torch.zeros(3, 4, 16, 16)}, ValueError, r"\[1, 4, h, w\], or one for each of 2 prompts, got \[3"),
        ({"latent": torch.zeros(4, 16, 16)}, ValueError, r"got \[4, 16, 16\]"),
        ({"latent": np.zeros((1, 4, 16, 16))}, TypeError, "expected latent to be a tensor .* got ndarray"),
        ({"latent": None, "generator": [torch.Generator()] * 2}, TypeError, "one generator, .* got a list"),
    ],
    ids=["rows", "axes", "array", "generators"],
)
def test_a_noise_that_cannot_be(pipe, given, error, said):
    for loop in (ptp_utils.text2image_ldm_stable, direct_inversion_p2p_guidance_forward):
        options = {"add_offset": False} if loop is direct_inversion_p2p_guidance_forward else {}
        with pytest.raises(error, match=said):
            loop(pipe, PROMPTS, None, num_inference_steps=2, **options, **given)


def test_a_controller_for_other_prompts_is_told_of(pipe):
    """Its words would be aligned at the places where the other prompts have them."""
    loops = (
        lambda *given: run(pipe, *given),
        lambda controller, prompts: direct_inversion_p2p_guidance_forward(
            pipe, prompts, controller, noise(16, 16), 2, add_offset=False
        ),
    )
    for loop in loops:
        with pytest.warns(EditWarning, match="controller is made for .*squirrel.* and the run has .*lion") as told:
            loop(AttentionReplace(PROMPTS, 2, 0.8, 0.4), PROMPTS[::-1])
        assert [warning.filename for warning in told if warning.category is EditWarning] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error", EditWarning)
            loop(AttentionReplace(PROMPTS, 2, 0.8, 0.4), PROMPTS)
            loop(AttentionStore(), PROMPTS)


SLOW = pytest.mark.slow  # as edits, the same cases are run by default


@pytest.mark.parametrize(
    "name", [pytest.param(f"p2p_{kind}", marks=SLOW) for kind in ("replace", "refine", "reweight")]
)
def test_the_notebooks_runs(pipe, name):
    case = load_case(name)
    prompts, steps = case.settings["prompts"], case.settings["steps"]
    if name == "p2p_reweight":
        factors = get_equalizer(prompts[1], ("smiling",), (5,))
        controller = AttentionReweight(prompts, steps, 0.8, 0.4, factors, compat="original")
    else:
        windows = (0.8, 0.4) if name == "p2p_replace" else (0.5, 0.2)
        controller = make_controller(prompts, name == "p2p_replace", *windows, num_steps=steps, compat="original")
    latents = run(pipe, controller, prompts, steps, case.tensors["in.start_latents"])
    compare(case, "latents", latents)
    assert unedited(pipe.unet)


@pytest.mark.slow
def test_the_notebooks_local_blend(pipe):
    case = load_case("p2p_replace_localblend_lat64")
    prompts, steps = case.settings["prompts"], case.settings["steps"]
    blend = LocalBlend(prompts, ("squirrel", "lion"), 0.75)
    windows = {"default_": 1.0, "lion": 0.4}
    controller = AttentionReplace(prompts, steps, windows, 0.4, blend, compat="original")
    compare(case, "latents", run(pipe, controller, prompts, steps, case.tensors["in.start_latents"]))


def test_the_originals_mappers(pipe):
    case = load_case("p2p_refine")
    mapper, alphas = seq_aligner.get_refinement_mapper(case.settings["prompts"], pipe.tokenizer, compat="original")
    assert torch.equal(mapper, case.tensors["in.ctrl/mapper"])
    assert torch.equal(alphas.flatten(), case.tensors["in.ctrl/alphas"].flatten())
    case = load_case("p2p_replace")
    mapper = seq_aligner.get_replacement_mapper(case.settings["prompts"], pipe.tokenizer, compat="original")
    assert torch.equal(mapper, case.tensors["in.ctrl/mapper"])
    with pytest.raises(ValueError, match="pads prompts to 77"):
        seq_aligner.get_mapper(*PROMPTS, pipe.tokenizer, max_len=32)


@pytest.mark.slow
def test_the_original_runs_on_from_where_it_was_and_stays(pipe):
    controller = AttentionReplace(PROMPTS, 2, 1.0, 1.0)
    first = run(pipe, controller)
    assert torch.equal(run(pipe, controller), first)
    with pytest.raises(RuntimeError, match=r"made for 2 steps, and this is step 3: call reset\(\)"):
        run(pipe, controller, compat="original")
    assert not unedited(pipe.unet)
    ptp_utils.register_attention_control(pipe, None)
    assert unedited(pipe.unet)


@pytest.mark.slow
def test_halves_one_after_the_other_are_halves_together(pipe):
    together = run(pipe, AttentionReplace(PROMPTS, 2, 1.0, 0.5))
    apart = run(pipe, AttentionReplace(PROMPTS, 2, 1.0, 0.5), low_resource=True)
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)


def test_the_last_steps_alone(pipe):
    controller = AttentionStore()
    run(pipe, controller, steps=4, start_time=1)
    assert controller.cur_step == 1


@pytest.mark.slow
def test_images(pipe):
    images, latent = ptp_utils.text2image_ldm_stable(
        pipe, PROMPTS, EmptyControl(), 1, generator=torch.Generator().manual_seed(1)
    )
    side = pipe.unet.config.sample_size
    assert latent.shape == (1, 4, side, side)
    assert images.shape == (2, 8 * side, 8 * side, 3) and images.dtype == np.uint8


def test_spatial_replacement(pipe):
    held = run(pipe, SpatialReplace(0.5, 2))
    free = run(pipe, EmptyControl())
    assert (held[1] - held[0]).abs().max() < (free[1] - free[0]).abs().max()
    assert torch.equal(run(pipe, SpatialReplace(0.0, 2))[0], run(pipe, SpatialReplace(0.0, 2))[1])


def test_words_and_windows(pipe):
    tokenizer = pipe.tokenizer
    lion = seq_aligner.get_word_inds(PROMPTS[1], "lion", tokenizer)
    assert np.array_equal(lion, seq_aligner.get_word_inds(PROMPTS[1], 4, tokenizer)) and len(lion)
    assert not len(ptp_utils.get_word_inds(PROMPTS[1], "dog", tokenizer))
    alpha = ptp_utils.get_time_words_attention_alpha(PROMPTS, 10, {"default_": 0.5, "lion": (0.2, 1.0)}, tokenizer)
    assert alpha.shape == (11, 1, 1, 1, 77)
    assert alpha[:, 0, 0, 0, 0].tolist() == [1.0] * 5 + [0.0] * 6
    assert alpha[:, 0, 0, 0, lion[0]].tolist() == [0.0] * 2 + [1.0] * 9
    with pytest.raises(ValueError, match="'dog' of cross_replace_steps is in none"):
        ptp_utils.get_time_words_attention_alpha(PROMPTS, 10, {"dog": 0.5}, tokenizer)
    ptp_utils.get_time_words_attention_alpha(PROMPTS, 10, {"dog": 0.5}, tokenizer, compat="original")


def test_factors(pipe):
    tokenizer, text = pipe.tokenizer, PROMPTS[1]
    lion, burger = (seq_aligner.get_word_inds(text, word, tokenizer).tolist() for word in ("lion", "burger"))
    one = get_equalizer(text, "lion", (5.0,), tokenizer)
    assert one.shape == (1, 77) and one[0, lion].unique().tolist() == [5.0] and one.sum() == 77 + 4 * len(lion)
    both = get_equalizer(text, ["lion", "burger"], (5.0, 0.5), tokenizer)
    assert both[0, lion].unique().tolist() == [5.0] and both[0, burger].unique().tolist() == [0.5]
    several = get_equalizer(text, ["lion"], (1.0, 2.0, 3.0), tokenizer)
    assert several.shape == (3, 77) and several[:, lion[0]].tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(get_equalizer(text, ("lion",), (5.0,)).tensor(tokenizer), one)
    with pytest.raises(ValueError, match="3 factors for the 2 words"):
        get_equalizer(text, ["lion", "burger"], (1.0, 2.0, 3.0), tokenizer)
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        get_equalizer(text, ["dog"], (1.0,), tokenizer)


@pytest.mark.filterwarnings("ignore::fpe_pipeline.compat.lazy.MapNumbersWarning")
def test_looks_at_maps(pipe):
    store = AttentionStore()
    run(pipe, store, latent=noise(16, 24))
    cross = aggregate_attention(store, (4, 6), ("up", "down"), True, 1)
    assert isinstance(cross, LazyMap) and cross.shape == (4, 6, 77)
    torch.testing.assert_close(cross.sum(-1), torch.ones(4, 6))
    tokens = len(pipe.tokenizer.encode(PROMPTS[1]))
    shown = show_cross_attention(store, (4, 6), ("up", "down"), select=1)
    assert shown.width > tokens * 256 and shown.height > 256
    components = show_self_attention_comp(store, (4, 6), ("up", "down"), max_com=3)
    assert components.size == (3 * 256, 256) and np.asarray(components).std() > 0
    with pytest.raises(ValueError, match=r"no cross-attention layer of 5 × 5 .* kept are layers of \[24, 96, 384\]"):
        aggregate_attention(store, 5, ("up", "down"), True, 0)
    with pytest.raises(ValueError, match="one of 2 prompts"):
        aggregate_attention(store, (4, 6), ("up",), True, 2)


def test_layers_of_as_many_tokens_and_another_shape_are_told_apart(pipe):
    """At 4:1, 64 tokens are 4 × 16; laid out as 8 × 8 the original shows them without a word."""
    store = AttentionStore()
    run(pipe, store, latent=noise(4, 16))
    with pytest.raises(ValueError, match=r"those of as many tokens are 4 × 16: pass res=\(4, 16\)"):
        aggregate_attention(store, np.int64(8), ("up",), True, 0)
    assert aggregate_attention(store, (4, 16), ("up",), True, 0).shape == (4, 16, 77)


def test_a_text_is_one_prompt(pipe):
    """It was as many as it has letters."""
    assert run(pipe, None, "a cat").shape[0] == 1
    with pytest.raises(ValueError, match=r"at least one target, got 1 prompt"):
        AttentionReplace("a cat", 2, 0.8, 0.4)
    assert SelfAttentionControlEdit("a cat", 2, 0.8).batch_size == 1
    latents, _ = direct_inversion_p2p_guidance_forward(pipe, "a cat", None, noise(4, 4), 1, add_offset=False)
    assert latents.shape[0] == 1


def test_maps_asked_for_before_or_after_their_steps(pipe):
    store = AttentionStore()
    with pytest.raises(RuntimeError, match="no step has ended"):
        store.get_average_attention()
    run(pipe, store, steps=1)
    assert store.step_store == store.get_empty_store()
    store.reset()
    with pytest.raises(RuntimeError, match="no step has ended"):
        aggregate_attention(store, 16, ("up",), True, 0)


@pytest.mark.slow
def test_what_is_held_is_never_more_than_the_matrix(pipe):
    store = AttentionStore()
    kinds = set()
    for steps in (2, 4):
        run(pipe, store, steps=steps)
        for maps in store.attention_store.values():
            for total in maps:
                assert total.nbytes <= total.numel() * 4
                kinds.add(total.holds_numbers)
    assert kinds == {True, False}
    assert "as numbers" in store.held() and "as queries and keys" in store.held()


def test_words_before_a_tokenizer_is_known():
    controller = AttentionReplace(PROMPTS, 2, 0.8, 0.4)
    with pytest.raises(RuntimeError, match="register_attention_control"):
        _ = controller.mapper
    with pytest.raises(ValueError, match="at least one target"):
        AttentionReplace(PROMPTS[:1], 2, 0.8, 0.4)


def test_a_blend_of_words_that_are_not_there(pipe):
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        _ = LocalBlend(PROMPTS, ["squirrel", "dog"], tokenizer=pipe.tokenizer).alpha_layers
    blend = LocalBlend(PROMPTS, ["squirrel", "dog"], tokenizer=pipe.tokenizer, compat="original")
    assert blend.alpha_layers.shape == (2, 1, 1, 1, 1, 77) and blend.alpha_layers[1].sum() == 0


def test_a_blend_of_sides_that_are_no_multiples_of_four(pipe):
    """A UNet rounds up where it halves an odd side: of 9 × 13 latents, layers have 3 × 4 tokens."""
    parts = torch.randn(2, 2, 1, 77, 8, generator=torch.Generator().manual_seed(0))
    attention = AttentionMap(parts[0][..., :12, :], parts[1])
    blend = LocalBlend(PROMPTS, ["squirrel", "lion"], tokenizer=pipe.tokenizer)
    latents = torch.randn(2, 4, 9, 13, generator=torch.Generator().manual_seed(1))
    out = blend(latents, {"down_cross": [LazyMap(attention)], "up_cross": []})
    words = blend.alpha_layers.reshape(2, 1, 77)
    heat = F.max_pool2d((attention.dense()[:, 0] * words).sum(-1).reshape(2, 1, 3, 4), 3, stride=1, padding=1)
    mask = F.interpolate(heat / heat.amax((2, 3), keepdim=True), (9, 13)) > 0.3
    assert 0 < (mask[:1] | mask).sum() < 2 * 9 * 13
    assert torch.equal(out, torch.where(mask[:1] | mask, latents, latents[:1]))


def test_a_blend_that_sees_no_latents_says_so(pipe):
    """A pipeline's own call does not hand them over, as the notebook's loop does."""

    def controller():
        blend = LocalBlend(PROMPTS, ["squirrel", "lion"], tokenizer=pipe.tokenizer)
        return AttentionReplace(PROMPTS, 3, 0.8, 0.4, blend, tokenizer=pipe.tokenizer)

    embeds = torch.zeros(4, 77, pipe.unet.config.cross_attention_dim)
    for handed in (False, True):
        edit = controller()
        with (
            ptp_utils.register_attention_control(pipe, edit),
            warnings.catch_warnings(record=True) as said,
            torch.no_grad(),
        ):
            warnings.simplefilter("always")
            for _ in range(3):
                pipe.unet(torch.zeros(4, 4, 16, 16), 1, encoder_hidden_states=embeds)
                edit._latents_seen = edit._latents_seen or handed
        told = [str(one.message) for one in said if "local blend does nothing" in str(one.message)]
        assert len(told) == (0 if handed else 1)
    edit.local_blend = lambda latents, store: latents
    edit.reset()
    edit.step_callback(noise(16, 16))
    assert edit._latents_seen


def test_pictures():
    image = np.full((50, 40, 3), 7, np.uint8)
    assert ptp_utils.text_under_image(image, "word").shape == (60, 40, 3)
    sheet = ptp_utils.view_images([image, image, image], num_rows=2, offset_ratio=0.1)
    assert sheet.size == (85, 105)


@pytest.mark.slow
def test_null_text_inversion(pipe):
    case = load_case("nulltext_fpe_4x2")
    size = pipe.unet.config.sample_size
    pipe.unet.register_to_config(sample_size=32)
    try:
        inversion = NullInversion(pipe, case.settings["steps"], case.settings["guidance_scale"])
        (image, back), latent, embeddings = inversion.invert(
            source_image().numpy(), case.settings["prompts"][0], num_inner_steps=case.settings["inner_steps"]
        )
    finally:
        pipe.unet.register_to_config(sample_size=size)
    compare(case, "uncond_embeddings", torch.stack(embeddings))
    assert torch.equal(latent, inversion.inversion.latents[-1])
    assert np.array_equal(image, source_image().numpy()) and back.shape == image.shape


@pytest.mark.slow
def test_embeddings_of_an_inversion_in_half_precision(pipe):
    """They are optimised in float32, whatever the model computes in."""
    half = type(pipe)(**copy.deepcopy(pipe.components)).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    conditional, _ = half.encode_prompt(PROMPTS[:1], "cpu", 1, False)
    own = run(half, None, latent=noise(8, 8), guidance_scale=2.0, uncond_embeddings=[conditional] * 2)
    wide = run(half, None, latent=noise(8, 8), guidance_scale=2.0, uncond_embeddings=[conditional.float()] * 2)
    assert wide.dtype is torch.bfloat16 and torch.equal(wide, own)


TOOLS = ("prompt_to_prompt", "prompt_to_prompt.ptp_utils", "prompt_to_prompt.seq_aligner", "free_prompt_editing")


@pytest.mark.parametrize("tool", TOOLS)
def test_names_that_a_tool_never_had(tool):
    module = importlib.import_module(f"fpe_pipeline.compat.{tool}")
    for name in module.__all__:
        assert getattr(module, name) is not None
    first = module.__all__[-1]
    with pytest.raises(ImportError, match=f"did you mean {first}"):
        exec(f"from {module.__name__} import {first[:-1]}x")
    assert not hasattr(module, "__wrapped__")


def test_tools_by_name():
    compat = importlib.import_module("fpe_pipeline.compat")
    exec("from fpe_pipeline.compat import pnp_inversion, prompt_to_prompt")
    with pytest.raises(ImportError, match=r"did you mean prompt_to_prompt\? .*free_prompt_editing, .*pnp_inversion"):
        exec("from fpe_pipeline.compat import prompt2prompt")
    assert not hasattr(compat, "__wrapped__")


def test_names_that_are_left_out_say_why():
    with pytest.raises(ImportError, match=r"leaves out 'text2image_ldm' of .*no pipeline of that model"):
        from fpe_pipeline.compat.prompt_to_prompt.ptp_utils import text2image_ldm  # noqa: F401
