"""What people type into Python: likely mistakes are told what to do, and what comes back can be looked at and kept."""

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, Inversion, MasaCtrlEdit, NullText, ddim_scheduler, editing
from fpe_pipeline.edits.registry import METHODS
from fpe_pipeline.embedded import embedded_path
from fpe_pipeline.errors import InputError
from fpe_pipeline.images.side_by_side import Comparison, side_by_side
from tests.support.free_prompt_pipelines import SOURCE, TARGET, distance, free_prompt_pipeline, noise

FAST = {"num_inference_steps": 2, "height": 24, "width": 32}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def tiny(pipe):
    made = free_prompt_pipeline(pipe)
    made.scheduler = ddim_scheduler(made.scheduler)
    return made


@pytest.fixture(scope="module")
def out(tiny):
    return tiny(SOURCE, [TARGET, TARGET], latents=noise(), num_inference_steps=2)


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


class TestMistakes:
    @pytest.mark.parametrize("generator", [42, np.int64(42), [torch.Generator(), 42], "42"])
    def test_a_seed_as_generator(self, tiny, generator):
        for call in (
            lambda: tiny(SOURCE, TARGET, generator=generator),
            lambda: tiny.record(SOURCE, generator=generator),
        ):
            with pytest.raises(TypeError, match=r"generator=torch\.Generator\(\)\.manual_seed\(") as caught:
                call()
            assert generator == "42" or "manual_seed(42)" in one_line(caught)

    @pytest.mark.parametrize("edit", [FreePromptEdit, MasaCtrlEdit])
    def test_a_class_as_edit(self, tiny, edit):
        recording = tiny.record(SOURCE, **FAST)
        for call in (
            lambda: tiny(SOURCE, TARGET, edit=edit),
            lambda: editing(tiny, edit),
            lambda: tiny.edit(recording, TARGET, edit=edit),
        ):
            with pytest.raises(TypeError, match=rf"the class {edit.__name__}: write {edit.__name__}\(…\)") as caught:
                call()
            one_line(caught)

    def test_a_name_as_edit(self, tiny):
        for call in (lambda: tiny(SOURCE, TARGET, edit="p2p-refine"), lambda: editing(tiny, "p2p-refine")):
            with pytest.raises(
                TypeError, match=r"write make_edit\('p2p-refine', \[source, target\], pipe\.tokenizer\)"
            ):
                call()
        with pytest.raises(TypeError, match=f"there are {', '.join(METHODS)}"):
            editing(tiny, "magic")

    @pytest.mark.parametrize("picture", [PICTURE, np.asarray(PICTURE), torch.zeros(1, 3, 24, 32)])
    def test_a_picture_as_prompt(self, tiny, picture):
        for prompts in ((picture, TARGET), ([picture], TARGET), (SOURCE, picture), ([SOURCE, picture], None)):
            with pytest.raises(
                TypeError, match=r"invert it first, inversion = pipe\.invert\(picture, prompt\)"
            ) as caught:
                tiny(*prompts)
            one_line(caught)

    def test_misspelt_options(self, tiny):
        with pytest.raises(TypeError, match=r"unknown option target_prompts; did you mean target_prompt\? ") as caught:
            tiny(SOURCE, target_prompts=[TARGET])
        named = set(re.findall(r"\w+", one_line(caught).partition("There are")[2]))
        assert {"target_prompt", "edit", "inversion", "keep_source", "eta", "clip_skip"} <= named
        assert not {"self", "options", "kwargs"} & named


class TestOutput:
    def test_the_grid_shows_every_picture(self, out):
        rows = [Comparison(SOURCE, TARGET, out.source, target) for target in out.targets]
        assert out.grid().tobytes() == side_by_side(rows, edit_label="edited").tobytes()

    def test_a_notebook_shows_the_grid(self, out):
        encoded = re.search(r'src="data:image/png;base64,([^"]+)"', out._repr_html_())[1]
        assert PIL.Image.open(io.BytesIO(base64.b64decode(encoded))).tobytes() == out.grid().tobytes()

    @pytest.mark.parametrize("kind", ["np", "pt"])
    def test_arrays_are_pictures_too(self, tiny, out, kind):
        arrays = tiny(SOURCE, [TARGET, TARGET], latents=noise(), num_inference_steps=2, output_type=kind)
        assert arrays.grid().tobytes() == out.grid().tobytes()

    def test_latents_are_not(self, tiny):
        latents = tiny(SOURCE, TARGET, latents=noise(), num_inference_steps=1, output_type="latent")
        with pytest.raises(ValueError, match='4 channels as latents have: leave out output_type="latent"'):
            latents.grid()
        assert latents._repr_html_() is None and len(repr(latents)) < 200

    def test_saving(self, out, tmp_path):
        paths = out.save(tmp_path / "made")
        assert [path.name for path in paths] == ["grid.png", "source.png", "target-1.png", "target-2.png"]
        assert sorted(path.name for path in (tmp_path / "made").iterdir()) == sorted(path.name for path in paths)
        pictures = [Image.open(path).tobytes() for path in paths]
        assert pictures == [image.tobytes() for image in (out.grid(), *out.images)]

    @pytest.mark.parametrize("keep", [True, False])
    def test_several_images_a_prompt(self, tiny, tmp_path, keep):
        several = tiny(SOURCE, TARGET, num_images_per_prompt=2, keep_source=keep, **FAST)
        names = [path.name for path in several.save(tmp_path)]
        source = ["source-1.png", "source-2.png"] if keep else []
        assert names == ["grid.png", *source, "target-1-1.png", "target-1-2.png"]

    def test_without_targets_or_prompts(self, tiny, tmp_path):
        assert [path.name for path in tiny(SOURCE, **FAST).save(tmp_path / "alone")] == ["grid.png", "source.png"]
        embeds, negative = tiny.encode_prompt([SOURCE, TARGET], "cpu", 1, True, ["", ""])
        embedded = tiny(prompt_embeds=embeds, negative_prompt_embeds=negative, **FAST)
        assert embedded.prompts == () and embedded.grid().width > embedded.source.width

    def test_edits_of_recordings(self, tiny, tmp_path):
        edited = tiny.edit(tiny.record(SOURCE, **FAST), TARGET)
        assert edited.prompts == (SOURCE, TARGET)
        assert [path.name for path in edited.save(tmp_path)] == ["grid.png", "target-1.png"]


class TestInversions:
    @pytest.fixture(
        scope="class", params=["direct", NullText(inner_steps=1, early_stop=0.5)], ids=["direct", "null-text"]
    )
    def inversion(self, request, tiny):
        return tiny.invert(PICTURE, SOURCE, method=request.param, num_inference_steps=2)

    def test_a_saved_one_edits_alike(self, tiny, inversion, tmp_path):
        loaded = Inversion.load(inversion.save(tmp_path / "new" / "photo.safetensors"))
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["photo.safetensors"]
        for name in ("method", "prompt", "guidance_scale", "schedule", "null_text"):
            assert getattr(loaded, name) == getattr(inversion, name), name
        assert loaded.image.tobytes() == inversion.image.tobytes()
        images = [
            tiny(inversion=each, target_prompt=TARGET, output_type="latent").images for each in (inversion, loaded)
        ]
        assert torch.equal(*images)

    def test_damaged_files(self, inversion, tmp_path):
        path = inversion.save(tmp_path / "photo.safetensors")
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match="is no inversion, or damaged"):
            Inversion.load(path)
        with pytest.raises(InputError, match=r"cannot read .*nowhere"):
            Inversion.load(tmp_path / "nowhere")
        weights = embedded_path() / "unet" / "diffusion_pytorch_model.safetensors"
        with pytest.raises(InputError, match=r"expected an inversion of format 1, .* has None"):
            Inversion.load(weights)


def test_representations_fit_a_screen(tiny, out):
    inversion = tiny.invert(PICTURE, "a photo " * 100, num_inference_steps=2)
    recording = tiny.record("a photo " * 100, **FAST)
    for thing in (inversion, recording, out, out.report):
        text = repr(thing)
        assert len(text) < 240 and text.startswith(type(thing).__name__), text
    assert "2 steps" in repr(inversion) and "image 36x28" in repr(inversion) and "2 targets" in repr(out)


def test_the_embedded_model_by_name():
    pipe = FreePromptPipeline.from_pretrained("embedded")
    there = StableDiffusionPipeline.from_pretrained(embedded_path())
    assert isinstance(pipe, FreePromptPipeline)
    assert all(torch.equal(*pair) for pair in zip(pipe.unet.parameters(), there.unet.parameters(), strict=True))


def test_modules_taken_over_keep_their_dtype(pipe):
    """A pipeline made from another one shares its modules, and float16 weights would come back as float32."""
    parts = dict(free_prompt_pipeline(pipe).components)
    parts["unet"] = type(parts["unet"]).from_config(parts["unet"].config).half()
    mixed = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    before = [parameter.clone() for parameter in mixed.unet.parameters()]
    made = FreePromptPipeline.from_pipe(mixed)
    assert made.unet is mixed.unet and mixed.unet.dtype == torch.float16 and mixed.vae.dtype == torch.float32
    assert all(distance(*pair) == 0 for pair in zip(mixed.unet.parameters(), before, strict=True))
    assert FreePromptPipeline.from_pipe(mixed, torch_dtype=torch.float32).unet.dtype == torch.float32
