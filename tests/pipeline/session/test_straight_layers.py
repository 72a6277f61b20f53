"""Layers that nobody edits: less of the host's time in a session, the same to the bit, and given back at its end."""

import copy
import cProfile
import pstats

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from fpe_pipeline import FreePromptEdit, editing
from fpe_pipeline.session.processors.straight import StraightAttnProcessor, straighten, unstraighten
from fpe_pipeline.session.processors.unet import EditAttnProcessor
from tests.support.edited_layer import attention, random, run
from tests.support.tiny_models import draw
from tests.support.tiny_pipelines import tiny_pipeline

LAYERS = {
    "plain": {},
    "biased": {"bias": True, "out_bias": True},
    "what it adds to": {"residual_connection": True, "rescale_output_factor": 3.0},
    "heads of another width": {"heads": 3, "dim_head": 5},
}
MORE = {
    "a norm of queries": {"qk_norm": "layer_norm"},
    "a norm of channels": {"norm_num_groups": 4},
    "a norm of the text": {"cross_attention_dim": 16, "cross_attention_norm": "layer_norm"},
    "a picture": {"residual_connection": True},
    "a mask": {},
}
EDIT = FreePromptEdit(0.5, levels=(1, 2))


class Operators(TorchDispatchMode):
    """The names of the operators that are computed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def operators(function):
    with Operators() as seen:
        function()
    return seen.names


def python_calls(function):
    profile = cProfile.Profile()
    profile.runcall(function)
    return pstats.Stats(profile).total_calls


def processors_of(layer):
    """Both ways in which a session computes a layer that has nothing to do."""
    return StraightAttnProcessor(layer.processor), EditAttnProcessor(layer.processor)


@pytest.mark.parametrize("context", [None, 5], ids=["self", "cross"])
@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_the_same_in_fewer_calls(config, context):
    layer = attention(**config, **({} if context is None else {"cross_attention_dim": 24}))
    text = {} if context is None else {"encoder_hidden_states": random(3, context, 24, seed=2)}
    hidden = random(3, 12, 16)
    expected, plain = run(layer, hidden, **text), layer.processor
    calls, computed = (count(lambda: run(layer, hidden, **text)) for count in (python_calls, operators))
    for processor in processors_of(layer):
        layer.processor = processor
        assert torch.equal(run(layer, hidden, **text), expected)
        assert python_calls(lambda: run(layer, hidden, **text)) < 0.7 * calls
        left_out = [] if config.get("rescale_output_factor") else ["aten.div.Tensor"]  # by 1
        names = operators(lambda: run(layer, hidden, **text))
        assert sorted(names + left_out) == sorted(computed)
        layer.processor = plain


@pytest.mark.parametrize("name", MORE)
def test_a_layer_that_does_more_is_left_to_its_processor(name):
    layer, text = attention(**MORE[name]), {}
    hidden = random(2, 16, 3, 4) if name == "a picture" else random(2, 12, 16)
    if name == "a norm of the text":
        text["encoder_hidden_states"] = random(2, 5, 16, seed=2)
    if name == "a mask":
        text["attention_mask"] = torch.where(torch.arange(12) < 4, 0.0, -1e4).double().expand(2, 1, 12)
    expected = run(layer, hidden, **text)
    if text:
        assert (expected - run(layer, hidden)).abs().max() > 1e-2
    for processor in processors_of(layer):
        layer.processor = processor
        assert torch.equal(run(layer, hidden, **text), expected)
        layer.processor = processor.inner


def straight(unet):
    return [path for path, own in unet.attn_processors.items() if isinstance(own, StraightAttnProcessor)]


def test_in_a_session(pipe):
    """Every layer that the edit does not select, until the session ends; then each has the very processor it had."""
    tiny = tiny_pipeline(pipe)
    before, plain = tiny.unet.attn_processors, draw(tiny, 2, steps=4)
    with editing(tiny, EDIT) as session:
        beside = straight(tiny.unet)
        edited = draw(tiny, 2, steps=4)
        with session.paused():
            assert torch.equal(draw(tiny, 2, steps=4), plain)
    assert len(beside) + len(session.report().layers) == len(before)
    assert any("attn1" in path for path in beside) and sum("attn2" in path for path in beside) > 1
    assert tiny.unet.attn_processors == before and not straight(tiny.unet)
    with editing(tiny, EDIT):
        for own in (getattr(layer, "processor", None) for layer in tiny.unet.modules()):
            if isinstance(own, StraightAttnProcessor):
                own.__class__ = AttnProcessor2_0  # as without it
        assert torch.equal(draw(tiny, 2, steps=4), edited)


def test_a_step_beyond_the_window_takes_fewer_calls_than_without_a_session(pipe):
    tiny = tiny_pipeline(pipe)
    text = torch.randn(4, 77, tiny.unet.config.cross_attention_dim)
    latents, timestep = torch.randn(4, tiny.unet.config.in_channels, 16, 16), torch.tensor(500)

    def call():
        with torch.no_grad():
            tiny.unet(latents, timestep, text, return_dict=False)

    call()
    plain, computed = python_calls(call), operators(call)
    with editing(tiny.unet, FreePromptEdit(0.5, levels=(1, 2)), classifier_free_guidance=True) as session:
        session.step(0, 4)
        call()
        session.step(3, 4)
        call()
        assert python_calls(call) < plain
        layers = len(tiny.unet.attn_processors)
        assert operators(call).count("aten.div.Tensor") == computed.count("aten.div.Tensor") - layers


def test_other_processors_stay(pipe):
    class Own(AttnProcessor2_0):
        pass

    tiny = tiny_pipeline(pipe)
    layer = tiny.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.set_processor(Own())
    with editing(tiny, EDIT):
        assert type(layer.processor) is Own
        other = tiny.unet.up_blocks[-1].attentions[0].transformer_blocks[0].attn2
        assert type(other.processor) is StraightAttnProcessor
        other.set_processor(Own())  # by a user, in the session
        draw(tiny, 2, steps=2)
    assert type(layer.processor) is type(other.processor) is Own


def test_a_compiled_unet_keeps_its_own(pipe):
    """Its graphs hold no Python to save, and would be made anew for other processors."""
    for compile_ in (lambda unet: unet.compile(backend="eager"), lambda unet: unet.compile_repeated_blocks()):
        tiny = tiny_pipeline(pipe)
        compile_(tiny.unet)
        with pytest.warns(RuntimeWarning, match="without a call"), editing(tiny, EDIT):
            assert not straight(tiny.unet)
    tiny = tiny_pipeline(pipe)
    tiny.unet = torch.compile(tiny.unet, backend="eager")
    with pytest.warns(RuntimeWarning, match="without a call"), editing(tiny, EDIT):
        assert not straight(tiny.unet)


def test_copies_are_in_no_session():
    layer = attention()
    own = layer.processor
    assert straighten(layer) and straighten(layer)
    assert type(copy.deepcopy(layer).processor) is AttnProcessor2_0
    unstraighten(layer)
    assert layer.processor is own
    layer.processor = StraightAttnProcessor()  # as diffusers makes them, of the class of what it finds
    unstraighten(layer)
    assert type(layer.processor) is AttnProcessor2_0
