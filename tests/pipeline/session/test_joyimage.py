"""Edits of JoyImage beside a picture, whose image stands before the picture's tokens: against dense layers."""

import warnings

import diffusers
import pytest
import torch
from PIL import Image

if not hasattr(diffusers, "JoyImageEditPipeline"):
    pytest.skip("this diffusers has no JoyImage", allow_module_level=True)

from fpe_pipeline import ConsistEdit, FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, editing, heat_maps
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.prompts.alignment import align_refine
from fpe_pipeline.prompts.words import TokenizedPrompt
from tests.support.dense_joint import Blocks
from tests.support.dense_rows import farthest
from tests.support.slow_cases import few
from tests.support.tiny_joyimage import JOYIMAGE, draw_joyimage, tiny_joyimage_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8
SOURCE, TARGET, LONGER = "a red car", "a red dog", "a photo of a red car on a mountain in winter"
PICTURE = Image.linear_gradient("L").resize((80, 40)).convert("RGB")


@pytest.fixture(scope="module")
def tiny():
    return tiny_joyimage_pipeline()


def shown(pipe, prompts, *, size=(4, 8), seed=0, **options):
    """Latents beside a picture, of which the autoencoder draws the same in every run."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return draw_joyimage(pipe, prompts, size=size, image=PICTURE, **options)


def edited(pipe, edit, prompts, **options):
    with editing(pipe, edit) as session:
        out = shown(pipe, prompts, **options)
    return out, session.report()


def one_picture(pipe, monkeypatch):
    """Have the autoencoder draw what it draws of the first row for all of them, as a session does."""
    encode = pipe.vae.encode

    def encodes(pictures):
        found = encode(pictures)
        draw = found.latent_dist.sample
        found.latent_dist.sample = lambda generator=None: draw(generator)[:1].repeat(len(pictures), 1, 1, 1, 1)
        return found

    monkeypatch.setattr(pipe.vae, "encode", encodes)


def reference(pipe, rule, steps, prompts, *, both=False, **options):
    """A guided step's first call sees the prompts."""

    def at_step(row, rows):
        return rule(row, rows) if state["step"] in steps and (both or state["calls"] % 2) else None

    with JOYIMAGE.dense(pipe, at_step, "", None) as state:
        return shown(pipe, prompts, **options)


def taking(*names):
    return lambda row, rows: [(1.0, dict.fromkeys(names, 0))] if row else None


RULES = {
    "image": (FreePromptEdit(0.5), taking("q_image", "k_image"), (0, 1), False),
    "consistedit": (ConsistEdit(0.75), taking("q_image", "k_image"), (0, 1, 2), True),
    "masactrl": (MasaCtrlEdit(1, layers=range(3)), taking("k_image", "v_image"), (1, 2, 3), True),
}


@pytest.mark.parametrize("rule", few(RULES.keys(), "image"))
def test_targets_are_the_papers(tiny, rule, monkeypatch):
    """What shows the picture stays each row's own."""
    edit, dense_rule, steps, both = RULES[rule]
    prompts = (SOURCE, LONGER, TARGET)
    actual, report = edited(tiny, edit, prompts)
    one_picture(tiny, monkeypatch)
    assert farthest(actual, reference(tiny, dense_rule, steps, prompts, both=both)) <= EXACT
    plain = shown(tiny, prompts)
    assert farthest(actual[0], plain[0]) <= EXACT
    assert (actual - plain)[1:].abs().amax((1, 2, 3)).min() > 1e-4
    assert len(report.layers) == 3 and all(tuple(noted) == steps for noted in report.layers.values())


@pytest.mark.parametrize(
    "names", [("q_image", "k_image", "q_reference", "k_reference"), ("q_reference", "k_reference")]
)
def test_other_rules_are_told_apart(tiny, names, monkeypatch):
    actual, _ = edited(tiny, FreePromptEdit(0.5), (SOURCE, TARGET))
    one_picture(tiny, monkeypatch)
    assert farthest(actual, reference(tiny, taking(*names), (0, 1), (SOURCE, TARGET))) > 1e-6


def test_rows_see_the_same_picture(tiny):
    """Of which the pipeline draws another one for each row, from no generator."""
    both = (SOURCE, SOURCE)
    actual, _ = edited(tiny, FreePromptEdit(0.5), both)
    assert farthest(actual[0], actual[1]) <= EXACT
    apart = shown(tiny, both)
    assert farthest(apart[0], apart[1]) > 1e-3


@pytest.mark.slow
def test_texts_with_places(monkeypatch):
    """Of models that turn text tokens too."""
    turned = tiny_joyimage_pipeline(rope_type="mrope")
    actual, _ = edited(turned, FreePromptEdit(0.5), (SOURCE, LONGER))
    one_picture(turned, monkeypatch)
    expected = reference(turned, taking("q_image", "k_image"), (0, 1), (SOURCE, LONGER))
    assert farthest(actual, expected) <= EXACT


@pytest.mark.slow
def test_several_images_a_prompt(tiny):
    noise = torch.randn(2, 1, 4, 1, 4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = {"latents": noise.repeat(2, 1, 1, 1, 1, 1), "num_images_per_prompt": 2}
    prompts, size = (SOURCE, TARGET), (4, 8)
    with editing(tiny, FreePromptEdit(0.5)):
        actual = draw_joyimage(tiny, prompts, size=size, **options)

    def rule(row, rows):
        follows = state["step"] < 2 and state["calls"] % 2 and row > 1
        return [(1.0, dict.fromkeys(("q_image", "k_image"), row - 2))] if follows else None

    with JOYIMAGE.dense(tiny, rule, "", None) as state:
        assert farthest(actual, draw_joyimage(tiny, prompts, size=size, **options)) <= EXACT


def placed(pipe, prompts):
    """The prompts among the tokens that the model receives, by counting from the whole texts' ends."""
    after = pipe.tokenizer("<|im_end|>\n<|im_start|>\n")["input_ids"]
    before = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    template, dropped = pipe.prompt_template_encode["multiple_images"], pipe.prompt_template_encode_start_idx["image"]
    texts = [template.format(f"{before}{prompt}<|im_end|>\n") for prompt in prompts]
    rows = [ids[dropped:] for ids in pipe.processor(texts, padding=False, return_tensors=None)["input_ids"]]
    longest, out = max(map(len, rows)), []
    for prompt, row in zip(prompts, rows, strict=True):
        tokens = pipe.tokenizer.convert_ids_to_tokens(row[: -len(after)])
        spans, end = [], len(prompt)
        while end > 0:
            piece = tokens.pop().replace("Ġ", " ").lstrip(" ")
            spans.append((end - len(piece), end))
            end = len(prompt[: end - len(piece)].rstrip(" "))
        out.append(TokenizedPrompt(prompt, tuple(spans[::-1]), longest, len(tokens)))
    return out


class TestWords:
    def test_behind_the_picture(self, tiny, monkeypatch):
        """The encoder's tokens of a picture come before the prompt's, which are told by their distance from the end."""
        prompts = (SOURCE, LONGER)
        edit = PromptToPromptEdit(prompts, tiny.tokenizer, "refine", cross_replace_steps=0.5, self_replace_steps=0.0)
        actual, _ = edited(tiny, edit, prompts)
        alignment = align_refine(*placed(tiny, prompts))

        def text(of_source, own):
            return of_source @ alignment.mapper * alignment.kept + own * (1 - alignment.kept)

        one_picture(tiny, monkeypatch)
        expected = reference(tiny, lambda row, rows: Blocks(0, text=text) if row else None, (0, 1), prompts)
        assert farthest(actual, expected) <= EXACT

    def test_heat(self, tiny):
        with heat_maps(tiny, ["car"]) as maps:
            draw_joyimage(tiny, [SOURCE, TARGET], size=(4, 12), guidance=1.0)
        heat = maps.word("car")
        assert heat.shape == (2, 6) and heat.min() > 0

    def test_padding_in_front(self, tiny):
        """Where its pipeline drops padding in the place of the template's tokens."""
        left = tiny_joyimage_pipeline(padding="left")
        with pytest.raises(ValueError, match=r"pads texts in front.*padding_side = \"right\""):
            editing(left, PromptToPromptEdit((SOURCE, LONGER), left.tokenizer, "refine"))
        editing(left, FreePromptEdit(0.5))


def test_padding_is_told(tiny):
    told = r"JoyImage attends to padding: texts \[0\] have fewer alone"
    with editing(tiny, FreePromptEdit(0.5)), pytest.warns(EditWarning, match=told):
        beside = draw_joyimage(tiny, [SOURCE, LONGER], steps=2)
    assert farthest(beside[0], draw_joyimage(tiny, [SOURCE, SOURCE], steps=2)[0]) > 1e-3
    with warnings.catch_warnings(), editing(tiny, FreePromptEdit(0.5)):
        warnings.simplefilter("error", EditWarning)
        draw_joyimage(tiny, [SOURCE, TARGET], steps=2)
