"""``accelerate``: diffusers' own map users compute what they did, without the matrices."""

import copy
import re
import warnings

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionSAGPipeline, TextToVideoZeroPipeline, UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import CrossFrameAttnProcessor

from benchmarks.memory import peak_bytes
from benchmarks.unets import CONFIGS
from fpe_pipeline import FreePromptEdit, editing
from fpe_pipeline.compat import accelerate, diffusers_maps
from fpe_pipeline.compat.lazy import LazyMap, MapNumbersWarning
from tests.support.dropin import load_dropin_pipeline
from tests.support.golden_cases import load_pipeline
from tests.support.map_users import MAP_USERS, generator, made
from tests.support.tiny_pipelines import sample, tiny_pipeline

FLOAT32 = 1e-4


@pytest.fixture
def tiny(pipe):
    return tiny_pipeline(pipe)


def before_and_after(name, pipe, **options):
    """A pipeline's output as it is, and accelerated; what acceleration says; and the largest difference."""
    tiny, run = MAP_USERS[name](pipe, **options)
    before = run(tiny).images
    with accelerate(tiny) as acceleration:
        after = run(tiny).images
    return before, after, acceleration


def scores_of(model):
    return [vars(layer).get("get_attention_scores") for layer in model.modules() if isinstance(layer, Attention)]


@pytest.mark.parametrize(
    "name",
    [
        "Attend-and-Excite",
        pytest.param("Prompt-to-Prompt", marks=pytest.mark.slow),
        pytest.param("SAG", marks=pytest.mark.slow),
        pytest.param("LEDITS++", marks=pytest.mark.slow),
        pytest.param("LEDITS++ XL", marks=pytest.mark.slow),
        pytest.param("pix2pix-zero", marks=pytest.mark.slow),
    ],
)
def test_the_same_before_and_after(name):
    """In float32, of values as large as they come; gradients change the latents of two of them."""
    pipe = load_dropin_pipeline("tiny-sdxl") if name.endswith("XL") else load_dropin_pipeline("tiny-sd15")
    options = {"num_inference_steps": 1, "max_iter_to_alter": 1} if name == "Attend-and-Excite" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", MapNumbersWarning)
        before, after, acceleration = before_and_after(name, pipe, **options)
    assert (after - before).abs().max() <= FLOAT32 * max(1.0, float(before.abs().max()))
    assert acceleration.served
    assert not acceleration.left_alone
    assert scores_of(pipe.unet) == [None] * len(scores_of(pipe.unet))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAP_USERS if not name.startswith("LEDITS")])
def test_the_same_in_float64(name):
    """Refined by gradients step by step, where rounding alone would grow."""
    options = {"thresholds": {0: 0.9, 1: 0.95}} if name == "Attend-and-Excite" else {}
    before, after, _ = before_and_after(name, load_pipeline().to(torch.float64), **options)
    torch.testing.assert_close(after, before, atol=1e-8, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAP_USERS)
def test_another_map_is_seen(name, monkeypatch):
    """The same with scores four times as large is far from the same."""
    exact = diffusers_maps.AttentionMap
    monkeypatch.setattr(
        diffusers_maps, "AttentionMap", lambda *parts, scale, **rest: exact(*parts, scale=4 * scale, **rest)
    )
    pipe = load_dropin_pipeline("tiny-sdxl") if name.endswith("XL") else load_dropin_pipeline("tiny-sd15")
    before, after, _ = before_and_after(name, pipe)
    assert (after - before).abs().max() > 20 * FLOAT32 * float(before.abs().max())


def test_what_it_says(tiny):
    pipe, run = MAP_USERS["SAG"](tiny, num_inference_steps=1)
    layers = len(scores_of(pipe.unet))
    acceleration = accelerate(pipe)
    assert f"each of {layers} layers gives a lazy map" in str(acceleration)
    assert "StableDiffusionSAGPipeline sets CrossAttnStoreProcessor in its calls" in str(acceleration)
    assert "AttnProcessor2_0: asks for no map, and is left alone" in str(acceleration)
    run(pipe)
    assert acceleration.served == {"CrossAttnStoreProcessor": 1}
    acceleration.restore()
    acceleration.restore()
    assert f"each of {layers} layers gave a lazy map" in str(acceleration)


class Users:
    """A processor of a user's own, which needs the numbers."""

    def __init__(self):
        self.seen = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(part) for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        self.seen = attn.get_attention_scores(query, key, attention_mask)
        return attn.to_out[0](attn.batch_to_head_dim(self.seen @ value))


def test_unknown_processors_are_named_and_left(tiny):
    users = Users()
    tiny.unet.set_attn_processor(users)
    plain = sample(tiny, 1, steps=1)
    with accelerate(tiny) as acceleration:
        with pytest.warns(RuntimeWarning, match="Users asks for attention maps and is not known") as told:
            accelerated = sample(tiny, 1, steps=2)
        assert isinstance(users.seen, torch.Tensor)
        sample(tiny, 1, steps=1)
    assert len([one for one in told if "is not known" in str(one.message)]) == 1
    assert acceleration.left_alone == {"Users": len(scores_of(tiny.unet))}
    assert re.search(r"Users: not known; \d+ layers were given \d+ matrices", str(acceleration))
    del accelerated
    torch.testing.assert_close(sample(tiny, 1, steps=1), plain, atol=0, rtol=0)


def test_a_subclass_of_a_known_processor_is_a_users(tiny):
    class Mine(AttnProcessor):
        pass

    tiny.unet.set_attn_processor(Mine())
    with accelerate(tiny) as acceleration, pytest.warns(RuntimeWarning, match="Mine asks for attention maps"):
        sample(tiny, 1, steps=1)
    assert not acceleration.served


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_an_error_in_a_call(tiny, error):
    def fail(*arguments):
        raise error("in the user's callback")

    plain = sample(tiny, 1, steps=1)
    pipe, _ = MAP_USERS["Prompt-to-Prompt"](tiny)
    with pytest.raises(error), accelerate(pipe):
        pipe(["a red car", "a blue car"], num_inference_steps=1, callback_on_step_end=fail, output_type="latent")
    assert not any(scores_of(tiny.unet))
    torch.testing.assert_close(sample(tiny, 1, steps=1), plain, atol=0, rtol=0)


def test_bad_input(tiny):
    with accelerate(tiny), pytest.raises(RuntimeError, match="accelerated already"):
        accelerate(tiny)
    with pytest.raises(TypeError, match="whose layers give none of their maps"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        accelerate(tiny, backend="fast")
    with accelerate(tiny), pytest.raises(RuntimeError, match=r"cannot be copied: restore\(\)"):
        copy.deepcopy(tiny.unet)


def test_upcast_attention_and_masks(tiny):
    """In half precision with float scores, and with keys left out, as the layer's own answer."""
    layer = next(layer for layer in tiny.unet.modules() if isinstance(layer, Attention))
    layer.set_processor(AttnProcessor())
    query, key, value = torch.randn(3, 2 * layer.heads, 6, 4, generator=generator()).to(torch.bfloat16)
    mask = torch.zeros(2 * layer.heads, 1, 6).index_fill_(2, torch.tensor([1, 4]), -1e4).to(torch.bfloat16)
    for upcast in (False, True):
        layer.upcast_attention = layer.upcast_softmax = upcast
        given = mask.float() if upcast else mask
        expected = layer.get_attention_scores(query, key, given)
        with accelerate(tiny):
            answer = layer.get_attention_scores(query, key, given)
            assert isinstance(answer, LazyMap)
            assert answer.dtype == expected.dtype == torch.bfloat16
            product = torch.bmm(answer, value)
        assert product.dtype == torch.bfloat16
        torch.testing.assert_close(product, torch.bmm(expected, value), atol=2e-2, rtol=2e-2)


def test_a_map_that_is_moved_holds_nothing_where_it_was(tiny):
    layer = next(layer for layer in tiny.unet.modules() if isinstance(layer, Attention))
    layer.set_processor(AttnProcessor())
    query, key = torch.randn(2, layer.heads, 6, 4)
    with accelerate(tiny):
        kept = layer.get_attention_scores(query, key)
        moved = kept.detach().to("meta")
        assert moved.device == moved.operator.device == torch.device("meta")
        assert kept.detach().cpu().operator.device == torch.device("cpu")


@pytest.mark.slow
def test_properties_of_the_pipelines_stay(tiny, tmp_path):
    """Saved and loaded, a dictionary or a tuple, callbacks, a batch or one by one."""
    pipe, _ = MAP_USERS["SAG"](tiny, num_inference_steps=2)
    seen = []
    call = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
    with accelerate(pipe):
        whole = pipe("a red car", generator=generator(), callback=lambda *step: seen.append(step[0]), **call)
        (as_tuple, _) = pipe("a red car", generator=generator(), return_dict=False, **call)
        pipe.save_pretrained(tmp_path)
        noise = torch.randn(1, 4, 64 // 8, 64 // 8, generator=generator())
        both = pipe(["a red car", "a blue car"], latents=noise.repeat(2, 1, 1, 1), **call).images
        alone = [pipe(prompt, latents=noise, **call).images for prompt in ("a red car", "a blue car")]
    assert seen == [0, 1]
    torch.testing.assert_close(as_tuple, whole.images, atol=0, rtol=0)
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)
    loaded = StableDiffusionSAGPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    loaded.set_progress_bar_config(disable=True)
    assert not any(scores_of(loaded.unet))
    torch.testing.assert_close(
        loaded("a red car", generator=generator(), **call).images, whole.images, atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
def test_what_gives_no_maps_is_left_to_the_bit(tiny):
    """PAG, FreeU, attention's keyword arguments and edits."""
    pag = made(StableDiffusionPAGPipeline, tiny, pag_applied_layers=["mid", "up"])
    tiny.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    options = {"steps": 2, "cross_attention_kwargs": {"scale": 0.5}}
    call = {"num_inference_steps": 2, "pag_scale": 2.0, "output_type": "latent", "height": 64, "width": 64}

    def outputs():
        plain = pag("a red car", generator=generator(), **call).images
        with editing(tiny, FreePromptEdit(1.0, levels=(0, 1, 2, 3))):
            return plain, sample(tiny, 2, **options)

    before = outputs()
    with accelerate(tiny) as acceleration:
        after = outputs()
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, atol=0, rtol=0)
    assert not acceleration.served


@pytest.mark.slow
@torch.no_grad()
def test_frames_attend_to_the_first_one_as_before(tiny):
    """Text2Video-Zero, with its fused processor, which gives no maps, and with the one that does."""
    parts = {name: part for name, part in tiny.components.items() if name not in ("image_encoder", "safety_checker")}
    video = TextToVideoZeroPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    video.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "t0": 2, "t1": 3, "video_length": 3, "output_type": "latent"}

    def frames():
        return video("a red car", generator=generator(), height=64, width=64, **call).images

    before = frames()
    with accelerate(video) as acceleration:
        torch.testing.assert_close(frames(), before, atol=0, rtol=0)
    assert not acceleration.served
    given = torch.randn(6, 4, 8, 8, generator=generator()), 10, torch.randn(6, 77, 32, generator=generator())
    video.unet.set_attn_processor(CrossFrameAttnProcessor(batch_size=2))
    before = video.unet(*given).sample
    with accelerate(video) as acceleration:
        after = video.unet(*given).sample
    assert list(acceleration.served) == ["CrossFrameAttnProcessor"]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    video.unet.set_attn_processor(AttnProcessor())
    assert (before - video.unet(*given).sample).abs().max() > 1e-3  # frames that attend to themselves


@pytest.mark.slow
@torch.no_grad()
def test_temporal_layers_of_animatediff():
    """Frames that attend to one another, pixel by pixel, with processors that ask for maps."""
    torch.manual_seed(0)
    unet = UNetMotionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=2,
        motion_max_seq_length=4,
        sample_size=8,
    ).eval()
    unet.set_attn_processor(AttnProcessor())
    given = torch.randn(2, 4, 3, 8, 8), 10, torch.randn(6, 5, 8)
    before = unet(*given).sample
    with accelerate(unet) as acceleration:
        after = unet(*given).sample
    temporal = [name for name, _ in unet.named_modules() if name.endswith("attn1") and "motion_modules" in name]
    assert temporal
    assert acceleration.served["AttnProcessor"] >= len(temporal)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_step_with_gradients_holds_no_maps(pipe):
    """Attend-and-Excite's gradients, with layers of 4096 tokens: what diffusers holds dense is several times that."""
    large = tiny_pipeline(pipe, **CONFIGS["tiny"])
    tiny, run = MAP_USERS["Attend-and-Excite"](
        large, num_inference_steps=1, max_iter_to_alter=1, height=512, width=512, attn_res=(32, 32)
    )
    dense = peak_bytes(lambda: run(tiny))
    with accelerate(tiny):
        assert peak_bytes(lambda: run(tiny)) < dense / 4
