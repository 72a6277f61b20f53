"""ConceptAttention against its equations on dense maps in float64, written on the blocks of a plain run."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from fpe_pipeline import FreePromptEdit, StableFlowEdit, concept_maps, editing, heat_maps
from tests.support.dense_joint import dense
from tests.support.slow_cases import few
from tests.support.tiny_cross import tiny_ltx_pipeline
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.tiny_transformers import PROMPTS, draw, draw_flux, tiny_flux_pipeline, tiny_sd3_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-6  # maps are float32
CONCEPTS = ["car", "a red mountain", "house"]
FAMILIES = ["sd3.5", "flux"]
STEPS, SIZE, GRID = 3, (6, 12), (3, 6)


@pytest.fixture(scope="module")
def models(pipe):
    return {
        "sd3": (tiny_sd3_pipeline(pipe, num_layers=4), draw),
        "sd3.5": (tiny_sd3_pipeline(pipe, "sd3.5", num_layers=4), draw),
        "flux": (tiny_flux_pipeline(pipe, num_layers=4), draw_flux),
    }


def embeddings(tiny, family, mistake):
    """By hand: T5's for a concept alone, the mean of the tokens that spell it."""
    ids = [tiny.tokenizer(name)["input_ids"][1:-1] for name in CONCEPTS]
    if family == "flux":
        given = tiny.encode_prompt(CONCEPTS, None)[0]
        first = 0
    else:
        given = tiny.encode_prompt(CONCEPTS, None, None, do_classifier_free_guidance=False)[0]
        first = 77 if mistake != "CLIP's" else 0
    start = first + 1  # behind the token that begins a text
    if mistake == "the first token alone":
        return torch.stack([row[start] for row in given])
    return torch.stack([row[start : start + len(own)].mean(0) for row, own in zip(given, ids, strict=True)])


class Dense:
    """Watches a plain run, of which each block tells what it received, and walks the concepts along beside it."""

    def __init__(self, tiny, family, layers, mistake=None, conditional=lambda rows, calls: range(rows)):
        self.tiny, self.family, self.layers, self.mistake = tiny, family, layers, mistake
        self.conditional, self.sums, self.count, self.calls = conditional, {}, 0, 0
        self.concepts = tiny.transformer.context_embedder(embeddings(tiny, family, mistake))
        self.handles, self.seen = [], {}
        for index, block in enumerate(tiny.transformer.transformer_blocks):
            given = self.noting(index, "block"), self.noting(index, "attention"), self.noting(index, "given")
            self.handles += [
                block.register_forward_pre_hook(given[0], with_kwargs=True),
                block.attn.register_forward_pre_hook(given[1], with_kwargs=True),
                block.attn.to_out[0].register_forward_pre_hook(given[2], with_kwargs=True),
                block.register_forward_hook(lambda *_, index=index: self.block(index)),
            ]

    def noting(self, index, name):
        return lambda module, args, kwargs: self.seen.__setitem__((index, name), (args, kwargs)) or None

    def block(self, index):
        block, attn = (part := self.tiny.transformer.transformer_blocks[index]), part.attn
        image = self.seen[index, "attention"][1]["hidden_states"]
        if index == 0:
            self.calls += 1
            self.rows = list(self.conditional(image.shape[0], self.calls))
            self.stream = self.concepts.expand(len(self.rows), -1, -1)
        temb = self.seen[index, "block"][1]["temb"][self.rows]
        image = image[self.rows]
        moves = block.norm1_context(self.stream, emb=temb) if not getattr(block, "context_pre_only", False) else None
        normed = moves[0] if moves else block.norm1_context(self.stream, temb)

        def heads(layer, tokens, norm=None):
            part = layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return part if norm is None else norm(part)

        query = heads(attn.add_q_proj, normed, attn.norm_added_q)
        own_key, own_value = heads(attn.add_k_proj, normed, attn.norm_added_k), heads(attn.add_v_proj, normed)
        key, value = heads(attn.to_k, image, attn.norm_k), heads(attn.to_v, image)
        rotary = self.seen[index, "attention"][1].get("image_rotary_emb")
        if rotary is not None and self.mistake != "keys before their places":
            key = apply_rotary_emb(key, [table[-key.shape[2] :] for table in rotary])
        keys, values = torch.cat([own_key, key], 2), torch.cat([own_value, value], 2)
        if self.mistake == "the image alone":
            keys, values = key, value
        if self.mistake == "the prompt as well":
            text = self.seen[index, "attention"][1]["encoder_hidden_states"][self.rows]
            keys = torch.cat([keys, heads(attn.add_k_proj, text, attn.norm_added_k)], 2)
            values = torch.cat([values, heads(attn.add_v_proj, text)], 2)
        scores = query @ keys.mT / query.shape[-1] ** 0.5
        out = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)  # [rows, C, H·E]
        places = self.seen[index, "given"][0][0][self.rows]
        if index in self.layers:
            for row, share in enumerate(self.share(places, out)):
                self.sums[row] = self.sums.get(row, 0) + share
            self.count += 1
        if moves:
            _, gate, shift, scale, gate_ff = moves
            tokens = self.stream + gate[:, None] * attn.to_add_out(out)
            wider = block.norm2_context(tokens) * (1 + scale[:, None]) + shift[:, None]
            if self.mistake != "concepts that stand still":
                self.stream = tokens + gate_ff[:, None] * block.ff_context(wider)

    def share(self, places, concepts):
        scores = places @ concepts.mT
        if self.mistake == "shares of places":
            return scores.softmax(1)
        return scores if self.mistake == "no shares" else scores.softmax(2)

    def map(self, concept, image):
        return (self.sums[image] / self.count)[:, CONCEPTS.index(concept)].reshape(GRID).numpy()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def seeing_prompts(family, guided=True):
    """The rows of a call that see their prompts."""
    if family == "flux":
        return lambda rows, calls: range(rows)
    return lambda rows, calls: range(rows // 2, rows)


def farthest(maps, expected, images=2):
    return max(
        abs(maps.concept(name, image) - expected.map(name, image)).max() for name in CONCEPTS for image in range(images)
    )


@pytest.mark.parametrize("family", few(["sd3", "sd3.5", "flux"], "sd3.5", "flux"))
def test_maps_are_the_papers(models, family):
    tiny, run = models[family]
    with concept_maps(tiny, CONCEPTS) as maps:
        out = run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    with Dense(tiny, family, (2, 3), conditional=seeing_prompts(family)) as expected:
        plain = run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    assert (out - plain).abs().max() <= 1e-10, "image and text see no concepts"
    assert farthest(maps, expected) <= EXACT
    total = sum(maps.concept(name, 1).astype("float64") for name in CONCEPTS)
    assert abs(total - 1).max() <= EXACT and maps.concept("car").shape == GRID
    assert abs(maps.concept("car", 0) - maps.concept("car", 1)).max() > 1e-3
    assert (maps.largest(1) == np.stack([maps.concept(name, 1) for name in CONCEPTS]).argmax(0)).all()


MISTAKES = {
    "the prompt as well": ("sd3.5", "flux"),
    "the image alone": ("sd3.5", "flux"),
    "concepts that stand still": ("sd3.5", "flux"),
    "shares of places": ("sd3.5", "flux"),
    "no shares": ("sd3.5", "flux"),
    "the first token alone": ("sd3.5", "flux"),
    "keys before their places": ("flux",),
    "CLIP's": ("sd3.5",),
}


@pytest.mark.parametrize(
    "planted",
    few({f"{f}, {m}": (f, m) for m, families in MISTAKES.items() for f in families}, "flux, keys before their places"),
)
def test_mistakes_show(models, planted):
    family, mistake = planted
    tiny, run = models[family]
    with concept_maps(tiny, CONCEPTS) as maps:
        run(tiny, PROMPTS[:2], steps=1, size=SIZE)
    with Dense(tiny, family, (2, 3), mistake, seeing_prompts(family)) as wrong:
        run(tiny, PROMPTS[:2], steps=1, size=SIZE)
    assert farthest(maps, wrong) > 20 * EXACT
    with Dense(tiny, family, (1, 2), None, seeing_prompts(family)) as earlier:
        run(tiny, PROMPTS[:2], steps=1, size=SIZE)
    assert farthest(maps, earlier) > 20 * EXACT


@pytest.mark.parametrize("family", few(FAMILIES))
def test_layers_and_steps(models, family):
    tiny, run = models[family]
    seen = []

    class Late(Dense):
        def block(self, index):
            if tiny.scheduler.step_index in (None, 0):
                return
            seen.append(index)
            super().block(index)

    with concept_maps(tiny, CONCEPTS, layers=[1, "transformer_blocks.2"], steps=(1 / 3, 1.0)) as maps:
        run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    with Late(tiny, family, (1, 2), conditional=seeing_prompts(family)) as expected:
        run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    assert len(seen) == 2 * 4 and farthest(maps, expected) <= EXACT


@pytest.mark.parametrize("family", few(FAMILIES))
def test_edited_images(models, family):
    """Places give what the edited layers give them; concepts look at a row's own image."""
    tiny, run = models[family]
    doubled = family != "flux"

    def rule(row, rows):
        source = rows // 2 if doubled else 0
        return [(1.0, {"q_image": source, "k_image": source})] if row > source else None

    with editing(tiny, FreePromptEdit(1.0)), concept_maps(tiny, CONCEPTS) as maps:
        out = run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    with (
        dense(tiny, rule, steps=range(STEPS)),
        _Projected(tiny),
        Dense(tiny, family, (2, 3), conditional=seeing_prompts(family)) as expected,
    ):
        plain = run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    assert (out - plain).abs().max() <= 1e-8
    assert farthest(maps, expected) <= EXACT
    with concept_maps(tiny, CONCEPTS) as unedited:
        run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    assert abs(maps.concept("car", 1) - unedited.concept("car", 1)).max() > 20 * EXACT


class _Projected:
    """Dense processors multiply by the weights of a projection; here they call it, so that hooks are called."""

    def __init__(self, tiny):
        self.modules = {id(b.attn.to_out[0].weight): b.attn.to_out[0] for b in tiny.transformer.transformer_blocks}

    def __enter__(self):
        from tests.support import dense_joint

        self.plain = dense_joint.linear

        def linear(projection, tokens):
            return projection(tokens) if id(projection.weight) in self.modules else self.plain(projection, tokens)

        dense_joint.linear = linear

    def __exit__(self, *_):
        from tests.support import dense_joint

        dense_joint.linear = self.plain


@pytest.mark.slow
def test_guidance_of_another_call(models):
    """Rows that see the negative prompt are a call of their own, in which no concept looks at anything."""
    tiny, run = models["flux"]
    options = {"true_cfg_scale": 3.0, "negative_prompt": ["a house"] * 2, "steps": STEPS, "size": SIZE}
    with concept_maps(tiny, CONCEPTS) as maps:
        run(tiny, PROMPTS[:2], **options)

    class Conditional(Dense):
        def block(self, index):
            self.number = getattr(self, "number", -1) + (index == 0)
            if self.number % 2 == 0:
                super().block(index)

    with Conditional(tiny, "flux", (2, 3)) as expected:
        run(tiny, PROMPTS[:2], **options)
    assert farthest(maps, expected) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_with_heat_and_fused_projections(pipe, models, family):
    tiny, run = models[family]
    with concept_maps(tiny, CONCEPTS) as expected:
        run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    edit = StableFlowEdit(layers=[0])
    with editing(tiny, edit), concept_maps(tiny, CONCEPTS) as alone:
        run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    with editing(tiny, edit), heat_maps(tiny, "car"), concept_maps(tiny, CONCEPTS) as beside:
        run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE)
    assert abs(beside.concept("car", 1) - alone.concept("car", 1)).max() <= EXACT
    assert abs(beside.concept("car", 1) - expected.concept("car", 1)).max() > 20 * EXACT
    if family == "flux":
        fused = tiny_flux_pipeline(pipe, num_layers=4)
        fused.transformer.fuse_qkv_projections()
        with concept_maps(fused, CONCEPTS) as maps:
            run(fused, PROMPTS[:2], steps=STEPS, size=SIZE)
        assert all(abs(maps.concept(name) - expected.concept(name)).max() <= EXACT for name in CONCEPTS)


@pytest.mark.slow
def test_a_skipped_block(models):
    """Skip-layer guidance: its call of the rows that see their prompts counts as theirs, without the block."""
    tiny, run = models["sd3.5"]
    options = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    with concept_maps(tiny, CONCEPTS) as maps:
        run(tiny, PROMPTS[:2], steps=STEPS, size=SIZE, **options)
    total = sum(maps.concept(name, 1).astype("float64") for name in CONCEPTS)
    assert abs(total - 1).max() <= EXACT


@pytest.mark.slow
def test_the_model_is_left_as_it_was(models):
    tiny, run = models["flux"]
    block, processors = tiny.transformer.transformer_blocks[0], dict(tiny.transformer.attn_processors)
    with pytest.raises(RuntimeError, match="stop"), concept_maps(tiny, CONCEPTS):
        assert block._forward_pre_hooks
        raise RuntimeError("stop")
    assert not block._forward_pre_hooks and tiny.transformer.attn_processors == processors
    assert "encode_prompt" not in vars(tiny)
    maps = {}
    for prompts in (PROMPTS[:2], PROMPTS[1:3]):  # every call is a run of its own
        with concept_maps(tiny, CONCEPTS) as one:
            run(tiny, prompts, steps=1, size=SIZE)
        maps[prompts[0]] = one
    with concept_maps(tiny, CONCEPTS) as both:
        run(tiny, PROMPTS[:2], steps=1, size=SIZE)
        run(tiny, PROMPTS[1:3], steps=1, size=SIZE)
    assert abs(both.concept("car") - maps[PROMPTS[1]].concept("car")).max() <= EXACT


class TestRefusals:
    @pytest.mark.parametrize("concepts", [["car"], ["car", "car"], ["car", " "], []])
    def test_concepts_that_share_out_nothing(self, models, concepts):
        with (
            pytest.raises(ValueError, match="two concepts or more"),
            concept_maps(models["sd3"][0], concepts),
        ):
            pass

    def test_no_list(self, models):
        with pytest.raises(TypeError, match="a list of concepts"), concept_maps(models["sd3"][0], "car"):
            pass

    def test_models(self, pipe):
        for other in (tiny_pipeline(pipe), tiny_ltx_pipeline(pipe)):
            with pytest.raises(TypeError, match="dual blocks, which Stable"), concept_maps(other, CONCEPTS):
                pass

    def test_layers(self, models):
        tiny, _ = models["flux"]
        with pytest.raises(ValueError, match="one stream for all tokens"), concept_maps(tiny, CONCEPTS, layers=[4]):
            pass
        with pytest.raises(ValueError, match="match none"), concept_maps(tiny, CONCEPTS, layers="blocks"):
            pass

    def test_a_model_alone(self, models):
        with pytest.raises(ValueError, match="pass one with its text encoders"):
            concept_maps(models["sd3"][0].transformer, CONCEPTS).__enter__()

    def test_what_was_not_read(self, models):
        tiny, run = models["flux"]
        with concept_maps(tiny, CONCEPTS) as maps:
            with pytest.raises(ValueError, match="no pipeline call was made"):
                maps.concept("car")
            run(tiny, PROMPTS[:2], steps=1, size=SIZE)
        with pytest.raises(ValueError, match=r"no share of 'dog' was read; there is \['car'"):
            maps.concept("dog")
        with pytest.raises(ValueError, match="expected image to be in 0 to 1, got 2"):
            maps.concept("car", 2)
