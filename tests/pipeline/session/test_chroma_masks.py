"""Masks of Chroma's calls: what of the texts they leave out, which of them are refused, and when they are read."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, editing
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.tiny_chroma import tiny_chroma

TEXTS = 12


def call_of_a_model(kind="truth values", rows=2):
    """Arguments of a call of a model: 18 tokens of an image, 12 of texts of which rows have 5 and 9."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(30).expand(rows, -1).clone()
    mask = (mask < torch.tensor([5, 9])[:rows, None]) | (mask >= TEXTS)
    places = torch.cartesian_prod(torch.tensor([0]), torch.arange(3), torch.arange(6)).double()
    noise = torch.randn(1, 18, 64, generator=generator, dtype=torch.float64)
    return {
        "hidden_states": noise.repeat(rows, 1, 1),
        "encoder_hidden_states": torch.randn(rows, TEXTS, 32, generator=generator, dtype=torch.float64),
        "timestep": torch.full((rows,), 0.5, dtype=torch.float64),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXTS, 3, dtype=torch.float64),
        "attention_mask": mask if kind == "truth values" else mask.double(),
    }


def farthest(one, other):
    return float((one - other).abs().max())


def test_checkpointed_gradients():
    """diffusers hands no mask to single blocks then: numbers are left out as it does, truth values are refused."""
    model, given = tiny_chroma(), call_of_a_model("numbers")
    model.enable_gradient_checkpointing()
    plain = model(**given, return_dict=False)[0].detach()
    with editing(model, FreePromptEdit(1.0), classifier_free_guidance=False) as session:
        session.step(0, 2)
        out = model(**given, return_dict=False)[0].detach()
        session.step(1, 2)
        with pytest.raises(ValueError, match=r"single_transformer_blocks\.0\.attn is not told the mask"):
            model(**call_of_a_model(), return_dict=False)
    assert farthest(out[0], plain[0]) <= 1e-8 and farthest(out[1], plain[1]) > 1e-4
    with torch.no_grad():
        assert farthest(model(**given, return_dict=False)[0], plain) > 1e-6


class TestMasks:
    def call(self, mask, **given):
        return adapter_of(self.model).read((), {**call_of_a_model(), "attention_mask": mask, **given})

    @pytest.fixture(autouse=True)
    def _model(self):
        self.model = tiny_chroma()

    def test_lengths(self):
        mask = call_of_a_model()["attention_mask"]
        assert self.call(mask).text_lengths == (5, 9)
        assert self.call(mask[:1]).text_lengths == (5, 5)
        assert self.call(torch.ones_like(mask)).text_lengths is None and self.call(None).text_lengths is None
        assert self.call(mask.double()).text_lengths is None  # no key is left out
        assert self.call(mask).size == (6, 12)
        none = mask.clone()
        none[0] = True
        assert self.call(none).text_lengths == (TEXTS, 9)

    @pytest.mark.parametrize("kind", [torch.bool, torch.float32])
    def test_other_masks(self, kind):
        mask = call_of_a_model()["attention_mask"]
        holes, picture, front, end = (mask.clone() for _ in range(4))
        holes[0, 2] = False
        picture[1, -1] = False
        front[0, :TEXTS] = torch.arange(TEXTS) >= 7  # padded on the left
        end[1, TEXTS] = False  # the padding goes on into the image
        ends = "leaves out other tokens than the last ones of texts"
        for wrong, message in ((holes, "has holes"), (picture, "has holes"), (front, ends), (end, ends)):
            with pytest.raises(ValueError, match=message):
                self.call(wrong.to(kind))

    def test_shapes_and_numbers(self):
        mask = call_of_a_model()["attention_mask"]
        with pytest.raises(ValueError, match=r"a mask \[2, 30\] of text and image tokens, got one of \[2, 12\]"):
            self.call(mask[:, :TEXTS])
        with pytest.raises(ValueError, match=r"got torch\.int64"):
            self.call(mask.long())
        with pytest.raises(ValueError, match="ones and zeros, got other numbers"):
            self.call(torch.where(mask, 0.0, float("-inf")))

    def test_a_mask_is_read_once(self, monkeypatch):
        """Reading makes the host wait for the device."""
        mask, read, tolist = call_of_a_model()["attention_mask"], [], torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self.shape) or tolist(self))
        calls = [self.call(mask) for _ in range(3)]
        assert calls[0].text_lengths == calls[2].text_lengths == (5, 9)
        assert read.count(mask.shape) == 1
        mask[0, 4] = False
        assert self.call(mask).text_lengths == (4, 9) and read.count(mask.shape) == 2

    def test_reference_pictures(self):
        places = call_of_a_model()["img_ids"]
        places[6:, 0] = 1
        with pytest.raises(ValueError, match="12 tokens of reference pictures, and Chroma has none"):
            self.call(None, img_ids=places)
