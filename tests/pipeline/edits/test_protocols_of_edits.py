"""What an edit may do beside its products: served by having the methods, and by all of them."""

from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

from fpe_pipeline import CombinedEdit, FreePromptEdit, LocalBlend, PlugAndPlayEdit, Product, PromptToPromptEdit, editing
from fpe_pipeline.edits import Edit
from fpe_pipeline.edits.base import Injecting, Prompted, Remembering, Watching, begun, parts_of, watchers_of
from tests.support.tiny_pipelines import PROMPTS, sample

PAIR = PROMPTS[:2]
BLOCK = "up_blocks.1.resnets.1.conv2"


class Bare(Edit):
    def products(self, site, step, roles):
        return {target: Product(source, (source,), (target,)) for source, target in roles.pairs()}


class HalfInjecting(Bare):
    def features(self, step, roles):
        return {BLOCK: {1: 0}}


class HalfPrompted(Bare):
    def written_for(self):
        return ("a red car",)


class Nowhere(Bare):
    def select(self, sites):
        return ()


@dataclass(frozen=True)
class InjectsAlone(Edit):
    feature_modules: tuple[str, ...] = (BLOCK,)

    def select(self, sites):
        return ()

    def products(self, site, step, roles):
        return {}

    def features(self, step, roles):
        return {BLOCK: {target: source for source, target in roles.pairs()}}


def test_an_edit_is_three_methods(tiny):
    assert not any(isinstance(Bare(), protocol) for protocol in (Watching, Injecting, Prompted, Remembering))
    with editing(tiny, Bare()) as session:
        edited = sample(tiny)
    assert len(session.report().layers) == len(session.sites)
    assert (edited - sample(tiny))[1].abs().max() > 1e-5


def test_what_the_methods_of_the_package_serve(tiny):
    words = PromptToPromptEdit(PAIR, tiny.tokenizer)
    assert isinstance(words, Prompted) and not isinstance(words, Watching)
    assert isinstance(LocalBlend(PAIR, tiny.tokenizer, ("red", "blue")), Watching)
    assert isinstance(PlugAndPlayEdit(), Injecting) and not isinstance(PlugAndPlayEdit(), Prompted)
    assert isinstance(FreePromptEdit(), Remembering)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (HalfInjecting(), "HalfInjecting has features and no feature_modules: an edit that is Injecting has both"),
        (HalfPrompted(), "HalfPrompted has written_for and no encoded"),
        (FreePromptEdit() + HalfInjecting(), "HalfInjecting has features and no feature_modules"),
    ],
    ids=["features", "prompts", "in a combination"],
)
def test_half_of_a_protocol_is_refused(tiny, edit, message):
    with pytest.raises(TypeError, match=message):
        editing(tiny, edit)


def test_features_without_a_layer(tiny):
    with editing(tiny, InjectsAlone()) as session:
        edited = sample(tiny)
    assert list(session.report().features) == [BLOCK]
    assert (edited - sample(tiny))[1].abs().max() > 1e-5


def test_a_part_of_a_combination_that_selects_nothing_is_refused(tiny):
    with pytest.raises(ValueError, match="Nowhere selects none of the model's"):
        editing(tiny, FreePromptEdit() + Nowhere())


def test_a_combination_stays_what_it_was(tiny):
    """Each session asks its parts which layers they want; nothing of it is left in the edit."""
    both = FreePromptEdit(levels=1) + PromptToPromptEdit(PAIR, tiny.tokenizer, self_replace_steps=0)
    before = {name: repr(value) for name, value in vars(both).items()}
    with editing(tiny, both):
        first = sample(tiny)
    with editing(tiny, both):
        assert torch.equal(sample(tiny), first)
    assert {name: repr(value) for name, value in vars(both).items()} == before == {"edits": repr(both.edits)}
    assert begun(both) is both and parts_of(both) == both.edits and watchers_of(both) == ()
    with pytest.raises(FrozenInstanceError):
        both.edits = ()
    assert isinstance(begun(both + LocalBlend(PAIR, tiny.tokenizer, ("red", "blue"))), CombinedEdit)


def test_a_run_has_a_report_of_its_own(tiny):
    with editing(tiny, FreePromptEdit(0.5)) as session:
        sample(tiny, steps=4)
        first = session.report()
        told = str(first)
        sample(tiny, steps=2)
    assert str(first) == told and first.total == 4 and session.report().total == 2
