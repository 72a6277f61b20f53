"""How products of joint attention are computed: what rows share once, by every backend, and in compiled blocks."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fpe_pipeline import FreePromptEdit, JointProduct, editing
from fpe_pipeline.edits.joint_products import plan_joint_products
from fpe_pipeline.session.joint_computing import JointLayer
from tests.support.tiny_transformers import draw, draw_flux, tiny_flux_pipeline, tiny_sd3_pipeline

MODELS = {
    "sd3.5": (lambda pipe: tiny_sd3_pipeline(pipe, "sd3.5", torch.float32), draw),
    "flux": (lambda pipe: tiny_flux_pipeline(pipe, torch.float32), draw_flux),
}


def edited(tiny, draw, prompts=2, **options):
    with editing(tiny, FreePromptEdit(0.5), **options):
        return draw(tiny, prompts)


def test_what_rows_share_is_computed_once(pipe, monkeypatch):
    """The map of image over image for the source and its three targets together; their queries are not projected."""
    tiny = tiny_sd3_pipeline(pipe, dtype=torch.float32)
    maps, projected = [], []
    make = JointLayer.map

    def counted(self, query, key):
        maps.append((query.shape[0], query.shape[2], key.shape[2]))
        return make(self, query, key)

    monkeypatch.setattr(JointLayer, "map", counted)
    attn = tiny.transformer.transformer_blocks[0].attn
    for name in ("to_q", "to_k", "to_v", "add_q_proj"):
        attn.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: projected.append((name, args[0].shape[0]))
        )
    with editing(tiny, FreePromptEdit(1.0, layers=0)):
        draw(tiny, 4, steps=1)
    image, text = 16, 12 + 77
    # Five maps of the image: four unconditional rows' and the source's, which is its targets' too.
    assert maps == [(5, image, image), (8, image, text), (8, text, image + text)]
    assert projected == [("to_q", 5), ("to_k", 5), ("to_v", 8), ("add_q_proj", 8)]


@pytest.mark.parametrize("model", MODELS)
def test_every_backend(pipe, backend, model):
    make, run = MODELS[model]
    tiny = make(pipe).to(backend.device)
    expected = edited(tiny, run, prompts=3, backend="reference")
    actual = edited(tiny, run, prompts=3, backend=backend.name)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_compiled_blocks(pipe, model):
    """Block by block without a graph break: nothing of a layer but its shape is in an edit's graph."""
    make, run = MODELS[model]
    tiny = make(pipe)
    expected = edited(tiny, run)
    counter = CompileCounter()
    transformer = tiny.transformer
    for block in (*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())):
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(edited(tiny, run), expected, rtol=0, atol=1e-4)
    graphs = counter.frame_count
    torch.testing.assert_close(edited(tiny, run), expected, rtol=0, atol=1e-4)
    assert counter.frame_count == graphs
    torch.compiler.reset()


def test_a_plan_in_words():
    plan = plan_joint_products({1: JointProduct((0, 1), (0, 1), (1, 1))}, 2)
    assert plan.description == "row 1 = A(q 0|1, k 0|1) @ v 1"
    assert plan.is_plain and plan.used("query", "image") == (0,) and plan.used("query", "text") == (0, 1)
    halves = (JointProduct((0, 0), (0, 0), (1, 1), weight=0.5), JointProduct.own(1, weight=0.5))
    plan = plan_joint_products({1: halves}, 2)
    assert plan.description == "row 1 = 0.5 A(q 0, k 0) @ v 1 + 0.5 A(q 1, k 1) @ v 1" and not plan.is_plain
    assert plan_joint_products({}, 3).description == "as it was"


def test_what_a_layer_holds(pipe):
    tiny = tiny_sd3_pipeline(pipe, dtype=torch.float32)
    with editing(tiny, FreePromptEdit(0.5, layers=0)) as session:
        draw(tiny)
    image, text, channels, itemsize = 16, 89, 16, 4
    memory = session.report().memory["transformer_blocks.0.attn"]
    # Of four rows one has no image queries and keys of its own.
    assert memory.held == itemsize * channels * (image * (3 + 3 + 4) + text * 3 * 4)
    assert memory.maps == itemsize * 4 * 2 * (image + text) ** 2
    assert "3 joint-attention layers" in session.explain()
