"""`fpe edit --method`: every method runs on the embedded model, and its record repeats it; nonsense is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline import cli, runs
from fpe_pipeline.methods import METHODS, TITLES
from fpe_pipeline.settings import InputError, Settings

SOURCE, TARGET = "a photo of a red car on the beach", "a photo of a blue car on the beach"
OPTIONS = {"masactrl": ["--option", "start_step=0", "--layers", "up_blocks"], "fpe": []}


def edit(method, folder, *more):
    arguments = ["edit", "--source", SOURCE, "--target", TARGET, "--method", method, "--steps", "2", "--quiet"]
    return cli.main([*arguments, *OPTIONS.get(method, []), *more, "-o", str(folder)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder for each method, from one run each."""
    folders = {method: tmp_path_factory.mktemp(method) for method in METHODS}
    for method, folder in folders.items():
        assert edit(method, folder) == 0
    return folders


def test_every_method_draws_another_picture_from_the_same_source(made):
    images = {method: json.loads((folder / "run.json").read_text())["images"] for method, folder in made.items()}
    edits = {found["target-1.png"]["pixels_sha256"] for found in images.values()}
    first, *others = (np.asarray(Image.open(folder / "source.png")).astype(int) for folder in made.values())
    # Methods compute sources in batches of their own, which order sums in ways of their own.
    assert max(np.abs(other - first).max() for other in others) <= 2
    # All words of this edit have their place in the source, where refinement and replacement are one and the same.
    assert len(edits) >= len(METHODS) - 1


def test_a_comparison_names_its_method(monkeypatch, tmp_path):
    assert TITLES.keys() == METHODS.keys()
    labels, draw = [], runs.side_by_side

    def side_by_side(rows, *, edit_label):
        labels.append(edit_label)
        return draw(rows, edit_label=edit_label)

    monkeypatch.setattr(runs, "side_by_side", side_by_side)
    assert edit("masactrl", tmp_path, "--steps", "1", "--no-control") == 0
    assert labels == ["target, MasaCtrl"]


@pytest.mark.parametrize("method", ["p2p-replace", "masactrl"])
def test_a_record_repeats_its_method(made, method, tmp_path, capsys):
    assert cli.main(["edit", "--from", str(made[method] / "run.json"), "--quiet", "-o", str(tmp_path)]) == 0
    assert "bit for bit" in capsys.readouterr().err


def test_the_embedded_model_takes_the_original_limit_and_keeps_a_choice():
    assert Settings(SOURCE, (TARGET,)).edit().max_tokens == 32**2
    assert Settings(SOURCE, (TARGET,), levels=(1,)).edit().max_tokens is None
    assert Settings(SOURCE, (TARGET,), model="elsewhere").edit().max_tokens is None


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

    from fpe_pipeline.models import embedded_path

    return CLIPTokenizer.from_pretrained(embedded_path() / "tokenizer")
