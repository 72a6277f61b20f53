"""Edits of FLUX.3, which diffusers calls from modular pipelines, against layers that are written out."""

import pytest
import torch

from fpe_pipeline import ConsistEdit, FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, StableFlowEdit, editing
from tests.support.tiny_flux3 import dense_flux3, draw_flux3, tiny_flux3, tiny_flux3_pipeline

TOLERANCE = 2e-4
STEPS = 2  # of four
OWN = [f"mode_blocks.image.{index}.attn" for index in range(2)]
COMMON = [f"single_transformer_blocks.{index}.attn" for index in range(3)]


def queries_and_keys(row, joint, image, own, every, state):
    """Free-Prompt-Editing, of image tokens."""
    if row == 0 or state["step"] >= STEPS or state["calls"] > 1 or not joint:
        return None
    for part, all_rows in zip(own[:2], every[:2], strict=True):
        part[:, image] = all_rows[0][:, image]
    return own


def keys_and_values(row, joint, image, own, every, state):
    """MasaCtrl's rule in every layer, those of image tokens alone too, and in both halves of the rows."""
    if row == 0:
        return None
    for part, all_rows in zip(own[1:], every[1:], strict=True):
        part[:, image] = all_rows[0][:, image]
    return own


def whole_maps(row, joint, image, own, every, state):
    if row == 0 or state["step"] >= STEPS or state["calls"] > 1 or not joint:
        return None
    return every[0][0], every[1][0], own[2]


EDITS = {
    "image": (lambda: FreePromptEdit(0.5), queries_and_keys),
    "whole maps": (lambda: FreePromptEdit(0.5, scope="joint"), whole_maps),
    "masactrl": (lambda: MasaCtrlEdit(0, layers=[*OWN, *COMMON]), keys_and_values),
}


def held(pipe, edit, rule, **options):
    with dense_flux3(pipe, rule):
        expected = draw_flux3(pipe, **options)
    with editing(pipe, edit) as session:
        found = draw_flux3(pipe, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    with dense_flux3(pipe, lambda *_: None):
        unedited = draw_flux3(pipe, **options)
    torch.testing.assert_close(found[0], unedited[0], rtol=0, atol=TOLERANCE)
    assert (found[1:] - unedited[1:]).abs().max() > 5 * TOLERANCE
    return session


@pytest.mark.parametrize("shown", [False, True], ids=["alone", "beside a reference picture"])
@pytest.mark.parametrize("name", EDITS)
def test_edits(name, shown):
    edit, rule = EDITS[name]
    held(tiny_flux3_pipeline(), edit(), rule, rows=3, shown=shown)


def test_the_distilled_model():
    """It is told where each step ends, and guides by nothing."""
    session = held(tiny_flux3_pipeline(distilled=True), FreePromptEdit(0.5), queries_and_keys)
    assert "single_transformer_blocks.2.attn" in session.explain()


def test_layers_as_diffusers_computes_them():
    pipe = tiny_flux3_pipeline()
    plain = draw_flux3(pipe)
    with dense_flux3(pipe, lambda *_: None):
        torch.testing.assert_close(draw_flux3(pipe), plain, rtol=0, atol=TOLERANCE)
    with editing(pipe, ConsistEdit()):
        both = draw_flux3(pipe)
    with editing(pipe, StableFlowEdit(layers=[0, 2])):
        assert (draw_flux3(pipe) - both).abs().max() > TOLERANCE


def test_fused_projections():
    pipe = tiny_flux3_pipeline()
    with editing(pipe, FreePromptEdit(0.5)):
        expected = draw_flux3(pipe)
    pipe.transformer.fuse_qkv_projections()
    with editing(pipe, FreePromptEdit(0.5)):
        torch.testing.assert_close(draw_flux3(pipe), expected, rtol=0, atol=TOLERANCE)


def test_reduced_precision():
    """Queries and keys are normed and turned in float32, by weights that stay in it."""
    pipe = tiny_flux3_pipeline()
    pipe.transformer.to(torch.bfloat16)
    for block in pipe.transformer.single_transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.float()
    with editing(pipe, FreePromptEdit(0.5)):
        assert draw_flux3(pipe).isfinite().all()


def test_the_model_alone():
    model = tiny_flux3()
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in (1, 4, 6, 1)))
    given = {"hidden_states": torch.randn(1, 24, 16).repeat(2, 1, 1), "encoder_hidden_states": torch.randn(2, 6, 32)}
    given |= {"timestep": torch.full((2,), 0.5), "img_ids": places, "txt_ids": torch.zeros(6, 4)}
    with torch.no_grad(), editing(model, FreePromptEdit(0.5), classifier_free_guidance=False) as session:
        session.step(0, 4)
        edited = model(**given).sample
    assert session.explain().startswith("3 layers replaced")
    assert not torch.equal(edited, model(**given).sample)
    with (
        pytest.raises(ValueError, match="24 image tokens, whose places are 4 rows and 5 columns"),
        editing(model, FreePromptEdit(0.5), classifier_free_guidance=False) as session,
    ):
        session.step(0, 4)
        model(**given | {"img_ids": places[:20].roll(1, 0) * torch.tensor([1, 1, 1, 1]) % 5})


def test_words(pipe):
    with pytest.raises(ValueError, match=r"FLUX\.3's blocks encode one prompt a call"):
        editing(tiny_flux3_pipeline(), PromptToPromptEdit(["a cat", "a dog"], pipe.tokenizer))
