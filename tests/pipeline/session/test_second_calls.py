"""Pipelines that guide by a second call and name no contexts, beside what controls a picture."""

import diffusers
import pytest
import torch

from fpe_pipeline import FreePromptEdit, editing
from tests.support.dense_joint import dense
from tests.support.tiny_cogview import COGVIEW4, draw_cogview, tiny_cogview4_control_pipeline
from tests.support.tiny_transformers import draw_flux, tiny_flux_pipeline, tiny_vae

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8
PROMPTS = ("a photo of a red car", "a photo of a big dog")


def farthest(one, other):
    return float((one - other).abs().max())


def control_picture():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def check(pipe, draw, written_out):
    """The first of a step's calls sees the prompts, and it alone is edited."""

    def run():
        torch.manual_seed(0)  # of which the pipelines draw what their autoencoder makes of the picture
        return draw(steps=2)

    plain = run()
    # Written-out layers see what diffusers makes of the picture for each row.
    with editing(pipe, FreePromptEdit(0.5), noise="separate") as session:
        actual = run()
    assert {tuple(steps) for steps in session.report().layers.values()} == {(0,)}
    for seen, same in ((1, True), (0, False)):

        def rule(row, rows, seen=seen):
            first = state["calls"] % 2 == seen and state["step"] < 1
            return [(1.0, {"q_image": 0, "k_image": 0})] if row and first else None

        with written_out(rule) as state:
            assert (farthest(actual, run()) <= EXACT) is same
    assert farthest(actual[0], plain[0]) <= EXACT and farthest(actual[1], plain[1]) > 1e-5


def test_flux_beside_a_controlnet(pipe):
    own = tiny_flux_pipeline(pipe)
    torch.manual_seed(3)
    net = diffusers.FluxControlNetModel.from_transformer(
        own.transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "controlnet" in name:
                parameter.normal_(std=0.3)
    parts = {name: part for name, part in own.components.items() if part is not None}
    tiny = diffusers.FluxControlNetPipeline(**parts, controlnet=net.double().eval())
    tiny.set_progress_bar_config(disable=True)
    options = {"negative_prompt": ["a drawing"] * 2, "true_cfg_scale": 3.0, "control_image": control_picture()}

    def draw(**given):
        return draw_flux(tiny, list(PROMPTS), **options, **given)

    check(tiny, draw, lambda rule: dense(tiny, rule, steps=range(2)))


def test_cogview_with_a_control_picture():
    tiny = tiny_cogview4_control_pipeline(vae=tiny_vae().double())

    def draw(**given):
        return draw_cogview(tiny, PROMPTS, control_image=control_picture(), **given)

    check(tiny, draw, lambda rule: COGVIEW4.dense(tiny, rule, "", None))
