"""Windows are fractions of the user's steps, however often a scheduler calls the model."""

from dataclasses import dataclass, field

import diffusers
import pytest
import torch

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, LocalBlend, PromptToPromptEdit, editing
from fpe_pipeline.models.steps import run_steps
from tests.support.silent import SOURCE, TARGET, embedded, noise

PROMPTS = [SOURCE, TARGET]
# Per scheduler, how many calls of the model its first `steps` steps take, of ten.
CALLS = {
    "PNDMScheduler": lambda steps: steps + (steps > 0),
    "HeunDiscreteScheduler": lambda steps: 2 * steps - (steps == 10),
    "KDPM2DiscreteScheduler": lambda steps: 2 * steps - (steps == 10),
}
PNDM = {"skip_prk_steps": True, "steps_offset": 1}


@pytest.fixture(scope="module")
def pipe():
    return embedded()


def with_scheduler(pipe, name):
    options = PNDM if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


@dataclass(frozen=True)
class Counted(FreePromptEdit):
    """Free-Prompt-Editing in the first ``calls`` calls of the model, which it counts itself."""

    calls: int = 0
    made: list = field(default_factory=list, compare=False)

    def active(self, step):
        return len(self.made) <= self.calls

    def windows(self):
        return ()


def run(pipe, edit, steps=10):
    hook = None
    if isinstance(edit, Counted):
        hook = pipe.unet.register_forward_pre_hook(lambda module, args: edit.made.append(None))
    try:
        with editing(pipe, edit):
            return pipe(PROMPTS, latents=noise(0, 0), num_inference_steps=steps, output_type="latent").images
    finally:
        if hook is not None:
            hook.remove()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers' KDPM2 with NumPy 2
@pytest.mark.parametrize("share", [0.3, pytest.param(0.8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name.startswith(("KDPM2", "Heun")) else name for name in CALLS],
)
def test_the_share_of_the_steps(pipe, name, share):
    with_scheduler(pipe, name)
    counted = run(pipe, Counted(1.0, calls=CALLS[name](int(10 * share))))
    torch.testing.assert_close(run(pipe, FreePromptEdit(share)), counted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_authors_count_of_calls(pipe):
    """Their controllers count calls and know the user's number of steps: int(10 * 0.8) calls, of eleven."""
    with_scheduler(pipe, "PNDMScheduler")
    counted = run(pipe, Counted(1.0, calls=int(10 * 0.8)))
    original = run(pipe, FreePromptEdit(0.8, compat="original"))
    torch.testing.assert_close(original, counted, rtol=0, atol=1e-5)
    assert (original - run(pipe, FreePromptEdit(0.8))).abs().max() > 1e-3


def test_the_authors_prompt_to_prompt(pipe):
    """``cross_replace_alpha`` has num_steps + 1 entries, of which the first int((num_steps + 1) * s) are on, and is
    indexed by the count of calls; self-attention is replaced in the first int(num_steps * s) calls."""
    with_scheduler(pipe, "PNDMScheduler")
    cross, own = 0.6, 0.3
    edit = PromptToPromptEdit(
        PROMPTS, pipe.tokenizer, cross_replace_steps=cross, self_replace_steps=own, compat="original"
    )
    with editing(pipe, edit) as session:
        sites = {site.path: site.kind for site in session.sites}
        active = {"self": [], "cross": []}
        calls = []

        def note(module, args, output):
            for kind in active:
                layers = [
                    path
                    for path, processor in session._layers.ordered.items()
                    if sites[path] == kind and processor.order.edited
                ]
                active[kind] += [len(calls)] if layers else []
            calls.append(None)

        hook = pipe.unet.register_forward_hook(note)
        pipe(PROMPTS, latents=noise(0, 0), num_inference_steps=10, output_type="latent")
        hook.remove()
    alphas = torch.zeros(11)
    alphas[: int(11 * cross)] = 1
    assert active["cross"] == [call for call in range(len(calls)) if alphas[call]]
    assert active["self"] == list(range(int(10 * own)))


@pytest.mark.slow
def test_recordings_and_dropped_sources_of_such_runs():
    pipe = with_scheduler(embedded(FreePromptPipeline), "HeunDiscreteScheduler")
    options = {"latents": noise(0), "num_inference_steps": 5, "output_type": "latent", "self_replace_steps": 0.6}
    expected = pipe(SOURCE, TARGET, **options).images
    # Rounding differs with the rows that are computed together, and nine calls of the model multiply it.
    to_rounding = {"rtol": 0, "atol": 3e-4}
    dropped = pipe(SOURCE, TARGET, keep_source=False, **options)
    torch.testing.assert_close(dropped.images, expected[1:], **to_rounding)
    recording = pipe.record(SOURCE, latents=noise(0), num_inference_steps=5, self_replace_steps=0.6)
    replayed = pipe.edit(recording, TARGET, output_type="latent").images
    torch.testing.assert_close(replayed, expected[1:], **to_rounding)


def test_the_authors_local_blend(pipe):
    """Its counter is of calls, and blends once it exceeds int(num_steps * start)."""
    with_scheduler(pipe, "PNDMScheduler")
    pipe.scheduler.set_timesteps(10)
    edit = LocalBlend(PROMPTS, pipe.tokenizer, ("red", "blue"), start=0.25, compat="original")
    blended = []
    for counter, step in enumerate(run_steps(pipe.scheduler), start=1):
        assert edit.blends_at(step) == (counter > int(10 * 0.25))
        blended.append(edit.blends_at(step))
    assert blended.count(True) == len(blended) - int(10 * 0.25)
