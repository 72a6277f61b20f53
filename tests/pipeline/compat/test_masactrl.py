"""MasaCtrl's surface against its authors' outputs, and against maps that are written out."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline import FreePromptEdit, editing
from fpe_pipeline.compat.controlled import controlled_layers
from fpe_pipeline.compat.lazy.numbers import MapNumbersWarning, forget_lines
from fpe_pipeline.compat.masactrl.diffuser_utils import MasaCtrlPipeline
from fpe_pipeline.compat.masactrl.masactrl import (
    MutualSelfAttentionControl,
    MutualSelfAttentionControlMask,
    MutualSelfAttentionControlMaskAuto,
    MutualSelfAttentionControlUnion,
)
from fpe_pipeline.compat.masactrl.masactrl_utils import (
    AttentionBase,
    AttentionStore,
    regiter_attention_editor_diffusers,
)
from fpe_pipeline.compat.masactrl.scores import LazyScores
from tests.support.dropin import DDIM, load_dropin, load_dropin_pipeline
from tests.support.tiny_pipelines import sample, tiny_pipeline, unedited
from tests.support.written_out import dense_attention, softmax_map

SIZE = (8, 12)


@pytest.fixture(scope="module")
def masa():
    pipe = MasaCtrlPipeline(**load_dropin_pipeline("tiny-sd15").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.latent2image = lambda latents, return_type="np": latents  # latents are compared, not pictures
    return pipe


@pytest.fixture(scope="module")
def eight(pipe):
    return tiny_pipeline(pipe, block_out_channels=(16, 32, 32), attention_head_dim=8)


class UsersEditor(AttentionBase):
    """The case's own editor, as a user writes it: MasaCtrl's names, and tensors' operations."""

    start, factor, renormalises = 1, 1.2, False

    def forward(self, q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs):
        if is_cross:
            attn = attn.clone()
            attn[:, :, 5] = attn[:, :, 5] * 2
            if self.renormalises:
                attn = attn / attn.sum(-1, keepdim=True)
        elif place_in_unet == "up" and self.cur_step >= self.start:
            halves = [half[:num_heads].repeat(half.shape[0] // num_heads, 1, 1) for half in k.chunk(2)]
            other = torch.einsum("b i d, b j d -> b i j", q, torch.cat(halves)) * kwargs["scale"]
            attn = (0.5 * sim + 0.5 * (self.factor * other)).softmax(dim=-1)
        return super().forward(q, k, v, sim, attn, is_cross, place_in_unet, num_heads, **kwargs)


def editor_of(name, tensors):
    if name == "masa_user_forward":
        return UsersEditor()
    window = {"start_step": 1, "start_layer": 8}
    if name == "masa_mask":
        return MutualSelfAttentionControlMask(**window, mask_s=tensors["in.mask_s"], mask_t=tensors["in.mask_t"])
    return MutualSelfAttentionControlMaskAuto(**window, thres=0.5, ref_token_idx=[5], cur_token_idx=[5])


def misses(pipe, case, editor):
    given = case.settings
    side = given["latent_res"] * 8
    with regiter_attention_editor_diffusers(pipe, editor, compat="original"):
        latents, _, trajectory = pipe(
            given["prompts"],
            height=side,
            width=side,
            num_inference_steps=given["steps"],
            guidance_scale=given["guidance_scale"],
            latents=case.start(2),
            return_intermediates=True,
        )
    assert editor.cur_step == given["steps"]
    return case.miss("latents", latents), case.miss("latents_step1", trajectory[1])


@pytest.mark.parametrize("name", ["masa_user_forward", "masa_mask", "masa_mask_auto"])
def test_is_what_the_authors_compute(masa, name, no_whole_maps):
    case = load_dropin(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MapNumbersWarning)  # no numbers of a map are needed
        assert max(misses(masa, case, editor_of(name, case.tensors))) <= 1
    assert unedited(masa.unet)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("masa_user_forward", {"renormalises": True}),
        ("masa_user_forward", {"factor": 1.0}),
        ("masa_user_forward", {"start": 2}),
        ("masa_mask", {"mask_s": None, "mask_t": None}),
        ("masa_mask", "swapped"),
        ("masa_mask_auto", {"thres": 0.4}),
        ("masa_mask_auto", {"ref_token_idx": [6], "cur_token_idx": [6]}),
    ],
)
def test_another_editor_is_seen(masa, name, change):
    case = load_dropin(name)
    editor = editor_of(name, case.tensors)
    if change == "swapped":
        change = {"mask_s": editor.mask_t, "mask_t": editor.mask_s}
    for field, value in change.items():
        setattr(editor, field, value)
    latents, _ = misses(masa, case, editor)
    assert latents > 10


# -- any prompts, heads and proportions -


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


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
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


# -- scores -


def test_scores_are_a_tensor_to_who_looks(recwarn):
    forget_lines()
    query, key = torch.randn(4, 6, 8), torch.randn(4, 5, 8)
    scores, dense = LazyScores(query, key, 0.3), 0.3 * query @ key.transpose(1, 2)
    mask, own = torch.randn(5), torch.randn(4, 6, 5)
    assert scores.shape == dense.shape and scores.size(1) == 6 and len(scores) == 4 and scores.ndim == 3
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    value = torch.randn(4, 5, 3)
    for lazy, whole in (
        (scores, dense),
        (2 * scores + mask, 2 * dense + mask),
        (mask + scores / 2 - own, mask + dense / 2 - own),
        (torch.add(scores, own)[2:], torch.add(dense, own)[2:]),
        (torch.mul(-scores, 0.5).chunk(2)[1], -dense.chunk(2)[1] / 2),
        (scores + 1.0 + mask[None, None], dense + 1.0 + mask),
    ):
        rows = value[-len(whole) :]
        torch.testing.assert_close(lazy.softmax(-1) @ rows, whole.softmax(-1) @ rows)
        torch.testing.assert_close(torch.softmax(lazy, dim=-1) @ rows, whole.softmax(-1) @ rows)
        torch.testing.assert_close(F.softmax(lazy, dim=-1)[..., 2], whole.softmax(-1)[..., 2])
    assert not recwarn.list
    for of in (lambda s: s.amax(-1), lambda s: s[0], lambda s: torch.exp(s), lambda s: s.softmax(1), lambda s: s * own):
        forget_lines()
        with pytest.warns(MapNumbersWarning, match=r"test_masactrl\.py"):
            torch.testing.assert_close(of(scores), of(dense))
    with pytest.raises(AttributeError, match="no attribute 'soft_max'"):
        scores.soft_max(-1)


# -- the way back, and what cannot be asked -


def test_the_pipeline_is_left_as_it_was(eight):
    before, plain = dict(eight.unet.attn_processors), sample(eight, 2)

    class Failing(AttentionBase):
        def forward(self, *layer, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), regiter_attention_editor_diffusers(eight, Failing()):
        sample(eight, 2)
    registered = regiter_attention_editor_diffusers(eight, MutualSelfAttentionControl(**WINDOW))
    regiter_attention_editor_diffusers(eight, AttentionBase()).restore()
    registered.restore()
    assert controlled_layers(eight) is None and unedited(eight.unet)
    assert all(eight.unet.attn_processors[name] is processor for name, processor in before.items())
    torch.testing.assert_close(sample(eight, 2), plain, rtol=0, atol=0)


def test_an_editor_is_used_again_after_reset(eight):
    editor = MutualSelfAttentionControl(step_idx=[0, 1, 2], layer_idx=[5])
    with regiter_attention_editor_diffusers(eight, editor):
        first = sample(eight, 2)
        editor.reset()
        torch.testing.assert_close(sample(eight, 2), first, rtol=0, atol=0)
        assert (sample(eight, 2) - first).abs().max() > 1e-4  # its steps are past, as in the original


def test_what_cannot_be_asked(eight, masa):
    with pytest.raises(ValueError, match=r"layer_idx=\[99\]: the UNet has 7 self-attention layers"):
        regiter_attention_editor_diffusers(eight, MutualSelfAttentionControl(layer_idx=[3, 99]))
    with pytest.raises(ValueError, match="start_layer=10: the UNet has 7"):
        regiter_attention_editor_diffusers(eight, MutualSelfAttentionControl())
    assert unedited(eight.unet)
    with pytest.raises(TypeError, match="expected an editor"):
        regiter_attention_editor_diffusers(eight, None)
    with pytest.raises(ValueError, match="expected mask_s and mask_t, got one"):
        MutualSelfAttentionControlMask(mask_s=MASK_S)
    with editing(eight, FreePromptEdit()), pytest.raises(ValueError, match="editing session"):
        regiter_attention_editor_diffusers(eight, AttentionBase())

    class Map(AttentionBase):
        def forward(self, q, k, v, sim, attn, *layer, **kwargs):
            return attn

    with regiter_attention_editor_diffusers(eight, Map()), pytest.raises(TypeError, match=r"an editor gives \[rows, N"):
        sample(eight, 1)
    auto = MutualSelfAttentionControlMaskAuto(**WINDOW, ref_token_idx=[77])
    with regiter_attention_editor_diffusers(eight, auto), pytest.raises(ValueError, match="have 77 tokens"):
        sample(eight, 2)
    masked = MutualSelfAttentionControlMask(**WINDOW, mask_s=MASK_S, mask_t=MASK_T)
    with (
        regiter_attention_editor_diffusers(eight, masked, compat="original"),
        pytest.raises(ValueError, match="masks are for squares"),
    ):
        sample(eight, 2, size=SIZE)
    with pytest.raises(ValueError, match="expected eta to be 0"):
        masa("a cat", eta=0.5)
    with pytest.raises(TypeError, match="takes no guidance"):
        masa("a cat", guidance=3.0)
    with pytest.raises(ImportError, match="leaves out 'regiter_attention_editor_ldm'"):
        from fpe_pipeline.compat.masactrl.masactrl_utils import regiter_attention_editor_ldm  # noqa: F401
    with pytest.raises(ImportError, match="no 'MutualSelfAttention' here: did you mean"):
        from fpe_pipeline.compat.masactrl import MutualSelfAttention  # noqa: F401


def test_arguments_come_in_masactrls_order(masa):
    noise = torch.randn(1, 4, 8, 8)
    prompts = ["a cat", "a dog"]
    named = masa(prompts, num_inference_steps=2, guidance_scale=3.0, latents=noise, height=64, width=64)
    placed = masa(prompts, 2, 64, 64, 2, 3.0, 0.0, noise)
    torch.testing.assert_close(placed, named, rtol=0, atol=0)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    start, trajectory = masa.invert(image, "a cat", 2, 1.0, 0.0, True)
    assert len(trajectory) == 3 and torch.equal(trajectory[-1], start)
    assert masa.scheduler.config.beta_end == DDIM["beta_end"]
