"""attention-map-diffusers' surface against its own outputs, and against maps that are written out."""

import warnings

import pytest
import torch
from PIL import Image

from fpe_pipeline import FreePromptEdit, editing
from fpe_pipeline.compat.attention_map_diffusers import (
    attn_maps,
    init_pipeline,
    restore_pipeline,
    save_attention_maps,
    watched_pipeline,
)
from fpe_pipeline.compat.attention_map_diffusers.collector import TextMaps
from fpe_pipeline.errors import EditWarning
from fpe_pipeline.session.layers import joint_computing
from tests.support.dropin import load_dropin, load_dropin_pipeline, rounded_frequencies
from tests.support.tiny_language import gemma_tokenizer
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline, unedited
from tests.support.written_out import written_out_maps

CASES = {
    "attnmaps_sd15": "tiny-sd15",
    "attnmaps_sdxl": "tiny-sdxl",
    "attnmaps_sd3": "tiny-sd3",
    "attnmaps_flux": "tiny-flux",
}
EXACT = ("attnmaps_sdxl", "attnmaps_sd3")
SIZE = (8, 12)


@pytest.fixture(scope="module")
def pipes():
    found = {}
    for name, model in CASES.items():
        found[name] = load_dropin_pipeline(model, ddim=model in ("tiny-sd15", "tiny-sdxl"))
    # The original lies close to float64, and in float32 this CPU's products do not.
    for name in EXACT:
        found[name].to(dtype=torch.float64)
    return found


@pytest.fixture(autouse=True)
def forgotten():
    attn_maps.clear()


def run(pipe, case):
    with rounded_frequencies():
        return _run(pipe, case)


def _run(pipe, case):
    given, rows = case.settings, len(case.settings["prompts"])
    dtype = (pipe.unet if getattr(pipe, "unet", None) else pipe.transformer).dtype
    return pipe(
        given["prompts"],
        latents=case.start(rows).to(dtype),
        height=given["height"],
        width=given["width"],
        num_inference_steps=given["steps"],
        guidance_scale=given["guidance_scale"],
        output_type="latent",
        **given["call_kwargs"],
    ).images


def written_out(view):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the numbers are asked for, which here they are
        return view.numbers()


def misses(case, latents):
    keys, missed = case.settings["timestep_keys"], {"latents": case.miss("latents", latents)}
    assert list(attn_maps) == keys and all(type(key) is type(mine) for key, mine in zip(keys, attn_maps, strict=True))
    for name in case.outputs:
        kind, _, rest = name.partition("/")
        if kind == "map":
            index, _, layer = rest.partition("/")
            missed[name] = case.miss(name, written_out(attn_maps[keys[int(index)]][layer]))
        elif kind == "headmean_summed_over_steps":
            missed[name] = case.miss(name, sum(written_out(attn_maps[key][rest].mean(1)) for key in keys))
    assert all(list(layers) == case.settings["layer_keys"] for layers in attn_maps.values())
    return missed


@pytest.mark.parametrize("name", CASES)
def test_is_what_the_original_keeps(pipes, name):
    case = load_dropin(name)
    with watched_pipeline(pipes[name], compat="original") as pipe:
        missed = misses(case, run(pipe, case))
    assert len(missed) == len(case.outputs) and max(missed.values()) <= 1, missed


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("attnmaps_sd15", "height for width"),
        ("attnmaps_sd15", "other rows"),
        ("attnmaps_flux", "height for width"),
        ("attnmaps_flux", "other rows"),
        ("attnmaps_flux", "renormalised"),
    ],
)
def test_other_maps_are_seen(pipes, name, planted, monkeypatch):
    case, receive = load_dropin(name), TextMaps.receive
    if planted == "renormalised":
        shares = joint_computing._text_shares
        monkeypatch.setattr(joint_computing, "_text_shares", lambda terms, layer: torch.ones_like(shares(terms, layer)))

    def changed(self, site, step, roles, columns, maps):
        if planted == "other rows":
            maps = {row: maps[roles.batch - 1 - row] for row in maps}
        receive(self, site, step, roles, columns, maps)
        if planted == "height for width":
            view = self._maps[next(reversed(self._maps))][site.path]
            view._grid = view._grid[::-1]
            self._maps[next(reversed(self._maps))][site.path] = _Turned(view)

    monkeypatch.setattr(TextMaps, "receive", changed)
    with watched_pipeline(pipes[name], compat="original") as pipe:
        missed = misses(case, run(pipe, case))
    assert missed.pop("latents") <= 1
    assert max(missed.values()) > 10


class _Turned:
    """A map whose height is its width, read as if it were not."""

    def __init__(self, view):
        self.view = view

    def numbers(self):
        return self.view.numbers().transpose(-2, -3)

    def mean(self, axis):
        return _Turned(self.view.mean(axis))


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_any_prompts_heads_and_proportions(pipe, guidance_scale, no_whole_maps, tmp_path):
    eight = tiny_pipeline(pipe, block_out_channels=(16, 32, 32), attention_head_dim=8)
    with written_out_maps(eight) as maps:
        expected = sample(eight, 3, size=SIZE, guidance_scale=guidance_scale)
    with watched_pipeline(eight):
        latents = sample(eight, 3, size=SIZE, guidance_scale=guidance_scale)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    cross = [path for path in maps if path.endswith("attn2")]
    tokens = eight.tokenizer(PROMPTS[:3])["input_ids"]
    for step, layers in enumerate(attn_maps.values()):
        assert list(layers) == cross
        for path, view in layers.items():
            whole = maps[path][step]  # [B, H, N, M]
            assert view.shape[:2] == (6 if guidance_scale > 1 else 3, 8) and view.shape[2] * 3 == view.shape[3] * 2
            heat = view @ torch.eye(77)[:, 2:5]
            torch.testing.assert_close(heat.flatten(2, 3), whole[..., 2:5], rtol=0, atol=1e-5)
            for other in (whole.flip(0), whole.flip(1), whole.roll(1, 3)):  # rows, heads or tokens in another order
                assert (heat.flatten(2, 3) - other[..., 2:5]).abs().max() > 1e-4
            column = view.mean(1)[..., 4]
            torch.testing.assert_close(column.flatten(1), whole.mean(1)[..., 4], rtol=0, atol=1e-5)

    save_attention_maps(attn_maps, eight.tokenizer, PROMPTS[:3], tmp_path, unconditional=guidance_scale > 1)
    key = next(iter(attn_maps))
    (picture,) = (tmp_path / str(key) / cross[0] / "batch-2").glob("3-*.png")
    whole = maps[cross[0]][0]
    summed = whole[whole.shape[0] - 1].sum(0)[:, 3].reshape(SIZE)
    shown = torch.tensor(list(Image.open(picture).getdata())).reshape(SIZE) / 255
    torch.testing.assert_close(shown, summed.clamp(0, 1), rtol=0, atol=0.003)
    assert len(list((tmp_path / "batch-1").iterdir())) == len(tokens[1])


def test_a_run_begins_with_none_and_the_originals_with_all(tiny):
    for compat in ("original", None):
        attn_maps.clear()
        with watched_pipeline(tiny, compat=compat):
            sample(tiny, 1, steps=3)
            first = next(iter(attn_maps))
            sample(tiny, 1, steps=2)
        assert (first in attn_maps) == (compat == "original")
        assert compat == "original" or len(attn_maps) == 2


def test_edited_maps_are_shown_edited(tiny):
    with watched_pipeline(tiny), editing(tiny, FreePromptEdit()):
        sample(tiny, 2)
    edited = dict(next(reversed(attn_maps.values())))
    with watched_pipeline(tiny):
        sample(tiny, 2)
    plain = next(reversed(attn_maps.values()))
    columns = torch.eye(77)[:, :5]
    miss = [((edited[path] @ columns) - (plain[path] @ columns)).abs().amax((1, 2, 3, 4)) for path in plain]
    miss = torch.stack(miss).amax(0)  # [rows]: an edited target has another image, and so other maps
    assert miss[2] < 1e-5 < 2e-5 < miss[3]


def test_the_pipeline_is_left_as_it_was(tiny):
    before = dict(tiny.unet.attn_processors)
    assert init_pipeline(tiny) is tiny
    assert init_pipeline(tiny) is tiny  # as of a notebook's cell that runs again
    restore_pipeline(tiny)
    with pytest.raises(RuntimeError, match="restored already"):
        restore_pipeline(tiny)
    with pytest.raises(KeyError), watched_pipeline(tiny):
        sample(tiny, 1)
        raise KeyError
    assert unedited(tiny.unet)
    assert all(tiny.unet.attn_processors[name] is processor for name, processor in before.items())


def test_transformers_are_left_as_they_were(pipes):
    pipe, case = pipes["attnmaps_flux"], load_dropin("attnmaps_flux")
    before, plain = dict(pipe.transformer.attn_processors), run(pipe, case)
    with pytest.raises(KeyError), watched_pipeline(pipe):
        run(pipe, case)
        raise KeyError
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in before.items())
    assert "cache_context" not in vars(pipe.transformer)
    torch.testing.assert_close(run(pipe, case), plain, rtol=0, atol=0)


def test_pictures_are_named_by_the_tokens_of_the_columns(pipes, tmp_path):
    """The original's example for FLUX.1 passes CLIP's tokenizer, and the columns are tokens of T5."""
    pipe, case = pipes["attnmaps_flux"], load_dropin("attnmaps_flux")
    with watched_pipeline(pipe):
        run(pipe, case)
    assert attn_maps.tokenizer is pipe.tokenizer_2
    prompts = case.settings["prompts"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_attention_maps(attn_maps, pipe.tokenizer, prompts, tmp_path / "own", unconditional=False)
    with pytest.warns(EditWarning, match=r"pass pipe.tokenizer_2"):
        save_attention_maps(attn_maps, gemma_tokenizer(), prompts, tmp_path / "other", unconditional=False)
    own, other = ({path.name for path in (tmp_path / name / "batch-0").iterdir()} for name in ("own", "other"))
    assert own == other


def test_words_that_were_cut_off_have_no_picture(tiny, tmp_path):
    prompt = "a photo of " + "car " * 90
    with watched_pipeline(tiny):
        tiny(prompt, num_inference_steps=1, height=64, width=64, output_type="latent")
    save_attention_maps(attn_maps, tiny.tokenizer, prompt, tmp_path)
    names = {path.name for path in (tmp_path / "batch-0").iterdir()}
    assert len(names) == 77 and "76-endoftext.png" in names


def test_what_cannot_be_asked(tiny, tmp_path):
    with pytest.raises(ValueError, match="call a pipeline after init_pipeline"):
        save_attention_maps(attn_maps, tiny.tokenizer, PROMPTS[0], tmp_path)
    with watched_pipeline(tiny):
        sample(tiny, 2)
    with pytest.raises(ValueError, match="the maps have 2 conditional rows, for 1 prompts"):
        save_attention_maps(attn_maps, tiny.tokenizer, PROMPTS[0], tmp_path)
    with pytest.raises(ValueError, match="expected compat"):
        init_pipeline(tiny, compat="new")
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        init_pipeline("a pipeline")
    with pytest.raises(ImportError, match="no 'attn_map' here: did you mean attn_maps"):
        from fpe_pipeline.compat.attention_map_diffusers import attn_map  # noqa: F401
    with pytest.raises(ImportError, match="leaves out 'cross_attn_init'"):
        from fpe_pipeline.compat.attention_map_diffusers import cross_attn_init  # noqa: F401
