"""MasaCtrl's surface against its authors' outputs."""

import warnings

import pytest
import torch

from fpe_pipeline.compat.lazy.numbers import MapNumbersWarning
from fpe_pipeline.compat.masactrl.diffuser_utils import MasaCtrlPipeline
from fpe_pipeline.compat.masactrl.masactrl import MutualSelfAttentionControlMask, MutualSelfAttentionControlMaskAuto
from fpe_pipeline.compat.masactrl.masactrl_utils import AttentionBase, regiter_attention_editor_diffusers
from tests.support.dropin import load_dropin, load_dropin_pipeline
from tests.support.tiny_pipelines import unedited


@pytest.fixture(scope="module")
def masa():
    pipe = MasaCtrlPipeline(**load_dropin_pipeline("tiny-sd15").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.latent2image = lambda latents, return_type="np": latents  # latents are compared, not pictures
    return pipe


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
        pytest.param("masa_user_forward", {"factor": 1.0}, marks=pytest.mark.slow),
        pytest.param("masa_user_forward", {"start": 2}, marks=pytest.mark.slow),
        pytest.param("masa_mask", {"mask_s": None, "mask_t": None}, marks=pytest.mark.slow),
        ("masa_mask", "swapped"),
        pytest.param("masa_mask_auto", {"thres": 0.4}, marks=pytest.mark.slow),
        pytest.param("masa_mask_auto", {"ref_token_idx": [6], "cur_token_idx": [6]}, marks=pytest.mark.slow),
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
