"""StyleAligned's surface against its authors' outputs, and against maps that are written out."""

import dataclasses

import pytest
import torch
from torch import nn

from fpe_pipeline.compat import style_aligned
from fpe_pipeline.compat.style_aligned import Handler, StyleAlignedArgs
from fpe_pipeline.compat.style_aligned.edit import left_alone
from fpe_pipeline.compat.style_aligned.norms import shared_group_norm
from tests.support.dropin import load_dropin, load_dropin_pipeline
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline, unedited
from tests.support.tiny_transformers import tiny_flux
from tests.support.written_out import dense_attention, softmax_map

# Each case with options of which the original makes another picture.
CASES = {
    "stylealigned_default": ({"share_group_norm": False}, {"adain_keys": False}, {"adain_values": True}),
    "stylealigned_shift": ({"shared_score_shift": 0.0}, {"shared_score_scale": 1.1}),
    "stylealigned_full_share": ({"full_attention_share": False}, {"only_self_level": 0.5}),
    "stylealigned_only_self_level": ({"only_self_level": 0.0}, {"adain_queries": True}),
    "stylealigned_adain_only": ({"share_attention": True}, {"adain_values": False}),
}
SAME = {
    "stylealigned_default": {"share_layer_norm": False},
    "stylealigned_full_share": {"share_layer_norm": True},
    "stylealigned_adain_only": {"share_layer_norm": False},
}


@pytest.fixture(scope="module")
def sdxl():
    return load_dropin_pipeline("tiny-sdxl")


def misses(pipe, case, **changed):
    given = case.settings
    options = StyleAlignedArgs(**{**given["style_aligned_args"], **changed})
    first = []

    def keep(pipe, index, timestep, tensors):
        first.append(tensors["latents"].clone())
        return {}

    with Handler(pipe, compat="original").register(options):
        latents = pipe(
            given["prompts"],
            latents=case.start(len(given["prompts"])),
            height=given["height"],
            width=given["width"],
            num_inference_steps=given["steps"],
            guidance_scale=given["guidance_scale"],
            output_type="latent",
            callback_on_step_end=keep,
        ).images
    assert unedited(pipe.unet)
    return max(case.miss("latents", latents), case.miss("latents_step1", first[0]))


@pytest.mark.parametrize("name", CASES)
def test_is_what_the_authors_compute(sdxl, name, no_whole_maps):
    case = load_dropin(name)
    assert misses(sdxl, case, **SAME.get(name, {})) <= 1


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        pytest.param(name, changed, marks=pytest.mark.slow if place else ())
        for name, all_ in CASES.items()
        for place, changed in enumerate(all_)
    ],
)
def test_other_options_are_seen(sdxl, name, changed):
    assert misses(sdxl, load_dropin(name), **changed) > 10


def test_the_order_of_layers_is_seen(sdxl, monkeypatch):
    monkeypatch.setattr(style_aligned.edit, "left_alone", lambda layers, level, compat: left_alone(layers, 0.2, compat))
    assert misses(sdxl, load_dropin("stylealigned_only_self_level")) > 10


@pytest.fixture(scope="module")
def eight(pipe):
    return tiny_pipeline(pipe, block_out_channels=(16, 32, 32), attention_head_dim=8, sample_size=12)


def adain(x, reference):
    x, like = x.double(), x[reference].double()
    return (x - x.mean(-2, True)) / (x.var(-2, keepdim=True) + 1e-5).sqrt() * (
        like.var(-2, keepdim=True) + 1e-5
    ).sqrt() + like.mean(-2, True)


def dense(options, references):
    """Attention of rows that share with ``references``, with maps written out."""

    def attend(path, query, key, value, scale):
        if not path.endswith("attn1"):
            return softmax_map(query, key, scale) @ value
        query = adain(query, references) if options.adain_queries else query.double()
        key = adain(key, references) if options.adain_keys else key.double()
        value = adain(value, references) if options.adain_values else value.double()
        if not options.share_attention:
            return (softmax_map(query, key, scale) @ value).float()
        shared = key[references].clone()
        for row, reference in enumerate(references):
            if row != reference:
                shared[row] *= options.shared_score_scale
        scores = query @ torch.cat([key, shared], 2).transpose(2, 3) * scale
        scores[..., key.shape[2] :] += options.shared_score_shift
        return (scores.softmax(-1) @ torch.cat([value, value[references]], 2)).float()

    return attend


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_score_scale": 1.3, "shared_score_shift": -0.5, "adain_values": True, "adain_queries": False},
        {"share_attention": False, "adain_keys": False},
    ],
    ids=["default", "scaled", "adain"],
)
def test_any_prompts_heads_and_proportions(eight, guidance_scale, options, no_whole_maps):
    options = StyleAlignedArgs(share_group_norm=False, **options)
    references = [0, 0, 0, 3, 3, 3] if guidance_scale > 1 else [0, 0, 0]
    plain = sample(eight, 3, size=(8, 12), guidance_scale=guidance_scale)
    with dense_attention(eight.unet, dense(options, references)):
        expected = sample(eight, 3, size=(8, 12), guidance_scale=guidance_scale)
    with Handler(eight).register(options):
        found = sample(eight, 3, size=(8, 12), guidance_scale=guidance_scale)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(found[0], plain[0], rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [{}, {"shared_score_scale": 1.0}, {"shared_score_shift": 0.5}, {"adain_values": False}, {"adain_queries": True}],
    ids=str,
)
def test_other_options_are_seen_in_any_proportions(eight, wrong):
    right = {"shared_score_scale": 1.3, "shared_score_shift": -0.5, "adain_values": True, "adain_queries": False}
    options = StyleAlignedArgs(share_group_norm=False, **right)
    with dense_attention(eight.unet, dense(options, [0, 0, 0, 3, 3, 3])):
        expected = sample(eight, 3, size=(8, 12))
    with Handler(eight).register(StyleAlignedArgs(share_group_norm=False, **{**(right if wrong else {}), **wrong})):
        found = sample(eight, 3, size=(8, 12))
    assert (found - expected).abs().max() > 10 * 2e-4


def test_without_guidance_the_original_has_two_references(eight):
    options = StyleAlignedArgs(share_group_norm=False)
    with dense_attention(eight.unet, dense(options, [0, 0, 2, 2])):
        expected = sample(eight, 4, guidance_scale=1.0)
    with Handler(eight, compat="original").register(options):
        torch.testing.assert_close(sample(eight, 4, guidance_scale=1.0), expected, rtol=0, atol=2e-4)
        with pytest.raises(ValueError, match="this one has 3 rows"):
            sample(eight, 3, guidance_scale=1.0)


def test_images_of_one_prompt_share(eight):
    options = StyleAlignedArgs(share_group_norm=False)
    with dense_attention(eight.unet, dense(options, [0, 0, 2, 2])):
        expected = sample(eight, 1, images=2)
    with Handler(eight).register(options):
        torch.testing.assert_close(sample(eight, 1, images=2), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(5, 8, 4, 6), (5, 8, 7)])
def test_shared_norms_are_those_of_both_images(shape):
    norm = nn.GroupNorm(4, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    features = torch.randn(shape, dtype=torch.float64) + torch.arange(5.0)[(...,) + (None,) * (len(shape) - 1)]
    groups = ((0, 1), (2, 3, 4))
    found = shared_group_norm(norm, features, groups)
    for group in groups:
        for row in group:
            both = torch.cat([features[row], features[group[0]]], -1)[None]
            expected = norm(both)[0][..., : shape[-1]]
            torch.testing.assert_close(found[row], expected)
    torch.testing.assert_close(found[0], norm(features)[0])


@pytest.mark.parametrize(
    ("layers", "level", "expected"),
    [(10, 0, ()), (10, 1, range(10)), (10, 0.2, (0, 5)), (8, 0.75, (1, 2, 3, 5, 6, 7)), (9, 0.3, (0, 4, 8))],
)
def test_layers_that_are_left_alone(layers, level, expected):
    assert left_alone(layers, level, "original") == set(expected)


def test_a_level_below_one_layer():
    assert left_alone(9, 0.05, None) == set()
    assert left_alone(9, 0.95, None) == set(range(9))
    with pytest.raises(ValueError, match="less than one, by which StyleAligned's own code divides"):
        left_alone(9, 0.05, "original")


@pytest.mark.slow
def test_the_pipeline_is_left_as_it_was(eight):
    before = dict(eight.unet.attn_processors)
    norms = {name: vars(module).get("forward") for name, module in eight.unet.named_modules()}
    marked = eight.unet.conv_norm_out
    marked.forward = own = marked.forward  # as accelerate's hooks do
    plain = sample(eight, 2)
    handler = Handler(eight)
    handler.register(StyleAlignedArgs())
    shared = sample(eight, 2)
    handler.register(StyleAlignedArgs(only_self_level=1.0))
    norms_alone = sample(eight, 2)
    handler.remove()
    handler.remove()
    assert (shared - plain).abs().max() > 1e-3 and (norms_alone - shared).abs().max() > 1e-3
    assert (norms_alone - plain).abs().max() > 1e-3
    with pytest.raises(KeyError), handler.register(StyleAlignedArgs()):
        sample(eight, 2)
        raise KeyError
    torch.testing.assert_close(sample(eight, 2), plain, rtol=0, atol=0)
    assert vars(marked)["forward"] is own
    del marked.forward
    assert norms == {name: vars(module).get("forward") for name, module in eight.unet.named_modules()}
    assert unedited(eight.unet)
    assert all(eight.unet.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("says", [True, False], ids=["of the pipeline's guidance", "of none"])
def test_a_loop_of_ones_own_repeats_the_prompts_as_it_likes(pipe, says):
    """As the authors' call with a ControlNet: two prompts are encoded, the second for several images."""
    tiny = tiny_pipeline(pipe)
    towards, away = tiny.encode_prompt([PROMPTS[0], PROMPTS[1], PROMPTS[1]], "cpu", 1, True)
    rows = torch.randn(6, 4, 8, 8), 501, torch.cat([away, towards])
    tiny._guidance_scale = 5.0
    with Handler(tiny).register(StyleAlignedArgs()):
        expected = tiny.unet(*rows).sample
    if not says:
        del tiny._guidance_scale
    with Handler(tiny).register(StyleAlignedArgs()):
        tiny.encode_prompt(PROMPTS[:2], "cpu", 1, True)
        torch.testing.assert_close(tiny.unet(*rows).sample, expected, rtol=0, atol=0)
    assert (tiny.unet(*rows).sample - expected).abs().max() > 1e-3


def test_another_handler_takes_the_first_ones_place(eight):
    """A notebook's cell that was interrupted before its remove() runs again."""
    first, second = Handler(eight).register(StyleAlignedArgs()), Handler(eight)
    second.register(StyleAlignedArgs(share_group_norm=False))
    norms = [module for module in eight.unet.modules() if isinstance(module, nn.GroupNorm)]
    assert not any("forward" in vars(norm) for norm in norms)
    first.remove()
    assert not unedited(eight.unet)
    second.remove()
    assert unedited(eight.unet)


def test_options_are_those_of_the_authors():
    names = [field.name for field in dataclasses.fields(StyleAlignedArgs)]
    assert names == list(load_dropin("stylealigned_default").settings["style_aligned_args"])
    assert dataclasses.asdict(StyleAlignedArgs()) == load_dropin("stylealigned_default").settings["style_aligned_args"]


def test_what_cannot_be_asked(eight):
    with pytest.raises(ValueError, match="only_self_level to be in"):
        StyleAlignedArgs(only_self_level=1.5)
    with pytest.raises(ValueError, match="shared_score_shift to be a finite number"):
        StyleAlignedArgs(shared_score_shift=float("nan"))
    with pytest.raises(TypeError, match="expected StyleAlignedArgs, got dict"):
        Handler(eight).register({})
    with pytest.raises(ValueError, match="expected a pipeline with a UNet"):
        Handler(tiny_flux())
    with pytest.raises(ImportError, match="no 'StyleAlignedArg' here: did you mean StyleAlignedArgs"):
        from fpe_pipeline.compat.style_aligned import StyleAlignedArg  # noqa: F401
    with pytest.raises(ImportError, match="leaves out 'concat_first'"):
        from fpe_pipeline.compat.style_aligned import concat_first  # noqa: F401
    assert len(PROMPTS) > 3


def test_a_layer_of_one_token_has_no_deviation(eight):
    with Handler(eight).register(StyleAlignedArgs(adain_values=True, share_attention=False)):
        assert torch.isfinite(sample(eight, 2, size=(4, 4))).all()
