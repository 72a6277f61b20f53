"""FreePromptPipeline on transformers: the class that serves them, and edits of generated images."""

import pytest
import torch
from diffusers import DiffusionPipeline

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, editing, flow_scheduler
from fpe_pipeline.models.flow_solvers import SOLVERS
from tests.support.flow_pipelines import (
    CLASSES,
    EXACT,
    FAMILIES,
    FAST,
    MADE,
    OTHER,
    PARENTS,
    SIZE,
    SOURCE,
    TARGET,
    StandIn,
    distance,
    edited_with,
    noise,
    repeated,
    solving,
)
from tests.support.tiny_transformers import PROMPTS, ExactEuler, draw, draw_flux, tiny_flux_pipeline, tiny_sd3_pipeline


@pytest.fixture(scope="module")
def stock(pipe):
    return {family: MADE[family](pipe) for family in FAMILIES}


@pytest.fixture(scope="module")
def pipes(stock):
    return {family: edited_with(stock[family]) for family in FAMILIES}


@pytest.fixture
def transformer_must_not_run(pipes, monkeypatch):
    def forward(*args, **kwargs):
        pytest.fail("the transformer ran before the arguments were checked")

    for tiny in pipes.values():
        monkeypatch.setattr(tiny.transformer, "forward", forward)


class TestClasses:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_from_pipe(self, stock, pipes, family):
        tiny = pipes[family]
        assert type(tiny) is CLASSES[family] and isinstance(tiny, PARENTS[family])
        assert all(tiny.components[name] is part for name, part in stock[family].components.items())
        assert tiny.transformer.dtype is torch.float64  # diffusers' own casts to float32
        assert type(CLASSES[family].from_pipe(tiny)) is CLASSES[family]
        assert PARENTS[family].from_pipe(tiny, torch_dtype=torch.float64).transformer is tiny.transformer

    def test_components_and_dtypes(self, pipe):
        other = ExactEuler(shift=1.0)
        tiny = FreePromptPipeline.from_pipe(tiny_sd3_pipeline(pipe), scheduler=other, dtype=torch.float32)
        assert tiny.scheduler is other and tiny.transformer.dtype is torch.float32

    @pytest.mark.parametrize("family", FAMILIES)
    def test_saved_models_load_in_diffusers_and_here(self, pipe, family, tmp_path):
        tiny = FreePromptPipeline.from_pipe(MADE[family](pipe, dtype=torch.float32))
        tiny.scheduler = flow_scheduler(tiny.scheduler, "euler")
        tiny.save_pretrained(tmp_path)
        options = {"latents": noise(family).float(), **SIZE, **FAST}
        expected = tiny(SOURCE, TARGET, **options).images
        assert type(DiffusionPipeline.from_pretrained(tmp_path)) is PARENTS[family]
        loaded = FreePromptPipeline.from_pretrained(tmp_path)
        assert type(loaded) is CLASSES[family]
        assert torch.equal(loaded(SOURCE, TARGET, **options).images, expected)

    def test_another_transformer(self, stock, monkeypatch):
        monkeypatch.setattr(stock["sd3"], "transformer", torch.nn.Linear(1, 1))
        with pytest.raises(TypeError, match="Linear is a transformer that no adapter describes yet"):
            FreePromptPipeline.from_pipe(stock["sd3"])


class TestAgainstTheSession:
    """The pipeline adds no arithmetic: a session around diffusers' pipeline gives the same bits."""

    @pytest.mark.parametrize("images", [1, 2])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_same_bits(self, stock, pipes, family, images):
        shared = {**FAST, **SIZE, "num_images_per_prompt": images, "guidance_scale": 3.0}
        shared |= {"true_cfg_scale": 2.0} if family == "flux" else {}
        rows = noise(family, images)
        given = {"latents": repeated(rows, 3), "negative_prompt": ["cars"] * 3}
        with editing(stock[family], FreePromptEdit((0.0, 0.5))):
            expected = stock[family]([SOURCE, TARGET, OTHER], **given, **shared).images
        ours = {"self_replace_steps": (0.0, 0.5), "latents": rows, "negative_prompt": "cars", **shared}
        assert torch.equal(pipes[family](SOURCE, [TARGET, OTHER], **ours).images, expected)
        assert torch.equal(pipes[family]([SOURCE, TARGET, OTHER], **ours).images, expected)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_fifth_of_the_steps_by_default(self, pipes, family):
        options = {**FAST, **SIZE, "latents": noise(family), "num_inference_steps": 5}
        out = pipes[family](SOURCE, TARGET, **options)
        assert all(steps == [0] for steps in out.report.layers.values()) and out.report.layers
        assert torch.equal(out.images, pipes[family](SOURCE, TARGET, edit=FreePromptEdit(0.2), **options).images)
        layer = next(iter(out.report.layers))
        one = pipes[family](SOURCE, TARGET, layers=[layer], **options)
        assert list(one.report.layers) == [layer]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_targets_it_is_the_pipeline(self, stock, pipes, family):
        options = {**FAST, **SIZE, "num_images_per_prompt": 2}
        expected = stock[family](SOURCE, generator=torch.Generator().manual_seed(1), **options).images
        out = pipes[family](SOURCE, generator=torch.Generator().manual_seed(1), **options)
        assert torch.equal(out.images, expected) and out.targets == [] and out.report is None

    @pytest.mark.parametrize("family", FAMILIES)
    def test_zero_steps_are_no_control(self, pipes, family):
        options = {**FAST, **SIZE, "latents": noise(family)}
        alone = pipes[family](TARGET, **options).source
        assert distance(pipes[family](SOURCE, TARGET, self_replace_steps=0, **options).targets[0], alone) <= 1e-6
        assert distance(pipes[family](SOURCE, TARGET, self_replace_steps=1, **options).targets[0], alone) > 1e-4

    @pytest.mark.parametrize("family", FAMILIES)
    def test_prompts_of_the_other_encoders(self, stock, pipes, family):
        options = {**FAST, **SIZE, "latents": noise(family)}
        given = {**options, "latents": repeated(noise(family), 2)}
        with editing(stock[family], FreePromptEdit(0.5)):
            expected = stock[family]([SOURCE, TARGET], prompt_2=["a car", "a car"], **given).images
        edit = FreePromptEdit(0.5)
        assert torch.equal(pipes[family](SOURCE, TARGET, edit=edit, prompt_2="a car", **options).images, expected)
        with pytest.raises(ValueError, match="expected one prompt 2, or one for each of the 2 prompts"):
            pipes[family](SOURCE, TARGET, prompt_2=["a", "b", "c"], **options)

    def test_embeddings_stand_in_for_prompts(self, pipes):
        tiny = pipes["sd3"]
        options = {**FAST, **SIZE, "latents": noise("sd3")}
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        encoded = tiny.encode_prompt([SOURCE, TARGET], None, None, max_sequence_length=12)
        by_embeds = tiny(**dict(zip(names, encoded, strict=True)), **options).images
        assert distance(by_embeds, tiny(SOURCE, TARGET, **options).images) <= 1e-12

    def test_guidance_of_each_prompt(self, pipes):
        tiny = solving(pipes["flux"], "euler")
        options = {**FAST, **SIZE, "latents": noise("flux")}
        out = tiny(SOURCE, [TARGET, OTHER], self_replace_steps=0, guidance_scale=[1.0, 3.5, 5.0], **options)
        for scale, prompt, image in zip((1.0, 3.5, 5.0), PROMPTS, out.images, strict=False):
            assert distance(image, tiny(prompt, guidance_scale=scale, **options).source) <= EXACT["flux"]
            assert distance(image, tiny(prompt, guidance_scale=scale + 2, **options).source) > 1e-4
        assert not tiny.transformer._forward_pre_hooks


class TestSharedNoise:
    @pytest.mark.parametrize("images", [1, 2])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equal_prompts_give_equal_images(self, pipes, family, images):
        generator = torch.Generator().manual_seed(0)
        out = pipes[family]([SOURCE] * 3, generator=generator, num_images_per_prompt=images, **FAST, **SIZE)
        assert distance(out.targets[0], out.source) <= EXACT[family]
        assert distance(out.targets[1], out.source) <= EXACT[family]
        if images == 2:
            assert distance(out.source[0], out.source[1]) > 0.1

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_generator_for_each_image(self, pipes, family):
        def generators(*seeds):
            return [torch.Generator().manual_seed(seed) for seed in seeds]

        options = {**FAST, **SIZE}
        both = pipes[family](SOURCE, TARGET, num_images_per_prompt=2, generator=generators(1, 2), **options)
        alone = pipes[family](SOURCE, TARGET, generator=generators(2)[0], **options)
        assert distance(both.targets[0][1], alone.targets[0]) <= EXACT[family]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_that_start_elsewhere_are_refused(self, pipes, family, transformer_must_not_run):
        with pytest.raises(ValueError, match=r"row 1 of latents differs from the source's row 0"):
            pipes[family](SOURCE, TARGET, latents=noise(family, 2), **FAST, **SIZE)


class TestDroppedSources:
    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize("guidance", [4.0, 1.0])
    def test_targets_are_the_same(self, pipes, solver, guidance):
        tiny = solving(pipes["sd3"], solver)
        options = {**FAST, **SIZE, "latents": noise("sd3"), "self_replace_steps": 0.5, "guidance_scale": guidance}
        rows = []
        handle = tiny.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        kept, dropped = (tiny(SOURCE, [TARGET, OTHER], keep_source=keep, **options) for keep in (True, False))
        handle.remove()
        assert dropped.source is None and len(dropped.images) == 2
        assert distance(dropped.images, kept.images[1:]) <= EXACT["sd3"]
        assert rows[-1] == (4 if guidance > 1 else 2) and rows[0] == (6 if guidance > 1 else 3)

    def test_where_a_loop_keeps_them(self, pipes, transformer_must_not_run):
        with pytest.raises(ValueError, match="FluxPipeline's loop, which keeps pooled"):
            pipes["flux"](SOURCE, TARGET, keep_source=False, **FAST)
        with pytest.raises(ValueError, match="skip-layer guidance"):
            pipes["sd3"](SOURCE, TARGET, keep_source=False, skip_guidance_layers=[1], **FAST)
        with pytest.raises(ValueError, match="at least one target"):
            pipes["sd3"](SOURCE, keep_source=False, **FAST)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"self_replace_steps": 1.5}, ValueError, r"\[0, 1\]"),
            ({"edit": FreePromptEdit(), "layers": 1}, ValueError, "belong to the edit"),
            ({"edit": "fpe"}, TypeError, "expected an Edit"),
            ({"backend": "cudnn"}, ValueError, "unknown backend"),
            ({"self_replace_step": 0.4}, TypeError, "unknown option self_replace_step; did you mean"),
            ({"levels": 1}, TypeError, "unknown option levels"),
            ({"negative_prompt": ["a", "b", "c"]}, ValueError, "one negative prompt, or one for each of the 2 prompts"),
            ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be a whole number from 1 on"),
            ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
            ({"width": 72}, ValueError, "width must be a positive multiple of 16 pixels"),
            ({"generator": 3}, TypeError, r"torch\.Generator\(\)\.manual_seed\(3\)"),
            ({"inversion": torch.zeros(1)}, TypeError, r"what pipe\.invert returns"),
        ],
    )
    @pytest.mark.parametrize("family", FAMILIES)
    def test_before_any_denoising(self, pipes, transformer_must_not_run, family, arguments, error, message):
        with pytest.raises(error, match=message):
            pipes[family](SOURCE, TARGET, **{**FAST, **SIZE, **arguments})

    def test_latents(self, pipes, transformer_must_not_run):
        with pytest.raises(ValueError, match=r"expected latents \[1, 16, h, w\] or \[2, 16, h, w\]"):
            pipes["sd3"](SOURCE, TARGET, latents=noise("sd3")[:, :3], **FAST)
        with pytest.raises(ValueError, match="latents of 6 x 10 make images of 48 x 80"):
            pipes["sd3"](SOURCE, TARGET, latents=noise("sd3"), height=64, **FAST)
        with pytest.raises(ValueError, match="pass height and width"):
            pipes["flux"](SOURCE, TARGET, latents=noise("flux"), **FAST)
        with pytest.raises(ValueError, match=r"expected latents \[1, 16, 64\] or \[2, 16, 64\], got \[1, 15, 64\]"):
            pipes["flux"](SOURCE, TARGET, latents=noise("flux"), height=64, width=64, **FAST)

    def test_guidance_of_each_prompt(self, pipe, pipes):
        with pytest.raises(ValueError, match="one for each of the 2 prompts"):
            pipes["flux"](SOURCE, TARGET, guidance_scale=[1.0, 2.0, 3.0], **FAST, **SIZE)
        schnell = FreePromptPipeline.from_pipe(tiny_flux_pipeline(pipe, guidance_embeds=False))
        with pytest.raises(ValueError, match=r"FLUX\.2 dev; this FluxTransformer2DModel is not"):
            schnell(SOURCE, TARGET, guidance_scale=[1.0, 2.0], **FAST, **SIZE)

    def test_models_that_take_more_than_latents(self, pipe):
        fill = FreePromptPipeline.from_pipe(tiny_flux_pipeline(pipe, in_channels=96, out_channels=64))
        with pytest.raises(ValueError, match=r"takes the 64 channels .* got one that takes 96"):
            fill(SOURCE, TARGET, **FAST, **SIZE)

    def test_a_negative_prompt_without_guidance(self, pipes):
        with pytest.warns(RuntimeWarning, match="the negative prompt does nothing at true_cfg_scale=1"):
            pipes["flux"](SOURCE, TARGET, negative_prompt="cars", **FAST, **SIZE)

    def test_guidance_without_a_negative_prompt(self, pipes):
        with pytest.warns(RuntimeWarning, match="true_cfg_scale=3 does nothing without a negative prompt"):
            pipes["flux"](SOURCE, TARGET, true_cfg_scale=3.0, **FAST, **SIZE)

    @pytest.mark.usefixtures("transformer_must_not_run")
    @pytest.mark.parametrize(
        ("family", "options", "said"),
        [
            ("sd3", {"ip_adapter_image_embeds": torch.zeros(1, 1, 3)}, "no IP-Adapter is loaded"),
            ("flux", {"ip_adapter_image_embeds": [torch.zeros(1, 1, 3)]}, "no IP-Adapter is loaded"),
            ("sd3", {"clip_skip": 99}, "clip_skip must be a whole number of layers .* from 0 to 1, got 99"),
            ("flux", {"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
            ("flux", {"guidance_scale": torch.tensor([1.0, 2.0])}, "guidance_scale must be a finite number"),
        ],
        ids=["sd3 image prompts", "flux image prompts", "layers to skip", "no number", "a tensor"],
    )
    def test_options_that_fail_inside_diffusers(self, pipes, family, options, said):
        with pytest.raises(ValueError, match=said):
            pipes[family](SOURCE, TARGET, **options, **FAST, **SIZE)


@pytest.mark.usefixtures("transformer_must_not_run")
def test_a_side_beyond_the_places_that_a_model_has(pipes):
    """Stable Diffusion 3 has a table of them; diffusers counts tokens in its refusal."""
    said = r"at most 192 pixels, for which this model has places, got {} \(height x width\): choose a smaller size"
    with pytest.raises(ValueError, match=said.format("64 x 208")):
        pipes["sd3"](SOURCE, TARGET, height=64, width=208, **FAST)
    with pytest.raises(ValueError, match=said.format("32 x 320")):
        pipes["sd3"].invert(torch.zeros(3, 32, 320), SOURCE, height=32, width=320)
    assert pipes["flux"].flow().longest is None, "FLUX.1 computes them"


def test_leaves_no_trace(pipes):
    for family, run in (("sd3", draw), ("flux", draw_flux)):
        tiny = solving(pipes[family], "euler")
        before, plain = dict(tiny.transformer.attn_processors), run(StandIn(tiny), 1)

        def fail(*args):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny(SOURCE, TARGET, latents=noise(family), callback_on_step_end=fail, **FAST, **SIZE)
        assert tiny.transformer.attn_processors == before
        assert torch.equal(run(StandIn(tiny), 1), plain)
