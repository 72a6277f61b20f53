"""The other methods give what their authors' code gives: Prompt-to-Prompt, MasaCtrl and Plug-and-Play."""

import pytest
import torch

from fpe_pipeline import BatchRoles, LocalBlend, MasaCtrlEdit, PlugAndPlayEdit, PromptToPromptEdit, editing
from fpe_pipeline.prompts.alignment import align_refine, align_replace, tokenize
from tests.support.golden_cases import GoldenCase, load_case
from tests.support.slow_cases import few


def distance(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


def edit_of(case: GoldenCase, tokenizer):
    prompts = case.settings["prompts"]
    common = {"max_tokens": 16**2, "compat": "original"}
    if case.name == "p2p_replace":
        return PromptToPromptEdit(prompts, tokenizer, "replace", 0.8, 0.4, **common)
    if case.name == "p2p_refine":
        return PromptToPromptEdit(prompts, tokenizer, "refine", 0.5, 0.2, **common)
    if case.name == "p2p_reweight":  # the original's mapper-less controller: every token stays where it is
        return PromptToPromptEdit(prompts, tokenizer, "replace", 0.8, 0.4, {"smiling": 5.0}, max_tokens=16**2)
    if case.name == "p2p_replace_localblend_lat64":
        windows = {"default_": 1.0, "lion": 0.4}
        edit = PromptToPromptEdit(prompts, tokenizer, "replace", windows, 0.4, **common)
        return edit + LocalBlend(prompts, tokenizer, ("squirrel", "lion"), 0.75)
    return MasaCtrlEdit(start_step=case.settings["controller_kwargs"]["start_step"], start_layer=10)


def run(pipe, case, edit, backend="torch"):
    trajectory = []
    options = {}
    if "in.start_latents" not in case.tensors:  # a real image: from the end of the original's inversion
        options["latents"] = case.tensors["out.inverted_list"][-1].expand(len(case.settings["prompts"]), -1, -1, -1)

    def keep(pipe, step, timestep, tensors):
        trajectory.append(tensors["latents"].clone())
        return {}

    with editing(pipe, edit, backend=backend) as session:
        case.call(pipe, callback_on_step_end=keep, **options)
    assert pipe.scheduler.timesteps.tolist() == case.settings["timesteps"]
    return trajectory, session


def check(case, trajectory):
    assert distance(trajectory[0], case.tensors["out.latents_step1"]) <= case.atol("latents_step1")
    assert distance(trajectory[-1], case.tensors["out.latents"]) <= case.atol("latents")
    assert distance(trajectory[-1], case.tensors["f64.latents"]) <= case.atol("latents")
    if "out.trajectory" in case.tensors:
        assert distance(torch.stack(trajectory), case.tensors["out.trajectory"]) <= case.atol("trajectory")
    assert distance(case.tensors["off.latents"], case.tensors["out.latents"]) >= 100 * case.atol("latents")


@pytest.mark.parametrize(
    "name",
    few(["p2p_replace", "p2p_refine", "p2p_reweight", "masa_s4_l10", "masa_real"], "p2p_refine", "masa_real"),
)
def test_edits_of_generated_images(pipe, name):
    case = load_case(name)
    trajectory, _ = run(pipe, case, edit_of(case, pipe.tokenizer))
    check(case, trajectory)


@pytest.mark.slow
def test_local_blend(pipe):
    case = load_case("p2p_replace_localblend_lat64")
    trajectory, _ = run(pipe, case, edit_of(case, pipe.tokenizer))
    check(case, trajectory)


@pytest.mark.slow
def test_replaced_steps_are_the_originals(pipe):
    case = load_case("p2p_replace")
    _, session = run(pipe, case, edit_of(case, pipe.tokenizer))
    first, last = case.settings["self_window"]
    cross = [step for step, on in enumerate(case.settings["cross_alpha_steps_any"][: case.settings["steps"]]) if on]
    layers = session.report().layers
    for site in session.sites:
        site = site.at(case.settings["latent_res"], case.settings["latent_res"])
        expected = cross if site.kind == "cross" else list(range(first, last))
        assert layers.get(site.path, []) == (expected if site.kind == "cross" or site.tokens <= 16**2 else [])


@pytest.mark.parametrize("name", ["p2p_replace", "p2p_replace_localblend_lat64", "p2p_refine"])
def test_the_originals_mappers(pipe, name):
    case = load_case(name)
    source, target = (tokenize(prompt, pipe.tokenizer) for prompt in case.settings["prompts"])
    mapper = case.tensors["in.ctrl/mapper"][0]
    if name != "p2p_refine":
        assert torch.equal(align_replace(source, target, "original").mapper, mapper.double())
        return
    alignment = align_refine(source, target, "original")
    kept = case.tensors["in.ctrl/alphas"].flatten().double()
    columns = torch.nn.functional.one_hot(mapper.clamp_min(0), mapper.numel()).T * kept
    assert torch.equal(alignment.kept, kept)
    assert torch.equal(alignment.mapper, columns)


def plug_and_play(pipe, case, edit):
    """The original's loop: the source row starts every step from the inverted latents."""
    settings, source = case.settings, case.tensors["in.source_latents"]
    layout = BatchRoles(conditional=(True, False, True), source_of=(0, 0, 0))
    with torch.no_grad():
        texts, _ = pipe.encode_prompt(["", settings["negative_prompt"], *settings["prompts"]], "cpu", 1, False)
        pipe.scheduler.set_timesteps(settings["steps"])
        latents, trajectory = source[-1], []
        with editing(pipe, edit, roles=layout, backend="torch") as session:
            for index, timestep in enumerate(pipe.scheduler.timesteps):
                batch = torch.cat([source[-1 - index], latents, latents])
                _, negative, positive = pipe.unet(batch, timestep, texts).sample.chunk(3)
                noise = negative + settings["guidance_scale"] * (positive - negative)
                latents = pipe.scheduler.step(noise, timestep, latents).prev_sample
                trajectory.append(latents)
    return trajectory, session


def test_plug_and_play(pipe):
    case = load_case("pnp_f08_a05")
    edit = PlugAndPlayEdit(case.settings["pnp_attn_t"], case.settings["pnp_f_t"])
    trajectory, session = plug_and_play(pipe, case, edit)
    check(case, trajectory)
    report = session.report()
    assert set(map(tuple, report.layers.values())) == {tuple(range(case.settings["attn_steps"]))}
    assert len(report.layers) == 8
    assert report.features == {"up_blocks.1.resnets.1.conv2": list(range(case.settings["conv_steps"]))}
