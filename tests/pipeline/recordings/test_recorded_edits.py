"""Every edit from a recording: the images that it makes beside its source, which runs no more."""

import pytest
import torch

from fpe_pipeline import (
    BatchRoles,
    FreePromptEdit,
    LocalBlend,
    MasaCtrlEdit,
    PlugAndPlayEdit,
    Product,
    PromptToPromptEdit,
    Recording,
    SelfAttentionEdit,
    StyleAlignedEdit,
    WordMask,
    ddim_scheduler,
)
from fpe_pipeline.edits.products import plan_products
from fpe_pipeline.models.sites import Site
from fpe_pipeline.models.steps import Step
from fpe_pipeline.recordings.record_run import estimate
from tests.support.free_prompt_pipelines import SOURCE, TARGET, distance, free_prompt_pipeline, noise

STEPS = 4
SECOND = "a photo of green cats walking on street"
TARGETS = [TARGET, SECOND]
RUN = {"num_inference_steps": STEPS, "latents": noise()}

PROMPTS = [SOURCE, *TARGETS]
SITE = Site("mid_block.attentions.0.transformer_blocks.0.attn1", "mid", "self", 0, 2, 1, ("up",), (6, 8), (12, 16))


def p2p(tokenizer, align="replace", **options):
    return PromptToPromptEdit(PROMPTS, tokenizer, align, **options)


class SharperHead(SelfAttentionEdit):
    """The source's map, three times as sharp in the first head."""

    def products(self, site, step, roles):
        first = (torch.arange(site.heads) == 0).float()[:, None]
        return {
            t: (Product(s, s, t, weight=first, scale=3.0), Product(s, s, t, weight=1 - first)) for s, t in roles.pairs()
        }


EDITS = {
    "soft": lambda t: FreePromptEdit(strength=0.6),
    "fading": lambda t: FreePromptEdit(1.0, strength=(1, 0)),
    "regional": lambda t: FreePromptEdit(mask=torch.linspace(0, 1, 24)[:, None].expand(24, 32), levels=1),
    "by word": lambda t: FreePromptEdit(1.0, mask=WordMask(SOURCE, "ducks", t), levels=1),
    "replace": lambda t: p2p(t),
    "refine": lambda t: p2p(t, "refine", cross_replace_steps={"default_": 0.8, "green": 0.3}),
    "re-weight": lambda t: p2p(t, weights={"rubber": 3.0, "cats": -1.0}),
    "free prompt and replace": lambda t: FreePromptEdit() + p2p(t, self_replace_steps=0),
    "local blend": lambda t: p2p(t) + LocalBlend(PROMPTS, t, ["ducks", "ducks", "cats"], 0.93, start=0.2),
    "masactrl": lambda t: MasaCtrlEdit(start_step=1, start_layer=1),
    "plug and play": lambda t: PlugAndPlayEdit(feature_modules="up_blocks.1.resnets.1.conv2"),
    "style aligned": lambda t: StyleAlignedEdit(0.6, shared_score_shift=0.3),
    "a sharper map in one head": lambda t: SharperHead(),
}


@pytest.fixture(scope="module")
def tiny(pipe):
    tiny = free_prompt_pipeline(pipe)
    tiny.scheduler = ddim_scheduler(tiny.scheduler)
    return tiny


@pytest.fixture(scope="module")
def plain(tiny):
    """The targets without control, by guidance."""
    options = {"self_replace_steps": 0, "output_type": "latent", **RUN}
    return {scale: tiny(SOURCE, TARGETS, guidance_scale=scale, **options).images[1:] for scale in (7.5, 1.0)}


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        *((name, 7.5) for name in EDITS),
        *(
            pytest.param(name, 1.0, marks=pytest.mark.slow)
            for name in ("by word", "replace", "masactrl", "plug and play")
        ),
    ],
)
def test_as_with_the_source(tiny, plain, name, guidance):
    edit, options = EDITS[name](tiny.tokenizer), {"guidance_scale": guidance, **RUN}
    expected = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **options).images[1:]
    recorded = tiny.record(SOURCE, edit=edit, **options)
    got = tiny.edit(recorded, TARGETS, edit=edit, output_type="latent")
    assert distance(got.images, expected) <= 2e-4
    assert min(distance(a, b) for a, b in zip(expected, plain[guidance], strict=True)) > 1e-2
    assert recorded.nbytes == estimate(tiny, edit, (12, 16), STEPS, guided=guidance > 1)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("replace", "int8-keys"), ("masactrl", "int8-keys"), ("plug and play", "half"), ("style aligned", "half")],
)
def test_at_reduced_precision_from_a_folder(tiny, tmp_path, name, precision):
    edit = EDITS[name](tiny.tokenizer)
    expected = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **RUN).images[1:]
    tiny.record(SOURCE, edit=edit, placement=tmp_path / "r", precision=precision, **RUN)
    recorded = Recording.load(tmp_path / "r")
    got = tiny.edit(recorded, TARGETS, edit=edit, output_type="latent").images
    assert 0 < recorded.error <= {"half": 2e-3, "int8-keys": 3e-2}[precision]
    assert 0 < distance(got, expected) <= 0.1 * distance(expected, recorded.latents[-1])


def test_real_images_blend_as_with_the_source(tiny):
    photo = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, height=24, width=32, method="direct")
    edit = EDITS["local blend"](tiny.tokenizer)
    expected = tiny(inversion=inversion, target_prompt=TARGETS, edit=edit, output_type="latent").images[1:]
    recorded = tiny.record(inversion=inversion, edit=edit)
    blended = (expected - recorded.latents[-1]).abs().amax(1) <= 2e-4
    assert 0.05 < blended.float().mean() < 0.95
    assert distance(tiny.edit(recorded, TARGETS, edit=edit, output_type="latent").images, expected) <= 2e-4


def test_one_recording_for_several_edits(tiny):
    """The targets of a word-aligned edit need not be known when the source is recorded."""
    before = PromptToPromptEdit([SOURCE, SOURCE], tiny.tokenizer)
    recorded = tiny.record(SOURCE, edit=[FreePromptEdit(), before, MasaCtrlEdit(1, 1)], **RUN)
    for edit in (p2p(tiny.tokenizer), MasaCtrlEdit(2, 2), FreePromptEdit((0.25, 0.6), strength=0.5)):
        expected = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **RUN).images[1:]
        assert distance(tiny.edit(recorded, TARGETS, edit=edit, output_type="latent").images, expected) <= 2e-4


def test_what_a_recording_lacks(tiny, monkeypatch):
    recorded = tiny.record(SOURCE, **RUN)
    monkeypatch.setattr(tiny.unet, "forward", lambda *a, **k: pytest.fail("denoised before it was checked"))
    with pytest.raises(
        ValueError, match=r"lacks what MasaCtrlEdit needs of the source: .*unconditional key.* at steps"
    ):
        tiny.edit(recorded, TARGETS, edit=MasaCtrlEdit(1, 1))
    with pytest.raises(ValueError, match=r"lacks what PromptToPromptEdit needs .*attn2.*pipe.record\(…, edit=…\)"):
        tiny.edit(recorded, TARGETS, edit=p2p(tiny.tokenizer))
    with pytest.raises(ValueError, match=r"lacks .* at steps 3 to 3"):
        tiny.edit(recorded, TARGETS, edit=FreePromptEdit(1.0))
    with pytest.raises(ValueError, match="belongs to the edit"):
        tiny.edit(recorded, TARGETS, edit=FreePromptEdit(), self_replace_steps=0.5)


def test_edits_that_are_written_for_other_prompts(tiny):
    edit = p2p(tiny.tokenizer)
    with pytest.raises(ValueError, match="is written for the prompts"):
        tiny.record("a photo of a house", edit=edit, **RUN)
    recorded = tiny.record(SOURCE, edit=edit, **RUN)
    with pytest.raises(ValueError, match="is written for the prompts"):
        tiny.edit(recorded, TARGETS[::-1], edit=edit)
    with pytest.raises(ValueError, match="not made for plain Free-Prompt-Editing: say with edit="):
        tiny.edit(recorded, TARGETS)


def _words_before(monkeypatch, tiny, given):
    """Let the pipeline put words of its own before the prompts."""
    original = type(tiny).encode_prompt

    def encode_prompt(self, prompt, *args, **kwargs):
        texts = [prompt] if isinstance(prompt, str) else prompt
        return original(self, [f"{given} {text}" for text in texts], *args, **kwargs)

    monkeypatch.setattr(type(tiny), "encode_prompt", encode_prompt)


@pytest.mark.parametrize("name", ["by word", "refine", "local blend"])
def test_words_are_where_the_pipeline_encodes_them(tiny, monkeypatch, tmp_path, name):
    """In recordings in folders too, and not where the prompt alone would have them."""
    _words_before(monkeypatch, tiny, "a picture of")
    edit = EDITS[name](tiny.tokenizer)
    expected = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **RUN).images[1:]
    tiny.record(SOURCE, edit=edit, placement=tmp_path / "r", **RUN)
    recorded = Recording.load(tmp_path / "r")
    assert distance(tiny.edit(recorded, TARGETS, edit=edit, output_type="latent").images, expected) <= 2e-4


def test_words_that_the_pipeline_does_not_encode(tiny, monkeypatch):
    edit = p2p(tiny.tokenizer)
    recorded = tiny.record(SOURCE, edit=edit, **RUN)
    monkeypatch.setattr(tiny.unet, "forward", lambda *a, **k: pytest.fail("denoised before it was checked"))
    monkeypatch.setattr(tiny, "encode_prompt", lambda prompt, *a, _=tiny.encode_prompt, **k: _(["?"] * 2, *a, **k))
    with pytest.raises(ValueError, match="the pipeline encodes other tokens than those of the prompt"):
        tiny.edit(recorded, TARGETS, edit=edit)


def test_features_without_a_known_size(tiny):
    with pytest.raises(ValueError, match=r"'up_blocks.0.upsamplers.0'.* is not known beforehand"):
        tiny.record(SOURCE, edit=PlugAndPlayEdit(feature_modules="up_blocks.0.upsamplers.0"), **RUN)


def test_the_report_says_what_was_replayed(tiny):
    edit = EDITS["plug and play"](tiny.tokenizer)
    recorded = tiny.record(SOURCE, edit=edit, **RUN)
    report = tiny.edit(recorded, TARGETS, edit=edit, output_type="latent").report
    assert sum(entry.nbytes for entry in report.replayed.values()) == recorded.store.nbytes
    assert report.replayed.keys() == {*report.layers, *report.features} == recorded.contents.keys()
    layer = next(iter(report.layers))
    heads, tokens = tiny.unet.get_submodule(layer).heads, 12 * 16 // 4 ** layer.count("up_blocks.0")
    assert report.replayed[layer].maps % (2 * heads * 4) == 0
    assert report.replayed[layer].maps <= 2 * 2 * heads * tokens * tokens * 4
    told = report.explain()
    assert "took the source from a recording, whose rows are numbered from 4 on" in told
    assert "steps 0-1: unconditional " in told and "unconditional feature" in told
    assert "the maps among it would have taken" in told


def test_roles_of_a_recording():
    roles = BatchRoles.from_recording(2, classifier_free_guidance=True)
    assert (roles.rows, roles.batch, roles.recorded) == (6, 4, 2)
    assert roles.pairs(conditional=None) == ((4, 0), (4, 1), (5, 2), (5, 3))
    assert roles.pairs() == ((5, 2), (5, 3))
    assert [roles.prompt_of(row) for row in range(6)] == [1, 2, 1, 2, 0, 0]


def test_plans_name_what_they_read():
    roles = BatchRoles.from_recording(1, classifier_free_guidance=True)
    replaced = FreePromptEdit().products(SITE, Step(0, STEPS), roles)
    plan = plan_products(replaced, 2, 2)
    assert (plan.queries, plan.keys, plan.values) == ((0,), (0,), (0, 1))
    assert plan.reads == {3: {"query", "key", "logsumexp"}}
    shared = plan_products(MasaCtrlEdit().products(SITE, Step(0, STEPS), roles), 2, 2)
    assert shared.reads == {2: {"key", "value"}, 3: {"key", "value"}}
    with pytest.raises(ValueError, match="would change row 3, whose run is recorded"):
        plan_products({3: replaced[1]}, 2, 2)
