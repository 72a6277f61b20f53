"""Every edit of joint attention on every family, generated and inverted: against dense layers, to 1e-8 in float64."""

import pytest

from tests.support import edited_transformers
from tests.support.edited_transformers import (
    EDITS,
    FAULTS,
    SOURCE,
    edited,
    inverted,
    reference,
    shows,
    unedited,
)
from tests.support.edited_videos import COGVIDEOX, HUNYUAN_VIDEO
from tests.support.tiny_aura_flow import AURA_FLOW
from tests.support.tiny_bria_fibo import FIBO
from tests.support.tiny_bria_fibo2 import FIBO2
from tests.support.tiny_cogview import COGVIEW
from tests.support.tiny_easyanimate import EASYANIMATE
from tests.support.tiny_flux3 import FLUX3
from tests.support.tiny_flux_kin import KIN
from tests.support.tiny_glm_image import GLM_IMAGE
from tests.support.tiny_hidream import HIDREAM
from tests.support.tiny_ideogram4 import IDEOGRAM4
from tests.support.tiny_joyimage import JOYIMAGE
from tests.support.tiny_krea2 import KREA2
from tests.support.tiny_mochi import MOCHI
from tests.support.tiny_motif_video import MOTIF_VIDEO
from tests.support.tiny_nucleus import NUCLEUS
from tests.support.tiny_qwen21 import QWEN21

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
MODELS = {
    **edited_transformers.MODELS,
    "CogVideoX": COGVIDEOX,
    "HunyuanVideo": HUNYUAN_VIDEO,
    **KIN,
    **COGVIEW,
    "AuraFlow": AURA_FLOW,
    "Bria FIBO": FIBO,
    "Bria FIBO 2": FIBO2,
    "EasyAnimate": EASYANIMATE,
    "FLUX.3": FLUX3,
    "GLM-Image": GLM_IMAGE,
    "HiDream-I1": HIDREAM,
    "Ideogram 4": IDEOGRAM4,
    "JoyImage": JOYIMAGE,
    "Krea 2": KREA2,
    **MOCHI,
    "Motif-Video": MOTIF_VIDEO,
    "Nucleus-Image": NUCLEUS,
    **QWEN21,
}
SIZES = {
    "1 target": (1, (8, 8)),
    "3 targets, not square": (3, (6, 12)),
    "3 targets": (3, (8, 8)),
    "1 target, not square": (1, (12, 6)),
}
# Text tokens of captions of other lengths are not each other's there.
REFUSED = {
    ("Lumina 2", "FPE, the whole map"): "write prompts of as many tokens",
    ("Lumina 2", "value injection"): "write prompts of as many tokens",
}
# Text tokens look at no image there, and stay what they are.
UNSERVED = {(model, edit) for model in QWEN21 for edit in ("FPE, the whole map", "value injection")}
# Their text tokens are no words of a prompt.
UNSERVED |= {
    (model, edit)
    for model in ("Bria FIBO 2", "GLM-Image")
    for edit in EDITS
    if edit.startswith(("Prompt-to-Prompt", "ReFlex"))
}
ALL = [(model, edit) for model in MODELS for edit in EDITS if (model, edit) not in REFUSED.keys() | UNSERVED]
ALWAYS = {
    ("SD3.5, a layer skipped", "value injection"),
    ("Qwen-Image", "Prompt-to-Prompt, refined"),
    ("Lumina 2", "KV-Edit"),
    ("Ovis-Image", "Prompt-to-Prompt, refined"),
    ("LongCat-Image", "KV-Edit"),
    ("Bria", "ReFlex"),
    ("Bria FIBO", "Prompt-to-Prompt, refined"),
    ("CogView 3 Plus", "FPE"),
    ("JoyImage", "Prompt-to-Prompt, refined"),
    ("Krea 2", "Prompt-to-Prompt, refined"),
    ("Mochi", "Prompt-to-Prompt, refined"),
    ("AuraFlow", "Prompt-to-Prompt, replaced words"),
    ("GLM-Image", "FPE, the whole map"),
    ("Bria FIBO 2", "FPE, the whole map"),
    ("EasyAnimate", "Prompt-to-Prompt, replaced words"),
    ("FLUX.3", "FPE"),
    ("FLUX.3", "Prompt-to-Prompt, refined"),
    ("HiDream-I1", "Prompt-to-Prompt, replaced words"),
    ("CogView 4", "Prompt-to-Prompt, refined"),
    ("Ideogram 4", "FPE"),
    ("Ideogram 4", "Prompt-to-Prompt, refined"),
    ("Qwen-Image 2.1", "Prompt-to-Prompt, refined"),
    ("Motif-Video", "Prompt-to-Prompt, refined"),
    ("Nucleus-Image", "Prompt-to-Prompt, replaced words"),
}
INVERTED = [pair for pair in ALL if MODELS[pair[0]].family in ("sd3", "flux", "qwen", "lumina") and pair[0] not in KIN]
ALWAYS_INVERTED = {("FLUX", "KV-Edit")}


def cases(pairs, always):
    return [
        pytest.param(*pair, id=" / ".join(pair), marks=() if pair in always else pytest.mark.slow) for pair in pairs
    ]


@pytest.fixture(scope="module")
def pipes(pipe):
    """By name of the family, made when it is first asked for."""

    class Made(dict):
        def __missing__(self, name):
            return self.setdefault(name, MODELS[name].make(pipe))

    return Made()


def case_of(pipes, model, edit, targets, size):
    make, words = EDITS[edit]
    prompts = [SOURCE, *words[:targets]]
    return make(MODELS[model], pipes[model], prompts, size), prompts


def farthest(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize("size", ["3 targets, not square"])
@pytest.mark.parametrize(("model", "edit"), cases(ALL, ALWAYS))
def test_targets_are_the_papers(pipes, model, edit, size):
    check_generated(pipes, model, edit, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [name for name in SIZES if name != "3 targets, not square"])
@pytest.mark.parametrize(("model", "edit"), ALL)
def test_other_numbers_and_sizes(pipes, model, edit, size):
    check_generated(pipes, model, edit, size)


def check_generated(pipes, model, edit, size):
    targets, size = SIZES[size]
    size = MODELS[model].fits(size)
    case, prompts = case_of(pipes, model, edit, targets, size)
    actual = edited(pipes[model], MODELS[model], case, prompts, size=size)
    assert farthest(actual, reference(pipes[model], MODELS[model], case, prompts, size=size)) <= EXACT
    plain = unedited(pipes[model], MODELS[model], prompts, size=size)
    assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-4
    assert farthest(actual[0], plain[0]) <= EXACT


@pytest.mark.parametrize(("model", "edit"), cases(ALL, {("Qwen-Image", "FPE")}))
def test_mistakes_show(pipes, model, edit):
    """Text and image in one another's order, queries from before norm and rotary embedding, the half of the batch that
    is to be left alone (or not to be), a step off by one."""
    case, prompts = case_of(pipes, model, edit, 1, (8, 8))
    actual = edited(pipes[model], MODELS[model], case, prompts, size=(8, 8))
    planted = [fault for fault in FAULTS if shows(fault, MODELS[model], edit)]
    assert len(planted) >= 2 or not MODELS[model].is_guided or edit == "value injection"
    for fault in planted:
        wrong = reference(pipes[model], MODELS[model], case, prompts, fault, size=(8, 8))
        assert farthest(actual, wrong) > 1e-6, fault


@pytest.mark.parametrize("size", ["1 target", pytest.param("3 targets, not square", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "edit"), cases(INVERTED, ALWAYS_INVERTED))
def test_of_inverted_images(pipes, model, edit, size):
    """The source follows the image's own latents after every step."""
    targets, size = SIZES[size]
    case, prompts = case_of(pipes, model, edit, targets, size)
    tiny, family = pipes[model], MODELS[model]
    before = tiny.scheduler
    try:
        actual, follows = inverted(tiny, family, case, prompts, size)
        assert farthest(actual, reference(tiny, family, case, prompts, **follows)) <= EXACT
        late = {**follows, "held": follows["held"].roll(-1, 0)}
        assert farthest(actual, reference(tiny, family, case, prompts, **late)) > 1e-5
        assert farthest(actual, reference(tiny, family, case, prompts, "a step off", **follows)) > 1e-6
    finally:
        tiny.scheduler = before


@pytest.mark.parametrize(("model", "edit"), cases(REFUSED, {("Lumina 2", "value injection")}))
def test_captions_of_other_lengths(pipes, model, edit):
    """Refused in the first call of the model, before anything is denoised; captions of one length are served."""
    case, prompts = case_of(pipes, model, edit, 1, (8, 8))
    steps = []
    with pytest.raises(ValueError, match=REFUSED[model, edit]):
        edited(pipes[model], MODELS[model], case, prompts, callback_on_step_end=lambda *given: steps.append(1) or {})
    assert not steps
    alike = [SOURCE, "a photo of a red car on a house"]
    lengths = {len(pipes[model].tokenizer(prompt)["input_ids"]) for prompt in alike}
    assert len(lengths) == 1
    case = EDITS[edit][0](MODELS[model], pipes[model], alike, (8, 8))
    actual = edited(pipes[model], MODELS[model], case, alike)
    assert farthest(actual, reference(pipes[model], MODELS[model], case, alike)) <= EXACT
