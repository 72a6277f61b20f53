"""Adapters of one's own: what is refused without one, and what one has to have."""

import pytest
import torch

from fpe_pipeline import FreePromptEdit, ModelCall, TransformerAdapter, editing, register_adapter
from fpe_pipeline.models.adapters import families


class OtherTransformer(torch.nn.Module):
    pass


class Other(TransformerAdapter):
    family = "unet"

    def find_sites(self):
        return ()

    def read(self, args, kwargs):
        return ModelCall(args[0], args[1], args[0].shape[-2:])


@pytest.fixture(autouse=True)
def _only_ours(monkeypatch):
    monkeypatch.setattr(families, "_TRANSFORMERS", dict(families._TRANSFORMERS))


def test_an_unknown_transformer_is_told_what_an_adapter_needs():
    with pytest.raises(TypeError, match=r"OtherTransformer .*find_sites.*register_adapter\('OtherTransformer'"):
        editing(OtherTransformer(), FreePromptEdit())


def test_one_that_inherits_is_known():
    class Finer(OtherTransformer):
        pass

    register_adapter("OtherTransformer", Other)
    register_adapter("OtherTransformer", Other)  # once more is no other
    assert isinstance(families.adapter_of(Finer()), Other)


def test_what_is_no_adapter():
    with pytest.raises(TypeError, match="expected a class of adapters"):
        register_adapter("OtherTransformer", Other(None, OtherTransformer()))

    class Half(TransformerAdapter):
        def read(self, args, kwargs):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Half lacks family, find_sites"):
        register_adapter("OtherTransformer", Half)


def test_models_that_have_one():
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel has an adapter already, FluxAdapter"):
        register_adapter("FluxTransformer2DModel", Other)
