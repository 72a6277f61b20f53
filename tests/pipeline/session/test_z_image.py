"""Edits of Z-Image, whose captions and images are filled up: against dense layers, to 1e-8 in float64."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "ZImagePipeline"):
    pytest.skip("this diffusers has no Z-Image", allow_module_level=True)

from fpe_pipeline import (
    ConsistEdit,
    Edit,
    FreePromptEdit,
    JointProduct,
    KVEdit,
    MasaCtrlEdit,
    StableFlowEdit,
    editing,
)
from tests.support.edited_transformers import EDITS, FAULTS, SOURCE, edited, reference, shows, unedited
from tests.support.edited_z_image import EXACT, MODEL, QUERIES_KEYS, densely, drawn, farthest, taking
from tests.support.slow_cases import few
from tests.support.tiny_z_image import (
    captions,
    dense_z_image,
    draw_z_image,
    tiny_z_image_pipeline,
    tiny_z_image_that_reads,
    wide_z_image,
)


@pytest.fixture(autouse=True)
def _wide():
    with wide_z_image():
        yield


@pytest.fixture(scope="module")
def tiny():
    return tiny_z_image_pipeline()


@pytest.fixture(scope="module")
def reading():
    return tiny_z_image_that_reads()


def case_of(pipe, edit, size, targets=2):
    make, texts = EDITS[edit]
    prompts = (SOURCE, *texts[:targets])
    return make(MODEL, pipe, prompts, size), prompts


@pytest.mark.parametrize("size", [pytest.param((6, 12), id="filled up"), pytest.param((8, 16), marks=pytest.mark.slow)])
@pytest.mark.parametrize("edit", few(EDITS.keys(), "FPE, the whole map", "ReFlex"))
def test_targets_are_the_papers(reading, edit, size):
    """Prompts that are filled up to one length: every edit that there is."""
    case, prompts = case_of(reading, edit, size)
    actual = edited(reading, MODEL, case, prompts, size=size)
    assert farthest(actual, reference(reading, MODEL, case, prompts, size=size)) <= EXACT
    plain = unedited(reading, MODEL, prompts, size=size)
    assert farthest(actual[0], plain[0]) <= EXACT
    assert all(farthest(actual[row], plain[row]) > 1e-4 for row in (1, 2))


@pytest.mark.parametrize("edit", few(EDITS.keys(), "FPE"))
def test_mistakes_show(reading, edit):
    """Also with the halves of the batch in one another's order, and without the padding that is attended to."""
    case, prompts = case_of(reading, edit, (6, 12), 1)
    actual = edited(reading, MODEL, case, prompts, size=(6, 12))
    for fault in [each for each in FAULTS if shows(each, MODEL, edit)]:
        wrong = reference(reading, MODEL, case, prompts, fault, size=(6, 12))
        assert farthest(actual, wrong) > 1e3 * EXACT, fault
    for fault in ("no pad", "no text pad"):
        with dense_z_image(reading, lambda row, rows: None, fault=fault):
            assert farthest(actual[0], unedited(reading, MODEL, prompts, size=(6, 12))[0]) > 1e3 * EXACT


MEMORY = taking("k_image", "v_image")
RULES = {
    "image": (FreePromptEdit(0.5), QUERIES_KEYS, (0, 1), False),
    "consistedit": (ConsistEdit(0.75), QUERIES_KEYS, (0, 1, 2), True),
    "masactrl": (MasaCtrlEdit(1, layers=range(3)), MEMORY, (1, 2, 3), True),
    "stable flow": (StableFlowEdit(layers=range(3)), MEMORY, (0, 1, 2, 3), True),
}
SIZES = {
    "1 target": {},
    "3 targets": {"prompts": 4},
    "nothing fills the image up": {"size": (8, 16)},
    "one length": {"lengths": (6, 20)},
    "no guidance": {"guidance": 0.0, "prompts": 3},
    "guidance that ends": {"cfg_truncation": 0.4, "prompts": 3},
}


@pytest.mark.parametrize("options", few(SIZES, "guidance that ends"))
@pytest.mark.parametrize("rule", few(RULES.keys(), "masactrl"))
def test_captions_of_other_lengths(tiny, rule, options):
    """Image tokens of the source stand where the target's begin; guidance in one call, in none, and until it ends."""
    edit, dense_rule, steps, both = RULES[rule]
    actual, report = drawn(tiny, edit, **options)
    assert farthest(actual, densely(tiny, dense_rule, steps, both=both, **options)) <= EXACT
    plain = draw_z_image(tiny, **options)
    assert farthest(actual[0], plain[0]) <= EXACT
    assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-5
    assert len(report.layers) == 3 and all(tuple(noted) == steps for noted in report.layers.values())


def test_a_mask_between_captions_of_other_lengths(tiny):
    """The tokens of both rows that it mixes stand in one place."""
    mask = torch.zeros(64, 64)
    mask[:32] = 1
    share = torch.tensor([1.0, 0.0]).repeat_interleave(8).double()
    early, late = (
        lambda source: [
            (1.0, dict.fromkeys(("q_image", "k_image"), source) | {"v_image": (source, 1 + source, share)})
        ],
        lambda source: [(1.0, dict.fromkeys(("q_image", "k_image", "v_image"), (source, 1 + source, share)))],
    )
    expected = densely(tiny, early, (0,), both=True, after=late)
    assert farthest(drawn(tiny, ConsistEdit(0.25, mask=mask))[0], expected) <= EXACT


def test_images_stand_where_the_target_begins(tiny):
    for edit, rule, steps, both in (RULES["image"], RULES["masactrl"]):
        actual, _ = drawn(tiny, edit)
        assert farthest(actual, densely(tiny, rule, steps, both=both, turns=False)) > 1e-6
        alike, _ = drawn(tiny, edit, lengths=(6, 20))
        assert farthest(alike, densely(tiny, rule, steps, both=both, turns=False, lengths=(6, 20))) <= EXACT


@pytest.mark.parametrize("names", [("q_image", "k_image", "q_pad", "k_pad"), ("q_text", "k_text"), ("k_image",), ()])
def test_other_rules_are_told_apart(tiny, names):
    """What fills an image up is each row's own."""
    options = {"lengths": (6, 20)}
    actual, _ = drawn(tiny, FreePromptEdit(0.5), **options)
    assert farthest(actual, densely(tiny, taking(*names), (0, 1), **options)) > 1e-6


def test_a_mask_between_captions_of_one_length_beside_negative_ones_of_another(tiny):
    """The halves of a batch are turned by other angles then; the two rows that a mask mixes are not."""
    mask, start = torch.zeros(64, 64), draw_z_image(tiny, steps=1).shape[-1]
    mask[:, :32] = 1  # white: the left half
    white = mask.unflatten(0, (4, 16)).unflatten(2, (4, 16)).mean((1, 3)).double()
    given = {"lengths": (40, 40), "negative_prompt_embeds": captions((6, 6), 1)}

    def paste(pipe, index, timestep, tensors):
        latents = tensors["latents"].clone()
        latents[1, :, :, : start // 2] = latents[0, :, :, : start // 2]
        return {"latents": latents}

    def rule(source):
        return [(1.0, {part: (source, source + 1, white.flatten()) for part in ("k_image", "v_image")})]

    actual, _ = drawn(tiny, KVEdit(mask=mask), **given)
    expected = densely(tiny, rule, range(4), both=True, callback_on_step_end=paste, **given)
    assert farthest(actual, expected) <= EXACT
    assert farthest(actual[1], draw_z_image(tiny, **given)[1]) > 1e-4


def test_guidance_that_ends_leaves_the_rows_that_see_their_prompts(tiny):
    calls = []
    handle = tiny.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with editing(tiny, FreePromptEdit(1.0, both_halves=True), images_per_prompt=1) as session:
        actual = draw_z_image(tiny, cfg_truncation=0.4)
        again = draw_z_image(tiny, cfg_truncation=0.4)
    handle.remove()
    assert calls == [4, 4, 2, 2] * 2 and session.report().batch == 2
    expected = densely(tiny, QUERIES_KEYS, range(4), both=True, cfg_truncation=0.4)
    assert farthest(actual, expected) <= EXACT and torch.equal(actual, again)


class OwnMaps(Edit):
    """Every row its own map, computed by the session's processors."""

    def select(self, sites):
        return tuple(site for site in sites if site.kind == "joint")

    def products(self, site, step, roles):
        return {row: JointProduct.own(row) for row in range(roles.rows)}


@pytest.mark.parametrize("dtype", few({"float64": torch.float64, "float32": torch.float32}, "float32"))
def test_the_source_is_the_one_without_an_edit(dtype):
    pipe = tiny_z_image_pipeline(dtype)
    out, _ = drawn(pipe, FreePromptEdit(1.0), prompts=3)
    own, report = drawn(pipe, OwnMaps(), prompts=3)
    plain = draw_z_image(pipe, prompts=3)
    assert list(report.layers) == [f"layers.{index}.attention" for index in range(3)]
    assert torch.equal(out[0], own[0])
    bound = 1e-4 if dtype is torch.float32 else 1e-11
    assert farthest(out[0], plain[0]) <= bound and farthest(own, plain) <= bound
    idle, _ = drawn(pipe, FreePromptEdit(0.0), prompts=3)
    assert torch.equal(idle, plain)


def test_layers_of_the_image_alone(tiny):
    """Where nothing fills the image up they are edited by name; where something does, it is nobody's."""
    edit = FreePromptEdit(1.0, layers=["noise_refiner.0", "layers.1"])
    _, report = drawn(tiny, edit, size=(8, 16))
    assert list(report.layers) == ["noise_refiner.0.attention", "layers.1.attention"]
    with pytest.raises(ValueError, match="16 tokens that fill up the 16 of an image"):
        drawn(tiny, edit)


def test_the_sources_keys_stand_where_the_target_begins_in_layers_of_the_image_alone(tiny):
    class Dense:
        def __call__(self, attn, tokens, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
            parts = (layer(tokens).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
            query, key, value = (part.transpose(1, 2) for part in parts)
            query, key, out = attn.norm_q(query), attn.norm_k(key), []
            for row in range(len(tokens)):
                of = row // 2 * 2
                maps = placed(query[row], freqs_cis[row]) @ placed(key[of], freqs_cis[row]).mT / query.shape[-1] ** 0.5
                out.append(maps.softmax(-1) @ value[of])
            return attn.to_out[0](torch.stack(out).transpose(1, 2).flatten(2))

    def placed(part, places):
        return torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * places).flatten(-2)

    edit = MasaCtrlEdit(0, layers=["noise_refiner.0"])
    actual, report = drawn(tiny, edit, size=(8, 16))
    layer = tiny.transformer.noise_refiner[0].attention
    before = layer.processor
    layer.processor = Dense()
    expected = draw_z_image(tiny, size=(8, 16))
    layer.processor = before
    assert list(report.layers) == ["noise_refiner.0.attention"]
    assert farthest(actual, expected) <= EXACT < farthest(actual, draw_z_image(tiny, size=(8, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrower_weights(tiny, dtype):
    """The edit is as far from the exact one as the unedited picture is from the exact one."""
    narrow = tiny_z_image_pipeline(dtype)
    exact, rounded = (draw_z_image(pipe).double() for pipe in (tiny, narrow))
    expected, actual = (drawn(pipe, FreePromptEdit(1.0))[0].double() for pipe in (tiny, narrow))
    assert farthest(actual, expected) <= 3 * farthest(rounded, exact)


@pytest.mark.slow
def test_a_compiled_transformer():
    pipe = tiny_z_image_pipeline(torch.float32)
    expected, _ = drawn(pipe, FreePromptEdit(0.5))
    pipe.transformer.compile(backend="eager")
    actual, _ = drawn(pipe, FreePromptEdit(0.5))
    assert farthest(actual, expected) <= 1e-5
