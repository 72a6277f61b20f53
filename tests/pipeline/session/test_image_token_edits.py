"""ConsistEdit, Stable Flow and FreeFlux are what the papers say: against dense processors in float64."""

import pytest
import torch

from fpe_pipeline import ConsistEdit, FreeFluxEdit, StableFlowEdit, editing
from tests.support.dense_joint import dense
from tests.support.tiny_transformers import draw, draw_flux, tiny_flux, tiny_flux_pipeline, tiny_sd3_pipeline

# diffusers turns queries and keys of FLUX in float32: a last bit may fall either way there.
EXACT = {"sd3": 1e-8, "flux": 1e-6}
SINGLE = "single_transformer_blocks"
SIZES = {"1 target": {}, "3 targets": {"prompts": 4}, "not square": {"size": (6, 12), "prompts": 3}}


@pytest.fixture(scope="module")
def models(pipe):
    return {"sd3": (tiny_sd3_pipeline(pipe), draw), "flux": (tiny_flux_pipeline(pipe), draw_flux)}


def edited(models, model, edit, **options):
    pipe, run = models[model]
    with editing(pipe, edit) as session:
        out = run(pipe, **options)
    return out, session.report()


def reference(models, model, rule, steps=range(4), layers="", **options):
    pipe, run = models[model]
    with dense(pipe, rule, steps=steps, layers=layers):
        return run(pipe, **options)


def farthest(one, other):
    return float((one - other).abs().max())


def source_of(model, row, rows):
    """The row of a target's source, in its half; None for a source: SD3's batch is doubled."""
    half = rows // 2 if model == "sd3" else rows
    return None if row % half == 0 else row // half * half


def taking(model, *names):
    """The source's tokens under these names, in both halves."""

    def rule(row, rows):
        source = source_of(model, row, rows)
        return None if source is None else [(1.0, dict.fromkeys(names, source))]

    return rule


def left_part(size=(8, 8), columns=2):
    """A mask as a picture, and as its tokens: 1 in the first columns of them."""
    height, width = size[0] // 2, size[1] // 2
    tokens = torch.zeros(height, width, dtype=torch.float64)
    tokens[:, :columns] = 1
    picture = tokens.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return picture, tokens.flatten()


def masked(model, share, *names, whole=()):
    """Tokens of two rows by their share of the source's; under ``whole`` all are the source's."""

    def rule(row, rows):
        source = source_of(model, row, rows)
        if source is None:
            return None
        return [(1.0, dict.fromkeys(names, (source, row, share)) | dict.fromkeys(whole, source))]

    return rule


MODELS = pytest.mark.parametrize("model", ["sd3", "flux"])


class TestConsistEdit:
    @MODELS
    @pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
    def test_structure(self, models, model, options):
        layers = SINGLE if model == "flux" else ""
        actual, report = edited(models, model, ConsistEdit(0.5), **options)
        rule = taking(model, "q_image", "k_image")
        assert farthest(actual, reference(models, model, rule, (0, 1), layers, **options)) <= EXACT[model]
        pipe, run = models[model]
        assert farthest(actual, run(pipe, **options)) > 1e-3
        assert len(report.layers) == 3 and all(path.startswith(layers) for path in report.layers)

    @MODELS
    def test_a_mask(self, models, model):
        """Values of the kept part are the source's at every step; queries and keys are all of them at first."""
        size = (6, 12)
        picture, share = left_part(size)
        actual, report = edited(models, model, ConsistEdit(0.5, mask=picture), size=size)
        assert all(steps == [0, 1, 2, 3] for steps in report.layers.values())
        layers = SINGLE if model == "flux" else ""
        early = masked(model, share, "v_image", whole=("q_image", "k_image"))
        late = masked(model, share, "q_image", "k_image", "v_image")

        def expected(early, late):
            return by_step(models, model, lambda step: early if step < 2 else late, layers, size=size)

        assert farthest(actual, expected(early, late)) <= EXACT[model]
        inverse = masked(model, 1 - share, "v_image", whole=("q_image", "k_image"))
        for wrong in ((late, late), (early, early), (inverse, late), (early, masked(model, share, "v_image"))):
            assert farthest(actual, expected(*wrong)) > 20 * EXACT[model]

    def test_one_half(self, models):
        actual, _ = edited(models, "sd3", ConsistEdit(0.5, both_halves=False), prompts=3)

        def rule(row, rows):
            return [(1.0, {"q_image": 3, "k_image": 3})] if row > 3 else None

        assert farthest(actual, reference(models, "sd3", rule, (0, 1), prompts=3)) <= EXACT["sd3"]
        assert farthest(actual, edited(models, "sd3", ConsistEdit(0.5), prompts=3)[0]) > 1e-4

    WRONG = (
        ("text in the image's place", taking("sd3", "q_text", "k_text"), (0, 1)),
        ("the whole map", taking("sd3", "q_image", "k_image", "q_text", "k_text"), (0, 1)),
        ("values as well", taking("sd3", "q_image", "k_image", "v_image"), (0, 1)),
        ("a step more", taking("sd3", "q_image", "k_image"), (0, 1, 2)),
        ("a step late", taking("sd3", "q_image", "k_image"), (1, 2)),
    )

    @pytest.mark.parametrize(("rule", "steps"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
    def test_other_rules_are_told_apart(self, models, rule, steps):
        actual, _ = edited(models, "sd3", ConsistEdit(0.5))
        assert farthest(actual, reference(models, "sd3", rule, steps)) > 1e-4

    def test_nothing_to_keep(self, models):
        """A mask that keeps nothing leaves the structure's steps, and one that keeps all copies the values too."""
        pipe, run = models["sd3"]
        none, _ = edited(models, "sd3", ConsistEdit(0.5, mask=torch.zeros(8, 8)))
        assert farthest(none, edited(models, "sd3", ConsistEdit(0.5))[0]) <= EXACT["sd3"]
        whole, _ = edited(models, "sd3", ConsistEdit(0.0, mask=torch.ones(8, 8)))
        rule = taking("sd3", "q_image", "k_image", "v_image")
        assert farthest(whole, reference(models, "sd3", rule)) <= EXACT["sd3"]
        assert farthest(whole, run(pipe)) > 1e-3

    def test_the_source_is_left_alone(self, models):
        for model, (pipe, run) in models.items():
            picture, _ = left_part()
            out, _ = edited(models, model, ConsistEdit(0.5, mask=picture), prompts=3)
            assert farthest(out[0], run(pipe, prompts=3)[0]) <= EXACT[model]

    @pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), True, "half"])
    def test_an_alpha_that_is_no_share(self, alpha):
        with pytest.raises(ValueError, match=r"expected alpha to be a number in \[0, 1\]"):
            ConsistEdit(alpha)

    def test_phases(self):
        assert ConsistEdit(0.5).phases(4) == (range(2), range(2, 4))
        assert ConsistEdit(0.5, mask=torch.ones(8, 8)).phases(4)[-1] == range(2, 4)
        assert ConsistEdit(0).windows() == ()


def by_step(models, model, rule_at, layers="", **options):
    """A dense run whose rule depends on the step."""
    pipe, run = models[model]

    def rule(row, rows):
        return rule_at(state["step"])(row, rows)

    with dense(pipe, rule, steps=range(4), layers=layers) as state:
        return run(pipe, **options)


class TestImageMemory:
    @MODELS
    @pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
    def test_stable_flow(self, models, model, options):
        actual, report = edited(models, model, StableFlowEdit(layers=range(2)), **options)
        rule, layers = taking(model, "k_image", "v_image"), "transformer_blocks"
        expected = by_layers(models, model, rule, [0, 1], **options)
        assert farthest(actual, expected) <= EXACT[model]
        assert list(report.layers) == [f"{layers}.{block}.attn" for block in range(2)]
        assert all(steps == [0, 1, 2, 3] for steps in report.layers.values())

    @MODELS
    def test_steps(self, models, model):
        actual, _ = edited(models, model, StableFlowEdit((0.25, 0.75), layers="transformer_blocks"))
        rule = taking(model, "k_image", "v_image")
        assert farthest(actual, reference(models, model, rule, (1, 2), "transformer_blocks")) <= EXACT[model]
        for steps in ((0, 1), (1,), (1, 2, 3)):
            assert farthest(actual, reference(models, model, rule, steps, "transformer_blocks")) > 20 * EXACT[model]

    @MODELS
    @pytest.mark.parametrize("names", [("k_image",), ("v_image",), ("k_text", "v_text"), ("q_image", "k_image")])
    def test_other_rules_are_told_apart(self, models, model, names):
        actual, _ = edited(models, model, StableFlowEdit(layers="transformer_blocks"))
        wrong = reference(models, model, taking(model, *names), layers="transformer_blocks")
        assert farthest(actual, wrong) > 20 * EXACT[model]

    @MODELS
    @pytest.mark.parametrize("task", ["non-rigid", "add"])
    def test_free_flux(self, models, model, task):
        whole, _ = edited(models, model, FreeFluxEdit(task, layers="transformer_blocks"))
        rule = taking(model, "k_image", "v_image")
        assert farthest(whole, reference(models, model, rule, layers="transformer_blocks")) <= EXACT[model]
        picture, share = left_part()
        part, _ = edited(models, model, FreeFluxEdit(task, mask=picture, layers="transformer_blocks"))
        expected = masked(model, share, "k_image", "v_image")
        assert farthest(part, reference(models, model, expected, layers="transformer_blocks")) <= EXACT[model]
        assert farthest(part, whole) > 20 * EXACT[model]

    @MODELS
    def test_a_background(self, models, model):
        picture, share = left_part()
        edit = FreeFluxEdit("background", mask=picture, steps=0.75, layers="transformer_blocks")
        actual, _ = edited(models, model, edit)
        expected = masked(model, share, "v_image")
        assert farthest(actual, reference(models, model, expected, range(3), "transformer_blocks")) <= EXACT[model]
        for wrong in (masked(model, share, "k_image", "v_image"), masked(model, 1 - share, "v_image")):
            other = reference(models, model, wrong, range(3), "transformer_blocks")
            assert farthest(actual, other) > 20 * EXACT[model]

    def test_a_soft_mask_mixes(self, models):
        share = torch.linspace(0, 1, 16, dtype=torch.float64)
        actual, _ = edited(models, "sd3", FreeFluxEdit("background", mask=share.reshape(4, 4), steps=1, layers=[0]))
        rule = masked("sd3", share, "v_image")
        assert farthest(actual, by_layers(models, "sd3", rule, [0])) <= EXACT["sd3"]

    def test_the_authors_layers(self):
        from fpe_pipeline.models.adapters.families import adapter_of

        sites = adapter_of(tiny_flux(torch.float32, num_layers=19, num_single_layers=38)).sites
        vital = [site.path for site in StableFlowEdit().select(sites)]
        assert vital == [
            *(f"transformer_blocks.{block}.attn" for block in (0, 1, 17, 18)),
            *(f"single_transformer_blocks.{block}.attn" for block in (6, 9, 34, 35, 37)),
        ]
        assert [len(FreeFluxEdit(task).select(sites)) for task in ("non-rigid", "add")] == [13, 7]
        background = FreeFluxEdit("background", mask=torch.ones(8, 8))
        assert background.select(sites) == sites and background.steps == (0.0, 0.9)
        assert [site.index for site in FreeFluxEdit("add").select(sites)] == [1, 2, 4, 26, 30, 54, 55]


def by_layers(models, model, rule, indices, **options):
    """A dense run whose rule holds in some blocks, by their number."""
    pipe, run = models[model]
    paths = [f"transformer_blocks.{index}." for index in indices]
    with dense(pipe, rule, steps=range(4), layers=tuple(paths)):
        return run(pipe, **options)


class TestRefusals:
    EDITS = (ConsistEdit(), StableFlowEdit(layers=[0]), FreeFluxEdit(layers=[0]))

    @pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)
    def test_a_unet(self, pipe, edit):
        with pytest.raises(ValueError, match=f"{type(edit).__name__} edits layers in which .* this model has none"):
            editing(pipe, edit)

    @pytest.mark.parametrize("edit", [StableFlowEdit(), FreeFluxEdit()], ids=["Stable Flow", "FreeFlux"])
    def test_layers_of_another_transformer(self, models, edit):
        with pytest.raises(ValueError, match=r"known for FLUX\.1, .* this transformer has 2 and 3: name"):
            editing(models["flux"][0], edit)

    def test_layers_that_match_nothing(self, models):
        with pytest.raises(ValueError, match=r"layers \[9\] match none of the transformer's 5 joint-attention"):
            editing(models["flux"][0], ConsistEdit(layers=[0, 9]))

    @MODELS
    def test_a_mask_of_other_proportions(self, models, model):
        pipe, run = models[model]
        calls = []
        message = r"the mask has 60 x 40 pixels .* and the latents 8 x 8"
        with pytest.raises(ValueError, match=message), editing(pipe, ConsistEdit(mask=torch.ones(40, 60))):
            run(pipe, callback_on_step_end=lambda *arguments: calls.append(arguments) or {})
        assert not calls

    def test_a_task(self):
        with pytest.raises(ValueError, match="one of non-rigid, add, background, got 'style'"):
            FreeFluxEdit("style")
        with pytest.raises(ValueError, match="a background is what a mask says: pass mask="):
            FreeFluxEdit("background")
