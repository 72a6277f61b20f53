"""Edits of Qwen-Image: against a dense processor, with texts of different length and guidance in a call of its own."""

import pytest
import torch

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    MasaCtrlEdit,
    PromptToPromptEdit,
    StableFlowEdit,
    editing,
)
from fpe_pipeline.models.adapters.families import adapter_of
from fpe_pipeline.prompts.encoding import EncodedText, Encoding
from tests.support.dense_joint import dense
from tests.support.own_maps import OwnMaps
from tests.support.tiny_transformers import draw_qwen, tiny_qwen, tiny_qwen_pipeline

# diffusers turns queries and keys in float32, whatever they are given in: a last bit may fall either way there.
EXACT = 1e-6


@pytest.fixture(scope="module")
def qwen():
    return tiny_qwen_pipeline()


def edited(pipe, edit, **kwargs):
    with editing(pipe, edit) as session:
        out = draw_qwen(pipe, **kwargs)
    return out, session.report()


def reference(pipe, rule, steps, **kwargs):
    with dense(pipe, rule, steps=steps):
        return draw_qwen(pipe, **kwargs)


def taking(*names):
    return lambda row, rows: [(1.0, dict.fromkeys(names, 0))] if row else None


QUERIES_KEYS = taking("q_image", "k_image")
RULES = {
    "image": (FreePromptEdit(0.5), QUERIES_KEYS, (0, 1)),
    "joint": (FreePromptEdit(0.5, scope="joint"), taking("q_image", "k_image", "q_text", "k_text"), (0, 1)),
    "consistedit": (ConsistEdit(0.75), QUERIES_KEYS, (0, 1, 2)),
    "masactrl": (MasaCtrlEdit(1, layers=range(3)), taking("k_image", "v_image"), (1, 2, 3)),
    "stable flow": (StableFlowEdit(layers=range(3)), taking("k_image", "v_image"), (0, 1, 2, 3)),
}
SIZES = {
    "1 target": {},
    "3 targets": {"prompts": 4},
    "not square": {"size": (6, 12)},
    "one length": {"lengths": (6, 6)},
}


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_targets_are_the_papers(qwen, rule, options):
    edit, dense_rule, steps = RULES[rule]
    actual, report = edited(qwen, edit, **options)
    assert (actual - reference(qwen, dense_rule, steps, **options)).abs().max() <= EXACT
    assert (actual - draw_qwen(qwen, **options))[1:].abs().amax((1, 2)).min() > 1e-4
    assert len(report.layers) == 3 and all(tuple(noted) == steps for noted in report.layers.values())


@pytest.mark.parametrize("names", [("q_text", "k_text"), ("k_image",), ("q_image", "k_image", "v_image"), ()])
def test_other_rules_are_told_apart(qwen, names):
    actual, _ = edited(qwen, FreePromptEdit(0.5))
    assert (actual - reference(qwen, taking(*names), (0, 1))).abs().max() > 20 * EXACT
    assert (actual - reference(qwen, QUERIES_KEYS, (1, 2))).abs().max() > 20 * EXACT


def test_padding_takes_no_attention(qwen):
    """A text's padding may hold anything; without the mask it would count."""
    actual, _ = edited(qwen, FreePromptEdit(1.0))
    alone = draw_qwen(qwen, prompts=1)
    plain = draw_qwen(qwen)
    assert (actual[0] - plain[0]).abs().max() <= EXACT and (plain[0] - alone[0]).abs().max() <= EXACT
    unpadded, _ = edited(qwen, FreePromptEdit(1.0), lengths=(9, 9, 9, 9))
    assert (actual - unpadded).abs().max() > 20 * EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_source_is_the_one_without_an_edit(dtype):
    tiny = tiny_qwen_pipeline(dtype)
    out, _ = edited(tiny, FreePromptEdit(1.0), prompts=3)
    own, _ = edited(tiny, OwnMaps(), prompts=3)
    plain = draw_qwen(tiny, prompts=3)
    assert torch.equal(out[0], own[0])
    bound = 1e-5 if dtype is torch.float32 else EXACT
    assert (out - plain)[0].abs().max() <= bound and (own - plain).abs().max() <= bound


def test_two_calls_a_step(qwen):
    """Rows that see the negative prompt are a call of their own, and their texts have lengths of their own."""
    options = {"negative": True, "prompts": 3}
    actual, report = edited(qwen, FreePromptEdit(0.5), **options)
    assert all(steps == [0, 1] for steps in report.layers.values())
    with dense(qwen, lambda row, rows: rule(row, rows), steps=(0, 1)) as state:

        def rule(row, rows):
            return QUERIES_KEYS(row, rows) if state["calls"] % 2 else None

        expected = draw_qwen(qwen, **options)
    assert (actual - expected).abs().max() <= EXACT
    both, _ = edited(qwen, FreePromptEdit(0.5, both_halves=True), **options)
    assert (both - reference(qwen, QUERIES_KEYS, (0, 1), **options)).abs().max() <= EXACT
    assert (both - actual).abs().max() > 20 * EXACT


def test_the_pipeline_is_left_as_it_was(qwen):
    processors, plain = dict(qwen.transformer.attn_processors), draw_qwen(qwen)
    with pytest.raises(RuntimeError, match="stop"), editing(qwen, FreePromptEdit(0.5)):
        draw_qwen(qwen)
        raise RuntimeError("stop")
    assert "cache_context" not in vars(qwen.transformer)
    assert qwen.transformer.attn_processors == processors
    assert torch.equal(draw_qwen(qwen), plain)


class TestRefusals:
    def call(self, **given):
        defaults = {
            "hidden_states": torch.zeros(2, 4, 64),
            "timestep": torch.ones(2),
            "img_shapes": [[(1, 2, 2)]] * 2,
        }
        return adapter_of(tiny_qwen()).read((), {**defaults, **given})

    def test_sizes_and_lengths(self):
        assert self.call().size == (4, 4) and self.call().text_lengths is None
        mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        assert self.call(encoder_hidden_states_mask=mask).text_lengths == (3, 1)
        assert self.call(encoder_hidden_states_mask=torch.ones(2, 3)).text_lengths is None

    def test_pictures_of_a_row(self):
        """Of those after the first, which are shown, tests/pipeline/session/test_qwen_edit.py has more."""
        assert self.call(img_shapes=[[(1, 2, 2), (1, 4, 4), (1, 1, 3)]] * 2).references == 19
        with pytest.raises(ValueError, match="3 layers of a picture"):
            self.call(img_shapes=[[(3, 2, 2)]] * 2)

    def test_a_mask_with_holes(self):
        with pytest.raises(ValueError, match="pad texts at their end"):
            self.call(encoder_hidden_states_mask=torch.tensor([[1, 0, 1], [1, 1, 1]]))

    def test_words(self, pipe):
        """The encoder's template is not read: nothing is guessed of where words are."""
        prompts = ("a photo of a red car", "a photo of a big car")
        edit = PromptToPromptEdit(prompts, pipe.tokenizer)
        encoding = Encoding(prompts, 2, 1, texts=(EncodedText(pipe.tokenizer, (), 1024),))
        with pytest.raises(ValueError, match="use an edit that looks for no words"):
            edit.encoded(encoding)

    def test_processors_that_do_more(self):
        tiny = tiny_qwen_pipeline(torch.float32)

        class Other(type(tiny.transformer.transformer_blocks[0].attn.processor)):
            pass

        tiny.transformer.transformer_blocks[1].attn.set_processor(Other())
        message = r"transformer_blocks\.1\.attn: its processor Other"
        with pytest.raises(ValueError, match=message), editing(tiny, FreePromptEdit()):
            draw_qwen(tiny)
