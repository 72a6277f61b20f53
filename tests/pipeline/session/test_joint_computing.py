"""How products of joint attention are computed: what rows share once, by every backend, and in compiled blocks."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fpe_pipeline import FreePromptEdit, JointProduct, MixedRows, editing
from fpe_pipeline.edits.joint_products import plan_joint_products
from fpe_pipeline.session.layers.computing import Rows
from fpe_pipeline.session.layers.joint_computing import JointLayer, SegmentProjections, evaluate_joint
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

    def counted(self, query, key, lengths=None):
        maps.append((query.shape[0], query.shape[2], key.shape[2]))
        return make(self, query, key, lengths)

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


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flux", pytest.param("sd3.5", marks=pytest.mark.slow)])
def test_every_backend(pipe, backend, model):
    make, run = MODELS[model]
    tiny = make(pipe).to(backend.device)
    expected = edited(tiny, run, prompts=3, backend="reference")
    actual = edited(tiny, run, prompts=3, backend=backend.name)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
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


def test_terms_of_one_segment_in_words():
    share = torch.ones(4)
    mixed = MixedRows(0, 1, share)
    terms = (
        JointProduct((0, 0), (0, 0), (None, 1), mixing=torch.eye(3), outputs="image"),
        JointProduct((mixed, 1), (mixed, 1), (1, None), outputs="image"),
        JointProduct.own(1, outputs="text"),
    )
    plan = plan_joint_products({1: terms}, 2)
    assert plan.description == (
        "row 1 = A(q 0, k 0) @ v 0s|M 1 for image + A(q (0 or 1 by mask)|1, k (0 or 1 by mask)|1) @ v 1|0s for image + "
        "A(q 1, k 1) @ v 1 for text"
    )
    assert not plan.is_plain and plan.used("query", "text") == (0, 1) and plan.used("value", "image") == (0, 1)
    with pytest.raises(ValueError, match=r"rows \[1\] no term of their text tokens"):
        plan_joint_products({1: terms[:2]}, 2)
    with pytest.raises(ValueError, match="no queries or keys for a segment"):
        JointProduct((0, 0), (None, 0), (0, 0))
    with pytest.raises(ValueError, match='outputs to be "all", "image" or "text"'):
        JointProduct((0, 0), (0, 0), (0, 0), outputs="words")
    with pytest.raises(ValueError, match="names a row outside the batch of 2"):
        plan_joint_products({1: JointProduct((MixedRows(0, 2, share), 1), (0, 1), (1, 1))}, 2)


def random_layer(backend, rows=2, images=12, texts=5, width=8, lengths=None):
    generator = torch.Generator(backend.device).manual_seed(0)

    def segment(tokens):
        parts = (torch.randn(rows, 2, tokens, width, generator=generator, device=backend.device) for _ in range(3))
        return SegmentProjections(*(Rows(part, tuple(range(rows))) for part in parts))

    return JointLayer(segment(images), segment(texts), width**-0.5, backend.name, lengths)


@pytest.mark.parametrize("lengths", [None, (5, 2)], ids=["whole", "padded"])
def test_mixed_rows_blocks_and_columns_on_every_backend(backend, lengths):
    """Image tokens of two rows, a block with a mixing, zeros in a block's place, and columns: as maps written out."""
    layer = random_layer(backend, lengths=lengths)
    share, mixing = torch.linspace(0, 1, 12, device=backend.device), torch.randn(5, 5, device=backend.device)
    mixed = MixedRows(0, 1, share)
    terms = (
        JointProduct((0, 0), (0, 0), (None, 1), mixing=mixing, outputs="image"),
        JointProduct((mixed, 1), (mixed, 1), (mixed, None), outputs="image"),
        JointProduct.own(1, outputs="text"),
    )
    columns = torch.eye(5, device=backend.device)[:, :2]
    image, text, heat = evaluate_joint(plan_joint_products({1: terms}, 2), layer, {1: columns})

    def lerp(rows):
        return share[:, None] * rows.tensor[0] + (1 - share[:, None]) * rows.tensor[1]

    def written_out(query, image_key, row):
        """Of image queries, over image keys and the text keys of a row."""
        scores = query @ torch.cat([image_key, layer.text.key.tensor[row]], 1).mT * layer.scale
        if lengths is not None:
            scores[..., 12 + lengths[row] :] = float("-inf")
        return scores.softmax(-1)

    source = written_out(layer.image.query.tensor[0], layer.image.key.tensor[0], 0)
    own = written_out(lerp(layer.image.query), lerp(layer.image.key), 1)
    v_text = layer.text.value.tensor[1]
    expected = source[..., 12:] @ (mixing @ v_text) + own[..., :12] @ lerp(layer.image.value)
    torch.testing.assert_close(image[1], expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(heat[1], source[..., 12:] @ (mixing @ columns), rtol=0, atol=2e-5)
    of_text = written_out(layer.text.query.tensor[1], layer.image.key.tensor[1], 1)
    values = torch.cat([layer.image.value.tensor[1], v_text], 1)
    torch.testing.assert_close(text[1], of_text @ values, rtol=0, atol=2e-5)


def test_masks_and_mixings_of_another_length(backend):
    layer = random_layer(backend)
    short = MixedRows(0, 1, torch.ones(9, device=backend.device))
    plan = plan_joint_products({1: JointProduct((short, 1), (0, 1), (1, 1))}, 2)
    with pytest.raises(ValueError, match="a mask of the layer's 12 image tokens, got one of 9"):
        evaluate_joint(plan, layer)
    with pytest.raises(ValueError, match="words were placed among 7 text tokens, and the layer receives 5"):
        evaluate_joint(plan_joint_products({}, 2), layer, {1: torch.ones(7, 1, device=backend.device)})


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
