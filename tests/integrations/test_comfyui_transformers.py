"""The ComfyUI nodes for transformers, against stand-ins whose attention is written out."""

import math
import sys

import pytest
import torch

from tests.support.comfyui import (
    SIGMAS,
    Clip,
    Flux,
    Patcher,
    QwenImageTransformer2DModel,
    UNet,
    WanModel,
    attention,
    loaded,
)
from tests.support.slow_cases import few

MODELS = {
    "flux": (Flux, (4, 8, 12)),
    "qwen": (QwenImageTransformer2DModel, (4, 1, 8, 12)),
    "wan": (WanModel, (4, 3, 8, 8)),
}
TEXT = 5


@pytest.fixture(scope="module")
def package():
    return loaded()


@pytest.fixture
def joint(package):
    return sys.modules["custom_nodes_fpe.joint"]


def made(name, images=3):
    """A model in float64, latents of so many images, and their texts."""
    torch.manual_seed(0)
    kind, shape = MODELS[name]
    model = kind().double().requires_grad_(False)
    for weights in model.parameters():
        weights.mul_(2)
    latent = {"samples": torch.zeros(images, *shape, dtype=torch.float64), "batch_index": [0] * images}
    return Patcher(model), latent, torch.randn(images, TEXT, 16, dtype=torch.float64)


def edited(package, model, start=0.0, stop=0.8, strength=1.0):
    return package.NODE_CLASS_MAPPINGS["FreePromptTransformer"]().edited(model, start, stop, strength)[0]


def written_out(model, image, steps, strength=1.0):
    """The same by an override that writes scores out: image queries and keys of conditional rows are the first's."""

    def override(plain, query, key, value, heads, *given, **named):
        options = named["transformer_options"]
        by_head = named["skip_reshape"]
        dim = 2 if by_head else 1
        own = plain(query, key, value, heads, *given, **named)
        step = int((SIGMAS[:-1] >= options["sigmas"][0]).sum()) - 1
        text = 0 if isinstance(model.diffusion_model, WanModel) else TEXT
        is_layer = query.shape[dim] == key.shape[dim] and query.shape[dim] >= text + image
        if step >= steps or not is_layer:
            return own
        states = []
        for each in (query, key):
            each = each if by_head else each.unflatten(-1, (heads, -1)).transpose(1, 2)
            each = each.clone()
            images = len(each) // len(options["cond_or_uncond"])
            for chunk, kind in enumerate(options["cond_or_uncond"]):
                if kind == 0:
                    rows = slice(chunk * images, (chunk + 1) * images)
                    each[rows, :, text : text + image] = each[chunk * images, :, text : text + image].clone()
            states.append(each)
        values = value if by_head else value.unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = states[0] @ states[1].transpose(-1, -2) / math.sqrt(values.shape[-1])
        mask = given[0] if given else 0.0
        out = (torch.softmax(scores + mask, dim=-1) @ values).transpose(1, 2).flatten(2)
        return torch.lerp(own, out, strength)

    reference = model.clone()
    reference.model_options["transformer_options"]["optimized_attention_override"] = override
    return reference


def image_tokens(latent):
    *_, height, width = latent["samples"].shape
    return math.prod(latent["samples"].shape[2:-2]) * height * width // 4


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("chunks", [(1, 0), (0,)])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_that_of_dense_maps(package, name, chunks, strength):
    model, latent, text = made(name)
    ours = edited(package, model, strength=strength).sample(latent, 1, chunks, text)
    theirs = written_out(model, image_tokens(latent), 4, strength).sample(latent, 1, chunks, text)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    plain = model.sample(latent, 1, chunks, text)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-9, atol=1e-9)  # the source is what it was
    assert (ours[1:] - plain[1:]).abs().max() > 1e-3


def test_tokens_of_reference_pictures_are_each_images_own(package):
    model, latent, text = made("flux")
    picture = torch.randn(6, 4, 4, 4, dtype=torch.float64)
    ours = edited(package, model).sample(latent, 1, text=text, ref_latents=picture)
    theirs = written_out(model, image_tokens(latent), 4).sample(latent, 1, text=text, ref_latents=picture)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (ours - edited(package, model).sample(latent, 1, text=text)).abs().max() > 1e-3


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_masks_count(package, name, strength):
    """Those of padding, of which a target may have more than its source."""
    model, latent, text = made(name)
    tokens = TEXT + image_tokens(latent)
    mask = torch.zeros(6, 1, 1, tokens, dtype=torch.float64)
    mask[4, ..., 3:TEXT] = mask[5, ..., 2:TEXT] = -torch.inf
    ours = edited(package, model, strength=strength).sample(latent, 1, text=text, attention_mask=mask)
    theirs = written_out(model, image_tokens(latent), 4, strength).sample(latent, 1, text=text, attention_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (ours - edited(package, model, strength=strength).sample(latent, 1, text=text)).abs().max() > 1e-3


def test_the_images_part_is_computed_once(joint, monkeypatch):
    made_maps, kind = [], joint.AttentionMap

    def watched(query, key, **options):
        made_maps.append((len(query), query.shape[2], key.shape[2]))
        return kind(query, key, **options)

    monkeypatch.setattr(joint, "AttentionMap", watched)
    states = torch.randn(3, 6, 2, 5 + 24, 8)
    joint.edited_rows(*states, [0, 1, 2, 3, 3, 3], joint.Tokens(5, 24))
    assert made_maps == [(4, 24, 24), (6, 24, 5), (6, 5, 29)], "four maps over the image for six rows"


def test_attention_that_another_node_chose_computes_the_rest(package):
    model, latent, text = made("flux")
    calls = []

    def chosen(plain, query, *given, **named):
        calls.append(len(query))
        return plain(query, *given, **named)

    model.model_options["transformer_options"]["optimized_attention_override"] = chosen
    ours = edited(package, model, stop=0.6).sample(latent, 1, text=text)
    assert calls == [6] * 3 * 2, "three layers in the two steps that are not edited"
    del model.model_options["transformer_options"]["optimized_attention_override"]
    torch.testing.assert_close(ours, edited(package, model, stop=0.6).sample(latent, 1, text=text))


@pytest.mark.parametrize("name", few(MODELS.keys(), "wan"))
def test_a_node_that_compiles_the_model_before_this_one(package, name):
    """Its wrapper puts the compiled model into the place of the model around each call."""
    model, latent, text = made(name)
    expected = edited(package, model).sample(latent, 1, text=text)
    compiled = torch.compile(model.diffusion_model, backend="eager")

    def around(executor, *given, **named):
        found, executor.class_obj.diffusion_model = executor.class_obj.diffusion_model, compiled
        try:
            return executor(*given, **named)
        finally:
            executor.class_obj.diffusion_model = found

    model.add_wrapper_with_key("apply_model", "compile", around)
    torch.testing.assert_close(edited(package, model).sample(latent, 1, text=text), expected)


def test_rows_of_the_negative_prompt_alone_are_comfyuis(package):
    model, latent, text = made("qwen")
    ours = edited(package, model).sample(latent, 1, (1,), text)
    assert torch.equal(ours, model.sample(latent, 1, (1,), text))


def test_the_input_is_left_as_it_was(package):
    model, *_ = made("flux")
    edited(package, model)
    assert model.model_options == {"transformer_options": {}} and not model.wrappers


class TestNothingWrongInSilence:
    def test_attention_that_another_node_took_later(self, package):
        model, latent, text = made("flux")
        patched = edited(package, model)
        patched.model_options["transformer_options"]["optimized_attention_override"] = lambda plain, *a, **k: plain(
            *a, **k
        )
        with pytest.raises(ValueError, match=r"none of the model's attention was handed .*\(connect that one before"):
            patched.sample(latent, 1, text=text)

    def test_tokens_that_another_node_put_before_the_image(self, package, joint):
        states = torch.randn(3, 2, 29, 16)
        options = {
            "fpe_tokens": joint.Tokens(5, 20),
            "block_type": "single",
            "img_slice": [9, 29],
            "cond_or_uncond": [0],
        }
        with pytest.raises(ValueError, match="behind the prompt's 5 tokens, got it behind 9"):
            joint.JointMaps()(attention, *states, 2, transformer_options=options)

    def test_a_video_of_as_many_tokens_as_its_text(self, package):
        """Whose layers that attend to the text look like those that attend to the video: Wan's texts have 512."""
        model, latent, _ = made("wan")
        text = torch.randn(3, image_tokens(latent), 16, dtype=torch.float64)
        with pytest.raises(ValueError, match="more or fewer tokens than its text, got 48 of both"):
            edited(package, model).sample(latent, 1, text=text)

    def test_one_image(self, package):
        model, latent, text = made("flux", images=1)
        with pytest.raises(ValueError, match="a source and its targets, got one image"):
            edited(package, model).sample(latent, 1, text=text)

    def test_models_windows_and_versions(self, package, joint):
        model, *_ = made("flux")
        with pytest.raises(ValueError, match="start below stop"):
            edited(package, model, start=0.5, stop=0.5)
        with pytest.raises(ValueError, match="got one of this node"):
            edited(package, edited(package, model))
        with pytest.raises(ValueError, match=r"Flux, Chroma, .* got UNet: the node for that is 'Free-Prompt-Editing'"):
            edited(package, Patcher(UNet()))
        with pytest.raises(ValueError, match="got Linear: the node for that is none here"):
            edited(package, Patcher(torch.nn.Linear(2, 2)))

        class Old(Patcher):
            add_wrapper_with_key = property()

        with pytest.raises(ValueError, match="take no wrappers"):
            edited(package, Old(Flux()))
        unknown = type("Flux", (torch.nn.Module,), {})()
        with pytest.raises(ValueError, match="Flux to have a patch_size, got none"):
            joint.tokens_of(unknown, torch.zeros(1, 4, 8, 8), None)


class TestPrompts:
    def test_as_many_tokens(self, package):
        node = package.NODE_CLASS_MAPPINGS["FreePromptBatch"]()
        ((words, _),), _ = node.batch(Clip("t5xxl"), "a cat", "a dog", 64, 64)
        assert words.shape == (2, 77, 8)
        with pytest.raises(ValueError, match=r"as many tokens.*got \[77, 154\]: write 'a cat' and 'a long fox' with"):
            node.batch(Clip("t5xxl"), "a cat", "a long fox", 64, 64)

    def test_what_comes_with_them(self, package):
        node, clip = package.NODE_CLASS_MAPPINGS["FreePromptBatch"](), Clip("qwen25_7b")
        encode = clip.encode_from_tokens_scheduled

        def told(pooled, **more):
            clip.encode_from_tokens_scheduled = lambda tokens: [
                [encode(tokens)[0][0], {"pooled_output": pooled, **{name: make(tokens) for name, make in more.items()}}]
            ]
            return node.batch(clip, "a cat", "a dog", 64, 64)[0][0][1]

        shared = {"scale": torch.tensor(3.0), "kinds": [torch.ones(2)], "sizes": {"of": (1, torch.ones(1))}}
        alike = told(None, **{name: lambda tokens, value=value: value for name, value in shared.items()})
        assert {name: alike[name] for name in shared} == shared
        for make in (lambda n: torch.ones(4) * n, lambda n: [torch.ones(4) * n], lambda n: {"of": (n,)}, str):
            made = map(make, (2, 3))
            with pytest.raises(ValueError, match=r"ids as tensors of one row, or the same .*, got .* that differ"):
                told(None, ids=lambda tokens, made=made: next(made))
        known = told(None, attention_mask=lambda tokens: torch.ones(1, 77), guidance=lambda tokens: 3.5)
        assert known["pooled_output"] is None and known["guidance"] == 3.5 and known["attention_mask"].shape == (2, 77)
        with pytest.raises(ValueError, match=r"attention_mask of one size for all prompts, got \[\[1, 5\], \[1, 6\]\]"):
            lengths = iter((5, 6))
            told(None, attention_mask=lambda tokens: torch.ones(1, next(lengths)))
        with pytest.raises(ValueError, match="attention_mask of every prompt or of none"):
            masks = iter((torch.ones(1, 5), None))
            told(None, attention_mask=lambda tokens: next(masks))

    def test_latents_of_another_kind(self, package):
        node = package.NODE_CLASS_MAPPINGS["FreePromptBatch"]()
        empty = {"samples": torch.zeros(1, 128, 4, 6), "downscale_ratio_spacial": 16}
        _, latent = node.batch(Clip(), "a cat", "a dog\na fox", 64, 64, empty)
        assert latent["samples"].shape == (3, 128, 4, 6) and latent["batch_index"] == [0, 0, 0]
        assert latent["downscale_ratio_spacial"] == 16 and "batch_index" not in empty
