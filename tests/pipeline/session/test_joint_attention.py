"""Free-Prompt-Editing on joint attention is what the papers say: against a dense processor in float64."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, StableDiffusion3Img2ImgPipeline

from fpe_pipeline import CombinedEdit, Edit, FreePromptEdit, JointProduct, editing
from tests.support.dense_joint import dense
from tests.support.tiny_transformers import PROMPTS, draw, tiny_sd3_pipeline

EXACT = 1e-8


@pytest.fixture(scope="module", params=["sd3", "sd3.5"])
def tiny(pipe, request):
    return tiny_sd3_pipeline(pipe, request.param)


@pytest.fixture(scope="module")
def sd3(pipe):
    return tiny_sd3_pipeline(pipe)


def replaced(scope="image", first=None, names=("q", "k")):
    """The rule of image queries and keys, or of all of them: targets are the conditional rows after the source's.

    Args:
        first: number of the source's row in a batch of so many rows; default: the first of the second half.
    """
    segments = ("image",) if scope == "image" else ("image", "text")

    def rule(row, rows):
        source = rows // 2 if first is None else first(rows)
        return [(1.0, {f"{n}_{s}": source for n in names for s in segments})] if row > source else None

    return rule


def unguided(rows):
    return 0


def edited(pipe, edit, **kwargs):
    with editing(pipe, edit) as session:
        out = draw(pipe, **kwargs)
    return out, session.report()


def reference(pipe, rule, steps, kinds=("attn",), **kwargs):
    with dense(pipe, rule, steps=steps, kinds=kinds):
        return draw(pipe, **kwargs)


@pytest.mark.parametrize("scope", ["image", "joint"])
@pytest.mark.parametrize(
    "options",
    [
        {"prompts": 2},
        {"prompts": 4},
        {"prompts": 2, "size": (6, 12)},
        {"prompts": 3, "size": (10, 4), "guidance_scale": 1.0},
    ],
    ids=["1 target", "3 targets", "not square", "no guidance"],
)
def test_targets_are_the_papers(tiny, scope, options):
    guided = options.get("guidance_scale", 4.0) > 1
    actual, report = edited(tiny, FreePromptEdit(0.5, scope=scope), **options)
    rule = replaced(scope, None if guided else unguided)
    expected = reference(tiny, rule, steps=(0, 1), **options)
    assert (actual - expected).abs().max() <= EXACT
    plain = draw(tiny, **options)
    assert (actual - plain)[1:].abs().amax((1, 2, 3)).min() > 1e-3
    assert set(report.layers) == {f"transformer_blocks.{block}.attn" for block in range(3)}
    assert all(steps == [0, 1] for steps in report.layers.values())


WRONG = {
    "text for image": replaced(names=("q", "k"), scope="joint"),
    "queries alone": replaced(names=("q",)),
    "keys alone": replaced(names=("k",)),
    "values as well": replaced(names=("q", "k", "v")),
    "the text's tokens in the image's place": lambda row, rows: (
        [(1.0, {"q_text": rows // 2, "k_text": rows // 2})] if row > rows // 2 else None
    ),
    "an unconditional row": lambda row, rows: (
        [(1.0, {"q_image": row // 2 * 2, "k_image": row // 2 * 2})] if row % 2 else None
    ),
    "the unconditional source": lambda row, rows: [(1.0, {"q_image": 0, "k_image": 0})] if row > rows // 2 else None,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_other_rules_are_told_apart(sd3, wrong):
    actual, _ = edited(sd3, FreePromptEdit(0.5))
    assert (actual - reference(sd3, wrong, steps=(0, 1))).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [(0,), (1, 2), (0, 1, 2)])
def test_other_steps_are_told_apart(sd3, steps):
    actual, _ = edited(sd3, FreePromptEdit(0.5))
    assert (actual - reference(sd3, replaced(), steps=steps)).abs().max() > 1e-4


@dataclass(frozen=True)
class OwnMaps(Edit):
    """Every row its own map, computed by the session's processors: nothing is selected for any target."""

    def select(self, sites):
        return tuple(site for site in sites if site.kind == "joint")

    def products(self, site, step, roles):
        return {row: JointProduct.own(row) for row in range(roles.rows)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prompts", [2, 4])
def test_the_source_is_the_one_without_an_edit(pipe, dtype, prompts):
    """To rounding the stock pipeline's, and to the bit that of the same processors with every row its own."""
    tiny = tiny_sd3_pipeline(pipe, "sd3.5", dtype)
    out, _ = edited(tiny, FreePromptEdit(1.0), prompts=prompts)
    plain = draw(tiny, prompts=prompts)
    own, _ = edited(tiny, OwnMaps(), prompts=prompts)
    assert (out - plain)[0].abs().max() <= 1e-9 * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    assert torch.equal(out[0], own[0])
    assert (own - plain).abs().max() <= 1e-9 * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps


def test_both_halves(sd3):
    actual, _ = edited(sd3, FreePromptEdit(0.5, both_halves=True), prompts=3)

    def rule(row, rows):
        source = row // 3 * 3
        return [(1.0, {"q_image": source, "k_image": source})] if row > source else None

    assert (actual - reference(sd3, rule, steps=(0, 1), prompts=3)).abs().max() <= EXACT


def test_a_strength_is_a_blend(sd3):
    actual, _ = edited(sd3, FreePromptEdit(1.0, strength=0.25))

    def rule(row, rows):
        return [(0.25, {"q_image": 2, "k_image": 2}), (0.75, {})] if row == 3 else None

    assert (actual - reference(sd3, rule, steps=range(4))).abs().max() <= EXACT


def test_a_mask_is_a_blend_by_token(sd3):
    """Image tokens by their place; text tokens, which have none, by the mask's mean."""
    mask = torch.zeros(48, 96)
    mask[:, :32] = 1
    actual, _ = edited(sd3, FreePromptEdit(1.0, mask=mask), size=(6, 12))
    weight = torch.zeros(3, 6, dtype=torch.float64)
    weight[:, :2] = 1
    weight = weight.flatten()

    def rule(row, rows):
        return [(weight, {"q_image": 2, "k_image": 2}), (1 - weight, {})] if row == 3 else None

    assert (actual - reference(sd3, rule, steps=range(4), size=(6, 12))).abs().max() <= EXACT


@pytest.mark.parametrize("layers", [1, "transformer_blocks.1", "transformer_blocks.1.attn"])
def test_chosen_layers(sd3, layers):
    _, report = edited(sd3, FreePromptEdit(0.5, layers=layers))
    assert list(report.layers) == ["transformer_blocks.1.attn"]


def test_layers_of_image_tokens_are_edited_where_they_are_named(pipe):
    tiny = tiny_sd3_pipeline(pipe, "sd3.5")
    actual, report = edited(tiny, FreePromptEdit(0.5, layers=["transformer_blocks"]))
    assert [path for path in report.layers if path.endswith("attn2")] == [
        "transformer_blocks.0.attn2",
        "transformer_blocks.1.attn2",
    ]
    expected = reference(tiny, replaced(), steps=(0, 1), kinds=("attn", "attn2"))
    assert (actual - expected).abs().max() <= EXACT
    _, by_index = edited(tiny, FreePromptEdit(0.5, layers=[0, 1]))
    assert list(by_index.layers) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def test_a_scheduler_that_calls_twice_a_step(pipe):
    tiny = tiny_sd3_pipeline(pipe)
    tiny.scheduler = FlowMatchHeunDiscreteScheduler()
    calls = []
    hook = tiny.transformer.register_forward_pre_hook(lambda *arguments: calls.append(arguments))
    _, report = edited(tiny, FreePromptEdit(0.5))
    hook.remove()
    assert len(calls) == 7 and all(steps == [0, 1] for steps in report.layers.values())


def test_rows_of_one_image_draw_the_same_noise(sd3):
    seen = []
    with editing(sd3, FreePromptEdit(0.5)) as session:
        hook = sd3.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        sd3(
            PROMPTS[:3],
            generator=torch.Generator().manual_seed(0),
            height=64,
            width=64,
            num_inference_steps=1,
            max_sequence_length=12,
            output_type="latent",
        )
        hook.remove()
    assert all(torch.equal(row, seen[0][0]) for row in seen[0])
    assert "draw the same noise" in session.explain()


def test_images_per_prompt(sd3):
    actual, _ = edited(sd3, FreePromptEdit(0.5), prompts=3, images=2)

    def rule(row, rows):
        source = 6 + row % 2
        return [(1.0, {"q_image": source, "k_image": source})] if row > 7 else None

    assert (actual - reference(sd3, rule, steps=(0, 1), prompts=3, images=2)).abs().max() <= EXACT


def test_skip_layer_guidance(sd3):
    """Its call of conditional rows alone, without a block, is edited as those rows are in the other call."""
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    actual, report = edited(sd3, FreePromptEdit(0.75), prompts=3, **options)

    def rule(row, rows):
        source = {6: 3, 3: 0}[rows]
        return [(1.0, {"q_image": source, "k_image": source})] if row > source else None

    expected = reference(sd3, rule, steps=(0, 1, 2), prompts=3, **options)
    assert (actual - expected).abs().max() <= EXACT
    assert (actual - edited(sd3, FreePromptEdit(0.75), prompts=3)[0]).abs().max() > 1e-3
    assert not report.skipped and all(steps == [0, 1, 2] for steps in report.layers.values())


def end_guidance(pipe, step, timestep, values):
    if step == 1:
        pipe._guidance_scale = 1.0
        values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        values["pooled_prompt_embeds"] = values["pooled_prompt_embeds"].chunk(2)[1]
    return values


def test_guidance_that_ends(sd3):
    options = {
        "callback_on_step_end": end_guidance,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    actual, _ = edited(sd3, FreePromptEdit(1.0), prompts=3, **options)

    def rule(row, rows):
        source = {6: 3, 3: 0}[rows]
        return [(1.0, {"q_image": source, "k_image": source})] if row > source else None

    assert (actual - reference(sd3, rule, steps=range(4), prompts=3, **options)).abs().max() <= EXACT


def test_a_window_in_the_middle(sd3):
    actual, _ = edited(sd3, FreePromptEdit((0.25, 0.75)))
    assert (actual - reference(sd3, replaced(), steps=(1, 2))).abs().max() <= EXACT


def test_edits_of_different_layers_act_together(sd3):
    parts = FreePromptEdit(0.5, layers=0), FreePromptEdit(0.5, scope="joint", layers=1)
    actual, report = edited(sd3, CombinedEdit(parts))
    assert list(report.layers) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    alone = [edited(sd3, part)[0] for part in parts]
    assert all((actual - other).abs().max() > 1e-4 for other in alone)


def test_image_to_image(pipe):
    tiny = tiny_sd3_pipeline(pipe, kind=StableDiffusion3Img2ImgPipeline)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(**given):
        return tiny(
            PROMPTS[:2],
            height=64,
            width=64,
            strength=0.75,
            num_inference_steps=8,
            guidance_scale=4.0,
            max_sequence_length=12,
            output_type="latent",
            **given,
        ).images

    with editing(tiny, FreePromptEdit(0.75)) as session:
        actual = run(image=image, generator=torch.Generator().manual_seed(0))
    assert all(steps == [2, 3, 4, 5] for steps in session.report().layers.values())
    with dense(tiny, replaced(), steps=range(2, 6)):  # its rows have noise of their own but for generators of their own
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        expected = run(image=image.repeat(2, 1, 1, 1), generator=generators)
    assert (actual - expected).abs().max() <= EXACT


def test_the_pipeline_is_left_as_it_was(sd3):
    processors, plain = dict(sd3.transformer.attn_processors), draw(sd3)
    with pytest.raises(RuntimeError, match="stop"), editing(sd3, FreePromptEdit(0.5)):
        draw(sd3)
        raise RuntimeError("stop")
    assert sd3.transformer.attn_processors == processors
    assert not sd3.transformer._forward_pre_hooks and not sd3.transformer._forward_hooks
    assert torch.equal(draw(sd3), plain)


def test_fused_projections(pipe):
    tiny = tiny_sd3_pipeline(pipe)
    expected, _ = edited(tiny, FreePromptEdit(0.5))
    tiny.transformer.fuse_qkv_projections()
    actual, report = edited(tiny, FreePromptEdit(0.5))
    assert len(report.layers) == 3
    assert (actual - expected).abs().max() <= EXACT


def test_a_transformer_alone(sd3):
    edit = FreePromptEdit(0.5)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 8, 8, generator=generator, dtype=torch.float64).repeat(4, 1, 1, 1),
        "encoder_hidden_states": torch.randn(4, 9, 32, generator=generator, dtype=torch.float64),
        "pooled_projections": torch.randn(4, 16, generator=generator, dtype=torch.float64),
        "timestep": torch.full((4,), 500.0),
    }
    plain = sd3.transformer(**inputs).sample
    with editing(sd3.transformer, edit, classifier_free_guidance=True) as session:
        session.step(0, 4)
        early = sd3.transformer(**inputs).sample
        session.step(2, 4)
        late = sd3.transformer(**inputs).sample
    assert torch.equal(late, plain)
    change = (early - plain).abs().amax((1, 2, 3))
    assert change[:3].max() <= 1e-10 and change[3] > 1e-3


def layer_output(transformer, edit, hidden, text):
    """What the first layer of joint attention gives for these tokens, image and text one after the other."""
    outputs, dtype = [], transformer.dtype
    attn = transformer.transformer_blocks[0].attn

    def give(module, args, kwargs):
        return args, {**kwargs, "hidden_states": hidden.to(dtype), "encoder_hidden_states": text.to(dtype)}

    hooks = [
        attn.register_forward_pre_hook(give, with_kwargs=True),
        attn.register_forward_hook(lambda module, args, output: outputs.append(torch.cat(output, dim=1))),
    ]
    shapes = {"hidden_states": (4, 16, 8, 8), "encoder_hidden_states": (4, 9, 32), "pooled_projections": (4, 16)}
    with editing(transformer, edit, classifier_free_guidance=True) as session:
        session.step(0, 1)
        transformer(**{n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()}, timestep=torch.zeros(4, dtype=dtype))
    for hook in hooks:
        hook.remove()
    return outputs[0].double()


def test_half_precision_is_as_good_as_the_stock_processor(pipe):
    """A layer in bfloat16, against float64: at most twice the error of diffusers' own processor, and a rounding."""
    half, exact = (tiny_sd3_pipeline(pipe, "sd3.5", dtype).transformer for dtype in (torch.bfloat16, torch.float64))
    exact.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(4, count, 16, generator=generator).bfloat16() for count in (16, 9)]
    errors = [
        (layer_output(half, edit, *tokens) - layer_output(exact, edit, *tokens)).abs().max()
        for edit in (FreePromptEdit(1.0, layers=0), FreePromptEdit(0.0, layers=0))
    ]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps
