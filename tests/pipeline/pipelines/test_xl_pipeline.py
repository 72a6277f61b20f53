"""FreePromptXLPipeline: SDXL's images, generated and real, and its recordings, in float64 against formulas."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors.torch import save_file

from fpe_pipeline import (
    FreePromptEdit,
    FreePromptPipeline,
    FreePromptXLPipeline,
    Inversion,
    LocalBlend,
    NullText,
    PromptToPromptEdit,
    Recording,
    editing,
)
from fpe_pipeline.inversion.trajectory import METHODS, encode_image
from fpe_pipeline.models.sources import find_model, holds_sdxl
from fpe_pipeline.sampling.decoding import decoded
from tests.support.free_prompt_pipelines import OTHER, SOURCE, TARGET, distance, free_prompt_xl_pipeline, noise
from tests.support.tiny_models import add_image_prompts, image_embeds
from tests.support.tiny_pipelines import tiny_pipeline, tiny_sdxl_pipeline

EXACT = 1e-9
STEPS = 3
SIZE = {"height": 24, "width": 32}
FAST = {"num_inference_steps": STEPS, "output_type": "latent"}


@pytest.fixture(scope="module")
def tiny(pipe):
    return free_prompt_xl_pipeline(pipe)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(3).random((24, 32, 3))


def start(rows=1):
    return noise(rows).double()


def inverted(tiny, photo, method="direct", **options):
    return tiny.invert(photo, SOURCE, method=method, num_inference_steps=STEPS, **SIZE, **options)


def quick(method):
    """A method of inversion; null-text's of one iteration a step."""
    return NullText(inner_steps=1) if method == "null-text" else method


def stock_of(tiny):
    """diffusers' own pipeline around the same modules."""
    stock = StableDiffusionXLPipeline(**tiny.components)
    stock.set_progress_bar_config(disable=True)
    return stock


def by_hand(tiny, prompt, *, guidance=1.0, told=(24, 32, 0, 0, 24, 32)):
    """The UNet's prediction of latents at a timestep, as the paper of SDXL conditions it."""
    states, away, pooled, pooled_away = tiny.encode_prompt(prompt, do_classifier_free_guidance=True)
    sizes = torch.tensor([told], dtype=torch.float64)

    def one(latents, timestep, states, pooled):
        added = {"text_embeds": pooled, "time_ids": sizes}
        return tiny.unet(latents, timestep, encoder_hidden_states=states, added_cond_kwargs=added).sample

    def predicted(latents, timestep):
        towards = one(latents, timestep, states, pooled)
        if guidance == 1:
            return towards
        return guidance * towards + (1 - guidance) * one(latents, timestep, away, pooled_away)

    return predicted


def path_to_noise(tiny, start, predicted):
    """DDIM followed backwards: x' = sqrt(a') x0 + sqrt(1 - a') e at every level that the run goes through."""
    levels = tiny.scheduler.alphas_cumprod.double()
    tiny.scheduler.set_timesteps(STEPS)
    found, less = [start], tiny.scheduler.final_alpha_cumprod.double()
    for timestep in reversed(tiny.scheduler.timesteps.tolist()):
        sample, more = found[-1], levels[timestep]
        error = predicted(sample, timestep)
        clean = (sample - (1 - less).sqrt() * error) / less.sqrt()
        found.append(more.sqrt() * clean + (1 - more).sqrt() * error)
        less = more
    return torch.stack(found)


class TestGenerated:
    @pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "bad"}], ids=str)
    def test_as_editing_around_the_pipeline_of_diffusers(self, tiny, options):
        made = tiny(SOURCE, [TARGET, OTHER], latents=start(), **FAST, **options).images
        stock = stock_of(tiny)
        negative = {name: [text] * 3 for name, text in options.items() if name == "negative_prompt"}
        call = {"latents": start().repeat(3, 1, 1, 1), **SIZE, **FAST, **options, **negative}
        with editing(stock, FreePromptEdit(0.8)):
            expected = stock([SOURCE, TARGET, OTHER], **call).images
        assert distance(made, expected) <= EXACT
        unedited = stock([SOURCE, TARGET, OTHER], **call).images
        assert distance(made[1:], unedited[1:]) > 1e-3
        assert distance(made[0], unedited[0]) <= EXACT

    def test_guidance_is_that_of_the_pipeline_of_diffusers(self, tiny):
        assert torch.equal(
            tiny(SOURCE, TARGET, latents=start(), **FAST).images,
            tiny(SOURCE, TARGET, latents=start(), guidance_scale=5.0, **FAST).images,
        )

    def test_texts_of_each_prompt(self, tiny):
        texts = {"prompt_2": [SOURCE, OTHER], "negative_prompt": ["bad", "grey"], "negative_prompt_2": "worse"}
        made = tiny(SOURCE, TARGET, latents=start(), **texts, **FAST).images
        single = tiny(
            TARGET, prompt_2=OTHER, negative_prompt="grey", negative_prompt_2="worse", latents=start(), **FAST
        ).images
        free = tiny(SOURCE, TARGET, self_replace_steps=0, latents=start(), **texts, **FAST).images
        assert distance(free[1], single[0]) <= EXACT
        assert distance(free[1], made[1]) > 1e-3

    def test_sizes_that_the_model_is_told(self, tiny):
        told = {"original_size": (96, 128), "crops_coords_top_left": (8, 4), "target_size": (48, 64)}
        made = tiny(SOURCE, latents=start(), **told, **FAST).images
        assert distance(made, stock_of(tiny)(SOURCE, latents=start(), **SIZE, **told, **FAST).images) <= EXACT
        assert distance(made, tiny(SOURCE, latents=start(), **FAST).images) > 1e-3

    @pytest.mark.parametrize("images", [1, 2])
    def test_without_its_source(self, tiny, images):
        options = {"latents": start(images), "num_images_per_prompt": images, **FAST}
        whole = tiny(SOURCE, [TARGET, OTHER], self_replace_steps=0.4, **options)
        dropped = tiny(SOURCE, [TARGET, OTHER], self_replace_steps=0.4, keep_source=False, **options)
        assert dropped.source is None
        assert distance(dropped.images, whole.images[images:]) <= EXACT

    def test_a_run_that_ends_early(self, tiny):
        part = tiny(SOURCE, TARGET, latents=start(), denoising_end=0.7, num_inference_steps=10, output_type="latent")
        stock = stock_of(tiny)
        with editing(stock, FreePromptEdit(0.8)):
            options = {"denoising_end": 0.7, "num_inference_steps": 10, "output_type": "latent", **SIZE}
            expected = stock([SOURCE, TARGET], latents=start().repeat(2, 1, 1, 1), **options).images
        assert distance(part.images, expected) <= EXACT

    def test_words_are_found_in_both_encoders(self, tiny):
        prompts = [SOURCE, TARGET]
        edit = PromptToPromptEdit(prompts, tiny.tokenizer) + LocalBlend(
            prompts, tiny.tokenizer, ["ducks", "ducks"], 0.5
        )
        made = tiny(SOURCE, TARGET, edit=edit, latents=start(), **FAST)
        stock = stock_of(tiny)
        with editing(stock, edit):
            expected = stock(prompts, latents=start().repeat(2, 1, 1, 1), **SIZE, **FAST).images
        assert distance(made.images, expected) <= EXACT
        with pytest.raises(ValueError, match=r"receive other words, .*one prompt for both \(leave prompt_2 out\)"):
            tiny(SOURCE, TARGET, edit=edit, prompt_2=["ducks", "of rubber ducks"], latents=start(), **FAST)

    @pytest.mark.slow
    def test_image_prompts_and_adapters_of_weights(self, pipe):
        """IP-Adapter's of two images, and a LoRA of the UNet: as diffusers' own pipeline takes them."""
        tiny = free_prompt_xl_pipeline(pipe, torch.float32)
        add_image_prompts(tiny)
        tiny.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        stock, call = stock_of(tiny), {"ip_adapter_image_embeds": image_embeds(1), **FAST}
        made = tiny(SOURCE, TARGET, latents=noise(), **call).images
        with editing(stock, FreePromptEdit(0.8)):
            expected = stock([SOURCE, TARGET], latents=noise().repeat(2, 1, 1, 1), **SIZE, **call).images
        assert distance(made, expected) <= 1e-4 * expected.abs().max()
        for refused in (lambda: tiny.record(SOURCE), lambda: tiny.invert(torch.rand(3, 24, 32), SOURCE)):
            with pytest.raises(ValueError, match="takes no image prompts"):
                refused()


class TestRealImages:
    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_inverted_by_the_formula(self, tiny, photo, guidance):
        found = inverted(tiny, photo, guidance_scale=guidance).latents
        predicted = by_hand(tiny, SOURCE, guidance=guidance)
        expected = path_to_noise(tiny, found[0], predicted)
        assert distance(found, expected) <= 1e-6 * expected.abs().max()  # the scheduler's levels are float32
        for fault in (
            by_hand(tiny, SOURCE, guidance=guidance, told=(0,) * 6),
            by_hand(tiny, TARGET, guidance=guidance),
        ):
            assert distance(found, path_to_noise(tiny, found[0], fault)) > 1e-3

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_edits_several_targets(self, tiny, photo, method):
        inversion = inverted(tiny, photo, quick(method))
        options = {"output_type": "latent", "guidance_scale": 7.5}
        out = tiny(inversion=inversion, target_prompt=[TARGET, OTHER], **options)
        assert out.images.shape == (3, 4, 12, 16)
        single = tiny(inversion=inversion, target_prompt=OTHER, **options).targets[0]
        assert distance(out.images[2], single) <= 1e-7
        assert distance(out.images[2], out.images[1]) > 1e-2
        if method == "direct":
            assert torch.equal(out.images[0], inversion.latents[0, 0])

    def test_negative_prompts_of_both_encoders(self, tiny, photo):
        options = {"inversion": inverted(tiny, photo), "target_prompt": TARGET, "output_type": "latent"}
        made, other = (
            tiny(**options, negative_prompt="bad", negative_prompt_2=second).images for second in ("worse", "grey")
        )
        assert torch.equal(made[0], other[0])  # the source is the picture
        assert distance(made[1], other[1]) > 1e-4

    @pytest.mark.slow
    def test_null_text_comes_closer_to_the_picture(self, tiny, photo):
        inversion = inverted(tiny, photo, NullText(inner_steps=6))
        optimised = tiny(inversion=inversion, guidance_scale=7.5, output_type="latent").images
        plain = tiny(SOURCE, latents=inversion.noise, guidance_scale=7.5, **FAST).images
        assert distance(optimised, inversion.latents[0]) < 0.8 * distance(plain, inversion.latents[0])

    def test_the_source_of_negative_prompt_inversion_goes_back_as_without_guidance(self, tiny, photo):
        inversion = inverted(tiny, photo, "negative-prompt")
        guided = tiny(inversion=inversion, target_prompt=TARGET, guidance_scale=7.5, output_type="latent").images[0]
        free = tiny(SOURCE, latents=inversion.noise, guidance_scale=1.0, **FAST).images[0]
        assert distance(guided, free) <= 1e-7

    @pytest.mark.slow
    def test_it_is_kept_in_a_file(self, tiny, photo, tmp_path):
        inversion = inverted(tiny, photo, quick("null-text"))
        loaded = Inversion.load(inversion.save(tmp_path / "photo.safetensors"))
        options = {"target_prompt": TARGET, "guidance_scale": 7.5, "output_type": "latent"}
        assert torch.equal(tiny(inversion=loaded, **options).images, tiny(inversion=inversion, **options).images)

    def test_half_precision_is_no_matter_of_the_autoencoder(self, pipe, photo):
        half = free_prompt_xl_pipeline(pipe, torch.float16)
        seen = []
        hooks = [
            part.register_forward_pre_hook(lambda part, given: seen.append(given[0].dtype))
            for part in (half.vae.encoder, half.vae.decoder)
        ]
        inversion = inverted(half, photo)
        pictures = decoded(half, inversion.latents[0])
        for hook in hooks:
            hook.remove()
        assert seen == [torch.float32, torch.float32]
        assert half.vae.dtype == torch.float16 and inversion.latents.dtype == torch.float16
        assert pictures[0].size == (32, 24)

    @pytest.mark.slow
    def test_latents_by_the_autoencoders_moments(self, tiny, photo):
        """As Playground 2.5's: what diffusers' loop decodes is what was encoded."""
        plain = inverted(tiny, photo)
        pictures = tiny(inversion=plain, target_prompt=TARGET, output_type="pt").images[0]
        tiny.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
        try:
            moved = encode_image(tiny, plain.image)
            std, mean = (torch.tensor(tiny.vae.config[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("std", "mean"))
            expected = plain.latents[0] / tiny.vae.config.scaling_factor
            assert distance(moved, (expected - mean) * tiny.vae.config.scaling_factor / std) <= 1e-6
            again = tiny(inversion=inverted(tiny, photo), target_prompt=TARGET, output_type="pt").images[0]
            assert distance(again, pictures) <= 1e-6
        finally:
            tiny.vae.register_to_config(latents_mean=None, latents_std=None)


class TestRecordings:
    @pytest.mark.parametrize("kind", ["generated", "direct", "null-text", "negative-prompt"])
    def test_edits_are_those_of_full_runs(self, tiny, photo, tmp_path, kind):
        options = {"latents": start(), "num_inference_steps": STEPS, "prompt": SOURCE}
        if kind != "generated":
            options = {"inversion": inverted(tiny, photo, quick(kind)), "guidance_scale": 7.5}
        whole = tiny(target_prompt=[TARGET, OTHER], output_type="latent", **options).images
        recording = tiny.record(**options, placement=tmp_path / "kept")
        for one in (recording, Recording.load(tmp_path / "kept")):
            edited = tiny.edit(one, [TARGET, OTHER], output_type="latent").images
            assert distance(edited, whole[1:]) <= 1e-7

    def test_of_another_second_text_encoder(self, tiny):
        recording = tiny.record(SOURCE, latents=start(), num_inference_steps=STEPS)
        weight = tiny.text_encoder_2.text_projection.weight
        with torch.no_grad():
            weight += 1
            try:
                with pytest.raises(ValueError, match="the recording is of another model"):
                    tiny.edit(recording, TARGET)
            finally:
                weight -= 1


class TestRefusals:
    @pytest.fixture(autouse=True)
    def unet_must_not_run(self, tiny, monkeypatch):
        monkeypatch.setattr(tiny.unet, "forward", lambda *args, **kwargs: pytest.fail("the UNet ran"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"negative_prompt_2": "bad"}, "negative_prompt_2 does nothing without negative_prompt"),
            ({"clip_skip": 2}, "from 0 to 1, got 2"),
            ({"negative_original_size": (8, 8), "negative_target_size": (8, 8)}, "in a batch of 2 images would reach"),
            ({"negative_original_size": (8, 8)}, "does nothing without negative_target_size: pass them"),
            ({"negative_crops_coords_top_left": (4, 0)}, "without negative_original_size and negative_target_size"),
            (
                {"pooled_prompt_embeds": torch.zeros(1, 8)},
                r"expected pooled_prompt_embeds \[2, channels\], .* \[1, 8\]",
            ),
            ({"clip_skip": True}, "clip_skip must be a whole number"),
            ({"prompt_2": ["a", "b", "c"]}, "expected one prompt 2, or one for each of the 2 prompts"),
            ({"safety": 1}, "safety"),
            ({"height": 25}, "positive multiple of 2 pixels"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_options(self, tiny, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            tiny(SOURCE, TARGET, **FAST, **options)

    def test_another_sampler(self, tiny, photo):
        own = tiny.scheduler
        tiny.scheduler = EulerDiscreteScheduler()
        try:
            with pytest.raises(ValueError, match="ddim_scheduler"):
                inverted(tiny, photo)
        finally:
            tiny.scheduler = own

    def test_negatives_of_an_inversion_that_lives_in_them(self, tiny, photo, monkeypatch):
        monkeypatch.undo()
        inversion = inverted(tiny, photo, "negative-prompt")
        for name in ("negative_prompt_2", "negative_pooled_prompt_embeds"):
            with pytest.raises(ValueError, match=f"the inversion decides .*{name}"):
                tiny(inversion=inversion, target_prompt=TARGET, **{name: "bad"})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj'"),
            ({"in_channels": 9}, "takes the 4 channels"),
        ],
        ids=["kolors", "inpainting"],
    )
    def test_other_unets(self, pipe, config, message):
        other = tiny_sdxl_pipeline(pipe)
        other.unet.register_to_config(**config)
        with pytest.raises(ValueError, match=message + r".*editing\(pipe, edit\)"):
            FreePromptPipeline.from_pipe(other)

    def test_a_refiner(self, pipe):
        refiner = tiny_sdxl_pipeline(pipe)
        refiner.register_to_config(requires_aesthetics_score=True)
        with pytest.raises(ValueError, match=r"a refiner's, which is told an aesthetic score: .*editing\(pipe, edit\)"):
            FreePromptPipeline.from_pipe(refiner)

    def test_a_unet_that_is_told_no_sizes(self, pipe):
        with pytest.raises(ValueError, match="text and sizes, as SDXL's are, got one with addition_embed_type=None"):
            FreePromptXLPipeline.from_pipe(tiny_pipeline(pipe))


class TestLoading:
    def test_saved_by_either_it_is_loaded_by_both(self, pipe, tmp_path):
        tiny_sdxl_pipeline(pipe).save_pretrained(tmp_path / "stock")
        loaded = FreePromptPipeline.from_pretrained(tmp_path / "stock")
        assert type(loaded) is FreePromptXLPipeline
        loaded.save_pretrained(tmp_path / "ours")
        assert json.loads((tmp_path / "ours" / "model_index.json").read_text())["_class_name"] == (
            "StableDiffusionXLPipeline"
        )
        assert type(DiffusionPipeline.from_pretrained(tmp_path / "ours")) is StableDiffusionXLPipeline

    @pytest.mark.parametrize(
        ("suffix", "save"),
        [
            ("safetensors", save_file),
            ("ckpt", torch.save),
            ("ckpt", lambda state, path: torch.save({"state_dict": state, "global_step": 1}, path)),
        ],
        ids=["safetensors", "ckpt", "ckpt of a training"],
    )
    def test_a_checkpoint_is_told_by_its_second_encoder(self, tmp_path, monkeypatch, suffix, save):
        asked = []
        monkeypatch.setattr(FreePromptXLPipeline, "from_single_file", lambda path, **options: asked.append(path))
        path = tmp_path / f"xl.{suffix}"
        save({"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1)}, path)
        FreePromptPipeline.from_single_file(path)
        assert asked == [path]
        assert find_model(str(path)).family == "sdxl"

    @pytest.mark.parametrize("name", ["other.ckpt", "damaged.ckpt", "missing.ckpt"])
    def test_a_file_that_is_no_checkpoint_of_sdxl(self, tmp_path, name):
        torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.zeros(1)}}, tmp_path / "other.ckpt")
        (tmp_path / "damaged.ckpt").write_text("no checkpoint")
        assert not holds_sdxl(tmp_path / name)

    def test_modules_keep_their_dtypes(self, pipe):
        stock = tiny_sdxl_pipeline(pipe)
        stock.unet.to(torch.bfloat16)
        made = FreePromptPipeline.from_pipe(stock, scheduler=DDIMScheduler())
        assert made.unet is stock.unet and made.unet.dtype == torch.bfloat16
        assert made.text_encoder_2.dtype == torch.float32
