"""Two tools on one model: refused with the reason, taken off, or together, as the docs say; never half of either."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, editing
from fpe_pipeline.compat import accelerate, attention_map_diffusers, daam, masactrl, pnp_diffusers, style_aligned
from fpe_pipeline.compat.free_prompt_editing import SelfAttentionControlEdit, register_attention_control_new
from fpe_pipeline.compat.prompt_to_prompt import AttentionReplace, ptp_utils
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline

TWO = PROMPTS[:2]
#: Tools that compute layers; the first three by a controller, of which a later one takes the place of an earlier.
CONTROLLERS = {
    "prompt-to-prompt": lambda pipe: ptp_utils.register_attention_control(pipe, AttentionReplace(TWO, 2, 0.8, 0.4)),
    "free-prompt-editing": lambda pipe: register_attention_control_new(pipe, SelfAttentionControlEdit(TWO, 2, 0.8)),
    "masactrl": lambda pipe: masactrl.regiter_attention_editor_diffusers(
        pipe, masactrl.MutualSelfAttentionControl(0, 0)
    ),
}
SESSIONS = {
    "style-aligned": lambda pipe: style_aligned.Handler(pipe).register(style_aligned.StyleAlignedArgs()),
    "pnp-diffusers": lambda pipe: pnp_diffusers.register_attention_control_efficient(pipe, [1]),
    "editing": lambda pipe: editing(pipe, FreePromptEdit(0.8, levels=(0, 1, 2))).__enter__(),
}
LOOKING = {"daam": daam.trace, "attention-map-diffusers": attention_map_diffusers.watched_pipeline}
EDITING = CONTROLLERS | SESSIONS


def leave(registered):
    """Off again, by what each gives back."""
    (registered.restore if hasattr(registered, "restore") else lambda: registered.__exit__(None, None, None))()


@pytest.fixture(scope="module")
def tiny(pipe):
    return tiny_pipeline(pipe)


@pytest.fixture(scope="module")
def plain(tiny):
    return sample(tiny, 2, steps=1)


@pytest.fixture(autouse=True)
def left_as_it_was(tiny, plain):
    before = dict(tiny.unet.attn_processors)
    yield
    assert {name: id(one) for name, one in tiny.unet.attn_processors.items()} == {n: id(p) for n, p in before.items()}
    assert not tiny.unet._forward_pre_hooks
    torch.testing.assert_close(sample(tiny, 2, steps=1), plain, atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the editing session ended without a call")
@pytest.mark.parametrize("second", EDITING)
@pytest.mark.parametrize("first", EDITING)
def test_two_that_compute_layers(tiny, first, second):
    """The later of two controllers takes the earlier one's place, and so does a tool its own; others are refused."""
    earlier = EDITING[first](tiny)
    if first != "editing" and (first == second or {first, second} <= CONTROLLERS.keys()):
        later = EDITING[second](tiny)
        leave(later)
    else:
        with pytest.raises((RuntimeError, ValueError), match=r"session|already|cannot be edited"):
            EDITING[second](tiny)
    leave(earlier)


@pytest.mark.slow
@pytest.mark.parametrize("looking", LOOKING)
@pytest.mark.parametrize("first", ["style-aligned", "editing"])
def test_one_that_looks_sees_what_a_session_makes(tiny, first, looking):
    edited = EDITING[first](tiny)
    alone = sample(tiny, 2, steps=1)
    with LOOKING[looking](tiny):
        torch.testing.assert_close(sample(tiny, 2, steps=1), alone, atol=1e-5, rtol=1e-5)
    leave(edited)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the editing session ended without a call")
@pytest.mark.parametrize("looking", LOOKING)
@pytest.mark.parametrize("first", CONTROLLERS)
def test_one_that_looks_and_a_controller_are_refused(tiny, first, looking):
    """In either order."""
    with EDITING[first](tiny), pytest.raises(RuntimeError, match="another tool or session computes"):
        LOOKING[looking](tiny).__enter__()
    with LOOKING[looking](tiny), pytest.raises(ValueError, match="in an editing session"):
        EDITING[first](tiny)


@pytest.mark.slow
@pytest.mark.parametrize("first", CONTROLLERS)
def test_an_accelerated_model_is_edited_as_any_other(tiny, first):
    with EDITING[first](tiny):
        alone = sample(tiny, 2, steps=1)
    with accelerate(tiny) as accelerated, EDITING[first](tiny):
        torch.testing.assert_close(sample(tiny, 2, steps=1), alone, atol=0, rtol=0)
    assert not accelerated.served


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("tool", ["prompt-to-prompt", "style-aligned"])
def test_off_after_an_error_in_the_call(tiny, tool, error):
    def fail(*arguments):
        raise error("in the user's callback")

    registered = EDITING[tool](tiny)
    with pytest.raises(error), registered:
        sample(tiny, 2, steps=1, callback_on_step_end=fail)
