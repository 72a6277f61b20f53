"""Prompt-to-Prompt's own calls give what they gave: its store, and controllers that users derived from its classes."""

import pytest
import torch

from fpe_pipeline.compat.lazy import MapNumbersWarning
from fpe_pipeline.compat.prompt_to_prompt import AttentionControl, AttentionStore, aggregate_attention, ptp_utils
from tests.support.dropin_cases import compare, load_dropin, outputs
from tests.support.slow_cases import few


def run(pipe, case, controller):
    """The original's loop: latents after every step."""
    settings, latents, trajectory = case.settings, case.latents, []
    with torch.no_grad(), ptp_utils.register_attention_control(pipe, controller, compat="original", backend="torch"):
        towards, away = pipe.encode_prompt(settings["prompts"], "cpu", 1, True)
        pipe.scheduler.set_timesteps(settings["steps"])
        assert pipe.scheduler.timesteps.tolist() == settings["timesteps"]
        for t in pipe.scheduler.timesteps:
            context = torch.cat([away, towards])
            latents = ptp_utils.diffusion_step(pipe, controller, latents, context, t, settings["guidance_scale"])
            trajectory.append(latents)
    return trajectory


def check(pipe, name, controller):
    case = load_dropin(name)
    trajectory = run(pipe, case, controller)
    compare(case, "latents", trajectory[-1])
    if "latents_step1" in outputs(case):
        compare(case, "latents_step1", trajectory[0])
    for output in outputs(case, "avg/"):
        _, key, place = output.split("/")
        compare(case, output, controller.get_average_attention()[key][int(place)].numbers())
    for output in outputs(case, "avg_headmean/"):
        _, key, place = output.split("/")
        average = controller.get_average_attention()[key][int(place)]
        compare(case, output, average.reshape(len(case.latents), -1, *average.shape[1:]).mean(1).numbers())
    for output in outputs(case, "aggregate_cross16_up_down/"):
        aggregated = aggregate_attention(controller, 16, ("up", "down"), True, int(output[-1]))
        compare(case, output, aggregated.numbers())


class Power(AttentionControl):
    """From the second step on every map to a power, its rows brought back to a sum of one."""

    first, normalises = 1, True

    def forward(self, attn, is_cross, place_in_unet):
        if self.cur_step < self.first:
            return attn
        powered = attn**1.1
        return powered / powered.sum(-1, keepdim=True) if self.normalises else powered


class DropColumns(AttentionStore):
    """Keeps every map, and takes two words out of the first three steps' middle and upper layers."""

    places = ("up", "mid")

    def keep(self, attn, is_cross, place_in_unet):
        super().forward(attn, is_cross, place_in_unet)

    def edit(self, attn):
        attn[:, :, 5:7] = 0
        return attn

    def forward(self, attn, is_cross, place_in_unet):
        self.keep(attn, is_cross, place_in_unet)
        if is_cross and place_in_unet in self.places and self.cur_step < 3:
            attn = self.edit(attn.clone())
        return attn


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fpe_pipeline.compat.lazy.MapNumbersWarning")
def test_the_store(pipe):
    check(pipe, "p2p_store", AttentionStore())


@pytest.mark.filterwarnings("ignore::fpe_pipeline.compat.lazy.MapNumbersWarning")
def test_dropped_columns(pipe):
    check(pipe, "p2p_custom_dropcolumn", DropColumns())


@pytest.mark.slow
def test_a_power_says_which_line_asked(pipe):
    with pytest.warns(MapNumbersWarning) as told:
        check(pipe, "p2p_custom_power", Power())
    (one,) = [str(warning.message) for warning in told if "a power" in str(warning.message)]
    assert one.startswith(f"{__file__}:") and "bytes" in one


class StoreOfTheOtherHalf(AttentionStore):
    def __call__(self, attn, is_cross, place_in_unet):
        self.forward(attn[: attn.shape[0] // 2], is_cross, place_in_unet)
        self.rows = 1
        self.layer_done()
        return attn


class StoreOfTheLastStep(AttentionStore):
    def between_steps(self):
        self.attention_store = {key: [attn * self.cur_step for attn in maps] for key, maps in self.step_store.items()}
        self.step_store = self.get_empty_store()


class Unnormalised(Power):
    normalises = False


class FromTheFirstStep(Power):
    first = 0


class OfBothHalves(Power):
    def __call__(self, attn, is_cross, place_in_unet):
        attn[...] = self.forward(attn, is_cross, place_in_unet)
        self.layer_done()
        return attn


class Renormalised(DropColumns):
    def edit(self, attn):
        attn = super().edit(attn)
        return attn / attn.sum(-1, keepdim=True)


class DownToo(DropColumns):
    places = ("down", "up", "mid")


class UneditedCopies(DropColumns):
    def keep(self, attn, is_cross, place_in_unet):
        super().keep(attn.clone(), is_cross, place_in_unet)


WRONG = {
    StoreOfTheOtherHalf: "p2p_store",
    StoreOfTheLastStep: "p2p_store",
    Unnormalised: "p2p_custom_power",
    FromTheFirstStep: "p2p_custom_power",
    OfBothHalves: "p2p_custom_power",
    Renormalised: "p2p_custom_dropcolumn",
    DownToo: "p2p_custom_dropcolumn",
    UneditedCopies: "p2p_custom_dropcolumn",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fpe_pipeline.compat.lazy.MapNumbersWarning")
@pytest.mark.parametrize(
    "kind", few({kind.__name__: kind for kind in WRONG}, "StoreOfTheOtherHalf", "Unnormalised", "Renormalised")
)
def test_a_wrong_variant_is_seen(pipe, kind):
    with pytest.raises(AssertionError, match="of its tolerance"):
        check(pipe, WRONG[kind], kind())
