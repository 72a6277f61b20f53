"""A registered controller sees every layer, and leaves nothing behind."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpe_pipeline import FreePromptEdit, editing
from fpe_pipeline.compat.controlled import ControlledLayers, controlled_layers, register_controller
from fpe_pipeline.compat.lazy import LazyMap, MapNumbersWarning, numbers
from fpe_pipeline.compat.prompt_to_prompt import (
    AttentionControl,
    AttentionReplace,
    AttentionStore,
    EmptyControl,
    ptp_utils,
)
from tests.support.tiny_pipelines import sample, tiny_sdxl_pipeline, unedited


class Noting(AttentionControl):
    """Notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, attn, is_cross, place_in_unet):
        self.seen.append((tuple(attn.shape), is_cross, place_in_unet, self.cur_step, self.cur_att_layer))
        return attn


class Failing(AttentionControl):
    def __init__(self, error, layer=3):
        super().__init__()
        self.error, self.layer = error, layer

    def forward(self, attn, is_cross, place_in_unet):
        if self.cur_att_layer == self.layer:
            raise self.error
        return attn * 0.5


def same(before, unet):
    after = unet.attn_processors
    return before.keys() == after.keys() and all(after[name] is before[name] for name in before)


def test_every_layer_in_the_originals_order(pipe):
    noting = Noting()
    with register_controller(pipe, noting):
        pipe(["a", "b"], num_inference_steps=2, height=128, width=192, output_type="latent")
    assert noting.num_att_layers == 32 and noting.cur_step == 2 and noting.cur_att_layer == 0
    first = noting.seen[:32]
    assert [layer for *_, layer in first] == list(range(32))
    assert [place for _, _, place, _, _ in first] == ["down"] * 12 + ["mid"] * 2 + ["up"] * 18
    assert [is_cross for _, is_cross, *_ in first] == [False, True] * 16
    heads = pipe.unet.config.attention_head_dim
    heads = heads[0] if isinstance(heads, list | tuple) else heads
    assert first[0][0] == (2 * heads, 16 * 24, 16 * 24) and first[1][0] == (2 * heads, 16 * 24, 77)


def test_nothing_changes_where_nothing_is_changed(tiny):
    expected = sample(tiny, 3)
    for controller in (EmptyControl(), AttentionStore(), Noting()):
        with ptp_utils.register_attention_control(tiny, controller):
            torch.testing.assert_close(sample(tiny, 3), expected, rtol=1e-4, atol=1e-4)
    assert unedited(tiny.unet)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), RuntimeError("mine")], ids=repr)
def test_restored_after_an_error_in_forward(tiny, error):
    before, expected = dict(tiny.unet.attn_processors), sample(tiny)
    with pytest.raises(type(error)), register_controller(tiny, Failing(error)):
        sample(tiny)
    assert same(before, tiny.unet) and unedited(tiny.unet)
    assert torch.equal(sample(tiny), expected)


def test_a_call_that_was_broken_off_is_not_counted(tiny):
    class Once(AttentionStore):
        fails = True

        def forward(self, attn, is_cross, place_in_unet):
            if self.cur_att_layer == 3 and self.fails:
                raise ValueError("once")
            return super().forward(attn, is_cross, place_in_unet)

    once = Once()
    with register_controller(tiny, once):
        with pytest.raises(ValueError, match="once"):
            sample(tiny)
        once.fails = False
        sample(tiny)
    assert once.cur_step == 3 and once.cur_att_layer == 0
    assert sum(map(len, once.get_average_attention().values())) == once.num_att_layers


def test_restored_by_hand_and_by_none(tiny):
    before = dict(tiny.unet.attn_processors)
    registered = ptp_utils.register_attention_control(tiny, EmptyControl())
    assert controlled_layers(tiny) is registered and not same(before, tiny.unet)
    registered.restore()
    registered.restore()
    assert same(before, tiny.unet)
    ptp_utils.register_attention_control(tiny, EmptyControl())
    assert ptp_utils.register_attention_control(tiny, None) is None
    assert same(before, tiny.unet) and unedited(tiny.unet) and controlled_layers(tiny) is None


def test_registering_anew_takes_the_earlier_off(tiny):
    before, first, second = dict(tiny.unet.attn_processors), Noting(), Noting()
    register_controller(tiny, first)
    with register_controller(tiny, second):
        sample(tiny)
    assert not first.seen and second.seen and same(before, tiny.unet)


def test_guidance_is_read_from_the_call(tiny):
    noting = Noting()
    with register_controller(tiny, noting):
        sample(tiny, 3, steps=1, guidance_scale=1.0)
        without = noting.seen[0][0][0]
        noting.seen, noting.cur_step = [], 0
        sample(tiny, 3, steps=1)
        assert noting.seen[0][0][0] == without == 3 * tiny.unet.config.attention_head_dim
    with register_controller(tiny, noting, compat="original"):
        noting.seen = []
        sample(tiny, 4, steps=1, guidance_scale=1.0)
        assert noting.seen[0][0][0] == 2 * tiny.unet.config.attention_head_dim


def test_a_session_and_a_controller_do_not_meet(tiny):
    edit = FreePromptEdit(levels=[0, 1])
    with editing(tiny, edit):
        sample(tiny)
        with pytest.raises(ValueError, match="editing session"):
            register_controller(tiny, EmptyControl())
    refused = pytest.raises(RuntimeError, match="another tool or session computes")
    with register_controller(tiny, EmptyControl()), refused, editing(tiny, edit):
        raise AssertionError("the block was entered")
    assert unedited(tiny.unet)


def test_other_layers_of_a_users_own_are_refused(tiny):
    class Mine:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None):
            return hidden_states

    before = dict(tiny.unet.attn_processors)
    tiny.unet.set_attn_processor(Mine())
    with pytest.raises(ValueError, match="may do more than attention"):
        register_controller(tiny, EmptyControl())
    assert all(isinstance(processor, Mine) for processor in tiny.unet.attn_processors.values())
    tiny.unet.set_attn_processor(before)


class Shaped(EmptyControl):
    def __init__(self, result):
        self.result = result

    def __call__(self, attn, is_cross, place_in_unet):
        return self.result(attn)


@pytest.mark.parametrize("result", [lambda attn: None, lambda attn: attn[1:], lambda attn: "attn"])
def test_what_is_no_map_of_the_layer_is_refused(tiny, result):
    with register_controller(tiny, Shaped(result)), pytest.raises(TypeError, match="returns the map that it got"):
        sample(tiny)


def test_forward_that_returns_nothing(tiny):
    class Nothing(AttentionControl):
        def forward(self, attn, is_cross, place_in_unet):
            pass

    with register_controller(tiny, Nothing()), pytest.raises(TypeError, match="forward returned nothing"):
        sample(tiny)


class OwnBase:
    """A controller that shares no code with this package, as a notebook has it."""

    cur_step = cur_att_layer = 0

    def __call__(self, attn, is_cross, place_in_unet):
        half = attn.shape[0] // 2
        attn[half:] = self.forward(attn[half:], is_cross, place_in_unet)
        self.cur_att_layer += 1
        if self.cur_att_layer == self.num_att_layers:
            self.cur_att_layer, self.cur_step = 0, self.cur_step + 1
        return attn

    def forward(self, attn, is_cross, place_in_unet):
        maps = attn.reshape(2, -1, *attn.shape[1:])
        if not is_cross:
            maps[1:] = maps[:1]
        return maps.reshape(attn.shape)


@pytest.mark.filterwarnings("error::fpe_pipeline.compat.lazy.MapNumbersWarning")
def test_a_controller_of_no_class_of_ours(tiny):
    own = OwnBase()
    with register_controller(tiny, own):
        mine = sample(tiny)
    with editing(tiny, FreePromptEdit(1.0, levels=range(4))):
        torch.testing.assert_close(mine, sample(tiny), rtol=1e-3, atol=1e-3)
    assert own.cur_step == 3 and not torch.allclose(mine, sample(tiny), atol=1e-2)


def test_a_tensor_is_taken_too(tiny):
    numbers.forget_lines()
    expected = sample(tiny)
    with register_controller(tiny, Shaped(lambda attn: attn.numbers("all of it"))), pytest.warns(MapNumbersWarning):
        torch.testing.assert_close(sample(tiny), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_a_line_is_told_of_once_for_each_registration(tiny):
    power = Shaped(lambda attn: attn**2)
    told = []
    for _ in range(2):
        with register_controller(tiny, power), pytest.warns(MapNumbersWarning) as seen:
            sample(tiny)
        told.append(len(seen))
    line = inspect.getsourcelines(test_a_line_is_told_of_once_for_each_registration)[1] + 2
    assert told == [1, 1] and f"{__file__}:{line} needs" in str(seen[0].message)


@pytest.mark.parametrize(("made_for", "called_with"), [(2, 3), (3, 2), (2, 4)])
def test_controllers_for_other_prompts(tiny, made_for, called_with):
    prompts = ["a photo of a red car", "a photo of a blue car", "a photo of a green car"]
    controller = AttentionReplace(prompts[:made_for], 3, 0.8, 0.4)
    with register_controller(tiny, controller), pytest.raises(ValueError, match=f"made for {made_for} prompts"):
        sample(tiny, called_with)


def test_controllers_for_other_prompts_in_a_loop_of_ones_own(pipe):
    controller = AttentionReplace(["a red car", "a blue car"], 3, 0.8, 0.4)
    with pytest.raises(ValueError, match="made for 2 prompts; the batch has 3"):
        ptp_utils.text2image_ldm_stable(pipe, ["a", "b", "c"], controller, 2, latent=torch.randn(1, 4, 16, 16))


def test_models_that_have_no_such_layers(tiny):
    with pytest.raises(TypeError):
        register_controller(torch.nn.Linear(2, 2), EmptyControl())
    with pytest.raises(TypeError, match=r"controller\(attn, is_cross, place_in_unet\)"):
        register_controller(tiny, "store")
    with pytest.raises(ValueError, match="compat"):
        register_controller(tiny, EmptyControl(), compat="new")


def test_sdxl(pipe):
    sdxl, noting = tiny_sdxl_pipeline(pipe), Noting()
    with register_controller(sdxl, noting):
        sdxl(["a", "b"], num_inference_steps=1, height=128, width=64, output_type="latent")
    assert len(noting.seen) == noting.num_att_layers == len(sdxl.unet.attn_processors)


def test_layers_of_a_kind_by_a_function(tiny):
    calls = []

    def compute(call):
        calls.append((call.site.kind, call.number, call.layers))
        return call.attention @ call.value

    expected = sample(tiny, steps=1)
    with ControlledLayers(tiny, compute, kinds=("cross",), before=calls.append):
        torch.testing.assert_close(sample(tiny, steps=1), expected, rtol=1e-4, atol=1e-4)
    kinds = [call[0] for call in calls if isinstance(call, tuple)]
    assert not isinstance(calls[0], tuple) and set(kinds) == {"cross"} and len(kinds) == calls[1][2]


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, list | tuple) else [result]:
            if isinstance(made, torch.Tensor):
                self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
        return result


class Halving(AttentionStore):
    def forward(self, attn, is_cross, place_in_unet):
        super().forward(attn, is_cross, place_in_unet)
        attn[:, :, 3] = 0
        by_prompt = attn.reshape(2, -1, *attn.shape[1:])
        by_prompt[1:] = 0.5 * by_prompt[:1] + 0.5 * by_prompt[1:]
        return attn / attn.sum(-1, keepdim=True)


def largest(pipe, prompts, size):
    embeds = torch.zeros(len(prompts) * 2, 77, pipe.unet.config.cross_attention_dim)
    with torch.no_grad(), _Largest() as made:
        pipe.unet(torch.zeros(len(prompts) * 2, 4, *size), 1, encoder_hidden_states=embeds)
    return made.nbytes


@pytest.mark.slow
def test_layers_of_4096_tokens_make_no_tensor_of_a_maps_size(tiny):
    prompts, size = ["a red car", "a blue car"], (64, 64)
    plain = largest(tiny, prompts, size)
    matrix = 2 * tiny.unet.config.attention_head_dim * 4096 * 4096 * 4
    assert plain < matrix / 8
    for controller in (Halving(), AttentionReplace(prompts, 2, 0.8, 1.0, self_tokens=4096)):
        with register_controller(tiny, controller):
            assert largest(tiny, prompts, size) <= max(1.1 * plain, matrix / 16)
    with register_controller(tiny, Shaped(lambda attn: attn**2)), pytest.warns(MapNumbersWarning):
        assert largest(tiny, prompts, size) >= matrix


def test_a_views_map_is_the_layers(tiny):
    class Kept(AttentionControl):
        def forward(self, attn, is_cross, place_in_unet):
            self.attn = attn
            return attn.clone().mul_(2)

    kept = Kept()
    with register_controller(tiny, kept):
        sample(tiny)
    assert isinstance(kept.attn, LazyMap)
    torch.testing.assert_close(kept.attn.sum(-1), torch.full(kept.attn.shape[:2], 2.0))
