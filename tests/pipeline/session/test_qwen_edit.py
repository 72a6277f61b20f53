"""Edits of Qwen-Image-Edit, whose image stands before the tokens of reference pictures: against dense layers."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchEncoding

if not hasattr(diffusers, "QwenImageEditPlusPipeline"):
    pytest.skip("this diffusers has no Qwen-Image-Edit", allow_module_level=True)

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    FreePromptPipeline,
    KVEdit,
    MasaCtrlEdit,
    PromptToPromptEdit,
    editing,
    heat_maps,
)
from fpe_pipeline.models.adapters.families import adapter_of
from fpe_pipeline.prompts.alignment import align_refine
from tests.support.dense_joint import Blocks, dense
from tests.support.dense_rows import wide
from tests.support.slow_cases import few
from tests.support.tiny_language import tiny_qwen_that_reads

EXACT = 1e-8
SOURCE, TARGET, LONGER = "a red car", "a red dog", "a photo of a red car on a mountain in winter"
SHOWN = (64, 32)  # pixels, width and height
PICTURE = Image.linear_gradient("L").resize((80, 40)).convert("RGB")
PADS = 5  # tokens that a picture becomes


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """The pipelines bring what they are shown to some megapixels, these to a few tokens."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (*SHOWN, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: SHOWN)
    with wide():
        yield


class Processor:
    """Makes some tokens of each picture, and texts as long as the longest of a call, as Qwen's does."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, images=None, padding=True, return_tensors="pt"):
        marked = [one.replace("<|image_pad|>", "<|image_pad|>" * PADS) for one in text]
        return BatchEncoding(self.tokenizer(marked, padding=padding, return_tensors=return_tensors))


@pytest.fixture(scope="module")
def shown():
    return made_for(QwenImageEditPipeline)


def made_for(kind):
    made = tiny_qwen_that_reads()
    special = {"additional_special_tokens": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]}
    made.tokenizer.add_special_tokens(special)
    made.text_encoder.resize_token_embeddings(len(made.tokenizer))
    parts = {name: part for name, part in made.components.items() if part is not None}
    tiny = kind(**parts, processor=Processor(made.tokenizer))
    before = tiny.prompt_template_encode.partition("{}")[0].partition("<|vision_start|>")[0]
    tiny.prompt_template_encode_start_idx = len(made.tokenizer(before)["input_ids"])
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw(pipe, prompts, *, size=(8, 8), steps=4, seed=0, **options):
    """Packed latents; the rows start from the same noise."""
    noise = torch.randn(1, size[0] * size[1] // 4, 64, generator=torch.Generator().manual_seed(seed)).double()
    options.setdefault("latents", noise.repeat(len(prompts), 1, 1))
    given = {"height": size[0] * 8, "width": size[1] * 8, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(image=PICTURE, prompt=list(prompts), true_cfg_scale=1.0, **given, **options).images


def edited(pipe, edit, prompts, **options):
    with editing(pipe, edit) as session:
        out = draw(pipe, prompts, **options)
    return out, session.report()


def reference(pipe, rule, steps, prompts, *, size=(8, 8), **options):
    with dense(pipe, rule, steps=steps, images=size[0] * size[1] // 4):
        return draw(pipe, prompts, size=size, **options)


def taking(*names):
    return lambda row, rows: [(1.0, dict.fromkeys(names, 0))] if row else None


def farthest(one, other):
    return float((one - other).abs().max())


RULES = {
    "image": (FreePromptEdit(0.5), taking("q_image", "k_image"), (0, 1)),
    "consistedit": (ConsistEdit(0.75), taking("q_image", "k_image"), (0, 1, 2)),
    "masactrl": (MasaCtrlEdit(1, layers=range(3)), taking("k_image", "v_image"), (1, 2, 3)),
}


@pytest.mark.parametrize(
    "prompts", few({"one length": (SOURCE, TARGET), "lengths": (SOURCE, LONGER, TARGET)}, "lengths")
)
@pytest.mark.parametrize("rule", few(RULES.keys(), "image"))
def test_targets_are_the_papers(shown, rule, prompts):
    """What shows the pictures stays each row's own, and padding of texts is nobody's."""
    edit, dense_rule, steps = RULES[rule]
    actual, report = edited(shown, edit, prompts, size=(6, 12))
    assert farthest(actual, reference(shown, dense_rule, steps, prompts, size=(6, 12))) <= EXACT
    plain = draw(shown, prompts, size=(6, 12))
    assert farthest(actual[0], plain[0]) <= EXACT
    assert (actual - plain)[1:].abs().amax((1, 2)).min() > 1e-4
    assert len(report.layers) == 3 and all(tuple(noted) == steps for noted in report.layers.values())


@pytest.mark.parametrize(
    "names", [("q_image", "k_image", "q_reference", "k_reference"), ("q_reference", "k_reference")]
)
def test_other_rules_are_told_apart(shown, names):
    actual, _ = edited(shown, FreePromptEdit(0.5), (SOURCE, TARGET))
    assert farthest(actual, reference(shown, taking(*names), (0, 1), (SOURCE, TARGET))) > 1e-6


def test_masks(shown):
    share = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4).double()
    mask = Image.fromarray(np.repeat(np.uint8([[255, 255, 0, 0]]), 4, 0)).resize((64, 64), Image.Resampling.NEAREST)

    def rule(row, rows):
        return [(1.0, dict.fromkeys(("k_image", "v_image"), (0, row, share)))] if row else None

    def paste(pipe, index, timestep, tensors):
        latents = tensors["latents"].clone()
        latents[1:, share.bool()] = latents[:1, share.bool()]
        return {"latents": latents}

    actual, _ = edited(shown, KVEdit(mask=mask), (SOURCE, LONGER))
    expected = reference(shown, rule, range(4), (SOURCE, LONGER), callback_on_step_end=paste)
    assert farthest(actual, expected) <= EXACT


def test_words_stand_behind_the_pictures(shown):
    """The encoder's tokens of a picture come before the prompt's, which are told by their distance from the end."""
    prompts = (SOURCE, LONGER)
    edit = PromptToPromptEdit(prompts, shown.tokenizer, align="refine", cross_replace_steps=0.5, self_replace_steps=0.0)
    actual, _ = edited(shown, edit, prompts)
    source, target = placed(shown, prompts)
    alignment = align_refine(source, target)

    def text(of_source, own):
        return of_source @ alignment.mapper * alignment.kept + own * (1 - alignment.kept)

    def rule(row, rows):
        return Blocks(0, text=text) if row else None

    assert farthest(actual, reference(shown, rule, (0, 1), prompts)) <= EXACT


def placed(pipe, prompts):
    """The prompts among the tokens that the model receives, by counting from the whole texts' ends."""
    from fpe_pipeline.prompts.words import TokenizedPrompt

    after = pipe.tokenizer(pipe.prompt_template_encode.partition("{}")[2])["input_ids"]
    pictures = (
        ""
        if "<|image_pad|>" in pipe.prompt_template_encode
        else "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
    )
    texts = [pipe.prompt_template_encode.format(pictures + one) for one in prompts]
    rows = [
        ids[pipe.prompt_template_encode_start_idx :]
        for ids in pipe.processor(texts, padding=False, return_tensors=None)["input_ids"]
    ]
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


@pytest.mark.parametrize("kind", [QwenImageEditPipeline, QwenImageEditPlusPipeline])
def test_heat_of_words(kind):
    """Of one prompt, as the pipeline of several pictures takes no more."""
    shown = made_for(kind)
    kept, place = [], placed(shown, [SOURCE])[0].find("car")
    with heat_maps(shown, ["car"]) as maps:
        draw(shown, [SOURCE], size=(4, 12), steps=1)
    with dense(shown, taking(), steps=(), images=12, keep=lambda row, rows, block: kept.append(block)):
        draw(shown, [SOURCE], size=(4, 12), steps=1)
    heat = torch.stack([block[..., place].mean(-1).mean(0) for block in kept]).mean(0).reshape(2, 6).numpy()
    assert abs(maps.word("car") - heat).max() <= 1e-6


class TestRefused:
    def test_conveniences_that_hold_no_reference_picture(self, shown):
        with pytest.raises(
            TypeError, match=r"reference picture, .* of Qwen-Image-Edit, got QwenImageEditPipeline; put"
        ):
            FreePromptPipeline.from_pipe(shown)

    def test_layers_of_a_picture(self, shown):
        adapter = adapter_of(shown.transformer)
        given = {"hidden_states": torch.zeros(2, 16, 64), "timestep": 1, "img_shapes": [[(1, 4, 4)] * 2] * 2}
        assert adapter.read((), given).references == 16
        with pytest.raises(ValueError, match="Qwen-Image-Layered denoises several layers of a picture together"):
            adapter.read((), {**given, "additional_t_cond": torch.zeros(2)})

    def test_rows_of_several_sizes(self, shown):
        shapes = [[(1, 4, 4), (1, 2, 2)], [(1, 4, 4), (1, 2, 3)]]
        with pytest.raises(ValueError, match="pass pictures of one size for all prompts"):
            adapter_of(shown.transformer).read((), {"hidden_states": None, "timestep": 1, "img_shapes": shapes})
