"""Real images on families that came later: the papers' formulas, edits, files, and what is refused."""

import warnings

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from fpe_pipeline import (
    FreePromptEdit,
    FreePromptPipeline,
    Inversion,
    editing,
)
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.sampling.decoding import decoded
from tests.support.flow_formulas import path_to_noise
from tests.support.flow_pipelines import distance, solving
from tests.support.pictures_of_flows import (
    FAMILIES,
    NARROW,
    SIZE,
    SOURCE,
    STEPS,
    TARGET,
    OnAuraFlow,
    OnCogView4,
    OnIdeogram4,
    OnKrea2,
    shifted,
)
from tests.support.slow_cases import few
from tests.support.tiny_cogview import tiny_cogview4_control_pipeline, tiny_cogview4_that_reads
from tests.support.tiny_transformers import ExactEuler, tiny_vae
from tests.support.wide_torch import widened

EXACT = 1e-8
SOLVERS = ["euler", "rf-solver", "fireflow"]


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request, pipe):
    return request.param(pipe)


@pytest.fixture
def tiny(family):
    made = FreePromptPipeline.from_pipe(family.stock)
    made.set_progress_bar_config(disable=True)
    assert type(made) is family.kind
    return solving(made, "euler")


@pytest.fixture(autouse=True)
def in_float64():
    """Where Ideogram 4's pipeline narrows to float32."""
    with widened(*NARROW):
        yield


@pytest.fixture(scope="module")
def photo():
    return torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0).numpy()


def path(tiny, family, photo, solver, velocity):
    """The latents at every node, by the papers' formulas."""
    pixels = (torch.from_numpy(photo * 255).round().float() / 127.5 - 1).permute(2, 0, 1)[None].double()
    nodes = ExactEuler(shift=tiny.scheduler.config.shift)
    family.run(nodes)
    return path_to_noise(family.start(tiny.vae, pixels), velocity, nodes.sigmas, solver)


def inverted(tiny, family, photo, **options):
    return tiny.invert(photo, SOURCE, **({"num_inference_steps": STEPS} | SIZE | family.options | options))


@torch.no_grad()
@pytest.mark.parametrize("solver", few(SOLVERS, "fireflow"))
def test_the_papers_formulas(tiny, family, photo, solver):
    inversion = inverted(solving(tiny, solver), family, photo)
    assert distance(inversion.latents, path(tiny, family, photo, solver, family.velocity(tiny))) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("family", [each for each in FAMILIES.values() if each is not OnKrea2])
def test_guidance_is_by_the_empty_prompt_or_by_a_model_of_its_own(pipe, family, photo):
    family = family(pipe)
    tiny = solving(FreePromptPipeline.from_pipe(family.stock), "euler")
    tiny.set_progress_bar_config(disable=True)
    expected = path(tiny, family, photo, "euler", family.velocity(tiny, 3.0))
    assert distance(inverted(tiny, family, photo, guidance_scale=3.0).latents, expected) <= EXACT


@pytest.mark.parametrize("method", few(["direct", "reference", "free"]))
def test_what_holds_the_source(tiny, family, photo, method):
    inversion = inverted(tiny, family, photo, method=method)
    guided = getattr(family, "guided", {"negative_prompt": "a drawing", "guidance_scale": 3.0}) | family.options
    options = {"self_replace_steps": 0.5, "output_type": "latent", **guided}
    out = tiny(inversion=inversion, target_prompt=TARGET, **options)
    assert bool(distance(out.source, inversion.latents[0]) == 0) is (method == "direct")
    assert distance(out.targets[0], out.source) > 1e-3


@pytest.mark.slow
def test_a_source_that_is_free_comes_back_as_far_as_the_solver_goes(tiny, family, photo):
    """Unguided, more steps bring the reconstruction nearer: what is solved there and back is one equation."""
    unguided = {"guidance_scale": tiny.unguided, "output_type": "latent", **family.options}

    def apart(steps):
        inversion = inverted(tiny, family, photo, num_inference_steps=steps, method="free")
        target = getattr(family, "target", TARGET)
        out = tiny(inversion=inversion, target_prompt=target, self_replace_steps=0.0, **unguided)
        return float((out.source - inversion.latents[0]).norm() / inversion.latents[0].norm())

    assert apart(12) < 0.75 * apart(3)


@pytest.mark.parametrize("solver", few(SOLVERS, "rf-solver"))
@pytest.mark.parametrize("guided", few({"guided": True, "unguided": False}, "guided"))
def test_it_is_what_editing_makes_of_the_pipeline_of_diffusers(tiny, family, solver, guided):
    edit, stock = FreePromptEdit(0.5, both_halves=True), family.stock
    options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0 if guided else tiny.unguided}
    options |= SIZE | family.options
    out = solving(tiny, solver)(SOURCE, TARGET, edit=edit, generator=torch.Generator().manual_seed(5), **options)
    before, stock.scheduler = stock.scheduler, tiny.scheduler
    try:
        with editing(stock, edit):
            noise = [torch.Generator().manual_seed(5) for _ in range(2)]
            told = getattr(family, "told_by_calls", lambda options, solver: options)(options, solver)
            expected = stock([SOURCE, TARGET], generator=noise, **told)[0]
    finally:
        stock.scheduler = before
    assert distance(out.images, expected) <= EXACT


@pytest.mark.slow
def test_pictures_and_files(tiny, family, photo, tmp_path):
    inversion = inverted(tiny, family, photo, num_inference_steps=2)
    loaded = Inversion.load(inversion.save(tmp_path / "inversion.safetensors"))
    guided = getattr(family, "guided", {"negative_prompt": "a drawing"})
    options = {"self_replace_steps": 0.5, **guided, **family.options}
    out, again, latents = (
        tiny(inversion=one, target_prompt=TARGET, output_type=kind, **options).images
        for one, kind in ((inversion, "pil"), (loaded, "pil"), (inversion, "latent"))
    )
    assert [image.size for image in out] == [(80, 48)] * 2
    pictures = [image.tobytes() for image in out]
    assert pictures == [image.tobytes() for image in again]
    assert pictures == [image.tobytes() for image in decoded(tiny, latents, (48, 80))]


@pytest.mark.slow
def test_saved_models_load_in_diffusers_and_here(tiny, family, tmp_path):
    tiny.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tiny.save_pretrained(tmp_path)
    assert type(FreePromptPipeline.from_pretrained(tmp_path)) is family.kind
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is family.kind.parent


@pytest.mark.parametrize("solver", few(SOLVERS, "fireflow"))
def test_auraflow_drops_its_source_once_no_target_needs_it(pipe, solver):
    tiny = solving(FreePromptPipeline.from_pipe(OnAuraFlow(pipe).stock), solver)
    tiny.set_progress_bar_config(disable=True)
    rows = []
    tiny.transformer.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    whole, targets = (
        tiny(
            SOURCE,
            TARGET,
            self_replace_steps=0.5,
            keep_source=kept,
            num_inference_steps=4,
            negative_prompt="a drawing",
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
            **SIZE,
            **OnAuraFlow.options,
        ).images
        for kept in (True, False)
    )
    assert distance(targets, whole[1:]) <= EXACT
    calls = len(rows) // 2
    assert rows[:calls] == [4] * calls and rows[calls] == 4 and rows[-1] == 2


@pytest.mark.skipif("Krea 2" not in FAMILIES, reason="this diffusers has no Krea 2")
def test_krea_2_keeps_the_text_around_its_prompts():
    stock = OnKrea2(None).stock
    made = FreePromptPipeline.from_pipe(stock)
    assert made.prompt_template_encode_prefix == stock.prompt_template_encode_prefix
    assert made.prompt_template_encode_start_idx == stock.prompt_template_encode_start_idx


def test_a_longer_target_changes_cogview_4s_text_of_an_inverted_image_and_that_is_said(pipe, photo):
    tiny = solving(FreePromptPipeline.from_pipe(OnCogView4(pipe).stock), "euler")
    tiny.set_progress_bar_config(disable=True)
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=1, **SIZE)
    options = {"self_replace_steps": 1.0, "output_type": "latent"}
    with pytest.warns(
        EditWarning, match="with 16 text tokens and is denoised with 48, padding .* it is held all the same"
    ):
        tiny(inversion=inversion, target_prompt=" ".join([TARGET] * 3), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EditWarning)
        tiny(inversion=inversion, target_prompt=TARGET, **options)


class TestRefusals:
    def test_a_source_that_is_dropped(self, tiny):
        if tiny.kept_in_loop is None:
            pytest.skip("it is dropped")
        with pytest.raises(ValueError, match="cannot drop the source's rows"):
            tiny(SOURCE, TARGET, keep_source=False, **SIZE)

    def test_a_size_that_auraflow_has_no_places_for(self, pipe):
        tiny = FreePromptPipeline.from_pipe(OnAuraFlow(pipe).stock)
        with pytest.raises(ValueError, match=r"at most 128 pixels, .* got 144 x 16"):
            tiny(SOURCE, TARGET, height=144, width=16)

    @pytest.mark.skipif("Krea 2" not in FAMILIES, reason="this diffusers has no Krea 2")
    def test_krea_2s_guidance(self, photo):
        tiny = FreePromptPipeline.from_pipe(OnKrea2(None).stock)
        with pytest.raises(ValueError, match=r"counts guidance from 0 .* got guidance_scale=3: leave it at 1"):
            inverted(tiny, OnKrea2, photo, guidance_scale=3.0)

    def test_a_size_between_tokens(self, tiny):
        with pytest.raises(ValueError, match="positive multiple of 16"):
            tiny(SOURCE, TARGET, height=40, width=64)

    def test_control_models(self):
        control = FreePromptPipeline.from_pipe(tiny_cogview4_control_pipeline(tiny_vae().double()))
        with pytest.raises(ValueError, match="as inpainting and control models do"):
            control(SOURCE, TARGET)


@pytest.mark.parametrize("solver", few(["rf-solver", "fireflow"], "rf-solver"))
def test_the_pipeline_of_diffusers_goes_by_solvers_that_call_the_model_within_a_step(solver):
    """CogView 4's model is told timesteps that are not shifted as σ is: in the middle of a step what is half-way."""
    stock = solving(tiny_cogview4_that_reads(), solver)
    stock("a cat", num_inference_steps=3, guidance_scale=1.0, output_type="latent", **SIZE)
    told = {"rf-solver": [1000.0, 750.0, 500.0, 250.5, 1.0, 0.5], "fireflow": [1000.0, 750.0, 250.5, 0.5]}[solver]
    a, b, c, end = nodes = [*map(shifted, OnCogView4.calls), 0.0]
    middles = [(a + b) / 2, (b + c) / 2, (c + end) / 2]
    calls = {"rf-solver": [a, middles[0], b, middles[1], c, middles[2]], "fireflow": [a, *middles]}[solver]
    assert stock.scheduler.timesteps.tolist() == told
    assert stock.scheduler.sigmas.tolist() == pytest.approx([*calls, end])
    assert stock.scheduler.nodes.tolist() == pytest.approx(nodes)


@pytest.mark.skipif("Ideogram 4" not in FAMILIES, reason="this diffusers has no Ideogram 4")
class TestIdeogram4:
    @pytest.fixture(scope="class")
    def ideogram(self):
        made = FreePromptPipeline.from_pipe(OnIdeogram4(None).stock)
        made.set_progress_bar_config(disable=True)
        return solving(made, "fireflow")

    def test_a_guidance_for_each_step(self, ideogram):
        """Of diffusers, and of solvers that call the model within steps; the default is of 48 steps."""
        options = {"num_inference_steps": 3, "max_sequence_length": 40, "output_type": "latent", **SIZE}

        def drawn(**guidance):
            return ideogram(SOURCE, generator=torch.Generator().manual_seed(5), **options, **guidance).source

        constant, falling = drawn(guidance_scale=3.0), drawn(guidance_schedule=[7.0, 3.0, 3.0])
        assert distance(constant, drawn(guidance_schedule=(3.0, 3.0, 3.0))) <= EXACT
        assert distance(constant, falling) > 1e-3
        assert distance(falling, drawn(guidance_scale=None, guidance_schedule=[7.0, 3.0, 3.0])) == 0, "its default"
        with pytest.raises(ValueError, match=r"must have length `num_inference_steps` \(3\)"):
            drawn()
        with pytest.raises(ValueError, match=r"One of `guidance_scale` and `guidance_schedule`"):
            drawn(guidance_scale=None, guidance_schedule=None)
        with pytest.raises(ValueError, match="Only one of"):
            drawn(guidance_scale=3.0, guidance_schedule=[3.0] * 3)

    def test_no_guidance_is_none(self, ideogram):
        """By a scale of 0 diffusers' formula would follow the model that sees no text."""
        options = {"num_inference_steps": 3, "max_sequence_length": 40, "output_type": "latent", **SIZE}

        def drawn(prompt, scale):
            return ideogram(prompt, generator=torch.Generator().manual_seed(5), guidance_scale=scale, **options).source

        assert distance(drawn(SOURCE, 0), drawn(SOURCE, 1.0)) == 0
        assert distance(drawn(SOURCE, 0), drawn(TARGET, 0)) > 1e-3

    def test_what_is_refused(self, ideogram, photo):
        options = {"num_inference_steps": 3, "max_sequence_length": 40, **SIZE}
        with pytest.raises(ValueError, match=r"rewrite them by pipe\.upsample_prompt"):
            ideogram(SOURCE, TARGET, guidance_scale=3.0, prompt_upsampling=True, **options)
        with pytest.raises(ValueError, match="got Ideogram 4, which guides by a model without: edit the prompt"):
            ideogram.record(SOURCE, guidance_scale=3.0, **options)
        inversion = ideogram.invert(photo, SOURCE, **options)
        with pytest.raises(ValueError, match="the inversion decides std"):
            ideogram(inversion=inversion, target_prompt=TARGET, guidance_scale=3.0, std=1.0)
        with pytest.raises(TypeError, match="negative_prompt"):
            ideogram(SOURCE, TARGET, guidance_scale=3.0, negative_prompt="a drawing", **options)
