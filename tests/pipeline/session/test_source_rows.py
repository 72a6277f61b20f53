"""Rows of a source beside edited targets: bit for bit those of the same processors where nothing is taken of it."""

from dataclasses import dataclass

import pytest
import torch

from fpe_pipeline import ConsistEdit, Edit, FreePromptEdit, JointProduct, Product, editing
from tests.support.edited_transformers import LONGER, MODELS, SOURCE, unedited
from tests.support.slow_cases import few
from tests.support.tiny_wan import draw_wan, tiny_wan_pipeline

PROMPTS = [SOURCE, *LONGER]
# What the processors' one softmax over parts may differ from diffusers' by, of latents of a few units.
STOCK = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class OwnMaps(Edit):
    """Every row its own map and values, in the calls that an edit of targets is about: nothing is selected for any."""

    both: bool = False

    def select(self, sites):
        return tuple(site for site in sites if site.kind in ("joint", "self"))

    def products(self, site, step, roles):
        if not (self.both or any(roles.conditional)):
            return {}
        own = JointProduct.own if site.is_joint else lambda row: Product(row, (row,), (row,))
        return {row: own(row) for row in range(roles.rows)}


def made(pipe, name, dtype):
    """A pipeline in a dtype, and what draws with it."""
    if name == "Wan":
        return tiny_wan_pipeline(pipe, 2, dtype), lambda tiny: draw_wan(tiny, prompts=4)
    tiny = MODELS[name].make(pipe)
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if isinstance(getattr(tiny, part, None), torch.nn.Module):
            getattr(tiny, part).to(dtype)
    return tiny, lambda tiny: unedited(tiny, MODELS[name], PROMPTS)


@pytest.mark.parametrize("dtype", few({"float64": torch.float64, "float32": torch.float32}, "float32"))
@pytest.mark.parametrize("name", few([*MODELS, "Wan"], "FLUX, guided"))
def test_bit_for_bit(pipe, name, dtype):
    tiny, run = made(pipe, name, dtype)
    with editing(tiny, FreePromptEdit(1.0)):
        edited = run(tiny)
    with editing(tiny, OwnMaps()):
        own = run(tiny)
    stock = run(tiny)
    assert torch.equal(edited[0], own[0])
    assert (edited - own)[1:].abs().flatten(1).amax(1).min() > 1e-4
    # Lumina 2 turns queries and keys in float32 whatever they are given in.
    bound = 1e-5 if name == "Lumina 2" else STOCK[dtype]
    assert (edited[0] - stock[0]).abs().max() <= bound and (own - stock).abs().max() <= bound


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].is_guided])
def test_in_both_halves(pipe, name):
    """The same where rows that see the negative prompt are edited as well."""
    tiny, run = made(pipe, name, torch.float32)
    edit = ConsistEdit(1.0, layers=[0, 1, 2])
    with editing(tiny, edit):
        edited = run(tiny)
    with editing(tiny, OwnInLayers(both=True)):
        own = run(tiny)
    assert torch.equal(edited[0], own[0]) and (edited - own)[1:].abs().max() > 1e-4


@dataclass(frozen=True)
class OwnInLayers(OwnMaps):
    """In the first three layers alone."""

    def select(self, sites):
        return tuple(site for site in sites if site.kind == "joint" and site.index < 3)
