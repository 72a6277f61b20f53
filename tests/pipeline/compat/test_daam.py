"""DAAM's surface against DAAM's own outputs, and against maps that are written out."""

import types

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline import FreePromptEdit, editing
from fpe_pipeline.compat import daam
from fpe_pipeline.compat.daam import GlobalHeatMap, WordHeatMap, trace
from fpe_pipeline.compat.daam import trace as trace_class
from fpe_pipeline.compat.daam.collector import HeadHeat
from tests.support.dropin import load_dropin, load_dropin_pipeline
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline, unedited
from tests.support.written_out import written_out_maps

CASES = {"daam_sd15": "tiny-sd15", "daam_sdxl": "tiny-sdxl"}
SIZE = (8, 12)


@pytest.fixture(scope="module")
def pipes():
    return {name: load_dropin_pipeline(model) for name, model in CASES.items()}


@pytest.fixture(scope="module")
def eight_heads(pipe):
    return tiny_pipeline(pipe, block_out_channels=(16, 32, 32), attention_head_dim=8)


def traced(pipe, case):
    given = case.settings
    with trace(pipe, compat="original") as tc:
        latents = pipe(
            given["prompts"][0],
            latents=case.start(1),
            height=given["height"],
            width=given["width"],
            num_inference_steps=given["steps"],
            guidance_scale=given["guidance_scale"],
            output_type="latent",
        ).images
    return tc, latents


def misses(tc, latents, case):
    found = {"latents": latents, "global": tc.compute_global_heat_map().heat_maps}
    found |= {f"global_{name}": tc.compute_global_heat_map(**v).heat_maps for name, v in case.settings["views"].items()}
    for word in case.settings["words"]:
        found[f"word/{word}"] = tc.compute_global_heat_map().compute_word_heat_map(word).heatmap
    assert sorted(found) == sorted(case.outputs)
    return {name: case.miss(name, tensor) for name, tensor in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_is_what_daam_computes(pipes, name, no_whole_maps, monkeypatch):
    case = load_dropin(name)
    tc, latents = traced(pipes[name], case)
    assert max(misses(tc, latents, case).values()) <= 1
    assert sorted(list(key) for key, _ in tc.all_heat_maps) == case.settings["raw_keys_factor_layer_head"]
    assert tc.layer_names == case.settings["layer_names"]

    bilinear = types.SimpleNamespace(interpolate=lambda x, size, mode: F.interpolate(x, size=size, mode="bilinear"))
    monkeypatch.setitem(trace_class._view.__globals__, "F", bilinear)
    assert misses(tc, latents, case)["global"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["the unconditional half", "means over steps"])
def test_another_reading_is_seen(pipes, planted, monkeypatch):
    name = "daam_sd15"
    case = load_dropin(name)
    columns, receive = HeadHeat.columns, HeadHeat.receive
    if planted == "means over steps":
        steps = case.settings["steps"]
        monkeypatch.setattr(
            HeadHeat,
            "receive",
            lambda self, site, step, roles, found, maps: receive(
                self, site, step, roles, {row: heat / steps for row, heat in found.items()}, maps
            ),
        )
    else:

        def unconditional(self, site, step, roles):
            wanted = columns(self, site, step, roles).values()
            return dict(zip(roles.select(conditional=False), wanted, strict=True))

        monkeypatch.setattr(HeadHeat, "columns", unconditional)
    tc, latents = traced(pipes[name], case)
    missed = misses(tc, latents, case)
    assert missed["latents"] <= 1
    assert missed["global"] > 10 and missed["word/burger"] > 10 and missed["global_head1"] > 10


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_any_prompts_heads_and_proportions(eight_heads, guidance_scale, no_whole_maps):
    with written_out_maps(eight_heads) as maps:
        expected = sample(eight_heads, 3, size=SIZE, guidance_scale=guidance_scale)
    with trace(eight_heads) as tc:
        latents = sample(eight_heads, 3, size=SIZE, guidance_scale=guidance_scale)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    cross = [path for path in maps if path.endswith("attn2") and not path.startswith("mid")]
    assert len(tc.layer_names) == len(cross)
    rows = 6 if guidance_scale > 1 else 3
    for image in range(3):
        tokens = len(eight_heads.tokenizer.tokenize(PROMPTS[image])) + 2
        merged = []
        for path in cross:
            summed = sum(maps[path])[rows - 3 + image]  # [H, N, M]
            factor = round((SIZE[0] * SIZE[1] / summed.shape[1]) ** 0.5)
            grid = summed.transpose(1, 2)[:, :tokens].unflatten(-1, (SIZE[0] // factor, SIZE[1] // factor))
            merged.append(F.interpolate(grid, size=SIZE, mode="bicubic").clamp(min=0))
        assert merged[0].shape[0] == 8
        heat = tc.compute_global_heat_map(image=image)
        torch.testing.assert_close(heat.heat_maps, torch.cat(merged).mean(0), rtol=0, atol=1e-4)
        # Another image's heat, half of the heads or a mean over steps would be seen.
        for other in (
            tc.compute_global_heat_map(image=(image + 1) % 3).heat_maps[:tokens],
            tc.compute_global_heat_map(image=image, head_idx=0).heat_maps,
            heat.heat_maps / 3,
        ):
            assert other.shape[0] < tokens or (other - torch.cat(merged).mean(0)).abs().max() > 1e-3
        one = tc.compute_global_heat_map(image=image, layer_idx=2, head_idx=5, normalize=True).heat_maps
        alone = merged[2][5]
        torch.testing.assert_close(one, alone / (alone[1:-1].sum(0) + 1e-6), rtol=0, atol=1e-4)
        coarse = tc.compute_global_heat_map(image=image, factors=[2]).heat_maps
        picked = [heat for heat, path in zip(merged, cross, strict=True) if maps[path][0].shape[2] < SIZE[0] * SIZE[1]]
        assert 0 < len(picked) < len(merged)
        torch.testing.assert_close(coarse, torch.cat(picked).mean(0), rtol=0, atol=1e-4)
    assert tc.last_prompt == PROMPTS[0]


def test_without_guidance_half_of_the_heads_are_read_as_daam_does(tiny):
    with trace(tiny) as whole:
        sample(tiny, 1, guidance_scale=1.0)
    with trace(tiny, compat="original") as half:
        sample(tiny, 1, guidance_scale=1.0)
    heads = len(whole.all_heat_maps.heads())
    assert half.all_heat_maps.heads() == set(range(heads // 2))
    assert half.layer_names[0].startswith("up") and whole.layer_names[0].startswith("down")
    (first, *_) = [maps for (_, layer, head), maps in half.all_heat_maps if head == 0]
    own = {name: maps for (_, layer, head), maps in whole.all_heat_maps for name in [(layer, head)]}
    assert any(torch.equal(first, maps) for (_, head), maps in own.items() if head == heads // 2)


def test_low_memory_reads_the_first_layer_of_each_block(tiny):
    with trace(tiny) as whole, trace(tiny, low_memory=True) as tc:
        sample(tiny, 1)
    assert all(name.endswith("-0") for name in tc.layer_names)
    assert 0 < len(tc.layer_names) < len(whole.layer_names)


def test_heads_are_kept_as_factors_and_put_in_another_runs_place(tiny, tmp_path):
    with trace(tiny, save_heads=True, data_dir=tmp_path) as saved:
        sample(tiny, 1)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 * len(saved.layer_names) and any(name.startswith("mid") for name in saved.layer_names)
    kept = torch.load(files[0], weights_only=True)
    assert set(kept) == {"layer", "query", "key"}

    def other(**options):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        return tiny(PROMPTS[1], latents=noise, height=64, width=64, num_inference_steps=3, output_type="latent").images

    plain = other()
    with trace(tiny, load_heads=True, data_dir=tmp_path) as loaded:
        latents = other()
    assert (latents - plain).abs().max() > 1e-3
    want = saved.compute_global_heat_map().heat_maps
    torch.testing.assert_close(loaded.compute_global_heat_map(prompt=PROMPTS[1]).heat_maps[:3], want[:3])
    torch.testing.assert_close(other(), plain, rtol=0, atol=0)

    with (
        pytest.raises(ValueError, match="load them into a run of the same size"),
        trace(tiny, load_heads=True, data_dir=tmp_path),
    ):
        sample(tiny, 2)
    with (
        pytest.raises(FileNotFoundError, match="save_heads=True first"),
        trace(tiny, load_heads=True, data_dir=tmp_path / "nowhere"),
    ):
        sample(tiny, 1)
    torch.save(torch.zeros(3), tmp_path / "0.pt")
    with pytest.raises(ValueError, match="a written-out map"), trace(tiny, load_heads=True, data_dir=tmp_path):
        sample(tiny, 1)
    with pytest.raises(ValueError, match="got both"):
        trace(tiny, save_heads=True, load_heads=True)
    assert not any(module._forward_hooks for module in tiny.unet.modules())


def test_reads_the_edited_maps_inside_a_session(tiny):
    with trace(tiny) as outside:
        sample(tiny, 2)
    with editing(tiny, FreePromptEdit()), trace(tiny) as inside:
        sample(tiny, 2)
    same, other = (
        (inside.compute_global_heat_map(image=n).heat_maps - outside.compute_global_heat_map(image=n).heat_maps)
        .abs()
        .max()
        for n in (0, 1)
    )
    assert same < 1e-6 < 5e-5 < other


def test_the_pipeline_is_left_as_it_was(tiny):
    before = dict(tiny.unet.attn_processors)
    with pytest.raises(KeyError), trace(tiny):
        sample(tiny, 1)
        raise KeyError
    tc = trace(tiny).hook()
    sample(tiny, 1)
    tc.unhook()
    assert tc.compute_global_heat_map().heat_maps.shape[0] > 2
    after = tiny.unet.attn_processors
    assert unedited(tiny.unet) and all(after[name] is processor for name, processor in before.items())
    assert "encode_prompt" not in vars(tiny)


def test_words_are_found_wherever_they_occur(pipe):
    prompt = "a cat and a cat"
    tokens = len(pipe.tokenizer.tokenize(prompt))
    heat = GlobalHeatMap(pipe.tokenizer, prompt, torch.arange(float(tokens + 2))[:, None, None].expand(-1, 2, 3))
    places = [
        n for n, token in enumerate(pipe.tokenizer.tokenize(prompt)) if token == pipe.tokenizer.tokenize("cat")[0]
    ]
    assert len(places) == 2
    assert heat.compute_word_heat_map("Cat").value[0, 0] == sum(places) / 2 + 1
    assert heat.compute_word_heat_map("", word_idx=1).value[0, 0] == 2
    with pytest.raises(ValueError, match="does not hold 'dog'"):
        heat.compute_word_heat_map("dog")
    with pytest.raises(ValueError, match="none of \\[40\\]"):
        heat.compute_word_heat_map("", word_idx=40)
    with pytest.raises(NotImplementedError, match="for each word"):
        heat.parsed_heat_maps()
    with pytest.raises(NotImplementedError, match="plot_overlay"):
        trace(tiny_pipeline(pipe)).to_experiment("folder")


def test_a_word_is_laid_over_a_picture(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (6, 4), "white")
    word = WordHeatMap(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]), "cat")
    heat = word.expand_as(image)
    assert heat.shape == (4, 6) and heat.max() == 1 and heat.argmax() == 23
    assert word.expand_as(image, absolute=True).max() > 2
    assert set(word.expand_as(image, threshold=0.5).unique().tolist()) == {0.0, 1.0}
    assert WordHeatMap(word.heatmap, compat="original").expand_as(image).shape == (6, 4)
    drawn = word.plot_overlay(image, tmp_path / "cat.png")
    assert (tmp_path / "cat.png").exists()
    assert drawn.getpixel((5, 3))[1] < 150 < 240 < drawn.getpixel((0, 0))[1]
    assert word.compute_ioa(WordHeatMap(torch.ones(2, 3))) == pytest.approx(1.0)


def test_a_picture_is_on_the_figure_that_pyplot_shows(tmp_path):
    """As the tool's readme has it: plot_overlay(image), then plt.show()."""
    from PIL import Image

    pyplot = pytest.importorskip("matplotlib.pyplot")
    word, image = WordHeatMap(torch.rand(4, 4), "cat"), Image.new("RGB", (12, 8))
    pyplot.switch_backend("agg")
    figure = pyplot.figure()
    word.plot_overlay(image, tmp_path / "cat.png")
    assert not figure.axes
    word.plot_overlay(image)
    assert [axes.get_title() for axes in figure.axes] == ["cat"]
    pyplot.close(figure)


def test_what_cannot_be_asked(tiny):
    tc = trace(tiny)
    with pytest.raises(RuntimeError, match="call the pipeline in"):
        tc.compute_global_heat_map()
    assert len(tc.all_heat_maps) == 0 and tc.last_prompt == ""
    with tc:
        with pytest.raises(RuntimeError, match="call the pipeline in"):
            tc.compute_global_heat_map()
        with pytest.raises(RuntimeError, match="open already"):
            tc.hook()
        sample(tiny, 1)
    with pytest.raises(RuntimeError, match="heads \\[0, 1"):
        tc.compute_global_heat_map(head_idx=99)
    with pytest.raises(RuntimeError, match="nothing was read of factors \\[3\\]"):
        tc.compute_global_heat_map(factors=[3])
    with pytest.raises(ValueError, match="expected image to be in 0 to 0"):
        tc.compute_global_heat_map(image=1)
    with pytest.raises(ValueError, match="ask for a prompt of the call"):
        tc.compute_global_heat_map(prompt=" ".join(PROMPTS))
    with pytest.raises(ValueError, match='expected compat to be None or "original"'):
        trace(tiny, compat="old")
    with pytest.raises(TypeError, match="a UNet and a tokenizer"):
        trace(tiny.unet)
    with pytest.raises(ValueError, match="one prompt a call"), trace(tiny, compat="original"):
        sample(tiny, 2)
    with trace(tiny, compat="original") as oblong:
        sample(tiny, 1, size=SIZE)
    with pytest.raises(ValueError, match="square pictures"):
        oblong.compute_global_heat_map()
    embeds = tiny.encode_prompt(PROMPTS[0], "cpu", 1, False)[0]
    with pytest.raises(ValueError, match="pass prompt= in the place of prompt_embeds="), trace(tiny):
        tiny(prompt_embeds=embeds, height=64, width=64, num_inference_steps=1, guidance_scale=1.0, output_type="latent")


def test_names_that_are_not_there():
    with pytest.raises(ImportError, match="no 'tracer' here: did you mean trace"):
        from fpe_pipeline.compat.daam import tracer  # noqa: F401
    with pytest.raises(ImportError, match="leaves out 'ParsedHeatMap' of daam: it parses prompts"):
        from fpe_pipeline.compat.daam import ParsedHeatMap  # noqa: F401
    generator = daam.set_seed(3)
    assert generator.initial_seed() == 3
