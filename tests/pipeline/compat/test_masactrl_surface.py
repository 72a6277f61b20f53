"""MasaCtrl's surface: lazy scores, the way back, and what cannot be asked."""

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
)
from fpe_pipeline.compat.masactrl.masactrl_utils import (
    AttentionBase,
    AttentionStore,
    regiter_attention_editor_diffusers,
)
from fpe_pipeline.compat.masactrl.scores import LazyScores
from tests.support.dropin import DDIM, load_dropin_pipeline
from tests.support.tiny_pipelines import sample, tiny_pipeline, unedited

SIZE = (8, 12)
WINDOW = {"start_step": 0, "start_layer": 3}
MASK = torch.ones(4, 6)


@pytest.fixture(scope="module")
def masa():
    pipe = MasaCtrlPipeline(**load_dropin_pipeline("tiny-sd15").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.latent2image = lambda latents, return_type="np": latents  # latents are compared, not pictures
    return pipe


@pytest.fixture(scope="module")
def eight(pipe):
    return tiny_pipeline(pipe, block_out_channels=(16, 32, 32), attention_head_dim=8)


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
        with pytest.warns(MapNumbersWarning, match=r"test_masactrl_surface\.py"):
            torch.testing.assert_close(of(scores), of(dense))
    with pytest.raises(AttributeError, match="no attribute 'soft_max'"):
        scores.soft_max(-1)


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


@pytest.mark.parametrize("kind", [AttentionStore, MutualSelfAttentionControlMaskAuto])
def test_an_editor_is_used_again_after_a_run_that_broke_off(eight, kind):
    def broken(module, args):
        raise KeyboardInterrupt

    def results(editor, breaks):
        with regiter_attention_editor_diffusers(eight, editor):
            if breaks:
                with pytest.raises(KeyboardInterrupt):
                    eight.unet.up_blocks[-1].register_forward_pre_hook(broken)
                    sample(eight, 2, seed=1)
                eight.unet.up_blocks[-1]._forward_pre_hooks.clear()
                editor.reset()
            latents = sample(eight, 2)
        return (
            latents,
            getattr(editor, "cross_attns_step", []),
            [one.sum() for one in getattr(editor, "self_attns", [])],
        )

    def editor():
        return kind() if kind is AttentionStore else kind(0, 0, ref_token_idx=[2], cur_token_idx=[2], thres=0.5)

    torch.testing.assert_close(results(editor(), True), results(editor(), False), rtol=0, atol=0)


def test_what_cannot_be_asked(eight, masa):
    with pytest.raises(ValueError, match=r"layer_idx=\[99\]: the UNet has 7 self-attention layers"):
        regiter_attention_editor_diffusers(eight, MutualSelfAttentionControl(layer_idx=[3, 99]))
    with pytest.raises(ValueError, match="start_layer=10: the UNet has 7"):
        regiter_attention_editor_diffusers(eight, MutualSelfAttentionControl())
    assert unedited(eight.unet)
    with pytest.raises(TypeError, match="expected an editor"):
        regiter_attention_editor_diffusers(eight, None)
    with pytest.raises(ValueError, match="expected mask_s and mask_t, got one"):
        MutualSelfAttentionControlMask(mask_s=MASK)
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
    masked = MutualSelfAttentionControlMask(**WINDOW, mask_s=MASK, mask_t=MASK)
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


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize(
    "editor",
    [
        lambda: MutualSelfAttentionControlMask(**WINDOW, mask_s=MASK, mask_t=MASK),
        lambda: MutualSelfAttentionControlMaskAuto(**WINDOW),
    ],
    ids=["mask", "auto"],
)
def test_one_prompt_is_left_as_it_is(eight, editor, guidance_scale):
    plain = sample(eight, 1, guidance_scale=guidance_scale)
    with regiter_attention_editor_diffusers(eight, editor()):
        torch.testing.assert_close(sample(eight, 1, guidance_scale=guidance_scale), plain, rtol=0, atol=1e-4)


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
