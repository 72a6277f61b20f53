"""MasaCtrl's editors against maps that are written out: any prompts, heads and proportions."""

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline.compat.masactrl import (
    AttentionStore,
    MutualSelfAttentionControl,
    MutualSelfAttentionControlMask,
    MutualSelfAttentionControlMaskAuto,
    MutualSelfAttentionControlUnion,
    regiter_attention_editor_diffusers,
)
from tests.support.tiny_pipelines import sample, tiny_pipeline
from tests.support.written_out import dense_attention, softmax_map

SIZE = (8, 12)


@pytest.fixture(scope="module")
def eight(pipe):
    return tiny_pipeline(pipe, block_out_channels=(16, 32, 32), attention_head_dim=8)


def is_late(path, first=3):
    """Whether a path is one of the self-attention layers from ``first`` on, in the order of execution."""
    order = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    order += ["up_blocks.2.attentions.0", "up_blocks.2.attentions.1"]
    (place,) = [n for n, start in enumerate(order) if path.startswith(f"{start}.")]
    return path.endswith("attn1") and place >= first


def grid_of(tokens):
    factor = round((SIZE[0] * SIZE[1] / tokens) ** 0.5)
    return SIZE[0] // factor, SIZE[1] // factor


def nearest(mask, tokens):
    height, width = grid_of(tokens)
    rows = (torch.arange(height) * mask.shape[0] // height).long()
    return mask[rows][:, (torch.arange(width) * mask.shape[1] // width).long()].flatten()


def halves(rows):
    return (range(rows // 2), range(rows // 2, rows)) if rows > 3 else (range(rows),)


def dense_mutual(path, query, key, value, scale, first=3):
    if not is_late(path, first):
        return softmax_map(query, key, scale) @ value
    out = torch.empty_like(query)
    for half in halves(query.shape[0]):
        for row in half:
            out[row] = softmax_map(query[row], key[half[0]], scale) @ value[half[0]]
    return out


def dense_union(path, query, key, value, scale):
    if not is_late(path):
        return softmax_map(query, key, scale) @ value
    out = torch.empty_like(query)
    for half in halves(query.shape[0]):
        for row in half:
            rows = [half[0]] if row == half[0] else [half[0], row]
            keys, values = (torch.cat([part[each] for each in rows], 1) for part in (key, value))
            out[row] = softmax_map(query[row], keys, scale) @ values
    return out


MASK_S = (torch.rand(16, 24, generator=torch.Generator().manual_seed(3)) > 0.5).float()
MASK_T = (torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(4)) > 0.5).float()
SOFT = torch.rand(16, 24, generator=torch.Generator().manual_seed(5))


def weighted_softmax(query, key, scale, share):
    """A softmax in which each key counts as often as its share says; as it is where no key has one."""
    scores = query @ key.transpose(-1, -2) * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * (share if share.any() else torch.ones_like(share))
    return weights / weights.sum(-1, keepdim=True)


def dense_masked(source, targets):
    def attend(path, query, key, value, scale):
        if not is_late(path):
            return softmax_map(query, key, scale) @ value
        out = torch.empty_like(query)
        share = nearest(source, query.shape[2])
        for half in halves(query.shape[0]):
            first = half[0]
            out[first] = softmax_map(query[first], key[first], scale) @ value[first]
            for number, row in enumerate(list(half)[1:]):
                inside, outside = (weighted_softmax(query[row], key[first], scale, s) for s in (share, 1 - share))
                place = nearest(targets[number], query.shape[2])[:, None]
                out[row] = place * (inside @ value[first]) + (1 - place) * (outside @ value[first])
        return out

    return attend


WINDOW = {"start_step": 0, "start_layer": 3}
KINDS = {
    "mutual": (lambda: MutualSelfAttentionControl(**WINDOW), dense_mutual),
    "named": (
        lambda: MutualSelfAttentionControl(step_idx=[0, 1, 2], layer_idx=[5, 6]),
        lambda *layer: dense_mutual(*layer, first=5),
    ),
    "union": (lambda: MutualSelfAttentionControlUnion(**WINDOW), dense_union),
    "mask": (
        lambda: MutualSelfAttentionControlMask(**WINDOW, mask_s=MASK_S, mask_t=MASK_T),
        dense_masked(MASK_S, MASK_T),
    ),
    "soft": (
        lambda: MutualSelfAttentionControlMask(**WINDOW, mask_s=SOFT, mask_t=SOFT),
        dense_masked(SOFT, (SOFT, SOFT)),
    ),
    "empty": (
        lambda: MutualSelfAttentionControlMask(**WINDOW, mask_s=torch.zeros(4, 6), mask_t=MASK_T),
        dense_masked(torch.zeros(4, 6), MASK_T),
    ),
}


@pytest.mark.parametrize("guidance_scale", [5.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_prompts_heads_and_proportions(eight, kind, guidance_scale, no_whole_maps):
    make, attend = KINDS[kind]
    options = {"size": SIZE, "guidance_scale": guidance_scale}
    plain = sample(eight, 3, **options)
    with dense_attention(eight.unet, attend):
        expected = sample(eight, 3, **options)
    assert (expected - plain).abs().max() > 1e-3
    with regiter_attention_editor_diffusers(eight, make()):
        found = sample(eight, 3, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


#: By kind, an editor of another.
WRONG = {
    "mutual": lambda: MutualSelfAttentionControl(start_step=0, start_layer=4),
    "named": lambda: MutualSelfAttentionControl(step_idx=[0, 1, 2], layer_idx=[3, 5, 6]),
    "union": KINDS["mutual"][0],
    "mask": lambda: MutualSelfAttentionControlMask(**WINDOW, mask_s=MASK_S, mask_t=MASK_T.flip(0)),
    "soft": lambda: MutualSelfAttentionControlMask(**WINDOW, mask_s=SOFT.round(), mask_t=SOFT),
    "empty": KINDS["mask"][0],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_editor_is_seen(eight, kind):
    with dense_attention(eight.unet, KINDS[kind][1]):
        expected = sample(eight, 3, size=SIZE)
    with regiter_attention_editor_diffusers(eight, WRONG[kind]()):
        found = sample(eight, 3, size=SIZE)
    assert (found - expected).abs().max() > 10 * 2e-4


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_masks_from_words_in_any_proportions(eight, guidance_scale, no_whole_maps, tmp_path):
    tokens, thres, read = [3, 4], 0.3, []

    def attend(path, query, key, value, scale):
        attention = softmax_map(query, key, scale)
        rows = query.shape[0]
        level_1 = SIZE[0] * SIZE[1] // 4
        if path.startswith("down_blocks.0.") and path.endswith("attn1"):
            read.clear()
        if path.endswith("attn2") and query.shape[2] == level_1:
            read.append(attention.mean(1)[..., tokens].sum(-1))
        if not is_late(path) or not read:
            return attention @ value

        def mask(row):
            heat = torch.stack(read).mean(0)[row]
            share = (heat - heat.min()) / (heat.max() - heat.min())
            return nearest((share.reshape(grid_of(level_1))), query.shape[2]) >= thres

        first = rows // 2 if rows > 3 else 0
        masks = [mask(first + row).float() for row in range(3)]
        return dense_masked_tokens(masks, query, key, value, scale)

    options = {"size": SIZE, "guidance_scale": guidance_scale}
    with dense_attention(eight.unet, attend):
        expected = sample(eight, 3, **options)
    editor = MutualSelfAttentionControlMaskAuto(
        **WINDOW, thres=thres, ref_token_idx=tokens, cur_token_idx=tokens, mask_save_dir=str(tmp_path)
    )
    with regiter_attention_editor_diffusers(eight, editor):
        found = sample(eight, 3, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    other = MutualSelfAttentionControlMaskAuto(**WINDOW, thres=0.6, ref_token_idx=tokens, cur_token_idx=tokens)
    with regiter_attention_editor_diffusers(eight, other):
        assert (sample(eight, 3, **options) - expected).abs().max() > 10 * 2e-4
    assert {path.name for path in tmp_path.iterdir()} >= {"mask_s_1_6.png", "mask_t_2_12.png"}


def dense_masked_tokens(masks, query, key, value, scale):
    out = torch.empty_like(query)
    for half in halves(query.shape[0]):
        first = half[0]
        out[first] = softmax_map(query[first], key[first], scale) @ value[first]
        for number, row in enumerate(list(half)[1:], 1):
            inside, outside = (
                weighted_softmax(query[row], key[first], scale, share) for share in (masks[0], 1 - masks[0])
            )
            place = masks[number][:, None]
            out[row] = place * (inside @ value[first]) + (1 - place) * (outside @ value[first])
    return out


def test_soft_masks_shift_scores_as_the_original_does(eight):
    """A soft mask excludes nothing and is added: but for where it is 0 or 1, which it is nowhere here."""

    def attend(path, query, key, value, scale):
        if not is_late(path):
            return softmax_map(query, key, scale) @ value
        out = torch.empty_like(query)
        mask = F.interpolate(SOFT[None, None], (round(query.shape[2] ** 0.5),) * 2).flatten()
        for half in halves(query.shape[0]):
            first = half[0]
            shifted = query @ key[first].transpose(-1, -2) * scale + mask
            out[first] = softmax_map(query[first], key[first], scale) @ value[first]
            for row in list(half)[1:]:
                out[row] = shifted[row].softmax(-1) @ value[first]
        return out

    with dense_attention(eight.unet, attend):
        expected = sample(eight, 2)
    editor = MutualSelfAttentionControlMask(**WINDOW, mask_s=SOFT, mask_t=SOFT)
    with regiter_attention_editor_diffusers(eight, editor, compat="original"):
        torch.testing.assert_close(sample(eight, 2), expected, rtol=0, atol=2e-4)


def test_a_store_sums_steps_and_the_originals_empties_itself(eight):
    for compat, kept in ((None, 7), ("original", 0)):
        store = AttentionStore(max_step=3)
        with regiter_attention_editor_diffusers(eight, store, compat=compat):
            sample(eight, 1, steps=3)
        assert store.valid_steps == 2 and len(store.self_attns) == len(store.cross_attns) == kept
    rows = [attention.sum(-1) for attention in store.self_attns]
    assert rows == []


def test_sums_of_steps_are_those_of_maps(eight):
    maps, first = [], {}

    def attend(path, query, key, value, scale):
        attention = softmax_map(query, key, scale)
        first[path] = attention + first[path] if path in first else attention
        maps.append(path)
        return attention @ value

    with dense_attention(eight.unet, attend):
        sample(eight, 1, steps=2)
    store = AttentionStore()
    with regiter_attention_editor_diffusers(eight, store):
        sample(eight, 1, steps=2)
    cross = [path for path in dict.fromkeys(maps) if path.endswith("attn2")]
    for path, summed in zip(cross, store.cross_attns, strict=True):
        torch.testing.assert_close(summed[:, :, 3], first[path].flatten(0, 1)[:, :, 3], rtol=0, atol=1e-5)
