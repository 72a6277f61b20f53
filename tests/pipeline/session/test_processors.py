"""The processor against dense mathematics in float64, and against diffusers' own processors."""

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)

from fpe_pipeline import BatchRoles, Product
from fpe_pipeline.edits.products import plan_products
from fpe_pipeline.session.layers.computing import Projections, Rows, evaluate, take
from fpe_pipeline.session.processors.unet import EditAttnProcessor, unsupported_reasons
from tests.support.dense import dense_attention, own, replaced
from tests.support.edited_layer import GRID, attention, install, random, run

ROLES = BatchRoles.from_batch(6, classifier_free_guidance=True)  # one source, two targets
FPE = {target: Product(source, (source,), (target,)) for source, target in ROLES.pairs()}
FPE_DENSE = [[own(0)], [own(1)], [own(2)], [own(3)], [replaced(3, 4)], [replaced(3, 5)]]

VARIANTS = {
    "plain": {},
    "bias": {"bias": True, "out_bias": False},
    "unscaled": {"scale_qk": False},
    "group norm, residual": {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
    "layer norm of q and k": {"qk_norm": "layer_norm"},
    "rms norm of q and k": {"qk_norm": "rms_norm"},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "spatial norm": {"query_dim": 32, "spatial_norm_dim": 6, "residual_connection": True},
}


def variant_inputs(config):
    """Hidden states and keywords that suit a variant of the layer."""
    if "spatial_norm_dim" in config:
        return random(6, 32, *GRID), {"temb": random(6, 6, *GRID, seed=2)}
    if "norm_num_groups" in config:
        return random(6, 16, *GRID), {}
    return random(6, GRID[0] * GRID[1], 16), {}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_edited_rows_are_dense_mathematics(config, backend):
    attn = attention(**config)
    hidden_states, kwargs = variant_inputs(config)
    with torch.no_grad():
        expected = dense_attention(attn, hidden_states, FPE_DENSE, **kwargs)
        unedited = dense_attention(attn, hidden_states, [[own(row)] for row in range(6)], **kwargs)
    actual = run(install(attn, FPE, backend=backend), hidden_states, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert (expected - unedited)[4:].abs().max() > 1e-2
    assert torch.equal(expected[:4], unedited[:4])


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_each_row_its_own_map_is_what_diffusers_computes(config):
    attn = attention(**config)
    hidden_states, kwargs = variant_inputs(config)
    expected = run(attn, hidden_states, **kwargs)
    actual = run(install(attn, {0: Product(0, (0,), (0,))}), hidden_states, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", [None, "layer_norm", "group_norm"])
@pytest.mark.parametrize("inner", [AttnProcessor2_0, FusedAttnProcessor2_0])
def test_cross_attention(norm, inner):
    attn = attention(cross_attention_dim=8, cross_attention_norm=norm, cross_attention_norm_num_groups=4)
    hidden_states, context = random(6, 12, 16), random(6, 5, 8, seed=2)
    with torch.no_grad():
        expected = dense_attention(attn, hidden_states, FPE_DENSE, context=context)
    if inner is FusedAttnProcessor2_0:
        attn.fuse_projections()
    attn.set_processor(inner())
    actual = run(install(attn, FPE), hidden_states, encoder_hidden_states=context)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_gradients_are_those_of_dense_mathematics():
    attn = attention(norm_num_groups=4)
    gradients = []
    for edited in (False, True):
        hidden_states = random(6, 16, *GRID).requires_grad_()
        if edited:
            out = install(attn, FPE)(hidden_states)
        else:
            out = dense_attention(attn, hidden_states, FPE_DENSE)
        gradients.append(
            torch.autograd.grad((out * random(*out.shape, seed=9)).sum(), [hidden_states, attn.to_k.weight])
        )
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_under_autocast(norm):
    """Norms are computed in float32 there, and may leave queries and keys wider than values."""
    attn = attention(qk_norm=norm, dtype=torch.float32)
    hidden_states = random(6, 12, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(attn, hidden_states)
        actual = run(install(attn, {0: Product(0, (0,), (0,))}), hidden_states)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.1)


class RowCounter:
    def __init__(self, attn, names=("to_q", "to_k", "to_v")):
        self.rows = {}
        for name in names:
            getattr(attn, name).register_forward_hook(
                lambda module, args, output, name=name: self.rows.setdefault(name, []).append(args[0].shape[0])
            )


def test_queries_and_keys_of_targets_are_not_projected():
    attn = install(attention(), FPE)
    counter = RowCounter(attn)
    run(attn, random(6, 12, 16))
    assert counter.rows == {"to_q": [4], "to_k": [4], "to_v": [6]}


def test_sources_that_nobody_asks_for_are_not_projected():
    """All rows with one map: one query, one key."""
    attn = install(attention(), {row: Product(2, (2,), (row,)) for row in range(6)})
    counter = RowCounter(attn)
    run(attn, random(6, 12, 16))
    assert counter.rows == {"to_q": [1], "to_k": [1], "to_v": [6]}


def test_rows_that_lie_together_are_not_copied():
    tensor = random(6, 2, 3)
    assert take(tensor, range(6)) is tensor
    assert take(tensor, (1, 2, 3)).data_ptr() == tensor[1].data_ptr()
    assert torch.equal(take(tensor, (0, 1, 4, 4, 2)), tensor[[0, 1, 4, 4, 2]])


def full_mask(mask, heads=2):
    """Any mask as an additive [B, H, N, M]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    if mask.ndim == 2:
        mask = mask[:, None, None]
    elif mask.ndim == 3:
        mask = mask.reshape(-1, heads, *mask.shape[1:]) if mask.shape[0] == 6 * heads else mask[:, None]
    return mask.expand(6, heads, 12, 12)


MASKS = {
    "[B, M]": random(6, 12) * 3,
    "[B, 1, M]": random(6, 1, 12) * 3,
    "[B, N, M]": random(6, 12, 12) * 3,
    "[B·H, 1, M]": random(12, 1, 12) * 3,
    "[B, H, N, M]": random(6, 2, 12, 12) * 3,
    "[1, 1, M]": random(1, 1, 12) * 3,
    "bool [B, 1, M]": (random(6, 1, 12) > 0).index_fill(2, torch.tensor([0]), True),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_follows_the_keys(mask):
    attn = attention()
    hidden_states = random(6, 12, 16)
    with torch.no_grad():
        expected = dense_attention(attn, hidden_states, FPE_DENSE, mask=full_mask(mask))
    actual = run(install(attn, FPE), hidden_states, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_a_mask_follows_the_keys_and_not_the_query():
    """MasaCtrl's targets ask with their own queries for the source's keys, of which the source's mask knows."""
    attn, hidden_states, mask = attention(), random(6, 12, 16), MASKS["[B, N, M]"]
    edit = {5: Product(5, (3,), (3,)), 4: Product(4, (3, 4), (3, 4))}
    dense = [*FPE_DENSE[:4], [(4, (3, 4), (3, 4), 1.0, None)], [(5, (3,), (3,), 1.0, None)]]
    with torch.no_grad():
        expected = dense_attention(attn, hidden_states, dense, mask=full_mask(mask))
    actual = run(install(attn, edit), hidden_states, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["[B, 1, M]", "[B, N, M]", "[B·H, 1, M]", "bool [B, 1, M]"])
def test_masks_mean_what_they_mean_to_diffusers(name):
    attn = attention()
    hidden_states = random(6, 12, 16)
    expected = run(attn, hidden_states, attention_mask=MASKS[name])
    actual = run(install(attn, {0: Product(0, (0,), (0,))}), hidden_states, attention_mask=MASKS[name])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "message"), [((6, 1, 9), "masks 9 keys; the layer has 12"), ((4, 1, 12), "batch of 6 rows")]
)
def test_masks_of_another_size_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        run(install(attention(), FPE), random(6, 12, 16), attention_mask=random(*shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_accumulated_in_float32(dtype):
    """SD 2.1 asks for upcast attention because its scores pass 65504, the largest float16: fused scores always are."""
    query, key, value = (random(6, 2, 12, 8, seed=seed) for seed in range(3))
    query, key, value = (query * 200).to(dtype), (key * 200).to(dtype), value.to(dtype)
    scores = query.double() @ key.double().transpose(2, 3)
    assert scores.abs().max() > 65504
    expected = scores[[0, 1, 2, 3, 3, 3]].softmax(-1) @ value.double()
    rows = tuple(range(6))
    layer = Projections(Rows(query, rows), Rows(key, rows), Rows(value, rows), scale=1.0, backend="torch")
    actual, _ = evaluate(plan_products(FPE, 6), layer)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


class Recording(AttnProcessor2_0):
    """A custom processor with a keyword of its own."""

    def __call__(self, attn, hidden_states, *args, strength=1.0, temb=None, **kwargs):
        self.seen = {"strength": strength, "temb": temb, **kwargs}
        return super().__call__(attn, hidden_states, *args, temb=temb, **kwargs) * strength


def test_without_an_order_the_processor_underneath_gets_everything():
    attn = attention(processor=Recording())
    hidden_states, mask, temb = random(6, 12, 16), random(6, 1, 12), random(6, 3)
    expected = run(attn, hidden_states, attention_mask=mask, strength=3.0, temb=temb)
    inner = attn.processor
    attn.processor = EditAttnProcessor(inner)
    actual = run(attn, hidden_states, attention_mask=mask, strength=3.0, temb=temb)
    assert torch.equal(actual, expected)
    assert inner.seen["strength"] == 3.0
    assert inner.seen["temb"] is temb
    assert inner.seen["attention_mask"] is mask


@pytest.mark.parametrize("inner", [AttnProcessor, AttnProcessor2_0, lambda: SlicedAttnProcessor(1)])
def test_without_an_order_results_are_identical(inner):
    attn = attention(processor=inner(), norm_num_groups=4)
    hidden_states = random(6, 16, *GRID)
    expected = run(attn, hidden_states)
    attn.processor = EditAttnProcessor(attn.processor)
    assert torch.equal(run(attn, hidden_states), expected)


def test_fused_projections():
    attn = attention(bias=True)
    hidden_states = random(6, 12, 16)
    with torch.no_grad():
        expected = dense_attention(attn, hidden_states, FPE_DENSE)
    attn.fuse_projections()
    attn.set_processor(FusedAttnProcessor2_0())
    edited = install(attn, FPE)
    torch.testing.assert_close(run(edited, hidden_states), expected, rtol=0, atol=1e-10)
    counter = RowCounter(attn, ("to_q", "to_qkv"))
    run(edited, hidden_states)
    assert counter.rows == {"to_qkv": [6]}


def test_projections_that_are_fused_no_more():
    """`unfuse_qkv_projections` puts the processors back and leaves `fused_projections` and `to_qkv` behind."""
    attn = attention()
    attn.fuse_projections()
    with torch.no_grad():
        attn.to_q.weight.mul_(2)  # what an adapter loaded afterwards would do
        hidden_states = random(6, 12, 16)
        expected = dense_attention(attn, hidden_states, FPE_DENSE)
    torch.testing.assert_close(run(install(attn, FPE), hidden_states), expected, rtol=0, atol=1e-10)


def test_guiders_that_skip_attention_scores():
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    attn = attention()
    hidden_states = random(6, 12, 16)
    with AttentionScoreSkipFunctionMode():
        expected = run(attn, hidden_states)
    install(attn, FPE)
    edited = run(attn, hidden_states)
    with AttentionScoreSkipFunctionMode():
        assert torch.equal(run(attn, hidden_states), expected)
    assert not torch.equal(edited, expected)


def test_diffusers_knows_the_processor():
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    skip = AttentionProcessorRegistry.get(EditAttnProcessor).skip_processor_output_fn
    hidden_states = random(1, 2, 3)
    assert skip(None, hidden_states) is hidden_states


def test_layers_that_cannot_be_edited_say_why():
    assert unsupported_reasons(attention(), AttnProcessor2_0()) == []
    (reason,) = unsupported_reasons(attention(), SlicedAttnProcessor(1))
    assert "pipe.disable_attention_slicing()" in reason
    (reason,) = unsupported_reasons(attention(), Recording())
    assert "Recording" in reason and "override_processors" in reason
    assert unsupported_reasons(attention(), Recording(), (Recording,)) == []
    assert unsupported_reasons(attention(), IPAdapterAttnProcessor2_0(16, cross_attention_dim=16)) == []
    (reason,) = unsupported_reasons(attention(added_kv_proj_dim=4), AttnProcessor2_0())
    assert "added_kv_proj_dim" in reason
    (reason,) = unsupported_reasons(attention(kv_heads=1), AttnProcessor2_0())
    assert "fewer key and value heads" in reason


def test_inputs_that_are_not_what_was_planned_are_refused():
    attn = install(attention(), FPE)
    with pytest.raises(ValueError, match=r"batch of 6 rows and got \[4\]"):
        run(attn, random(4, 12, 16))
    with pytest.raises(ValueError, match=r"\(3, 4\) = 12 tokens and got 13"):
        run(attn, random(6, 13, 16))
    cross = install(attention(cross_attention_dim=8), FPE)
    with pytest.raises(ValueError, match="IP-Adapter"):
        run(cross, random(6, 12, 16), encoder_hidden_states=(random(6, 5, 8), [random(6, 1, 4, 8)]))
    with pytest.raises(ValueError, match=r"got \[6, 3\]"):
        run(cross, random(6, 12, 16), encoder_hidden_states=random(3, 5, 8))
