"""The shipped edits, in whole runs, against dense implementations of their papers' equations in float64."""

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline import FreePromptEdit, LocalBlend, PlugAndPlayEdit, PromptToPromptEdit, WordMask, editing
from tests.support.dense_methods import (
    STEPS,
    TOKENS,
    DenseRun,
    Words,
    in_window,
    prompt_to_prompt,
    refine_mapper,
    replace_mapper,
)

SIZE = (6, 10)
PROMPTS = ["a red car on the street", "a hippopotamus car on the street"]
REFINED = ["a red car on the street", "a very red car on street at night"]


def check(run, edit, change, **hooks):
    """An edit gives what changed maps give, and that is not what unchanged ones give; returns both rows' latents."""
    session = editing(run.unet, edit, classifier_free_guidance=True)
    actual = run.edited(session)
    unedited = run.dense(session.sites, lambda site, step, maps: maps)
    expected = run.dense(session.sites, change, **hooks)
    assert (actual - expected).abs().max() <= 1e-10
    assert (expected - unedited)[0].abs().max() <= 1e-10
    assert (expected - unedited)[1:].abs().amax((1, 2, 3)).min() > 1e-4
    return expected


def words_of(prompts, tokenizer, mappers, weights, window, word_windows):
    """The change of Prompt-to-Prompt in cross-attention: ``change(step, maps)``."""
    source, *targets = [Words(prompt, tokenizer) for prompt in prompts]

    def change(step, maps):
        count = len(prompts)
        for number, target in enumerate(targets, start=1):
            factors = torch.ones(TOKENS, dtype=torch.float64)
            alpha = torch.full((TOKENS,), float(in_window(step, *window, STEPS + 1)), dtype=torch.float64)
            for word, factor in weights.items():
                factors[target.of(word)] = factor
            for word, own in word_windows.items():
                alpha[target.of(word)] = float(in_window(step, *own, STEPS + 1))
            mapper, kept = mappers(source, target)
            row = count + number
            maps[row] = prompt_to_prompt(maps[count], maps[row], mapper, kept, factors, alpha)
        return maps

    return change


CASES = {
    "replace": (PROMPTS, "replace", replace_mapper, {}, {}),
    "replace, swapped": (PROMPTS[::-1], "replace", replace_mapper, {}, {}),
    "replace, words": (
        PROMPTS,
        "replace",
        replace_mapper,
        {"car": 2.5, "hippopotamus": -1.0},
        {"hippopotamus": (0.2, 0.6), "street": (0.0, 1.0)},
    ),
    "refine": (REFINED, "refine", refine_mapper, {}, {}),
    "refine, words": (REFINED, "refine", refine_mapper, {"very": 2.0, "car": 0.5}, {"red": (0.0, 0.1)}),
    "two targets": (
        [*REFINED, "a car on the wide street"],
        "refine",
        refine_mapper,
        {"night": 3.0},
        {"car": (0.5, 1.0)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prompt_to_prompt(pipe, name):
    prompts, align, mappers, weights, word_windows = CASES[name]
    cross = words_of(prompts, pipe.tokenizer, mappers, weights, (0.0, 0.7), word_windows)

    def change(site, step, maps):
        if site.kind == "cross":
            return cross(step, maps)
        if site.level >= 2 and in_window(step, 0.0, 0.4):
            maps[len(prompts) :] = maps[len(prompts)].clone()
        return maps

    windows = {"default_": 0.7, **word_windows}
    edit = PromptToPromptEdit(prompts, pipe.tokenizer, align, windows, 0.4, weights)
    check(DenseRun(len(prompts), SIZE), edit, change)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_free_prompt_editing_beside_prompt_to_prompt(pipe, strength):
    weights, word_windows = {"very": 2.0}, {"red": (0.0, 0.3)}
    cross = words_of(REFINED, pipe.tokenizer, refine_mapper, weights, (0.0, 0.8), word_windows)

    def change(site, step, maps):
        if site.kind == "cross":
            return cross(step, maps)
        if site.level in (0, 1) and in_window(step, 0.2, 0.8):
            maps[3] = strength * maps[2] + (1 - strength) * maps[3]
        return maps

    words = PromptToPromptEdit(REFINED, pipe.tokenizer, "refine", {"default_": 0.8, **word_windows}, 0, weights)
    check(DenseRun(2, SIZE), words + FreePromptEdit((0.2, 0.8), strength=strength, levels=(0, 1)), change)


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("levels", [None, (0, 1)])
def test_a_region_from_the_heat_of_a_word(pipe, threshold, levels):
    """The region of a step is that of the steps before; in the first it is everywhere."""
    run, car = DenseRun(2, SIZE), Words(PROMPTS[0], pipe.tokenizer).of("car")
    shares = []

    def read(step):
        sites = [site for site in session.sites if site.kind == "cross" and site.place != "mid"]
        heat = run.heat([site for site in sites if site.level in (levels or (1,))], 2, car) if step else None
        shares.append(None if heat is None else heat / heat.max())

    def change(site, step, maps):
        if site.kind == "cross" or site.level > 1 or not in_window(step, 0.0, 0.8):
            return maps
        weight = torch.ones(site.grid, dtype=torch.float64)
        if shares[step] is not None:
            weight = F.interpolate(shares[step][None, None], site.grid, mode="bilinear")[0, 0]
            weight = weight if threshold is None else (weight >= threshold).double()
            assert 0 < weight.mean() < 1
        weight = weight.reshape(-1, 1)
        maps[3] = weight * maps[2] + (1 - weight) * maps[3]
        return maps

    mask = WordMask(PROMPTS[0], "car", pipe.tokenizer, threshold=threshold, levels=levels)
    edit = FreePromptEdit(0.8, mask=mask, levels=(0, 1))
    session = editing(run.unet, edit, classifier_free_guidance=True)
    check(run, edit, change, before=read)


@pytest.mark.parametrize("size", [(6, 10), (12, 7)])
@pytest.mark.parametrize("levels", [None, (0, 1)])
def test_local_blend(pipe, size, levels):
    """Of edited maps, on latents of any shape, from the second step of five on."""
    run = DenseRun(2, size)
    source, target = (Words(prompt, pipe.tokenizer) for prompt in PROMPTS)
    cross = words_of(PROMPTS, pipe.tokenizer, replace_mapper, {}, (0.0, 0.7), {})
    kept = []

    def change(site, step, maps):
        return cross(step, maps) if site.kind == "cross" else maps

    def blend(latents, step):
        if step < int(STEPS * 0.3):
            return latents
        sites = [site for site in session.sites if site.kind == "cross" and site.place != "mid"]
        sites = [site for site in sites if site.level in (levels or (1,))]
        mask = torch.zeros(size, dtype=torch.bool)
        for row, tokens in ((2, source.of("red")), (3, target.of("hippopotamus"))):
            heat = F.max_pool2d(run.heat(sites, row, tokens)[None, None], 3, 1, padding=1)
            heat = F.interpolate(heat, size=size)[0, 0]
            mask |= heat / heat.max() > 0.9
        kept.append(1 - mask.double().mean())
        return torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])

    edit = PromptToPromptEdit(PROMPTS, pipe.tokenizer, "replace", 0.7, 0)
    edit += LocalBlend(PROMPTS, pipe.tokenizer, ("red", "hippopotamus"), 0.9, start=0.3, levels=levels)
    session = editing(run.unet, edit, classifier_free_guidance=True)
    expected = check(run, edit, change, after=lambda latents, step: blend(latents, step))
    assert len(kept) == STEPS - 1 and all(0 < share < 1 for share in kept)
    assert (expected[0] == expected[1]).all(0).double().mean() == pytest.approx(kept[-1].item())


def test_plug_and_play():
    """Features and maps of both halves, from each half's own source."""
    run = DenseRun(2, SIZE)
    later = ("up_blocks.1.attentions.1.", "up_blocks.2.attentions.")
    taken = []

    def change(site, step, maps):
        if site.kind == "self" and site.path.startswith(later) and in_window(step, 0.0, 0.5):
            taken.append(site.path)
            maps[1], maps[3] = maps[0], maps[2]
        return maps

    def inject(module, args, output):
        return torch.stack([output[0], output[0], output[2], output[2]]) if in_window(now[0], 0.0, 0.8) else None

    def before(step):
        now[0] = step

    now = [0]
    edit = PlugAndPlayEdit()
    session = editing(run.unet, edit, classifier_free_guidance=True)
    actual = run.edited(session)
    unedited = run.sample()
    handle = run.unet.get_submodule("up_blocks.1.resnets.1.conv2").register_forward_hook(inject)
    try:
        expected = run.dense(session.sites, change, before=before)
        features = run.dense(session.sites, lambda site, step, maps: maps, before=before)
    finally:
        handle.remove()
    assert len(set(taken)) == 3
    assert (actual - expected).abs().max() <= 1e-10
    assert (expected - unedited)[0].abs().max() <= 1e-10
    assert (expected - features)[1].abs().max() > 1e-4  # both the maps and the features matter
    assert (features - unedited)[1].abs().max() > 1e-4
