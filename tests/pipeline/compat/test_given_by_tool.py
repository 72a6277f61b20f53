"""Tool by tool, what is passed by mistake: read as it was meant, or refused with what was expected and what came."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline.compat import attention_map_diffusers, daam, masactrl, prompt_to_prompt, style_aligned
from fpe_pipeline.compat.prompt_to_prompt import ptp_utils
from fpe_pipeline.compat.stable_flow import FluxPipeline
from tests.support.tiny_pipelines import PROMPTS, shared_noise, tiny_pipeline
from tests.support.tiny_transformers import tiny_flux_pipeline

TWO = PROMPTS[:2]


@pytest.fixture(scope="module")
def unet(pipe):
    return tiny_pipeline(pipe)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))


def masked(mask_s, mask_t=None):
    return masactrl.MutualSelfAttentionControlMask(mask_s=mask_s, mask_t=mask_s if mask_t is None else mask_t)


def test_masks_of_any_kind_are_one_mask(tmp_path):
    """Bytes to 255 were factors of 255 in the targets, without a word; other kinds failed in the first layer."""
    ones = torch.zeros(4, 6)
    ones[:2] = 1
    grey = (ones * 255).byte()
    picture = Image.fromarray(grey.numpy())
    picture.save(tmp_path / "mask.png")
    bits = (ones.bool(), ones.byte(), ones.long(), ones.numpy(), ones.tolist(), ones[None])
    for given in (ones, *bits, grey, grey.numpy(), picture, tmp_path / "mask.png", str(tmp_path / "mask.png")):
        mask = masked(given, ones).mask_s
        assert mask.dtype == torch.float32 and torch.equal(mask, ones)
        assert torch.equal(
            masked(ones, [given if not isinstance(given, list) else ones] * 2).mask_t, ones.expand(2, 4, 6)
        )
    assert torch.equal(masked(ones, torch.stack([ones, 1 - ones])).mask_t[1], 1 - ones)
    assert torch.equal(masked(ones * 0.5).mask_s, ones * 0.5)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (torch.full((4, 4), float("nan")), ValueError, r"^mask_s: expected mask values in \[0, 1\]"),
        (torch.full((4, 4), 255.0), ValueError, r"^mask_s: expected mask values in \[0, 1\]"),
        (torch.zeros(2, 4, 4), ValueError, r"^mask_s: expected a mask \[height, width\], got shape \(2, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4), ValueError, r"^mask_s: expected a mask \[height, width\]"),
        (np.full((4, 4), 3), ValueError, "^mask_s: expected a mask of bools, 8-bit integers or floats"),
        ("no.png", ValueError, "^mask_s: .*no.png"),
        (object(), TypeError, "^mask_s: "),
    ],
)
def test_what_is_no_mask(given, error, said):
    with pytest.raises(error, match=said):
        masked(given, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"^mask_t: expected masks of one size"):
        masked(torch.zeros(4, 4), [torch.zeros(4, 4), torch.zeros(4, 5)])


@pytest.mark.parametrize("thres", ["0.1", None, float("nan"), 2.0, [0.1]], ids=str)
def test_thresholds_that_are_no_share(thres):
    with pytest.raises(ValueError, match=r"expected thres to be a number in \[0, 1\]"):
        masactrl.MutualSelfAttentionControlMaskAuto(thres=thres)


def test_classes_in_the_place_of_what_they_make(unet):
    before = dict(unet.unet.attn_processors)
    with pytest.raises(TypeError, match=r"got the class AttentionReplace itself: make one, AttentionReplace\(…\)"):
        ptp_utils.register_attention_control(unet, prompt_to_prompt.AttentionReplace)
    with pytest.raises(TypeError, match=r"an AttentionBase, got the class MutualSelfAttentionControl"):
        masactrl.regiter_attention_editor_diffusers(unet, masactrl.MutualSelfAttentionControl)
    assert unet.unet.attn_processors == before


def test_backends_that_are_not_known(unet):
    """They were found out in the first layer of a run, or never where no layer multiplies."""
    before = dict(unet.unet.attn_processors)
    for wrong in ("cuda", "", None):
        with pytest.raises(ValueError, match=r'unknown backend .*: expected "auto" or one of'):
            ptp_utils.register_attention_control(unet, prompt_to_prompt.AttentionStore(), backend=wrong)
        with pytest.raises(ValueError, match=r"unknown backend"):
            masactrl.regiter_attention_editor_diffusers(unet, masactrl.AttentionBase(), backend=wrong)
    assert unet.unet.attn_processors == before


def test_factors_of_words(unet):
    def factors(words, values):
        return prompt_to_prompt.get_equalizer(TWO[1], words, values, unet.tokenizer)

    word = TWO[1].split()[2]
    expected = factors(2, [3.0])
    assert (expected == 3).any()
    for words, values in ((word, 3.0), (np.int64(2), [3.0]), (word, torch.tensor(3.0)), ([torch.tensor(2)], (3,))):
        assert torch.equal(factors(words, values), expected)
    for values in ([], "3", ["3"], None, float("nan"), [None]):
        with pytest.raises(ValueError, match=r"^values: expected a finite number|^expected words and a factor"):
            factors(word, values)
    for words in (99, [99], True, 1.5, None, []):
        with pytest.raises(ValueError, match=r"^word_(select|place): expected .*number|^expected words and a factor"):
            factors(words, [3.0])
    for wrong in ({"words": (word,)}, {"word": (word,), "values": [3]}, ["blue", 3]):
        with pytest.raises(ValueError, match=r'^equilizer_params: expected {"words": …, "values": …}'):
            prompt_to_prompt.make_controller(TWO, False, 0.8, 0.4, None, wrong)


def test_blends_that_are_none():
    def blend(words=("photo", "photo"), **options):
        return prompt_to_prompt.LocalBlend(TWO, words, **options)

    assert blend().th == (0.3, 0.3) and blend(th=0.2).th == (0.2, 0.2)
    assert blend(th=torch.tensor([0.25, 0.5])).th == (0.25, 0.5)
    for wrong in ("photo", ["photo"], [["photo"], [5]], ["photo", None], [[], []], None):
        with pytest.raises(ValueError, match=r"^words: expected words for each of 2 prompts"):
            blend(wrong)
    for wrong in ("photo", ["photo"], [["photo"], [5]]):
        with pytest.raises(ValueError, match=r"^substruct_words: expected words for each of 2 prompts"):
            blend(substruct_words=wrong)
    assert blend(substruct_words=[["photo"], []]).substruct_words == [["photo"], []]
    for wrong in ({"th": ("0.3", 0.3)}, {"th": (0.3,)}, {"threshold": 30}, {"threshold": float("nan")}, {"th": "0.3"}):
        with pytest.raises(ValueError, match=r"expected (two )?threshold"):
            blend(**wrong)
    for wrong in ({"start_blend": 2}, {"start_blend": "0.2"}, {"num_steps": 0}):
        with pytest.raises(ValueError, match=r"expected start_blend to be a number in \[0, 1\]|num_steps must be"):
            blend(**wrong)


def test_saved_maps_that_are_none(unet, tmp_path):
    with attention_map_diffusers.watched_pipeline(unet):
        unet(TWO, num_inference_steps=1, latents=shared_noise(2), output_type="latent")
    maps, tokenizer = attention_map_diffusers.attn_maps, unet.tokenizer

    def save(given=maps, tokenizer=tokenizer, prompts=TWO, folder="maps", **options):
        attention_map_diffusers.save_attention_maps(given, tokenizer, prompts, tmp_path / folder, **options)

    save()
    save({step: {path: view.numbers() for path, view in layers.items()} for step, layers in maps.items()}, folder="own")
    files = sorted(path.relative_to(tmp_path / "maps") for path in (tmp_path / "maps").rglob("*.png"))
    assert files
    for file in files:
        lazy, plain = (np.asarray(Image.open(tmp_path / folder / file)).astype(int) for folder in ("maps", "own"))
        assert abs(lazy - plain).max() <= 1
    layers = next(iter(maps.values()))
    for wrong in (layers, next(iter(layers.values())), [layers], {1: {"layer": torch.zeros(2, 3)}}):
        with pytest.raises(TypeError, match=r"expected attn_maps as init_pipeline keeps them, \{timestep: "):
            save(wrong)
    for wrong in (unet, None, TWO):
        with pytest.raises(TypeError, match=r"expected the pipeline's tokenizer, pipe.tokenizer, .* got"):
            save(tokenizer=wrong)
    for wrong in ([], None):
        with pytest.raises((TypeError, ValueError), match=r"expected (at least one )?prompt"):
            save(prompts=wrong)
    with pytest.raises(TypeError, match=r"expected unconditional to be True or False, got 'False'"):
        save(unconditional="False")


def test_switches_and_numbers_of_style():
    for name in ("shared_score_scale", "shared_score_shift", "only_self_level"):
        for wrong in ("0.7", None, True, float("nan")):
            with pytest.raises(ValueError, match=f"expected {name} to be a finite number"):
                style_aligned.StyleAlignedArgs(**{name: wrong})
    for name in ("share_attention", "adain_queries", "full_attention_share"):
        for wrong in ("False", None, 0):  # the text counted as True
            with pytest.raises(ValueError, match=f"expected {name} to be True or False"):
                style_aligned.StyleAlignedArgs(**{name: wrong})
    assert style_aligned.StyleAlignedArgs(shared_score_shift=np.float32(0.5)).shared_score_shift == 0.5


def test_heat_on_what_is_no_picture(image):
    heat = daam.heatmap.WordHeatMap(torch.tensor([[0.0, 1.0], [1.0, 3.0]]))
    for wrong in ("photo.png", np.asarray(image), torch.zeros(3, 8, 8), None, (64, 64)):
        for look in (heat.expand_as, heat.plot_overlay):
            with pytest.raises(TypeError, match=r"expected image to be a PIL image, got .* PIL.Image.fromarray"):
                look(wrong)
    with pytest.raises(ValueError, match=r"^threshold: expected a finite number, got '0.5'"):
        heat.expand_as(image, threshold="0.5")
    assert set(heat.expand_as(image, threshold=0).unique().tolist()) == {0.0, 1.0}  # it was taken for none
    for seed in (5, np.int64(5), torch.tensor(5), 5.0):
        assert daam.set_seed(seed).initial_seed() == 5
    for wrong in ("5", None, -1, 0.5, 2**32):
        with pytest.raises(ValueError, match=r"^seed: expected a whole number"):
            daam.set_seed(wrong)


def test_what_stable_flow_is_given(pipe):
    own = FluxPipeline(**tiny_flux_pipeline(pipe).components)
    own.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 48, "num_inference_steps": 1, "max_sequence_length": 16, "output_type": "latent"}
    tokens = 32 * 48 // (2 * own.vae_scale_factor) ** 2
    latents = torch.randn(1, tokens, own.transformer.config.in_channels, dtype=torch.float64)

    def draw(prompts=TWO, **given):
        return own(prompts, **{"latents": latents.expand(len(prompts), -1, -1), **options, **given}).images

    def invert(**given):
        return own(TWO[0], invert_image=True, **{"latents": latents, **options, **given})

    plain = draw(mm_copy_blocks=[0])
    assert torch.equal(draw(tuple(TWO), mm_copy_blocks=[0]), plain)
    for scales in ([3.5, 3.5], np.array([3.5, 3.5]), torch.tensor([3.5, 3.5])):
        torch.testing.assert_close(draw(mm_copy_blocks=[0], guidance_scale=scales), plain)
    for wrong in (None, "1", float("nan")):
        for call in (draw, invert):
            with pytest.raises(ValueError, match=r"guidance_scale must be a finite number, got"):
                call(guidance_scale=wrong)
    with pytest.raises(ValueError, match=r"guidance_scale must be a finite number"):
        invert(guidance_scale=[1.0])
    with pytest.raises(TypeError, match=r"expected generator to be a torch.Generator, got 5"):
        draw(generator=5)
    for wrong in ("2", 0, None):
        with pytest.raises(ValueError, match=r"num_inference_steps must be a whole number"):
            invert(num_inference_steps=wrong)
    with pytest.raises(TypeError, match=r"expected latents to be a tensor \[1, N, C\], got ndarray"):
        invert(latents=latents.numpy())
    with pytest.raises(ValueError, match=r"expected packed latents"):
        invert(latents=latents[..., :3])
    for wrong in ([latents.numpy()], 5, "latents"):
        with pytest.raises(TypeError, match=r"expected inverted_latent_list to be the tensors"):
            draw(inverted_latent_list=wrong)
    with pytest.raises(ValueError, match=r"inverted_latent_list: expected latents .*of the same height and width"):
        draw(inverted_latent_list=[latents[:, :2]], compat="original")


def test_pictures_side_by_side(image):
    """Floats in [0, 1] were black."""
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for given in (pixels, pixels / 255, tensor, tensor / 255, image, torch.from_numpy(pixels.copy())):
        assert np.array_equal(np.asarray(ptp_utils.view_images(given)), pixels)
        beside = np.asarray(ptp_utils.view_images([given, given]))
        assert np.array_equal(beside[:, :16], pixels) and np.array_equal(beside[:, -16:], pixels)
    batch = torch.stack([tensor, tensor]) / 255
    assert np.array_equal(np.asarray(ptp_utils.view_images(batch)), beside)
    for wrong in ([], [image, image.rotate(90, expand=True)]):
        with pytest.raises(ValueError, match=r"expected one or more pictures of one height and width"):
            ptp_utils.view_images(wrong)
    for wrong in (None, "a.png", ["a.png"], 5):
        with pytest.raises(TypeError, match=r"expected (pictures|a PIL image)"):
            ptp_utils.view_images(wrong)
    for rows in (0, 1.5, "1"):
        with pytest.raises(ValueError, match=r"num_rows must be a whole number"):
            ptp_utils.view_images([image], num_rows=rows)


def test_offsets_of_pictures(image, monkeypatch):
    """Negative ones put black around the picture in silence."""
    from fpe_pipeline.compat.prompt_to_prompt.null_text import NullInversion, _cut

    for wrong in ((-5, 0, 0, 0), (1, 1), 5, None, ("1", 0, 0, 0), (0.5, 0, 0, 0), (8, 8, 0, 0), (0, 0, 30, 0)):
        with pytest.raises(ValueError, match=r"^offsets(:|=)"):
            NullInversion(None).invert(image, "", offsets=wrong)
    pixels = np.asarray(image)
    assert np.array_equal(np.asarray(_cut(pixels, (1, 2, 3, 4))), pixels[3:-4, 1:-2])
    assert np.array_equal(np.asarray(_cut(pixels / 255, (1, 2, 3, 4))), pixels[3:-4, 1:-2])
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # stored on its side: the right way up its left is cut, not its top
    assert np.array_equal(np.asarray(_cut(turned, np.array([1, 2, 3, 4]))), pixels[3:-4, 1:-2])


@pytest.mark.parametrize("tool", ["prompt_to_prompt", "masactrl"])
def test_processors_that_others_put_in_the_place(unet, tool):
    """The call was not edited, and nothing was said before the layers were restored."""
    editor, register = {
        "prompt_to_prompt": (prompt_to_prompt.AttentionStore(), ptp_utils.register_attention_control),
        "masactrl": (masactrl.AttentionBase(), masactrl.regiter_attention_editor_diffusers),
    }[tool]

    def draw():
        unet(TWO, num_inference_steps=1, latents=shared_noise(2), output_type="latent")

    registered = register(unet, editor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw()
    unet.fuse_qkv_projections()
    try:
        with pytest.warns(RuntimeWarning, match=r"computed without their editing processor.*attn1"):
            draw()
        with pytest.warns(RuntimeWarning, match=r"were replaced during"):
            registered.restore()
    finally:
        unet.unfuse_qkv_projections()
