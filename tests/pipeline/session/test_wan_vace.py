"""Wan VACE: the layers of Wan, beside those of a control branch, which are each row's own; the model by itself.

diffusers' pipeline of it makes one video a call.
"""

import diffusers
import pytest
import torch

from fpe_pipeline import FreePromptEdit, editing
from tests.support.dense_rows import dense_rows
from tests.support.tiny_transformers import sharpened
from tests.support.tiny_wan import WAN, DenseWan

pytestmark = pytest.mark.usefixtures("in_float64")


def test_a_target_takes_its_sources_maps():
    torch.manual_seed(0)
    model = sharpened(diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=8))
    model = model.double().eval()
    draw = torch.Generator().manual_seed(1)
    noise, shown, texts = (
        torch.randn(*size, generator=draw, dtype=torch.float64)
        for size in ((1, 16, 3, 8, 8), (1, 8, 3, 8, 8), (2, 6, 32))
    )
    given = {"hidden_states": noise.repeat(2, 1, 1, 1, 1), "control_hidden_states": shown.repeat(2, 1, 1, 1, 1)}
    given |= {"encoder_hidden_states": texts, "timestep": torch.full((2,), 500)}

    def step():
        with torch.no_grad():
            return model(**given).sample

    plain = step()
    with editing(model, FreePromptEdit(0.5), classifier_free_guidance=False) as session:
        session.step(0, 4)
        edited = step()
    assert session.explain().startswith("2 layers replaced")

    def of_source(row, rows, map_of, value):
        return map_of(0, 0) @ value[row] if row else None

    control = {name: layer for name, layer in model.attn_processors.items() if name.startswith("vace_blocks")}
    with dense_rows([model], DenseWan, {"attn1": of_source}, (0,), lambda: 0):
        model.set_attn_processor({**model.attn_processors, **control})
        expected = step()
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-8)
    assert (edited - plain)[0].abs().max() <= 1e-8 and (edited - plain)[1].abs().max() > 1e-4
