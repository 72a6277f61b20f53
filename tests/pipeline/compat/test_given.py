"""What users of other tools pass by mistake is refused with its name, what was expected and what came."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from PIL import Image

from fpe_pipeline.compat import daam, free_prompt_editing, masactrl, pnp_diffusers, pnp_inversion, prompt_to_prompt
from fpe_pipeline.compat.free_flux import register_non_rigid_attention_control
from fpe_pipeline.compat.prompt_to_prompt import ptp_utils
from fpe_pipeline.compat.stable_flow import FluxPipeline
from tests.support.tiny_pipelines import PROMPTS, shared_noise, tiny_pipeline
from tests.support.tiny_transformers import tiny_flux_pipeline

TWO = PROMPTS[:2]
#: What is no share of the steps: the first four, and a third number of a pair, changed what was edited in silence.
NO_SHARES = [80, -0.2, (0.8, 0), True, (0, 0.4, 0.8), "0.8", None, float("nan"), torch.ones(2, 2)]


@pytest.mark.parametrize("value", NO_SHARES, ids=str)
def test_windows_that_are_no_shares(value):
    with pytest.raises(ValueError, match=r"^cross_replace_steps: expected (a|the) "):
        prompt_to_prompt.AttentionReplace(TWO, 10, value, 0.4)
    with pytest.raises(ValueError, match=r"^cross_replace_steps\['blue'\]: expected (a|the) "):
        prompt_to_prompt.AttentionReplace(TWO, 10, {"default_": 0.8, "blue": value}, 0.4)
    with pytest.raises(ValueError, match=r"^self_replace_steps: expected (a|the) "):
        prompt_to_prompt.AttentionReplace(TWO, 10, 0.8, value)
    if value is not None:  # where the original's third argument is the share
        with pytest.raises(ValueError, match=r"^self_replace_steps: expected (a|the) "):
            free_prompt_editing.SelfAttentionControlEdit(TWO, 10, self_replace_steps=value)


@pytest.mark.parametrize("share", [np.float32(0.5), np.array([0, 0.5]), torch.tensor(0.5), [0, 0.5]], ids=str)
def test_shares_of_any_kind(share, pipe):
    controller = prompt_to_prompt.AttentionReplace(TWO, 10, share, share, tokenizer=pipe.tokenizer)
    assert controller.num_self_replace == (0, 5)
    assert controller.cross_replace_alpha[:5].all() and not controller.cross_replace_alpha[5:].any()
    assert free_prompt_editing.SelfAttentionControlEdit(TWO, 10, 16, share).num_self_replace == (0, 5)


@pytest.mark.parametrize("steps", ["10", 10.0, 0, -1, None, True])
def test_steps_that_are_no_number(steps, pipe):
    with pytest.raises(ValueError, match="num_steps must be a whole number from 1 on"):
        prompt_to_prompt.AttentionReplace(TWO, steps, 0.8, 0.4)
    with pytest.raises(ValueError, match="num_steps must be a whole number from 1 on"):
        free_prompt_editing.SelfAttentionControlEdit(TWO, steps, 0.8)
    with pytest.raises(ValueError, match="num_steps must be a whole number from 1 on"):
        ptp_utils.get_time_words_attention_alpha(TWO, steps, 0.8, pipe.tokenizer)


@pytest.mark.parametrize("value", [5, 0.1, True, ["masks"]], ids=str)
def test_folders_that_are_no_paths(value, tmp_path, monkeypatch):
    """Made by mistake, one called 5 was filled with masks."""
    monkeypatch.chdir(tmp_path)
    mask = np.ones((4, 4))
    with pytest.raises(ValueError, match=r"^mask_save_dir: expected a folder's path or None, got "):
        masactrl.MutualSelfAttentionControlMaskAuto(mask_save_dir=value)
    with pytest.raises(ValueError, match=r"^mask_save_dir: expected a folder's path or None, got "):
        masactrl.MutualSelfAttentionControlMask(mask_s=mask, mask_t=mask, mask_save_dir=value)
    assert not list(tmp_path.iterdir())
    masactrl.MutualSelfAttentionControlMask(mask_s=mask, mask_t=mask, mask_save_dir=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_side_in_the_place_of_the_share():
    with pytest.raises(ValueError, match="res must be a whole number"):
        free_prompt_editing.SelfAttentionControlEdit(TWO, 10, 0.8, 0.4)  # Prompt-to-Prompt's two shares


class _Loop:
    """A tiny pipeline's two loops with lists that belong to steps."""

    def __init__(self, pipe):
        self.pipe = tiny_pipeline(pipe)
        own = free_prompt_editing.FreePromptPipeline(**self.pipe.components, requires_safety_checker=False)
        own.set_progress_bar_config(disable=True)
        self.own, self.noise = own, shared_noise(1)

    def prompt_to_prompt(self, steps=3, prompts=TWO, **options):
        options = {"latent": self.noise, "return_type": "latents", **options}
        return ptp_utils.text2image_ldm_stable(self.pipe, prompts, prompt_to_prompt.EmptyControl(), steps, **options)[0]

    def free_prompt_editing(self, steps=3, prompts=TWO, **options):
        return self.own(prompts, num_inference_steps=steps, latents=self.noise, **options)


@pytest.fixture(scope="module")
def loop(pipe):
    return _Loop(pipe)


@pytest.mark.parametrize("count", [1, 9])
def test_lists_of_other_numbers_of_steps(loop, count):
    """Too many belong to other timesteps, which was not said; too few were missed after the steps that have one."""
    embeddings, latents = [torch.zeros(1, 77, 32)] * count, [loop.noise] * count
    with pytest.raises(ValueError, match=rf"^uncond_embeddings: expected 3 embeddings, got {count} embeddings"):
        loop.prompt_to_prompt(uncond_embeddings=embeddings)
    with pytest.raises(ValueError, match=rf"^unconditioning: expected 3 embeddings, got {count} embeddings"):
        loop.free_prompt_editing(unconditioning=embeddings)
    with pytest.raises(ValueError, match=rf"^ref_intermediate_latents: expected 4 latents, got {count} latents"):
        loop.free_prompt_editing(ref_intermediate_latents=latents)
    with pytest.raises(ValueError, match=r"^uncond_embeddings: expected 3 embeddings, got generator"):
        loop.prompt_to_prompt(uncond_embeddings=(one for one in embeddings))


def test_the_last_steps_are_no_more_than_all(loop):
    assert torch.equal(loop.prompt_to_prompt(start_time=5), loop.prompt_to_prompt())
    assert not torch.equal(loop.prompt_to_prompt(start_time=2), loop.prompt_to_prompt())
    for start_time in (0, -1, 1.5):
        with pytest.raises(ValueError, match="start_time must be a whole number from 1 on"):
            loop.prompt_to_prompt(start_time=start_time)


def test_the_last_steps_have_their_own_embeddings(loop):
    embeddings = [torch.full((1, 77, 32), float(number)) for number in range(3)]
    last = loop.prompt_to_prompt(start_time=1, uncond_embeddings=embeddings)
    assert torch.equal(last, loop.prompt_to_prompt(start_time=1, uncond_embeddings=embeddings[2:] * 3))
    first = loop.prompt_to_prompt(start_time=1, uncond_embeddings=embeddings, compat="original")
    assert torch.equal(first, loop.prompt_to_prompt(start_time=1, uncond_embeddings=embeddings[:1] * 3))


@pytest.mark.parametrize("of", ["prompt_to_prompt", "free_prompt_editing"])
def test_loops_refuse_what_is_no_run(loop, of):
    run = getattr(loop, of)
    for steps in (0, -1, 3.0, "3", None):
        with pytest.raises(ValueError, match="num_inference_steps must be a whole number"):
            run(steps)
    for scale in (None, "7.5", float("nan")):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
            run(guidance_scale=scale)
    for prompts in (None, 5, [1, 2], [TWO], ["a", None]):
        with pytest.raises(TypeError, match="expected prompts, a text or a list of texts, got"):
            run(prompts=prompts)
    with pytest.raises(ValueError, match="at least one prompt"):
        run(prompts=[])


def test_pictures_of_any_kind_are_one_picture(loop):
    """Floats in [0, 1] were read as bytes, and bytes of a tensor as floats: what was inverted was black, or noise."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    direct, expected = pnp_inversion.DirectInversion(loop.own, 1), torch.from_numpy(picture / 127.5 - 1).float()
    expected = loop.own.image2latent(expected.permute(2, 0, 1)[None])
    for given in (picture, picture / 255, (picture / 255).astype(np.float32), Image.fromarray(picture)):
        latents = direct.invert(given, TWO, 1.0)[2][0], loop.own.invert(given, "", 1)[1], loop.own.image2latent(given)
        for got in latents:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ValueError, r"in \[-1, 1\], got a tensor .*uint8"),
        (torch.full((1, 3, 16, 16), 255.0), ValueError, r"with values torch.float32 from 255 to 255: pass x / 127.5"),
        (torch.zeros(3, 16, 16), ValueError, r"got a tensor \(3, 16, 16\)"),
        (np.full((16, 16, 3), -1.0), ValueError, "rescale them"),
        (np.zeros((1, 16, 16, 3), np.uint8), ValueError, r"expected an array \[H, W\]"),
        ("photo.jpg", TypeError, "got 'photo.jpg': open paths with PIL.Image.open"),
        (None, TypeError, "got None"),
    ],
)
def test_what_is_no_picture(loop, given, error, said):
    with pytest.raises(error, match=said):
        loop.own.invert(given, "", 1)
    with pytest.raises(error, match=said):
        pnp_inversion.DirectInversion(loop.own, 1).invert(given, TWO, 1.0)


def masa(**options):
    return masactrl.MutualSelfAttentionControl(**options)


@pytest.mark.parametrize("value", ["12", 2, ["1"], [0.5], [None], [True], torch.tensor(2)], ids=str)
def test_lists_of_whole_numbers(loop, value):
    """A text is no list of its digits, and a fraction is not cut off: both edited other layers or steps, or none."""
    for name in ("layer_idx", "step_idx"):
        with pytest.raises(ValueError, match=rf"^{name}: expected a .*whole number"):
            masa(**{name: value})
    with pytest.raises(ValueError, match=r"^ref_token_idx: expected a .*whole number"):
        masactrl.MutualSelfAttentionControlMaskAuto(ref_token_idx=value)


def test_lists_of_any_kind():
    for given in ((1, 2), range(1, 3), torch.tensor([1, 2]), np.array([1.0, 2.0]), (one for one in (1, 2))):
        assert masa(step_idx=given).step_idx == [1, 2]
    for wrong in ({"start_step": -1}, {"start_layer": -1}, {"step_idx": [-1]}):
        with pytest.raises(ValueError, match="from 0 on"):
            masa(**wrong)
    with pytest.raises(ValueError, match=r"^start_step: expected a whole number, got 'a'"):
        masa(start_step="a")


def test_blocks_that_are_no_list(pipe):
    tiny = tiny_flux_pipeline(pipe)
    own = FluxPipeline(**tiny.components)
    for wrong in (0, "0", [0.9]):
        with pytest.raises(ValueError, match=r"^mm_copy_blocks: expected a .*whole number"):
            own(TWO, mm_copy_blocks=wrong)
        with pytest.raises(ValueError, match=r"^layer_idx: expected a .*whole number"):
            register_non_rigid_attention_control(tiny, layer_idx=wrong, total_layers=5)
        with pytest.raises(ValueError, match=r"^step_idx: expected a .*whole number"):
            register_non_rigid_attention_control(tiny, step_idx=wrong, total_layers=5)
    with pytest.raises(ValueError, match="steps from 0 on"):
        register_non_rigid_attention_control(tiny, step_idx=[-1], total_layers=5)


def test_schedules_that_are_no_list(loop):
    for wrong in (5, torch.tensor(5), "981", torch.zeros(2, 2), np.array(5)):
        with pytest.raises(ValueError, match=r"expected a list of timesteps, such as scheduler.timesteps\[:25\], got"):
            pnp_diffusers.register_attention_control_efficient(loop.pipe, wrong)
    for wrong in (float("nan"), float("inf"), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="expected a timestep as a whole number"):
            pnp_diffusers.register_conv_control_efficient(loop.pipe, [wrong])


def test_heat_of_what_is_no_number(loop):
    with daam.trace(loop.pipe) as tc:
        loop.pipe(TWO[0], num_inference_steps=1, latents=loop.noise, output_type="latent")
    for name in ("head_idx", "layer_idx", "image"):
        with pytest.raises(ValueError, match=f"^{name}: expected a whole number"):
            tc.compute_global_heat_map(**{name: [0]})
    for wrong in (4, "12", [0.5]):
        with pytest.raises(ValueError, match=r"^factors: expected a .*whole number"):
            tc.compute_global_heat_map(factors=wrong)
    heat = tc.compute_global_heat_map(factors=torch.tensor([1, 2]))
    assert torch.equal(heat.heat_maps, tc.compute_global_heat_map(factors=[1, 2]).heat_maps)
    with pytest.raises(TypeError, match="expected prompt to be a text"):
        tc.compute_global_heat_map([TWO[0]])
    for arguments in ((["car"],), (None,), ("car", [3])):
        with pytest.raises(TypeError, match="expected word to be a text and word_idx a whole number"):
            heat.compute_word_heat_map(*arguments)


def test_looks_at_what_was_not_seen(loop):
    store = prompt_to_prompt.AttentionStore()
    ptp_utils.text2image_ldm_stable(loop.pipe, TWO, store, 1, latent=loop.noise)

    def look(res=4, places=("down", "up"), select=0, prompts=None):
        return prompt_to_prompt.aggregate_attention(store, res, places, True, select, prompts)

    assert torch.equal(look(places="up").sum(-1), look(places=["up"]).sum(-1))
    for wrong in ("top", [], None, ["up", "left"]):
        with pytest.raises(ValueError, match='expected from_where to be of "down", "mid" and "up", got'):
            look(places=wrong)
    for wrong in (PROMPTS[:3], PROMPTS[:4], TWO[0]):  # four took heads for prompts, which was not said
        with pytest.raises(ValueError, match="prompts of the run, which had 2 rows"):
            look(prompts=wrong)
    with pytest.raises(ValueError, match=r"^select: expected a whole number"):
        look(select="0")
    with pytest.raises(TypeError, match=r"expected a.* AttentionStore"):
        prompt_to_prompt.aggregate_attention(None, 4, ("up",), True, 0)


def test_a_store_that_runs_again_shows_the_later_prompts(loop):
    store, edit = prompt_to_prompt.AttentionStore(), prompt_to_prompt.AttentionReplace(TWO, 1, 0.8, 0.4)
    for prompts in (TWO, PROMPTS[2:5]):
        ptp_utils.text2image_ldm_stable(loop.pipe, prompts, store, 1, latent=loop.noise)
        assert store.prompts == prompts
    ptp_utils.text2image_ldm_stable(loop.pipe, tuple(TWO), edit, 1, latent=loop.noise)
    assert edit.prompts == TWO


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, PNDMScheduler], ids=lambda kind: kind.__name__)
def test_other_schedulers_sample_as_they_do_in_diffusers(loop, monkeypatch, kind):
    """Euler's scales of latents were left out; others ended in an error, for want of a prediction nobody asked for."""
    for pipe in (loop.own, loop.pipe):
        given = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
        monkeypatch.setattr(pipe, "scheduler", kind.from_config(pipe.scheduler.config, **given))
    noise = torch.cat([loop.noise] * 2)
    expected = loop.pipe(TWO, num_inference_steps=3, latents=noise, output_type="pt").images
    torch.testing.assert_close(loop.free_prompt_editing(), expected, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="following an inversion needs DDIM"):
        loop.free_prompt_editing(ref_intermediate_latents=[loop.noise] * 4)
    if kind is PNDMScheduler:
        with pytest.raises(ValueError, match="which PNDMScheduler does not say"):
            loop.free_prompt_editing(return_intermediates=True)
