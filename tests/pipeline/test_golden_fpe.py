"""Free-Prompt-Editing on a plain StableDiffusionPipeline gives what the authors' code gives."""

import pytest
import torch
from golden_cases import CASES, load_case

from fpe_pipeline import FreePromptEdit, editing

BACKENDS = ["torch", "reference"]
LAYERS = "fpe_fake_2p_lat16_layers"


def original_edit(case):
    """The case's edit, with the original's limit on tokens."""
    tokens = case.settings.get("res_threshold_tokens", 32**2)  # the notebook in P2P code states no other
    return FreePromptEdit(case.settings["self_replace_steps"], max_tokens=tokens)


def distance(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


class Trajectory:
    """A `callback_on_step_end` that keeps the latents of every step."""

    def __init__(self):
        self.latents = []

    def __call__(self, pipe, step, timestep, tensors):
        self.latents.append(tensors["latents"].clone())
        return {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_latents_of_every_step(pipe, name, backend):
    case = load_case(name)
    trajectory = Trajectory()
    with editing(pipe, original_edit(case), backend=backend) as session:
        latents = case.call(pipe, callback_on_step_end=trajectory).images

    assert pipe.scheduler.timesteps.tolist() == case.settings["timesteps"]
    assert distance(trajectory.latents[0], case.tensors["out.latents_step1"]) <= case.atol("latents_step1")
    assert distance(latents, case.tensors["out.latents"]) <= case.atol("latents")
    assert distance(latents, case.tensors["f64.latents"]) <= case.atol("latents")
    if "out.trajectory" in case.tensors:
        assert distance(torch.stack(trajectory.latents), case.tensors["out.trajectory"]) <= case.atol("trajectory")

    first, last = case.settings["window"]
    layers = session.report().layers
    assert layers
    assert all(steps == list(range(first, last)) for steps in layers.values())


@pytest.mark.parametrize("name", CASES)
def test_without_the_edit_the_case_is_missed_by_far(pipe, name):
    case = load_case(name)
    latents = case.call(pipe).images
    assert distance(latents, case.tensors["off.latents"]) <= case.atol("latents")
    assert distance(latents, case.tensors["out.latents"]) >= 1000 * case.atol("latents")


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_of_every_attention_layer(pipe, backend):
    case = load_case(LAYERS)
    outputs = {}

    def keep(path):
        def hook(module, args, output):
            outputs.setdefault(path, []).append(output)

        return hook

    paths = [name.removesuffix(".processor") for name in pipe.unet.attn_processors]
    hooks = [pipe.unet.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        with editing(pipe, original_edit(case), backend=backend):
            case.call(pipe)
    finally:
        for hook in hooks:
            hook.remove()

    expected = {key.removeprefix("out.layer/"): t for key, t in case.tensors.items() if key.startswith("out.layer/")}
    assert set(expected) == set(paths)
    call = case.settings["layer_call_index"]
    errors = {path: distance(outputs[path][call], expected[path]) for path in paths}
    assert max(errors.values()) <= case.atol("layer/*"), errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoded_image(pipe, backend):
    case = load_case(LAYERS)
    with editing(pipe, original_edit(case), backend=backend):
        image = case.call(pipe, output_type="pt").images
    assert distance(image, case.tensors["out.image"]) <= case.atol("image")
