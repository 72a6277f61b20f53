"""What an edit of a transformer refuses: in a line that says what to do, and before anything is denoised."""

from dataclasses import dataclass

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0, PAGJointAttnProcessor2_0

from fpe_pipeline import (
    BatchRoles,
    Edit,
    FreePromptEdit,
    JointProduct,
    MasaCtrlEdit,
    PlugAndPlayEdit,
    Product,
    StyleAlignedEdit,
    editing,
)
from fpe_pipeline.edits.joint_products import plan_joint_products
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.tiny_pipelines import sample
from tests.support.tiny_transformers import draw, tiny_sd3, tiny_sd3_pipeline

SOURCE, TARGET = "a photo of a red car", "a photo of a blue car"


@pytest.fixture(scope="module")
def sd3(pipe):
    return tiny_sd3_pipeline(pipe, "sd3.5", torch.float32)


@pytest.fixture
def untouched(sd3):
    """The transformer, which must not be called, and must be left without hooks and processors of a session."""
    calls = []
    hook = sd3.transformer.register_forward_pre_hook(lambda *arguments: calls.append(arguments))
    yield sd3
    hook.remove()
    assert not calls
    assert not sd3.transformer._forward_hooks and not sd3.transformer._forward_pre_hooks
    assert {type(own) for own in sd3.transformer.attn_processors.values()} == {JointAttnProcessor2_0}


UNET_EDITS = {
    "plug and play": lambda tokenizer: PlugAndPlayEdit(),
    "style aligned": lambda tokenizer: StyleAlignedEdit(),
}


@pytest.mark.parametrize("make", UNET_EDITS.values(), ids=UNET_EDITS)
def test_edits_of_unets(untouched, make):
    message = "the transformer has none: its 5 layers attend to image and text tokens"
    with pytest.raises(ValueError, match=message), editing(untouched, make(untouched.tokenizer)):
        draw(untouched)


def test_keys_and_values_in_layers_that_are_not_named(untouched):
    with pytest.raises(ValueError, match=r"have to be named, of which this one has 5: pass layers="):
        editing(untouched, MasaCtrlEdit())


@dataclass(frozen=True)
class SelfMaps(Edit):
    """Written for UNets, and asked about any layer."""

    def products(self, site, step, roles):
        return {target: Product(source, (source,), (target,)) for source, target in roles.pairs()}


@dataclass(frozen=True)
class JointMaps(Edit):
    """Written for transformers, and asked about any layer."""

    def products(self, site, step, roles):
        return {target: JointProduct((s, target), (s, target), (target, target)) for s, target in roles.pairs()}


def test_products_of_the_other_kind(pipe, sd3):
    with pytest.raises(TypeError, match=r"expected JointProducts .* a Product for row 3"), editing(sd3, SelfMaps()):
        draw(sd3)
    message = r"JointProduct for row 3 of down_blocks.*self-attention"
    with pytest.raises(TypeError, match=message), editing(pipe, JointMaps()):
        sample(pipe)


def test_a_scope_on_a_unet(pipe):
    with pytest.raises(ValueError, match=r"scope='joint' says which tokens .* leave it out"):
        editing(pipe, FreePromptEdit(scope="joint"))
    with pytest.raises(ValueError, match='"image" or "joint", got \'text\''):
        FreePromptEdit(scope="text")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"layers": "down_blocks.1"}, r"layers \['down_blocks.1'\] match none of the transformer's 3 joint-attention"),
        ({"layers": [0, 7]}, r"layers \[7\] match none"),
        ({"layers": "transformer_blocks.1.attn3"}, "match none"),
        ({"levels": 1}, r"levels=\(1,\) tell resolutions apart, and a transformer has one"),
    ],
)
def test_layers_that_match_nothing(untouched, selector, message):
    with pytest.raises(ValueError, match=message):
        editing(untouched, FreePromptEdit(**selector))


def test_a_transformer_without_an_adapter():
    unknown = type("DrawingTransformer2DModel", (torch.nn.Module,), {})()
    with pytest.raises(TypeError, match=r"DrawingTransformer2DModel is a transformer that no adapter .*find_sites"):
        editing(unknown, FreePromptEdit())


def test_what_is_no_model():
    with pytest.raises(TypeError, match="a unet or a transformer, or one of those alone, got object"):
        editing(object(), FreePromptEdit())


def test_fused_projections_that_drop_norms(pipe):
    tiny = tiny_sd3_pipeline(pipe, "sd3.5", torch.float32)
    tiny.transformer.fuse_qkv_projections()
    message = r"leaves out the norms .* unfuse_qkv_projections"
    with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit()):
        draw(tiny)


def test_processors_that_do_more(pipe):
    tiny = tiny_sd3_pipeline(pipe, dtype=torch.float32)
    tiny.transformer.transformer_blocks[1].attn.set_processor(PAGJointAttnProcessor2_0())
    message = r"transformer_blocks\.1\.attn: its processor PAGJoint"
    with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit()):
        draw(tiny)


def test_caches(pipe):
    from diffusers import FirstBlockCacheConfig, apply_first_block_cache

    tiny = tiny_sd3_pipeline(pipe, dtype=torch.float32)
    apply_first_block_cache(tiny.transformer, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"FirstBlockCache is on in transformer_blocks\.0"):
        editing(tiny, FreePromptEdit())


def test_one_prompt_alone(sd3):
    with pytest.raises(ValueError, match="holds no target"), editing(sd3, FreePromptEdit()):
        draw(sd3, prompts=1)


def test_a_batch_of_another_layout(sd3):
    layout = BatchRoles.from_batch(6, classifier_free_guidance=True)
    message = "batch of 6 rows; the model got 4"
    with pytest.raises(ValueError, match=message), editing(sd3, FreePromptEdit(), roles=layout):
        draw(sd3)


def test_values_that_are_not_finite(pipe):
    tiny = tiny_sd3_pipeline(pipe, dtype=torch.float32)
    with torch.no_grad():
        tiny.transformer.transformer_blocks[1].ff.net[2].bias[0] = float("inf")
    message = r"from step 0 of 4 on: the first such layer is transformer_blocks\.1\.ff\.net\.2"
    with pytest.raises(FloatingPointError, match=message), editing(tiny, FreePromptEdit()):
        draw(tiny)
    with torch.no_grad():
        tiny.transformer.transformer_blocks[1].ff.net[2].bias[0] = 0.0
    noise = torch.full((2, 16, 8, 8), float("nan"))
    message = "the transformer got latents that are not finite"
    with pytest.raises(FloatingPointError, match=message), editing(tiny, FreePromptEdit()):
        tiny([SOURCE, TARGET], latents=noise, height=64, width=64, num_inference_steps=2, max_sequence_length=12)


def test_rows_outside_the_batch():
    with pytest.raises(ValueError, match="names a row outside the batch of 2"):
        plan_joint_products({1: JointProduct((2, 1), (0, 1), (1, 1))}, 2)


class TestCalls:
    def test_which_rows_a_call_holds(self):
        adapter = adapter_of(tiny_sd3())
        sample = torch.zeros(3, 16, 6, 10)
        call = adapter.read((sample, None, None, torch.tensor(7)), {})
        assert (call.rows, call.size, call.half, call.timestep) == (3, (6, 10), "as guided", 7)
        call = adapter.read((), {"hidden_states": sample, "timestep": 7, "skip_layers": [0, 2]})
        assert call.half == "conditional"
        paths = [site.path for site in adapter.sites]
        assert [call.computes(path) for path in paths] == [False, True, False]

    def test_sites(self):
        sites = adapter_of(tiny_sd3("sd3.5")).sites
        assert [(site.kind, site.index, site.place, site.level) for site in sites] == [
            ("joint", 0, "dual", 0),
            ("image", 0, "dual", 0),
            ("joint", 1, "dual", 0),
            ("image", 1, "dual", 0),
            ("joint", 2, "dual", 0),
        ]
        assert sites[0].at(6, 10).grid == (3, 5)

    def test_a_call_of_unconditional_rows_alone(self):
        roles = BatchRoles.from_batch(3, classifier_free_guidance=False).all_unconditional()
        assert roles.pairs() == () and roles.pairs(conditional=None) == ((0, 1), (0, 2))
        assert roles.pairs(conditional=False) == ((0, 1), (0, 2))
