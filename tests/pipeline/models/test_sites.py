import pytest
import torch

from fpe_pipeline import FreePromptEdit, Site
from fpe_pipeline.edits.selection import LayerSelection
from fpe_pipeline.models.sites import attention_sites
from tests.support.tiny_unets import SHAPES, tiny_unet, unet_inputs


def test_sites_of_a_unet_laid_out_as_sd15(pipe):
    sites = attention_sites(pipe.unet)
    assert {f"{site.path}.processor" for site in sites} == set(pipe.unet.attn_processors)
    for kind in ("self", "cross"):
        chosen = [site for site in sites if site.kind == kind]
        assert [site.index for site in chosen] == list(range(16))
        assert [site.place for site in chosen] == ["down"] * 6 + ["mid"] + ["up"] * 9
        assert [site.level for site in chosen] == [0, 0, 1, 1, 2, 2, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert [site.at(64, 64).tokens for site in sites if site.kind == "self"][:7] == [64**2] * 2 + [32**2] * 2 + [
        16**2
    ] * 2 + [8**2]


@pytest.mark.parametrize("padding", [1, 0])
@pytest.mark.parametrize(
    ("shape", "size"),
    # AttnUpBlock2D cannot upsample to odd sizes.
    [(shape, size) for shape in SHAPES for size in [(8, 8), (12, 8), (9, 13)] if (shape, size) != ("simple", (9, 13))],
    ids=str,
)
def test_sites_foretell_the_execution(shape, size, padding):
    """Order, kind, heads and grid of every layer are those of a real forward pass, odd sizes included."""
    unet = tiny_unet(shape, downsample_padding=padding)
    sites = [site.at(*size) for site in attention_sites(unet)]
    seen = []

    def watch(module, args, kwargs, output):
        hidden = args[0]
        grid = tuple(hidden.shape[2:]) if hidden.ndim == 4 else hidden.shape[1]
        seen.append((module, kwargs.get("encoder_hidden_states") is not None, grid))

    for site in sites:
        unet.get_submodule(site.path).register_forward_hook(watch, with_kwargs=True)
    args, kwargs = unet_inputs(unet, 1, *size)
    with torch.no_grad():
        unet(*args, **kwargs)

    assert [module for module, *_ in seen] == [unet.get_submodule(site.path) for site in sites]
    for site, (module, is_cross, grid) in zip(sites, seen, strict=True):
        assert grid in (site.grid, site.tokens), site
        assert is_cross == (site.kind == "cross")
        assert site.heads == module.heads


def test_sdxl_counts_every_transformer_block():
    sites = attention_sites(tiny_unet("sdxl"))
    own = [site for site in sites if site.kind == "self"]
    assert len(own) == 2 + 3 + 3 + 2 * 3 + 2 * 2
    assert {site.level for site in own} == {1, 2}
    assert len(FreePromptEdit().select(sites)) == len(own)


def test_layers_that_do_not_attend_over_the_image_are_no_sites():
    unet = tiny_unet("sd1", attention_type="gated")
    assert any(".fuser." in name for name in unet.attn_processors)
    sites = attention_sites(unet)
    assert len(sites) == len(attention_sites(tiny_unet("sd1")))
    assert not any("fuser" in site.path for site in sites)


def test_what_is_not_a_unet_is_refused(pipe):
    with pytest.raises(TypeError, match="AutoencoderKL without down_blocks, up_blocks"):
        attention_sites(pipe.vae)
    with pytest.raises(TypeError, match="attn_processors"):
        attention_sites(object())


def indices(edit, unet, size=None):
    sites = attention_sites(unet)
    if size is not None:
        sites = tuple(site.at(*size) for site in sites)
    return [site.index for site in edit.select(sites)]


def test_selectors(pipe):
    assert indices(FreePromptEdit(), pipe.unet) == list(range(2, 13))
    # The original's limit at 512 px selects what the default does at any size.
    assert indices(FreePromptEdit(max_tokens=32**2), pipe.unet, (64, 64)) == list(range(2, 13))
    assert indices(FreePromptEdit(max_tokens=32**2), pipe.unet, (96, 96)) == list(range(4, 10))
    assert indices(FreePromptEdit(max_tokens=32**2), pipe.unet) == list(range(16))  # size unknown yet
    assert indices(FreePromptEdit(levels=0), pipe.unet) == [0, 1, 13, 14, 15]
    assert indices(FreePromptEdit(levels=range(2, 4)), pipe.unet) == list(range(4, 10))
    assert indices(FreePromptEdit(layers=[3, 0, 3]), pipe.unet) == [0, 3]
    assert indices(FreePromptEdit(layers="mid_block"), pipe.unet) == [6]
    path = "up_blocks.1.attentions.2.transformer_blocks.0.attn1"
    assert indices(FreePromptEdit(layers=[path, "down_blocks.0."]), pipe.unet) == [0, 1, 9]
    assert indices(FreePromptEdit(layers=f"{path}.processor"), pipe.unet) == [9]
    site: Site = attention_sites(pipe.unet)[0]
    assert indices(FreePromptEdit(layers=[site]), pipe.unet) == [0]


@pytest.mark.parametrize(
    "selector",
    [
        {"levels": 7},
        {"layers": ["mid_block", "down_blocks.9"]},
        {"layers": [99]},
        {"layers": "down_block"},
        {"layers": "mid_block.attentions.0.transformer_blocks.0.attn2"},
    ],
    ids=str,
)
def test_selectors_that_match_nothing_list_what_there_is(pipe, selector):
    with pytest.raises(ValueError, match=r"match none of the UNet's 16 self-attention layers") as error:
        FreePromptEdit(**selector).select(attention_sites(pipe.unet))
    assert str(error.value).count("\n") == 16
    assert "mid_block.attentions.0.transformer_blocks.0.attn1 (level 3" in str(error.value)


def test_a_token_limit_below_every_layer_is_refused_once_the_size_is_known(pipe):
    edit = FreePromptEdit(max_tokens=15)
    with pytest.raises(ValueError, match=r"max_tokens=15 match none"):
        edit.select(tuple(site.at(64, 64) for site in attention_sites(pipe.unet)))


@pytest.mark.parametrize(
    "selectors",
    [
        {"levels": 1, "max_tokens": 4},
        {"levels": 1, "layers": [1]},
        {"levels": []},
        {"levels": -1},
        {"levels": 0.5},
        {"levels": "1"},
        {"max_tokens": -1},
        {"max_tokens": True},
        {"layers": []},
        {"layers": [-1]},
        {"layers": [None]},
    ],
    ids=str,
)
def test_selectors_that_make_no_sense_are_refused(selectors):
    with pytest.raises(ValueError, match=r"expected|name one of"):
        FreePromptEdit(**selectors)


def test_cross_attention_can_be_selected_too(pipe):
    chosen = LayerSelection.parse("cross", levels=3).match(attention_sites(pipe.unet))
    assert [site.path for site in chosen] == ["mid_block.attentions.0.transformer_blocks.0.attn2"]


def test_another_kind_of_attention_is_refused():
    with pytest.raises(ValueError, match="expected a kind of attention, self, cross, joint, image, got 'slef'"):
        LayerSelection.parse("slef")


def test_edits_are_values():
    assert FreePromptEdit(0.8) == FreePromptEdit((0, 0.8)) == FreePromptEdit([0, 0.8])
    assert hash(FreePromptEdit(layers=["a", 1])) == hash(FreePromptEdit(layers=("a", 1)))
    assert FreePromptEdit(0.5, levels={2, 1}).levels == (1, 2)
