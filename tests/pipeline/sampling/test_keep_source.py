"""keep_source=False: fewer rows after the last replaced step, the same targets."""

import diffusers
import pytest
import torch
from diffusers import DPMSolverSDEScheduler

from fpe_pipeline import FreePromptEdit
from fpe_pipeline.edits import Edit
from tests.support.free_prompt_pipelines import OTHER, SOURCE, TARGET, distance, free_prompt_pipeline, noise

FAST = {"num_inference_steps": 6, "output_type": "latent", "height": 24, "width": 32}

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
    "DPMSolverMultistepScheduler": {"solver_order": 3},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "UniPCMultistepScheduler": {},
    "HeunDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "SASolverScheduler": {},
}


@pytest.fixture(scope="module")
def tiny(pipe):
    return free_prompt_pipeline(pipe)


@pytest.fixture
def rows(tiny):
    """Batch sizes of the UNet's calls."""
    sizes = []
    hook = tiny.unet.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    yield sizes
    hook.remove()


def run(pipe, keep_source, **options):
    generator = torch.Generator().manual_seed(3)
    out = pipe(SOURCE, [TARGET, OTHER], keep_source=keep_source, generator=generator, **{**FAST, **options})
    return torch.cat([target.reshape(-1, 4, 12, 16) for target in out.targets]), out


@pytest.mark.parametrize(("guidance", "images"), [(7.5, 2), pytest.param(1.0, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_targets_are_the_same(tiny, rows, monkeypatch, name, guidance, images):
    monkeypatch.setattr(tiny, "scheduler", getattr(diffusers, name)(**BETAS, **SCHEDULERS[name]))
    options = {"guidance_scale": guidance, "num_images_per_prompt": images, "self_replace_steps": 0.5}
    kept, with_source = run(tiny, True, **options)
    calls = len(rows)
    dropped, without = run(tiny, False, **options)

    halves = 2 if guidance > 1 else 1
    edited = sum(size == 3 * images * halves for size in rows[calls:])
    assert rows[calls:] == [3 * images * halves] * edited + [2 * images * halves] * (calls - edited)
    assert 0 < edited < calls
    assert distance(dropped, kept) <= 1e-5 * kept.abs().max()
    assert with_source.source is not None
    assert without.source is None
    assert len(without.images) == 2 * images
    uncontrolled, _ = run(tiny, True, **{**options, "self_replace_steps": 0})
    assert distance(kept, uncontrolled) > 1e-3 * kept.abs().max()


def test_stochastic_steps_keep_their_noise(tiny):
    options = {"eta": 1.0, "self_replace_steps": 0.4, "num_images_per_prompt": 2}
    kept, _ = run(tiny, True, **options)
    assert distance(run(tiny, False, **options)[0], kept) <= 1e-4
    assert distance(run(tiny, True, **{**options, "eta": 0.0})[0], kept) > 0.1


def test_the_generator_advances_as_with_the_source(tiny):
    states = []
    for keep_source in (True, False):
        generator = torch.Generator().manual_seed(3)
        tiny(SOURCE, TARGET, keep_source=keep_source, generator=generator, eta=1.0, self_replace_steps=0.4, **FAST)
        states.append(generator.get_state())
    assert torch.equal(*states)
    assert not torch.equal(states[0], torch.Generator().manual_seed(3).get_state())


def test_rows_go_right_after_the_window(tiny, rows):
    run(tiny, False, self_replace_steps=(0.2, 0.5), guidance_scale=1.0)
    assert rows == [3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize(("window", "expected"), [(1.0, [6] * 6), (0, [6] + [4] * 5)])
def test_windows_at_the_ends(tiny, rows, window, expected):
    dropped, out = run(tiny, False, self_replace_steps=window)
    assert rows == expected
    assert len(out.images) == 2
    assert distance(dropped, run(tiny, True, self_replace_steps=window)[0]) <= 1e-4


def test_any_edit_says_when_it_needs_the_source(tiny, rows):
    class Always(Edit):
        def products(self, site, step, roles):
            return FreePromptEdit().products(site, step, roles) if site.kind == "self" else {}

    run(tiny, False, edit=Always())
    assert rows == [6] * 6


def test_callback_sees_rows_until_they_are_dropped(tiny):
    seen = []

    def callback(pipe, index, timestep, tensors):
        assert list(tensors) == ["latents"]
        seen.append(tensors["latents"].shape[0])
        return {"latents": tensors["latents"] + (1.0 if index == 4 else 0.0)}

    options = {"callback_on_step_end": callback, "self_replace_steps": 0.5}
    moved, _ = run(tiny, False, **options)
    assert seen == [3, 3, 3, 2, 2, 2]
    assert distance(moved, run(tiny, True, **options)[0]) <= 1e-4
    assert distance(moved, run(tiny, True, self_replace_steps=0.5)[0]) > 0.1


def test_interrupted_before_the_rows_are_dropped(tiny):
    def interrupt(pipe, index, timestep, tensors):
        pipe._interrupt = index == 1
        return {}

    dropped, out = run(tiny, False, callback_on_step_end=interrupt)
    assert len(out.images) == 2
    assert out.source is None
    assert torch.equal(dropped, run(tiny, True, callback_on_step_end=interrupt)[0])


def test_flags_of_the_safety_checker_follow(tiny, monkeypatch):
    monkeypatch.setattr(
        tiny, "run_safety_checker", lambda image, device, dtype: (image, [i == 1 for i in range(len(image))])
    )
    out = tiny(SOURCE, [TARGET, OTHER], latents=noise(), keep_source=False, num_inference_steps=2)
    assert out.nsfw_content_detected == [False, True]


class TestRefusals:
    def test_noise_of_the_whole_batch(self, tiny, monkeypatch):
        scheduler = DPMSolverSDEScheduler.from_config(tiny.scheduler.config) if _has_torchsde() else None
        if scheduler is None:
            scheduler = diffusers.DDIMScheduler.from_config(tiny.scheduler.config)
            scheduler.noise_sampler = None
        monkeypatch.setattr(tiny, "scheduler", scheduler)
        with pytest.raises(ValueError, match="without a noise sampler"):
            run(tiny, False)

    def test_image_prompts(self, tiny):
        with pytest.raises(ValueError, match="IP-Adapter"):
            run(tiny, False, ip_adapter_image_embeds=[torch.zeros(2, 1, 8)])

    def test_nothing_but_the_source(self, tiny):
        with pytest.raises(ValueError, match="at least one target"):
            tiny(SOURCE, keep_source=False, **FAST)


def _has_torchsde():
    try:
        import torchsde  # noqa: F401
    except ImportError:
        return False
    return True
