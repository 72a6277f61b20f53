"""Prompt-to-Prompt's classes beside written-out maps in float64: three prompts, eight heads, sizes that are no squares,
other thresholds, with and without guidance."""

import pytest
import torch

from fpe_pipeline.compat.free_prompt_editing import SelfAttentionControlEdit, register_attention_control_new
from fpe_pipeline.compat.lazy import LazyMap
from fpe_pipeline.compat.prompt_to_prompt import (
    AttentionControl,
    AttentionRefine,
    AttentionReplace,
    AttentionReweight,
    AttentionStore,
    LocalBlend,
    aggregate_attention,
    get_equalizer,
    ptp_utils,
    seq_aligner,
)
from tests.support.dense_controllers import Counting, DenseEdit, dense_controlled
from tests.support.tiny_pipelines import tiny_pipeline

PROMPTS = ["a photo of a red car", "a photo of a blue car", "a photo of a green ducks"]
ADDED = ["a photo of a car", "a photo of a blue car", "a photo of a green car"]
STEPS, HEADS, SIZE = 4, 8, (16, 24)
THRESHOLD = 0.998  # the maps of a random UNet are nearly even
CROSS, SELF = {"default_": 0.6, "blue": (0.2, 1.0)}, 0.75


@pytest.fixture(scope="module")
def eight_heads(pipe):
    return tiny_pipeline(
        pipe,
        dtype=torch.float64,
        block_out_channels=(16, 32, 32),
        attention_head_dim=HEADS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def embedded_words(eight_heads):
    def embedded(prompts):
        towards, away = eight_heads.encode_prompt(prompts, "cpu", 1, True)
        return towards.double(), away.double()

    return embedded


def sampled(pipe, controller, words, guided=True):
    """Latents after a loop of the test's own."""
    towards, away = words
    latents = (
        torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(0)).double().expand(len(towards), -1, -1, -1)
    )
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            if guided:
                context = torch.cat([away, towards])
                latents = ptp_utils.diffusion_step(pipe, controller, latents, context, t, 5.0)
            else:
                noise = pipe.unet(latents, t, encoder_hidden_states=towards).sample
                latents = controller.step_callback(pipe.scheduler.step(noise, t, latents).prev_sample)
    return latents


def both(pipe, lazy, dense, words, guided=True, register=ptp_utils.register_attention_control):
    """Latents by the class and by written-out maps, which differ from those without a controller."""
    with register(pipe, lazy, backend="reference"):
        mine = sampled(pipe, lazy, words, guided)
    with dense_controlled(pipe, dense):
        theirs = sampled(pipe, dense, words, guided)
    plain = sampled(pipe, Counting([]), words, guided)
    assert (theirs[1:] - plain[1:]).abs().max() > 1e-3
    return mine, theirs


def alphas(pipe, prompts, windows=CROSS):
    alpha = ptp_utils.get_time_words_attention_alpha(prompts, STEPS, windows, pipe.tokenizer)
    return alpha[:, :, 0, 0].double()


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def seen(mine, theirs):
    """Another variant misses by more than a thousand tolerances."""
    assert (mine - theirs).abs().max() > 1e-6


def dense_replacement(pipe, guided=True):
    mapper = seq_aligner.get_replacement_mapper(PROMPTS, pipe.tokenizer).double()
    own = torch.zeros(2, 77).double()
    return DenseEdit(PROMPTS, alphas(pipe, PROMPTS), mapper, own, (0, 3), 24, guided=guided)


@pytest.mark.parametrize("guided", [True, False])
def test_replacement(eight_heads, embedded_words, guided):
    lazy = AttentionReplace(PROMPTS, STEPS, CROSS, SELF, self_tokens=24)
    close(*both(eight_heads, lazy, dense_replacement(eight_heads, guided), embedded_words(PROMPTS), guided))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        lambda: AttentionReplace(PROMPTS, STEPS, 0.6, SELF, self_tokens=24),
        lambda: AttentionReplace(PROMPTS, STEPS, CROSS, 0.5, self_tokens=24),
        lambda: AttentionReplace(PROMPTS, STEPS, CROSS, SELF, self_tokens=16**2),
        lambda: AttentionReplace([PROMPTS[0], *PROMPTS[:0:-1]], STEPS, CROSS, SELF, self_tokens=24),
        lambda: AttentionRefine(PROMPTS, STEPS, CROSS, SELF, self_tokens=24),
    ],
    ids=["a word's window", "the window of self-attention", "other layers", "targets' order", "refinement"],
)
def test_a_wrong_replacement_is_seen(eight_heads, embedded_words, wrong):
    seen(*both(eight_heads, wrong(), dense_replacement(eight_heads), embedded_words(PROMPTS)))


def refined(pipe, factors=1.0):
    mapper, kept = seq_aligner.get_refinement_mapper(ADDED, pipe.tokenizer)
    onto = torch.nn.functional.one_hot(mapper.clamp_min(0), 77).double().transpose(-1, -2) * kept[:, None].double()
    return onto * factors, (1 - kept.double()) * factors


def refining(threshold=THRESHOLD, blended=("car", "car", ("green", "car")), values=(3.0, -1.0), inner=True):
    factors = get_equalizer(ADDED[1], ["blue", "car"], list(values))
    edit = AttentionRefine(ADDED, STEPS, CROSS, SELF) if inner else None
    return AttentionReweight(ADDED, STEPS, CROSS, SELF, factors, LocalBlend(ADDED, list(blended), threshold), edit)


def dense_refinement(eight_heads):
    words = torch.zeros(3, 77).double()
    for row, prompt in enumerate(ADDED):
        for word in (("car",), ("car",), ("green", "car"))[row]:
            words[row, seq_aligner.get_word_inds(prompt, word, eight_heads.tokenizer)] = 1
    weights = get_equalizer(ADDED[1], ["blue", "car"], [3.0, -1.0], eight_heads.tokenizer).double()
    return DenseEdit(
        ADDED, alphas(eight_heads, ADDED), *refined(eight_heads, weights), (0, 3), 16**2, blend=(THRESHOLD, words)
    )


def test_refinement_with_factors_and_a_local_blend(eight_heads, embedded_words):
    dense = dense_refinement(eight_heads)
    mine, theirs = both(eight_heads, refining(), dense, embedded_words(ADDED))
    close(mine, theirs)
    unblended = DenseEdit(ADDED, dense.alpha, dense.mixing, dense.own, dense.window, dense.most)
    with dense_controlled(eight_heads, unblended):
        assert (sampled(eight_heads, unblended, embedded_words(ADDED)) - theirs).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0.3},
        {"blended": ("photo", "photo", "photo")},
        {"values": (3.0, 1.0)},
        {"inner": False},
    ],
    ids=str,
)
def test_a_wrong_refinement_is_seen(eight_heads, embedded_words, wrong):
    seen(*both(eight_heads, refining(**wrong), dense_refinement(eight_heads), embedded_words(ADDED)))


class DenseSelf(Counting):
    def edit(self, maps, is_cross):
        inside = not is_cross and 1 <= self.step < 3 and maps.shape[-1] <= 30
        return maps[:1].expand_as(maps) if inside else maps


class Seen(SelfAttentionControlEdit):
    def forward(self, attn, is_cross, place_in_unet):
        assert isinstance(attn, LazyMap)
        return super().forward(attn, is_cross, place_in_unet)


@pytest.mark.parametrize("guided", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [SelfAttentionControlEdit, Seen])
def test_free_prompt_editing(eight_heads, embedded_words, kind, guided):
    lazy = kind(PROMPTS, STEPS, 5, (0.3, 0.75))
    lazy.max_tokens = 30
    dense, words = DenseSelf(PROMPTS, guided), embedded_words(PROMPTS)
    close(*both(eight_heads, lazy, dense, words, guided, register_attention_control_new))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "most"), [((0.3, 0.5), 30), ((0.0, 0.75), 30), ((0.3, 0.75), 200)], ids=["end", "begin", "layers"]
)
@pytest.mark.parametrize("kind", [SelfAttentionControlEdit, Seen])
def test_another_window_of_free_prompt_editing_is_seen(eight_heads, embedded_words, kind, window, most):
    lazy = kind(PROMPTS, STEPS, 5, window)
    lazy.max_tokens = most
    words = embedded_words(PROMPTS)
    seen(*both(eight_heads, lazy, DenseSelf(PROMPTS), words, register=register_attention_control_new))


class Everything(AttentionControl):
    """What a user might write, of every kind of operation."""

    def forward(self, attn, is_cross, place_in_unet):
        attn = attn.clone()
        by_prompt = attn.reshape(3, HEADS, *attn.shape[1:])
        if is_cross:
            by_prompt[1:, :, :, 2:5] = by_prompt[:1, :, :, 3:6].mean(1, keepdim=True)
            attn[:, :, 1] *= 0.5
            return attn / attn.sum(-1, keepdim=True)
        if attn.shape[1] <= 30:
            mean = by_prompt.mean(1, keepdim=True)
            by_prompt[1:] = 0.25 * by_prompt[:1] + 0.75 * mean[1:]
        return attn


class Otherwise(Everything):
    """The same, and a column that is not halved."""

    def forward(self, attn, is_cross, place_in_unet):
        if is_cross:
            attn = attn.clone()
            attn[:, :, 1] *= 2.0
        return super().forward(attn, is_cross, place_in_unet)


class DenseEverything(Counting):
    def edit(self, maps, is_cross):
        if is_cross:
            maps[1:, :, :, 2:5] = maps[:1, :, :, 3:6].mean(1, keepdim=True)
            maps[..., 1] *= 0.5
            return maps / maps.sum(-1, keepdim=True)
        if maps.shape[-1] <= 30:
            mean = maps.mean(1, keepdim=True)
            maps[1:] = 0.25 * maps[:1] + 0.75 * mean[1:]
        return maps


@pytest.mark.slow
@pytest.mark.filterwarnings("error::fpe_pipeline.compat.lazy.MapNumbersWarning")
def test_a_users_own(eight_heads, embedded_words):
    close(*both(eight_heads, Everything(), DenseEverything(PROMPTS), embedded_words(PROMPTS)))


@pytest.mark.slow
def test_another_of_a_users_own_is_seen(eight_heads, embedded_words):
    seen(*both(eight_heads, Otherwise(), DenseEverything(PROMPTS), embedded_words(PROMPTS)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fpe_pipeline.compat.lazy.MapNumbersWarning")
def test_the_store(eight_heads, embedded_words):
    store, dense, words = AttentionStore(), Counting(PROMPTS), embedded_words(PROMPTS)
    with ptp_utils.register_attention_control(eight_heads, store, backend="reference"):
        sampled(eight_heads, store, words)
    with dense_controlled(eight_heads, dense):
        sampled(eight_heads, dense, words)
    averages = store.get_average_attention()
    for (step, place, is_cross), matrices in dense.kept.items():
        if step == 0:
            kept = averages[f"{place}_{'cross' if is_cross else 'self'}"]
            assert len(kept) == len(matrices)
            for number, average in enumerate(kept):
                steps = [dense.kept[other, place, is_cross][number] for other in range(STEPS)]
                close(average.numbers(), torch.stack(steps).mean(0).flatten(0, 1))
                seen(average.numbers(), torch.stack(steps[1:]).mean(0).flatten(0, 1))
    size = (4, 6)
    wanted = [dense.kept[step, place, True] for step in range(STEPS) for place in ("up", "down")]
    maps = [matrix[2] for matrices in wanted for matrix in matrices if matrix.shape[2] == size[0] * size[1]]
    aggregated = aggregate_attention(store, size, ("up", "down"), True, 2)
    assert aggregated.shape == (*size, 77)
    close(aggregated[:, :, 4], torch.cat(maps).mean(0)[:, 4].reshape(size))
    held = store.held().splitlines()
    assert len(held) == store.num_att_layers and any("as numbers" in line for line in held)
