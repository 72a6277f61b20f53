"""FreePromptPipeline: one source, any number of targets, and everything that a diffusers pipeline promises."""

import logging
import types

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.callbacks import PipelineCallback
from safetensors.torch import save_file

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, editing, make_edit
from tests.support.free_prompt_pipelines import OTHER, SOURCE, TARGET, distance, free_prompt_pipeline, noise
from tests.support.golden_cases import CASES, GOLDEN, load_case
from tests.support.original_checkpoint import original_checkpoint

FAST = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def tiny(pipe):
    return free_prompt_pipeline(pipe)


@pytest.fixture
def unet_must_not_run(tiny, monkeypatch):
    def forward(*args, **kwargs):
        pytest.fail("the UNet ran before the arguments were checked")

    monkeypatch.setattr(tiny.unet, "forward", forward)


class TestGolden:
    """What the authors' code computed, through both forms of the call."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", CASES)
    def test_original_latents(self, pipe, name):
        case = load_case(name)
        steps = []

        def keep(pipe, index, timestep, tensors):
            steps.append(tensors["latents"].clone())
            return {}

        source, *targets = case.settings["prompts"]
        latents = FreePromptPipeline.from_pipe(pipe)(
            source,
            targets,
            self_replace_steps=case.settings["self_replace_steps"],
            max_tokens=case.settings.get("res_threshold_tokens", 32**2),  # one case's notes leave the default out
            latents=case.tensors["in.start_latents"],
            num_inference_steps=case.settings["steps"],
            guidance_scale=case.settings["guidance_scale"],
            output_type="latent",
            callback_on_step_end=keep,
        ).images
        assert distance(steps[0], case.tensors["out.latents_step1"]) <= case.atol("latents_step1")
        assert distance(latents, case.tensors["out.latents"]) <= case.atol("latents")

    def test_decoded_image_from_a_list_of_prompts(self, pipe):
        case = load_case("fpe_fake_2p_lat16_layers")
        edit = FreePromptEdit(case.settings["self_replace_steps"], max_tokens=case.settings["res_threshold_tokens"])
        images = case.call(FreePromptPipeline.from_pipe(pipe), edit=edit, output_type="pt").images
        assert distance(images, case.tensors["out.image"]) <= case.atol("image")


class TestAgainstTheSession:
    """The pipeline adds no arithmetic: a session around diffusers' pipeline gives the same bits."""

    @pytest.mark.parametrize("guidance", [7.5, 1.0, 0.0])
    @pytest.mark.parametrize("images", [1, 2])
    def test_same_bits(self, tiny, guidance, images):
        prompts = [SOURCE, TARGET, OTHER]
        options = {**FAST, "guidance_scale": guidance, "num_images_per_prompt": images}
        plain = StableDiffusionPipeline(**tiny.components, requires_safety_checker=False)
        plain.set_progress_bar_config(disable=True)
        edit = make_edit("fpe", prompts, None, plain, self_replace_steps=(0.0, 0.7))
        with editing(plain, edit, images_per_prompt=images):
            expected = plain(
                prompts, latents=noise(images).repeat(3, 1, 1, 1), negative_prompt=["cars"] * 3, **options
            ).images
        arguments = {"self_replace_steps": (0.0, 0.7), "latents": noise(images), "negative_prompt": "cars", **options}
        assert torch.equal(tiny(SOURCE, [TARGET, OTHER], **arguments).images, expected)
        assert torch.equal(tiny(prompts, **arguments).images, expected)

    def test_source_row_is_what_it_is_alone(self, tiny):
        edited = tiny(SOURCE, TARGET, latents=noise(), **FAST)
        alone = tiny(SOURCE, latents=noise(), **FAST)
        assert alone.targets == []
        assert distance(edited.source, alone.source) <= 1e-4
        assert distance(edited.targets[0], alone.source) >= 1e-2

    def test_without_targets_it_is_stable_diffusion(self, tiny):
        plain = StableDiffusionPipeline(**tiny.components, requires_safety_checker=False)
        plain.set_progress_bar_config(disable=True)
        options = {**FAST, "height": 24, "width": 32, "num_images_per_prompt": 2, "eta": 0.5}
        expected = plain(SOURCE, generator=torch.Generator().manual_seed(1), **options).images
        assert torch.equal(tiny(SOURCE, generator=torch.Generator().manual_seed(1), **options).images, expected)

    def test_zero_steps_are_no_control(self, tiny):
        plain = tiny(TARGET, latents=noise(), **FAST).source
        assert distance(tiny(SOURCE, TARGET, latents=noise(), self_replace_steps=0, **FAST).targets[0], plain) <= 1e-4
        assert distance(tiny(SOURCE, TARGET, latents=noise(), **FAST).targets[0], plain) >= 1e-2

    def test_embeddings_stand_in_for_prompts(self, tiny):
        embeds, negative = tiny.encode_prompt([SOURCE, TARGET], "cpu", 1, True, ["", ""])
        by_text = tiny(SOURCE, TARGET, latents=noise(), **FAST).images
        by_embeds = tiny(prompt_embeds=embeds, negative_prompt_embeds=negative, latents=noise(), **FAST).images
        assert torch.equal(by_text, by_embeds)


class TestSharedNoise:
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    @pytest.mark.parametrize("images", [1, 2])
    def test_equal_prompts_give_equal_images(self, tiny, eta, images):
        """At the start and in the steps of a stochastic sampler; images of one prompt differ."""
        out = tiny(
            [SOURCE] * 3,
            generator=torch.Generator().manual_seed(0),
            num_images_per_prompt=images,
            eta=eta,
            height=24,
            width=32,
            **FAST,
        )
        assert torch.allclose(out.targets[0], out.source, atol=1e-4)
        assert torch.allclose(out.targets[1], out.source, atol=1e-4)
        if images == 2:
            assert distance(out.source[0], out.source[1]) > 0.1

    def test_generator_decides_and_advances(self, tiny):
        generator = torch.Generator().manual_seed(5)
        first = tiny(SOURCE, TARGET, generator=generator, eta=1.0, **FAST).images
        second = tiny(SOURCE, TARGET, generator=generator, eta=1.0, **FAST).images
        again = tiny(SOURCE, TARGET, generator=torch.Generator().manual_seed(5), eta=1.0, **FAST).images
        assert torch.equal(first, again)
        assert distance(first, second) > 0.1

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_a_generator_for_each_image(self, tiny, eta):
        options = {"height": 24, "width": 32, "eta": eta, **FAST}
        both = tiny(
            SOURCE,
            TARGET,
            num_images_per_prompt=2,
            generator=[torch.Generator().manual_seed(s) for s in (1, 2)],
            **options,
        )
        alone = tiny(SOURCE, TARGET, generator=torch.Generator().manual_seed(2), **options)
        assert distance(both.targets[0][1], alone.targets[0]) <= 1e-4
        listed = tiny(SOURCE, TARGET, generator=[torch.Generator().manual_seed(2)], **options)
        assert torch.equal(listed.images, alone.images)

    def test_latents_of_one_row_of_each_image_or_of_all(self, tiny):
        two = noise(2)
        per_image = tiny(SOURCE, TARGET, latents=two, num_images_per_prompt=2, **FAST).images
        all_rows = tiny(SOURCE, TARGET, latents=two.repeat(2, 1, 1, 1), num_images_per_prompt=2, **FAST).images
        assert torch.equal(per_image, all_rows)
        one_row = tiny(SOURCE, TARGET, latents=noise(), num_images_per_prompt=2, **FAST)
        assert torch.equal(one_row.source[0], one_row.source[1])

    def test_rows_that_start_elsewhere_are_refused(self, tiny, unet_must_not_run):
        with pytest.raises(ValueError, match=r"row 1 of latents differs from the source's row 0"):
            tiny(SOURCE, TARGET, latents=noise(2), **FAST)


class TestSizes:
    @pytest.mark.parametrize(("height", "width"), [(24, 32), (18, 50), (2, 2)])
    def test_any_size_of_the_autoencoder(self, tiny, height, width):
        out = tiny(SOURCE, TARGET, height=height, width=width, num_inference_steps=2, output_type="np", levels=(0, 1))
        assert out.images.shape == (2, height, width, 3)

    def test_each_side_has_its_default(self, tiny):
        assert tiny(SOURCE, TARGET, height=20, **{**FAST, "num_inference_steps": 1}).images.shape[-2:] == (10, 16)

    @pytest.mark.parametrize("side", [25, 0, -2])
    def test_sizes_between_latent_pixels_are_refused(self, tiny, unet_must_not_run, side):
        with pytest.raises(ValueError, match="width must be a positive multiple of 2 pixels"):
            tiny(SOURCE, TARGET, height=24, width=side, **FAST)

    def test_size_against_latents(self, tiny, unet_must_not_run):
        with pytest.raises(ValueError, match="latents of 12 x 16 make images of 24 x 32"):
            tiny(SOURCE, TARGET, latents=noise(), height=32, width=32, **FAST)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"self_replace_steps": float("nan")}, ValueError, "got nan"),
            ({"self_replace_steps": 1.5}, ValueError, r"\[0, 1\]"),
            ({"self_replace_steps": (0.5, 0.2)}, ValueError, "start <= stop"),
            ({"levels": 7}, ValueError, "match none"),
            ({"levels": 1, "max_tokens": 64}, ValueError, "one of"),
            ({"edit": FreePromptEdit(), "levels": 1}, ValueError, "belong to the edit"),
            ({"edit": "fpe"}, TypeError, "expected an Edit"),
            ({"backend": "cudnn"}, ValueError, "unknown backend"),
            ({"self_replace_step": 0.4}, TypeError, "unknown option self_replace_step"),
            ({"negative_prompt": ["a", "b", "c"]}, ValueError, "one for each of the 2 prompts"),
            ({"guidance_scale": float("nan")}, ValueError, "finite"),
            ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be a whole number from 1 on"),
            ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
            ({"latents": noise()[:, :3]}, ValueError, r"expected latents \[1, 4, h, w\]"),
            ({"prompt_embeds": torch.zeros(2, 77, 32)}, ValueError, "not both"),
            ({"negative_prompt_embeds": torch.zeros(1, 77, 32)}, ValueError, r"\[2, tokens, .* got \[1, 77, 32\]"),
            ({"callback_on_step_end_tensor_inputs": ["images"]}, ValueError, "images"),
        ],
    )
    def test_before_any_denoising(self, tiny, unet_must_not_run, arguments, error, message):
        with pytest.raises(error, match=message):
            tiny(SOURCE, TARGET, **{**FAST, **arguments})

    @pytest.mark.parametrize(
        ("prompts", "error", "message"),
        [
            ((), ValueError, "expected a source prompt"),
            (([],), ValueError, "empty list"),
            (([SOURCE, TARGET], OTHER), ValueError, "one source prompt beside target_prompt"),
            ((SOURCE, [TARGET, 3]), TypeError, "prompts must be text"),
        ],
    )
    def test_prompts(self, tiny, unet_must_not_run, prompts, error, message):
        with pytest.raises(error, match=message):
            tiny(*prompts, **FAST)

    @pytest.mark.parametrize(
        ("embeds", "error", "message"),
        [
            (torch.zeros(77, 32), ValueError, r"prompt_embeds \[prompts, tokens, channels\].* got \[77, 32\]"),
            ([torch.zeros(77, 32)] * 2, TypeError, "a tensor .* got list"),
        ],
        ids=["of one prompt", "a list"],
    )
    def test_embeddings(self, tiny, unet_must_not_run, embeds, error, message):
        with pytest.raises(error, match=message):
            tiny(prompt_embeds=embeds, **FAST)

    def test_long_prompts_warn_as_in_diffusers(self, tiny):
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
        logger = logging.getLogger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        try:
            tiny(SOURCE, TARGET + " ducks" * 80, latents=noise(), **FAST)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        assert any(kind == "WARNING" and "77 tokens" in text for kind, text in messages)


class TestOutput:
    def test_images_have_names(self, tiny):
        out = tiny(SOURCE, [TARGET, OTHER], latents=noise(), num_inference_steps=1)
        assert len(out.images) == 3
        assert all(isinstance(image, PIL.Image.Image) and image.size == (32, 24) for image in out.images)
        assert out.source is out.images[0]
        assert out.targets == out.images[1:]
        assert out.nsfw_content_detected is None
        assert out[0] is out.images is out["images"]

    def test_several_images_a_prompt(self, tiny):
        out = tiny(SOURCE, [TARGET, OTHER], latents=noise(2), num_images_per_prompt=2, **FAST)
        assert out.source.shape[0] == 2
        assert [len(target) for target in out.targets] == [2, 2]
        assert torch.equal(out.targets[1], out.images[4:6])

    def test_tuple(self, tiny):
        images, nsfw = tiny(SOURCE, TARGET, latents=noise(), num_inference_steps=1, output_type="np", return_dict=False)
        assert isinstance(images, np.ndarray)
        assert nsfw is None

    def test_safety_checker_follows_the_images(self, tiny, monkeypatch):
        def check(self, image, device, dtype):
            return image, [False, True]

        monkeypatch.setattr(tiny, "run_safety_checker", types.MethodType(check, tiny))
        out = tiny(SOURCE, TARGET, latents=noise(), num_inference_steps=1)
        assert out.nsfw_content_detected == [False, True]


class TestCallbacks:
    def test_sees_what_it_asks_for_and_changes_it(self, tiny):
        seen = []

        def callback(pipe, index, timestep, tensors):
            seen.append((index, sorted(tensors)))
            return {"latents": torch.zeros_like(tensors["latents"])} if index == 2 else {}

        out = tiny(
            SOURCE,
            TARGET,
            latents=noise(),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            **FAST,
        )
        assert seen == [(index, ["latents", "prompt_embeds"]) for index in range(3)]
        assert not out.images.any()

    @pytest.mark.parametrize("keep_source", [True, False])
    def test_guidance_may_end_half_way(self, tiny, keep_source):
        class EndGuidance(PipelineCallback):
            tensor_inputs = ["prompt_embeds"]  # noqa: RUF012  (diffusers reads it from the class)

            def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
                if step_index == 0:
                    pipeline._guidance_scale = 0.0
                    callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"].chunk(2)[1]
                return callback_kwargs

        rows = []
        hook = tiny.unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
        try:
            out = tiny(
                SOURCE,
                TARGET,
                latents=noise(),
                callback_on_step_end=EndGuidance(),
                keep_source=keep_source,
                self_replace_steps=0.7,
                **FAST,
            )
        finally:
            hook.remove()
        assert rows == ([4, 2, 2] if keep_source else [4, 2, 1])
        assert len(out.images) == 1 + keep_source

    @pytest.mark.filterwarnings("ignore:.*callback.*:FutureWarning")
    def test_legacy_callback(self, tiny):
        steps = []
        tiny(SOURCE, TARGET, latents=noise(), callback=lambda i, t, x: steps.append(len(x)), callback_steps=1, **FAST)
        assert steps == [2, 2, 2]


class TestLifeOfThePipeline:
    def test_leaves_no_trace(self, tiny):
        before = tiny.unet.attn_processors
        plain = tiny(SOURCE, latents=noise(), **FAST).images

        def fail(*args):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny(SOURCE, TARGET, latents=noise(), callback_on_step_end=fail, **FAST)
        assert tiny.unet.attn_processors == before
        edited = tiny(SOURCE, TARGET, latents=noise(), **FAST).images
        assert torch.equal(tiny(SOURCE, TARGET, latents=noise(), **FAST).images, edited)
        assert torch.equal(tiny(SOURCE, latents=noise(), **FAST).images, plain)
        assert tiny.unet.attn_processors == before

    def test_shares_components_with_diffusers(self, pipe):
        ours = FreePromptPipeline.from_pipe(pipe)
        assert ours.unet is pipe.unet
        assert StableDiffusionPipeline.from_pipe(ours).unet is pipe.unet

    def test_saved_models_load_in_diffusers_and_here(self, tiny, tmp_path):
        tiny.save_pretrained(tmp_path)
        expected = tiny(SOURCE, TARGET, latents=noise(), **FAST).images
        assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline
        loaded = FreePromptPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded(SOURCE, TARGET, latents=noise(), **FAST).images, expected)

    def test_original_checkpoints(self, pipe, tmp_path):
        save_file(original_checkpoint(pipe), tmp_path / "model.safetensors")
        loaded = FreePromptPipeline.from_single_file(
            tmp_path / "model.safetensors", config=str(GOLDEN / "models" / "tiny-sd15")
        )
        loaded.set_progress_bar_config(disable=True)
        options = {"latents": noise(1, 8, 8), "num_inference_steps": 1, "output_type": "np"}
        expected = FreePromptPipeline.from_pipe(pipe)(SOURCE, TARGET, **options).images
        assert np.allclose(loaded(SOURCE, TARGET, **options).images, expected, atol=1e-5)
        assert np.ptp(expected) > 0.05

    def test_lora(self, pipe):
        peft = pytest.importorskip("peft")
        tiny = free_prompt_pipeline(pipe)
        before = tiny(SOURCE, TARGET, latents=noise(), **FAST).images
        torch.manual_seed(1)
        targets = ["to_q", "to_k", "to_v"]
        tiny.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        after = tiny(SOURCE, TARGET, latents=noise(), **FAST).images
        tiny.unet.disable_adapters()
        assert distance(after, before) > 1e-3
        assert torch.equal(tiny(SOURCE, TARGET, latents=noise(), **FAST).images, before)
