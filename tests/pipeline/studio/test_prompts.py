"""Prompts as the page shows and changes them, and as what a person would type."""

import pytest
from PIL import Image

from fpe_pipeline import make_edit
from fpe_pipeline.app import edit
from fpe_pipeline.app.commands import parsed
from fpe_pipeline.images.distance import pixel_hash
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.settings import Settings
from fpe_pipeline.studio.copied import as_command, as_python
from fpe_pipeline.studio.models import vocabulary
from fpe_pipeline.studio.prompts import differences, with_word, words_of
from fpe_pipeline.studio.sweeps import sweep
from tests.support.golden_cases import load_pipeline
from tests.support.tiny_cli import OTHER, SOURCE, TARGET, tiny_model_folder
from tests.support.tiny_transformers import tiny_sd3
from tests.support.tiny_unets import tiny_unet

WORDS = vocabulary("embedded")


def test_what_is_new_is_marked_and_text_is_escaped():
    assert differences("a red car", ["a blue car"]) == "<li>a <ins>blue</ins> car</li>"
    assert "<b>" not in differences("a", ["a <b>bold</b>"])


@pytest.mark.parametrize(
    ("prompt", "word", "changed"),
    [
        ("a photo of a red car on the beach", "blue", "a photo of a blue car on the beach"),
        ("a photo of a red car on the beach", "orange", "a photo of an orange car on the beach"),
        ("an image of an orange car", "red", "an image of a red car"),
        ("a photo of a red car on the beach", "snow", "a photo of a red car on the snow"),
        ("a photo of a red car", "cat", "a photo of a red cat"),
        ("something", "red", "something red"),
        ("", "red", "red"),
    ],
)
def test_a_word_takes_the_place_of_its_kind(prompt, word, changed):
    assert with_word(prompt, word, WORDS) == changed


def test_words_once_in_order():
    assert words_of(["A red car's door", "a blue car"]) == ["A", "red", "car's", "door", "blue", "car"]


def test_only_the_embedded_model_has_a_vocabulary():
    assert {"colour", "object", "place"} == set(WORDS) and vocabulary("./sd15") == {}


COPIED = [
    Settings(SOURCE, (TARGET, OTHER)),
    Settings(SOURCE, (TARGET,), seed=3, steps=7, guidance=4.25, negative='it\'s "bad" $HOME', size=(96, 64)),
    Settings(SOURCE, (TARGET,), method="p2p-blend", options={"words": ["red", "blue"], "start": 0.25}, control=False),
    Settings(SOURCE, (TARGET,), self_replace=(0.1, 0.5), layers=("mid_block", "up_blocks.0")),
    Settings(SOURCE, (TARGET,), levels=(1,), image="photo.png", inversion="direct"),
]


@pytest.mark.parametrize("settings", COPIED, ids=range(len(COPIED)))
def test_the_command_asks_for_the_same(settings, monkeypatch):
    import shlex

    asked = []
    monkeypatch.setattr(edit, "_run", lambda given, *_: asked.append(Settings(**given)) or 0)
    words = shlex.split(as_command(settings).replace("\\\n", " "))
    assert words[0] == "fpe" and parsed(words[1:])() == 0
    assert asked == [settings]


@pytest.mark.parametrize("model", ["embedded", "embedded-sd3"])
def test_the_python_of_every_method_asks_for_the_same(model):
    """Of a grid over methods, of which few have the window that the page shows."""
    pipe = tiny_sd3() if model == "embedded-sd3" else tiny_unet("sd1")
    pipe.tokenizer = load_pipeline().tokenizer
    for axis in ("methods", "strengths"):
        for label, settings in sweep(Settings.of_model(source=SOURCE, targets=(TARGET,), model=model), axis):
            lines = [line for line in as_python(settings).splitlines() if line.startswith(("source = ", "edit = "))]
            scope = {"make_edit": make_edit, "pipe": pipe, "targets": [TARGET]}
            exec("\n".join(lines), scope)
            assert scope["edit"] == settings.edit(pipe.tokenizer, pipe), label


def test_the_python_inverts_with_the_guidance_of_the_record():
    settings = Settings(SOURCE, (TARGET,), image="photo.png", inversion="direct", inversion_guidance=2.5)
    assert "num_inference_steps=50, guidance_scale=2.5, method='direct')" in as_python(settings)
    assert "num_inference_steps=50, method" in as_python(settings.with_values(inversion_guidance=1.0))


@pytest.mark.slow
def test_the_python_makes_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model_folder(tmp_path / "tiny")
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save("photo.png")
    generated = Settings(SOURCE, (TARGET,), model=str(model), steps=2, seed=5, self_replace=(0.0, 0.6), control=False)
    of_a_photo = generated.with_values(image="photo.png", inversion="direct", seed=0)
    optimised = of_a_photo.with_values(inversion="null-text", guidance=4.0, inner_steps=2)
    guided = of_a_photo.with_values(inversion_guidance=3.0)
    for settings in (generated, of_a_photo, optimised, guided):
        made = runs.execute(settings)
        scope = {}
        exec(as_python(made.settings), scope)
        assert pixel_hash(scope["out"].targets[0]) == pixel_hash(made.edited[0])
        assert (tmp_path / "out" / "target-1.png").exists()
