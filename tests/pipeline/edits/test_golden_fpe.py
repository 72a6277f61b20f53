"""Free-Prompt-Editing on a plain StableDiffusionPipeline gives what the authors' code gives."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fpe_pipeline import FreePromptEdit, editing
from tests.support.golden_cases import CASES, OriginalNoiseLevels, load_case, load_pipeline

BACKENDS = ["torch", pytest.param("reference", marks=pytest.mark.slow)]
LAYERS = "fpe_fake_2p_lat16_layers"


@dataclass
class Run:
    """A pipeline call: every step's latents, every attention layer's output at every call, the image, the report."""

    latents: list = field(default_factory=list)
    layers: dict = field(default_factory=dict)
    image: torch.Tensor | None = None
    replaced: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def golden_run(pipe):
    """Runs of the cases, edited by a backend or not at all (None). Cases that ask for the same run share it."""
    runs = {}

    def run(case, backend):
        tokens = case.settings.get("res_threshold_tokens", 32**2)  # one case's notes leave the default out
        edit = FreePromptEdit(case.settings["self_replace_steps"], max_tokens=tokens)
        key = (case.settings["steps"], case.settings["latent_res"], backend, backend and edit)
        if key not in runs:
            runs[key] = watched_call(pipe, case, edit, backend)
        return runs[key]

    return run


def watched_call(pipe, case, edit, backend):
    run = Run()

    def keep_latents(pipe, step, timestep, tensors):
        run.latents.append(tensors["latents"].clone())
        return {}

    def keep_output(path):
        return lambda module, args, output: run.layers.setdefault(path, []).append(output)

    paths = [name.removesuffix(".processor") for name in pipe.unet.attn_processors]
    hooks = [pipe.unet.get_submodule(path).register_forward_hook(keep_output(path)) for path in paths]
    try:
        if backend is None:
            run.image = case.call(pipe, output_type="pt", callback_on_step_end=keep_latents).images
        else:
            with editing(pipe, edit, backend=backend) as session:
                run.image = case.call(pipe, output_type="pt", callback_on_step_end=keep_latents).images
            run.replaced = session.report().layers
    finally:
        for hook in hooks:
            hook.remove()
    assert pipe.scheduler.timesteps.tolist() == case.settings["timesteps"]
    return run


def distance(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_latents(golden_run, name, backend):
    case = load_case(name)
    run = golden_run(case, backend)
    assert distance(run.latents[0], case.tensors["out.latents_step1"]) <= case.atol("latents_step1")
    assert distance(run.latents[-1], case.tensors["out.latents"]) <= case.atol("latents")
    assert distance(run.latents[-1], case.tensors["f64.latents"]) <= case.atol("latents")
    if "out.trajectory" in case.tensors:
        assert distance(torch.stack(run.latents), case.tensors["out.trajectory"]) <= case.atol("trajectory")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_report_is_the_window(golden_run, name):
    case = load_case(name)
    first, last = case.settings["window"]
    replaced = golden_run(case, "torch").replaced
    assert replaced
    assert all(steps == list(range(first, last)) for steps in replaced.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_without_the_edit_the_case_is_missed_by_far(golden_run, name):
    case = load_case(name)
    latents = golden_run(case, None).latents[-1]
    assert distance(latents, case.tensors["off.latents"]) <= case.atol("latents")
    assert distance(latents, case.tensors["out.latents"]) >= 1000 * case.atol("latents")


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_of_every_attention_layer(golden_run, backend):
    case = load_case(LAYERS)
    call = case.settings["layer_call_index"]
    outputs = {path: outputs[call] for path, outputs in golden_run(case, backend).layers.items()}
    expected = {key.removeprefix("out.layer/"): t for key, t in case.tensors.items() if key.startswith("out.layer/")}
    assert len(expected) == 32
    assert expected.keys() == outputs.keys()
    errors = {path: distance(outputs[path], expected[path]) for path in expected}
    assert max(errors.values()) <= case.atol("layer/*"), errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoded_image(golden_run, backend):
    case = load_case(LAYERS)
    assert distance(golden_run(case, backend).image, case.tensors["out.image"]) <= case.atol("image")


def test_float64_agrees_with_the_original_in_float64():
    case, pipe = load_case(LAYERS), load_pipeline(torch.float64)
    with OriginalNoiseLevels(pipe.scheduler), editing(pipe, FreePromptEdit(0.8, max_tokens=32**2)):
        latents = case.call(pipe).images
    assert distance(latents, case.tensors["f64.latents"]) <= 1e-9


ONE_STEP = f"""
from tests.support.golden_cases import load_case, load_pipeline
from fpe_pipeline import FreePromptEdit, editing

case, pipe, first = load_case({LAYERS!r}), load_pipeline(), []

def stop(pipe, step, timestep, tensors):
    first.append(tensors["latents"].clone())
    pipe._interrupt = True
    return {{}}

with editing(pipe, FreePromptEdit(0.8, max_tokens=32**2), backend="triton") as session:
    case.call(pipe, callback_on_step_end=stop)
error = (first[0] - case.tensors["out.latents_step1"]).abs().max().item()
assert len(session.report().layers) == 16
assert error <= case.atol("latents_step1"), error
"""


@pytest.mark.slow
def test_first_step_through_the_triton_interpreter():
    """In a process of its own: whether kernels are interpreted is decided when triton is imported."""
    pytest.importorskip("triton")
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", ONE_STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
