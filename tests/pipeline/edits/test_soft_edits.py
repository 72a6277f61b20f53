"""Free-Prompt-Editing by degrees: strengths, masks and the heat of words, against dense mathematics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline import BatchRoles, FreePromptEdit, Product, WordMask, editing
from fpe_pipeline.edits.masks import MaskImage, Strength
from fpe_pipeline.models.sites import Site
from fpe_pipeline.models.steps import Step, StepWindow
from tests.support.dense import DenseEditProcessor, own, replaced
from tests.support.tiny_pipelines import PROMPTS, sample, tiny_pipeline
from tests.support.tiny_unets import tiny_unet, unet_inputs

EVERYWHERE = {"levels": (0, 1)}


def site(grid=(4, 6), level=1, latent=(8, 12)):
    return Site("mid_block.attentions.0", "mid", "self", 0, 2, level, (), grid, latent)


@torch.no_grad()
def edited(edit, rows=4, height=8, width=8):
    unet = tiny_unet("sd1")
    args, kwargs = unet_inputs(unet, rows, height, width)
    with editing(unet, edit, classifier_free_guidance=True) as session:
        session.step(0, 2)
        return unet(*args, **kwargs).sample


@torch.no_grad()
def dense(rule, height=8, width=8):
    """The UNet with ``rule(site)(row)`` in every self-attention layer of levels 0 and 1."""
    unet = tiny_unet("sd1")
    args, kwargs = unet_inputs(unet, 4, height, width)
    with editing(unet, FreePromptEdit(**EVERYWHERE), classifier_free_guidance=True) as session:
        session.step(0, 2)
        unet(*args, **kwargs)
    for path in session.report().layers:
        (found,) = (s.at(height, width) for s in session.sites if s.path == path)
        unet.get_submodule(path).set_processor(DenseEditProcessor(rule(found)))
    return unet(*args, **kwargs).sample


def blend(weight):
    return lambda row: [(2, (2,), (3,), weight, None), (3, (3,), (3,), 1 - weight, None)] if row == 3 else None


def test_one_and_zero_are_plain_and_unedited():
    plain = edited(FreePromptEdit(**EVERYWHERE))
    nothing = edited(FreePromptEdit(0.0, **EVERYWHERE))
    white, black = np.ones((16, 16)), Image.new("L", (64, 64), 0)
    assert torch.equal(edited(FreePromptEdit(strength=1, **EVERYWHERE)), plain)
    assert torch.equal(edited(FreePromptEdit(mask=white, **EVERYWHERE)), plain)
    assert torch.equal(edited(FreePromptEdit(strength=0, **EVERYWHERE)), nothing)
    assert torch.equal(edited(FreePromptEdit(mask=black, **EVERYWHERE)), nothing)
    assert (plain - nothing)[3].abs().max() > 1e-5


def test_a_number_blends():
    actual = edited(FreePromptEdit(strength=0.3, **EVERYWHERE))
    torch.testing.assert_close(actual, dense(lambda site: blend(0.3)), rtol=0, atol=1e-10)


def test_a_mask_blends_by_pixel_on_any_grid():
    mask = np.zeros((64, 128), dtype=np.uint8)
    mask[:, 96:] = 255  # the right quarter, in an image of 8 x 16 latents
    actual = edited(FreePromptEdit(mask=Image.fromarray(mask), **EVERYWHERE), height=8, width=16)

    def rule(site):
        height, width = site.grid
        return blend((torch.arange(width) >= width * 3 // 4).double().repeat(height))

    torch.testing.assert_close(actual, dense(rule, 8, 16), rtol=0, atol=1e-10)


def test_a_token_takes_the_mean_of_its_part():
    mask = torch.arange(8 * 12).reshape(8, 12) / 95
    weights = MaskImage(mask).weights(site(), BatchRoles((True,), (0,)), 0)
    blocks = [mask[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].double().mean() for y in range(4) for x in range(6)]
    torch.testing.assert_close(weights, torch.stack(blocks))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.array([[0, 255]], dtype=np.uint8)),
        Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)),
        Image.fromarray(np.array([[False, True]])),
        Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("RGB").convert("LAB"),
        np.array([[False, True]]),
        np.array([[True, False]])[:, ::-1],
        np.array([[0, 1]], dtype=">f4"),
        torch.tensor([[[0.0, 1.0]]]),
        np.array([[0, 1]], dtype=np.uint8),  # a 255th of each edit was made, without a word
        torch.tensor([[0, 1]], dtype=torch.uint8),
        torch.tensor([[0, 1]]),
        Image.fromarray(np.array([[0, 1]], dtype=np.uint8)),
    ],
    ids=[
        "8-bit",
        "16-bit",
        "1-bit",
        "lab",
        "bools",
        "flipped",
        "big-endian",
        "channel",
        "0-and-1",
        "0-and-1-tensor",
        "0-and-1-wide",
        "0-and-1-picture",
    ],
)
def test_masks_of_every_kind(image):
    assert MaskImage(image).values.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")])
def test_sixteen_bits_in_any_order(mode, dtype):
    values = np.array([0, 257, 32768, 65535])
    image = Image.frombytes(mode, (4, 1), values.astype(dtype).tobytes())
    assert MaskImage(image).values.tolist() == [(values / 65535).tolist()]


@pytest.mark.parametrize("kind", [str, Path])
def test_masks_from_files(tmp_path, kind):
    """As the array that the file shows, upright and at its own size."""
    values = np.zeros((4, 6), dtype=np.uint8)
    values[0, 1:] = 255
    path = tmp_path / "mask.png"
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(values).save(path, exif=turned)
    expected = (np.rot90(values, -1) / 255).tolist()
    assert MaskImage(kind(path)).values.tolist() == expected
    with Image.open(path) as image:
        assert MaskImage(image).values.tolist() == expected
    Image.fromarray(values).convert("RGBA").save(path)
    assert FreePromptEdit(mask=kind(path)).mask.values.tolist() == (values / 255).tolist()


def test_files_that_are_no_masks(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nowhere\.png"):
        FreePromptEdit(mask=tmp_path / "nowhere.png")
    (tmp_path / "mask.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="not a picture"):
        FreePromptEdit(mask=str(tmp_path / "mask.png"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_masks_drawn_in_transparency(tmp_path, mode):
    drawn = Image.new("LA", (6, 4), (0, 0))
    drawn.paste((0, 255), (0, 0, 3, 4))
    path = tmp_path / "mask.png"
    drawn.convert("RGBA").convert(mode).save(path)
    for mask in (path, drawn):
        with pytest.raises(ValueError, match=r"transparent parts.*getchannel\('A'\)"):
            FreePromptEdit(mask=mask)
    assert MaskImage(drawn.getchannel("A")).values.tolist() == [[1.0] * 3 + [0.0] * 3] * 4


@pytest.mark.parametrize("mask", [{"a": 1}, object(), 3.0])
def test_masks_of_no_kind(mask):
    with pytest.raises(TypeError, match="expected a mask as a path"):
        FreePromptEdit(mask=mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((4, 4), 2.0), r"in \[0, 1\], got 2 to 2"),
        (np.full((4, 4), np.nan), r"in \[0, 1\]"),
        (np.zeros((4, 4, 3)), r"\[height, width\]"),
        (np.full((4, 4), 2, dtype=np.int64), "8-bit integers"),
    ],
)
def test_masks_that_are_none(mask, message):
    with pytest.raises(ValueError, match=message):
        FreePromptEdit(mask=mask)


def test_a_mask_of_another_image():
    with pytest.raises(ValueError, match=r"64 x 32 pixels .* latents 8 x 8"):
        edited(FreePromptEdit(mask=np.ones((32, 64)), **EVERYWHERE))


def test_strengths_by_step_and_level():
    window = StepWindow(0.0, 1.0)
    fading = Strength.parse((1.0, 0.0))
    assert [fading.at(site(), Step(i, 5), window) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    by_level = Strength.parse({1: 0.5, 2: [0.0, 1.0]})
    assert [by_level.at(site(level=level), Step(4, 5), window) for level in (0, 1, 2)] == [1.0, 0.5, 1.0]
    assert Strength.parse(lambda site, step: site.level / 4).at(site(level=3), Step(0, 1), window) == 0.75


@pytest.mark.parametrize("strength", [1.1, -0.1, float("nan"), "much", [], {}, {"a": 1.0}, [0.5, 2.0], True])
def test_strengths_that_are_none(strength):
    with pytest.raises(ValueError, match=r"strength"):
        FreePromptEdit(strength=strength)


def test_a_function_may_not_leave_the_range():
    with pytest.raises(ValueError, match="function gave"):
        edited(FreePromptEdit(strength=lambda site, step: 3.0, **EVERYWHERE))


def test_soft_products_are_described():
    product = Product(2, (2,), (3,), weight=0.25)
    assert product.describe() == "0.25 A(q 2, k 2) @ v 3"


@pytest.mark.slow
def test_the_heat_of_a_word_is_a_mask(pipe):
    tiny = tiny_pipeline(pipe)
    plain, unedited = FreePromptEdit(1.0, **EVERYWHERE), FreePromptEdit(0.0, **EVERYWHERE)
    latents = {}
    for name, mask in {
        "car": WordMask(PROMPTS[0], "car", tiny.tokenizer, threshold=0.9),
        "not car": WordMask(PROMPTS[0], "car", tiny.tokenizer, threshold=0.9, invert=True),
        "everywhere": WordMask(PROMPTS[0], "car", tiny.tokenizer, threshold=0.0),
    }.items():
        with editing(tiny, FreePromptEdit(1.0, mask=mask, **EVERYWHERE)):
            latents[name] = sample(tiny)
            again = sample(tiny)
        assert torch.equal(latents[name], again)  # a run does not see the last one's heat
    for name, edit in {"plain": plain, "unedited": unedited}.items():
        with editing(tiny, edit):
            latents[name] = sample(tiny)
    torch.testing.assert_close(latents["everywhere"], latents["plain"], rtol=0, atol=1e-4)
    for name in ("car", "not car"):
        for other in ("plain", "unedited"):
            assert (latents[name] - latents[other])[1].abs().max() > 1e-4
    torch.testing.assert_close(latents["car"][0], latents["unedited"][0], rtol=0, atol=1e-4)


def test_words_that_are_not_there(pipe):
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        WordMask("a photo of a cat", "dog", pipe.tokenizer)


def test_own_and_replaced_are_what_they_were():
    assert torch.equal(dense(lambda site: lambda row: [own(row)]), dense(lambda site: lambda row: None))
    fully = dense(lambda site: lambda row: [replaced(2, 3)] if row == 3 else None)
    torch.testing.assert_close(edited(FreePromptEdit(**EVERYWHERE)), fully, rtol=0, atol=1e-10)
