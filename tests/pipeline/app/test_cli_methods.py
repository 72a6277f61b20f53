"""`fpe edit --method`: every method runs on the embedded model, and its record repeats it; nonsense is refused."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from PIL import Image

from fpe_pipeline.app import cli
from fpe_pipeline.edits.registry import methods_of
from fpe_pipeline.errors import InputError
from fpe_pipeline.images.distance import distance
from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.loading import load_pipeline
from fpe_pipeline.runs.settings import Settings

METHODS = methods_of("unet")

SOURCE, TARGET = "a photo of a red car on the beach", "a photo of a blue car on the beach"
ROUNDING = 1  # levels of 255
OPTIONS = {
    "masactrl": ["--option", "start_step=0"],
    "fpe-regional": ["--option", "word=car"],
    "p2p-blend": ["--option", 'words=["red", "blue"]'],
}


def edit(method, folder, *more):
    arguments = ["edit", "--source", SOURCE, "--target", TARGET, "--method", method, "--steps", "2", "--quiet"]
    return cli.main([*arguments, *OPTIONS.get(method, []), *more, "-o", str(folder)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder for each method, from one run each, which is made when it is asked for."""

    class Made(dict):
        def __missing__(self, method):
            folder = self[method] = tmp_path_factory.mktemp(method)
            assert edit(method, folder) == 0
            return folder

    return Made()


@pytest.mark.slow
def test_every_method_draws_another_picture_from_the_same_source(made):
    """To rounding: the rows of a batch round by what is computed beside them, and each method computes other things."""
    names = ("source.png", "target-1.png")
    sources, edits = ({method: Image.open(made[method] / name) for method in METHODS} for name in names)
    for method in METHODS:
        assert distance(sources[method], sources["fpe"]).levels <= ROUNDING, method
    same = {pair for pair in combinations(METHODS, 2) if distance(*(edits[name] for name in pair)).levels <= ROUNDING}
    # All words of this edit have their place in the source, where refinement and replacement are one and the same; and
    # of two steps the first alone is in the window, before which no word's region is known, and none is blended yet.
    words = {"p2p-replace", "p2p-refine", "p2p-blend"}
    assert all(set(pair) <= words or set(pair) == {"fpe", "fpe-regional"} for pair in same), same


def test_a_comparison_names_its_method(monkeypatch, tmp_path):
    labels, draw = [], runs.side_by_side

    def side_by_side(rows, *, edit_label, **options):
        labels.append(edit_label)
        return draw(rows, edit_label=edit_label, **options)

    monkeypatch.setattr(runs, "side_by_side", side_by_side)
    assert edit("masactrl", tmp_path, "--steps", "1", "--no-control") == 0
    assert labels == ["target, MasaCtrl"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["p2p-replace", pytest.param("masactrl", marks=pytest.mark.slow)])
def test_a_record_repeats_its_method(made, method, tmp_path, capsys):
    assert cli.main(["edit", "--from", str(made[method] / "run.json"), "--quiet", "-o", str(tmp_path)]) == 0
    assert "bit for bit" in capsys.readouterr().err


def test_the_embedded_model_takes_the_original_limit_and_keeps_a_choice():
    unet = load_pipeline(find_model("embedded"), dtype=torch.float32, device="cpu").unet
    assert Settings(SOURCE, (TARGET,)).edit(None, unet).levels == (0, 1)
    assert Settings(SOURCE, (TARGET,), levels=(1,)).edit(None, unet).levels == (1,)
    assert Settings(SOURCE, (TARGET,), model="elsewhere").edit().levels is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "method must be one of fpe"),
        (["--method", "pnp", "--self-replace", "0.5"], "give pnp its own by --option"),
        (["--option", "what"], "expected NAME=VALUE"),
        (["--option", "speed=3"], "speed"),
        (["--method", "masactrl", "--option", "start_step=-1"], "start_step"),
    ],
)
def test_nonsense_is_refused_before_weights_are_read(arguments, message, tmp_path, capsys):
    command = ["edit", "--source", SOURCE, "--target", TARGET, *arguments, "-o", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_words_that_do_not_align_are_refused():
    with pytest.raises(InputError, match="word"):
        Settings(SOURCE, ("a big blue car on the beach",), method="p2p-replace").edit(_tokenizer())


def _tokenizer():
    from transformers import CLIPTokenizer

    from fpe_pipeline.embedded import embedded_path

    return CLIPTokenizer.from_pretrained(embedded_path() / "tokenizer")
