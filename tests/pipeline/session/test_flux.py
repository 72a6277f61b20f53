"""Edits of FLUX.1: against a dense processor in float64, dual and single blocks, one call a step or two."""

import functools
from typing import ClassVar

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, editing
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.dense_joint import dense
from tests.support.own_maps import OwnMaps
from tests.support.tiny_transformers import PROMPTS, draw_flux, tiny_flux, tiny_flux_pipeline

# diffusers turns queries and keys in float32, whatever they are given in: a last bit may fall either way there.
EXACT = 1e-6


@pytest.fixture(scope="module")
def flux(pipe):
    return tiny_flux_pipeline(pipe)


def edited(pipe, edit, **kwargs):
    with editing(pipe, edit) as session:
        out = draw_flux(pipe, **kwargs)
    return out, session.report()


def reference(pipe, rule, steps, layers="", **kwargs):
    with dense(pipe, rule, steps=steps, layers=layers):
        return draw_flux(pipe, **kwargs)


def image_maps(row, rows):
    return [(1.0, {"q_image": 0, "k_image": 0})] if row else None


def whole_maps(row, rows):
    return [(1.0, {"q_image": 0, "k_image": 0, "q_text": 0, "k_text": 0})] if row else None


def image_memory(row, rows):
    return [(1.0, {"k_image": 0, "v_image": 0})] if row else None


RULES = {
    "image": (FreePromptEdit(0.5), image_maps, (0, 1)),
    "joint": (FreePromptEdit(0.5, scope="joint"), whole_maps, (0, 1)),
    "keys and values": (MasaCtrlEdit(1, layers=range(5)), image_memory, (1, 2, 3)),
}
SIZES = {"1 target": {}, "3 targets": {"prompts": 4}, "not square": {"size": (6, 12)}}


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_targets_are_the_papers(flux, rule, options):
    edit, dense_rule, steps = RULES[rule]
    actual, report = edited(flux, edit, **options)
    assert (actual - reference(flux, dense_rule, steps, **options)).abs().max() <= EXACT
    assert (actual - draw_flux(flux, **options))[1:].abs().amax((1, 2)).min() > 1e-4
    assert len(report.layers) == 5 and all(tuple(noted) == steps for noted in report.layers.values())


@pytest.mark.parametrize("layers", ["single_transformer_blocks", "transformer_blocks", "single_transformer_blocks.2"])
def test_dual_and_single_blocks(flux, layers):
    actual, report = edited(flux, FreePromptEdit(1.0, layers=layers))
    expected = reference(flux, image_maps, range(4), layers=layers)
    assert (actual - expected).abs().max() <= EXACT
    assert report.layers and all(path.startswith(layers) for path in report.layers)


def test_layers_are_counted_through(flux):
    _, report = edited(flux, FreePromptEdit(1.0, layers=[1, 2]))
    assert list(report.layers) == ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]


WRONG = {
    "text in the image's place": lambda row, rows: [(1.0, {"q_text": 0, "k_text": 0})] if row else None,
    "the whole map": whole_maps,
    "keys and values": image_memory,
    "keys alone": lambda row, rows: [(1.0, {"k_image": 0})] if row else None,
    "nothing": lambda row, rows: None,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_other_rules_are_told_apart(flux, wrong):
    actual, _ = edited(flux, FreePromptEdit(0.5))
    assert (actual - reference(flux, wrong, (0, 1))).abs().max() > 20 * EXACT


@pytest.mark.parametrize("steps", [(0,), (1, 2), (0, 1, 2)])
def test_other_steps_are_told_apart(flux, steps):
    actual, _ = edited(flux, FreePromptEdit(0.5))
    assert (actual - reference(flux, image_maps, steps)).abs().max() > 20 * EXACT


def test_a_mask_is_a_blend_by_token(flux):
    mask = torch.zeros(48, 96)
    mask[:16] = 1
    actual, _ = edited(flux, FreePromptEdit(1.0, mask=mask), size=(6, 12))
    weight = torch.zeros(3, 6, dtype=torch.float64)
    weight[0] = 1
    weight = weight.flatten()

    def rule(row, rows):
        return [(weight, {"q_image": 0, "k_image": 0}), (1 - weight, {})] if row else None

    assert (actual - reference(flux, rule, range(4), size=(6, 12))).abs().max() <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_source_is_the_one_without_an_edit(pipe, dtype):
    tiny = tiny_flux_pipeline(pipe, dtype)
    out, _ = edited(tiny, FreePromptEdit(1.0), prompts=3)
    own, _ = edited(tiny, OwnMaps(), prompts=3)
    plain = draw_flux(tiny, prompts=3)
    assert torch.equal(out[0], own[0])
    bound = 1e-5 if dtype is torch.float32 else EXACT
    assert (out - plain)[0].abs().max() <= bound and (own - plain).abs().max() <= bound


class TestTwoCallsAStep:
    """Guidance by a negative prompt: rows that see it are a call of their own, which is left alone."""

    OPTIONS: ClassVar = {"true_cfg_scale": 3.0, "negative_prompt": ["a drawing"] * 3, "prompts": 3}

    def test_conditional_rows(self, flux):
        actual, report = edited(flux, FreePromptEdit(0.5), **self.OPTIONS)
        assert all(steps == [0, 1] for steps in report.layers.values())
        with dense(flux, lambda row, rows: rule(row, rows), steps=(0, 1)) as state:

            def rule(row, rows):
                return image_maps(row, rows) if state["calls"] % 2 else None

            expected = draw_flux(flux, **self.OPTIONS)
        assert (actual - expected).abs().max() <= EXACT
        assert (actual - reference(flux, image_maps, (0, 1), **self.OPTIONS)).abs().max() > 20 * EXACT

    def test_both_halves(self, flux):
        actual, _ = edited(flux, FreePromptEdit(0.5, both_halves=True), **self.OPTIONS)
        assert (actual - reference(flux, image_maps, (0, 1), **self.OPTIONS)).abs().max() <= EXACT

    def test_run_after_run(self, flux):
        """A second call of the pipeline is a run of its own prompts, with and without negative ones."""
        expected = edited(flux, FreePromptEdit(0.5), prompts=2)[0]
        with editing(flux, FreePromptEdit(0.5)):
            draw_flux(flux, **self.OPTIONS)
            actual = draw_flux(flux, prompts=2)
        assert torch.equal(actual, expected)

    def test_negative_prompts_are_not_the_runs(self, flux):
        """They are encoded after the prompts, by a call of their own."""
        seen = []

        class Listening(FreePromptEdit):
            def encoded(self, encoding):
                seen.append(encoding.prompts)
                return self

        with editing(flux, Listening(0.5)):
            draw_flux(flux, **self.OPTIONS)
            draw_flux(flux, prompts=2)
        assert seen == [tuple(PROMPTS[:3]), tuple(PROMPTS[:2])]

    @pytest.mark.parametrize("where", ["prepare_latents", "encode_prompt"])
    def test_a_call_that_failed_before_it_denoised(self, flux, monkeypatch, where):
        """The next one's prompts are its own: neither the failed call's, nor taken for its negative ones."""
        expected = edited(flux, FreePromptEdit(0.5), prompts=2)[0]
        original, calls, seen = getattr(flux, where), [], []

        @functools.wraps(original)
        def fail(*args, **kwargs):
            calls.append(kwargs)
            if len(calls) == (1 if where == "prepare_latents" else 2):
                raise MemoryError(where)
            return original(*args, **kwargs)

        class Listening(FreePromptEdit):
            def encoded(self, encoding):
                seen.append(encoding.prompts)
                return self

        with monkeypatch.context() as patch:
            patch.setattr(flux, where, fail)
            with editing(flux, Listening(0.5)):
                with pytest.raises(MemoryError):
                    draw_flux(flux, **self.OPTIONS)
                actual = draw_flux(flux, prompts=2)
        assert seen == [tuple(PROMPTS[:3]), tuple(PROMPTS[:2])]
        assert torch.equal(actual, expected)

    def test_pipelines_that_do_not_say_which_call_is_which(self, pipe):
        """Of those that call with the prompts first it is known; of others nothing is guessed."""
        image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        given = {"image": image, "height": 64, "width": 64, "max_sequence_length": 12, "num_inference_steps": 8}
        given |= {"negative_prompt": ["a drawing"] * 2, "true_cfg_scale": 3.0, "output_type": "latent"}
        tiny = tiny_flux_pipeline(pipe, kind=FluxImg2ImgPipeline)

        def run():
            return tiny(PROMPTS[:2], **given, generator=[torch.Generator().manual_seed(0) for _ in range(2)]).images

        with editing(tiny, FreePromptEdit()) as session:
            actual = [run(), run()]
        assert all(steps == [3, 4, 5] for steps in session.report().layers.values())
        with dense(tiny, lambda row, rows: rule(row, rows), steps=(3, 4, 5)) as state:

            def rule(row, rows):
                return image_maps(row, rows) if state["calls"] % 2 else None

            expected = run()
        assert all((out - expected).abs().max() <= EXACT for out in actual)

    def test_a_pipeline_that_is_not_known(self, pipe):
        class Unknown(FluxPipeline):
            def __call__(self, prompts):
                self.check_inputs(prompts, None, 64, 64)
                embeddings, pooled, places = self.encode_prompt(prompts, max_sequence_length=12)
                latents, ids = self.prepare_latents(2, 16, 64, 64, torch.float64, "cpu", torch.Generator())
                given = {"pooled_projections": pooled, "txt_ids": places, "img_ids": ids, "guidance": torch.ones(2)}
                for _ in range(2):
                    self.transformer(latents, embeddings, timestep=torch.ones(2), **given)

        tiny = tiny_flux_pipeline(pipe, kind=Unknown)
        tiny.scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="calls the model 2 times in a step"), editing(tiny, FreePromptEdit()):
            tiny(PROMPTS[:2])

    def test_guidance_that_is_said(self, flux):
        with pytest.raises(ValueError, match="guides by calls of their own"):
            editing(flux, FreePromptEdit(), classifier_free_guidance=True)


def test_image_to_image(pipe):
    tiny = tiny_flux_pipeline(pipe, kind=FluxImg2ImgPipeline)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"height": 64, "width": 64, "strength": 0.75, "num_inference_steps": 8, "max_sequence_length": 12}

    def run(**given):
        return tiny(PROMPTS[:2], **options, **given, output_type="latent").images

    with editing(tiny, FreePromptEdit(0.75)) as session:
        actual = run(image=image, generator=torch.Generator().manual_seed(0))
    assert all(steps == [2, 3, 4, 5] for steps in session.report().layers.values())
    with dense(tiny, image_maps, steps=range(2, 6)):  # its rows draw the same noise from generators of their own
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        expected = run(image=image.repeat(2, 1, 1, 1), generator=generators)
    assert (actual - expected).abs().max() <= EXACT


def test_a_scheduler_that_is_set_in_the_session(pipe):
    """Which call of a step sees the prompts is told by the steps of the scheduler that the pipeline has then."""
    tiny = tiny_flux_pipeline(pipe, kind=FluxImg2ImgPipeline)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"height": 64, "width": 64, "strength": 1.0, "num_inference_steps": 2, "max_sequence_length": 12}

    def run():
        noise = torch.Generator().manual_seed(0)
        return tiny(PROMPTS[:2], image=image, generator=noise, **options, output_type="latent").images

    with editing(tiny, FreePromptEdit(1.0)):
        expected = run()
    before = tiny.scheduler
    with editing(tiny, FreePromptEdit(1.0)) as session:
        tiny.scheduler = type(before).from_config(before.config)
        actual = run()
    assert all(steps == [0, 1] for steps in session.report().layers.values())
    assert torch.equal(actual, expected)
    assert "step" not in vars(before) and "step" not in vars(tiny.scheduler)


def test_fused_projections(pipe):
    tiny = tiny_flux_pipeline(pipe)
    expected, _ = edited(tiny, FreePromptEdit(0.5))
    tiny.transformer.fuse_qkv_projections()
    actual, report = edited(tiny, FreePromptEdit(0.5))
    assert len(report.layers) == 5
    assert (actual - expected).abs().max() <= EXACT


def test_the_pipeline_is_left_as_it_was(flux):
    processors, plain = dict(flux.transformer.attn_processors), draw_flux(flux)
    with pytest.raises(RuntimeError, match="stop"), editing(flux, FreePromptEdit(0.5)):
        assert "cache_context" in vars(flux.transformer)
        draw_flux(flux)
        raise RuntimeError("stop")
    assert "cache_context" not in vars(flux.transformer)
    assert flux.transformer.attn_processors == processors
    assert torch.equal(draw_flux(flux), plain)


def test_settings_of_the_processor_inside(flux):
    with editing(flux, FreePromptEdit(0.5)):
        own = flux.transformer.transformer_blocks[0].attn.processor
        own._attention_backend = "native"
        assert own.inner._attention_backend == "native" and own._parallel_config is None
        own._attention_backend = None
    assert isinstance(flux.transformer.transformer_blocks[0].attn.processor, FluxAttnProcessor)


class TestRefusals:
    def test_image_prompts(self, pipe):
        tiny = tiny_flux_pipeline(pipe, torch.float32)
        adapted = FluxIPAdapterAttnProcessor(hidden_size=16, cross_attention_dim=16)
        tiny.transformer.transformer_blocks[0].attn.set_processor(adapted)
        message = "FluxIPAdapterAttnProcessor may do more"
        with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit()):
            draw_flux(tiny)

    def test_context_parallelism(self, pipe):
        tiny = tiny_flux_pipeline(pipe, torch.float32)
        tiny.transformer.transformer_blocks[0].attn.processor._parallel_config = object()
        with pytest.raises(ValueError, match="context parallelism is on"), editing(tiny, FreePromptEdit()):
            draw_flux(tiny)

    def test_tokens_out_of_order(self):
        """Of the picture that is denoised, which tokens of a reference may follow (test_kontext.py)."""
        adapter = adapter_of(tiny_flux())
        places = torch.zeros(8, 3)
        places[:4, 1:] = places[4:, 1:] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        call = {"hidden_states": torch.zeros(2, 4, 64), "timestep": torch.ones(2), "img_ids": places[:4]}
        assert adapter.read((), call).size == (4, 4) and adapter.read((), call).references == 0
        call["hidden_states"] = torch.zeros(2, 8, 64)
        places[4:, 0] = 1
        assert adapter.read((), {**call, "img_ids": places}).references == 4
        for wrong in (places[[0, 4, 1, 5, 2, 6, 3, 7]], places[[0, 1, 2, 4, 5, 6, 7]]):
            with pytest.raises(ValueError, match="its grid has to be whole"):
                adapter.read((), {**call, "img_ids": wrong})

    def test_a_scheduler_whose_steps_are_over(self, flux):
        flux.scheduler.set_timesteps(2)
        flux.scheduler.set_begin_index(2)
        with pytest.raises(ValueError, match="is at step 2 of 2"):
            adapter_of(flux).step(None)
