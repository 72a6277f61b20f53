"""The reference is what the docstrings say, and the docstrings say what a caller has to know."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from docs.reference import pages
from docs.reference.docstrings import parsed

FOLDER = Path(pages.__file__).parent
NAMES = [(package, name, found) for package, named in pages.public().items() for name, found in named]
FUNCTIONS = [(name, found) for _, name, found in NAMES if inspect.isfunction(found)]
CLASSES = [(name, found) for _, name, found in NAMES if inspect.isclass(found)]
MEMBERS = [(f"{name}.{member.name}", member) for name, found in CLASSES for member in pages.members(found)]
#: Their makers are `editing`, `heat_maps`, `AttentionMap` and the like, which are documented.
NOT_YET = {"make_edit"}  # says what it returns in its first line
MADE_BY_OTHERS = {"CombinedEdit", "ConceptMaps", "Edit", "HeatMaps", "LinearMap", "FreePromptPipeline"} | {
    "FireFlowScheduler",
    "FreePromptBriaFiboPipeline",
    "FreePromptBriaPipeline",
    "FreePromptAuraFlowPipeline",
    "FreePromptChromaPipeline",
    "FreePromptCogView3PlusPipeline",
    "FreePromptCogView4Pipeline",
    "FreePromptFlux2KleinPipeline",
    "FreePromptFlux2Pipeline",
    "FreePromptFluxPipeline",
    "FreePromptHunyuanImagePipeline",
    "FreePromptIdeogram4Pipeline",
    "FreePromptKandinsky5T2IPipeline",
    "FreePromptKrea2Pipeline",
    "FreePromptNucleusMoEImagePipeline",
    "FreePromptLongCatImagePipeline",
    "FreePromptLumina2Pipeline",
    "FreePromptOvisImagePipeline",
    "FreePromptPixArtAlphaPipeline",
    "FreePromptPixArtSigmaPipeline",
    "FreePromptQwenImage21Pipeline",
    "FreePromptQwenImagePipeline",
    "FreePromptSD3Pipeline",
    "FreePromptXLPipeline",
    "FreePromptZImagePipeline",
    "Injecting",
    "Prompted",
    "RFSolverScheduler",
    "Remembering",
    "Watching",
}


@pytest.mark.parametrize("name", pages.pages())
def test_a_page_is_as_the_docstrings_have_it(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == pages.pages()[name], "python -m docs.reference"


def test_every_public_name_has_a_place():
    for package, name, _ in NAMES:
        assert f"## `{name}`\n" in (FOLDER / f"{package}.md").read_text(encoding="utf-8")


def parameters(function, *, method=False):
    listed = list(inspect.signature(function).parameters.values())[int(method) :]
    return [one for one in listed if one.kind is not one.VAR_POSITIONAL]


def named(said):
    return {name.strip("* ") for names, _ in said.entries("Args") for name in names.split(",")}


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=[name for name, _ in FUNCTIONS])
def test_a_function_says_what_it_takes_and_gives(name, function):
    said = parsed(inspect.getdoc(function) or "")
    assert said.words
    assert {one.name for one in parameters(function)} == named(said)
    assert name in NOT_YET or "Returns" in said.sections or "Yields" in said.sections


@pytest.mark.parametrize(("name", "kind"), CLASSES, ids=[name for name, _ in CLASSES])
def test_a_class_says_what_it_is_made_of(name, kind):
    said = parsed(inspect.getdoc(kind) or "")
    assert said.words
    if name in MADE_BY_OTHERS:
        return
    if dataclasses.is_dataclass(kind):
        taken = {one.name for one in dataclasses.fields(kind) if one.init and not one.name.startswith("_")}
    else:
        taken = {one.name for one in parameters(kind)}
    assert taken <= named(said), sorted(taken - named(said))


@pytest.mark.parametrize(("name", "member"), MEMBERS, ids=[name for name, _ in MEMBERS])
def test_a_member_says_what_it_does(name, member):
    said = parsed(member.text)
    assert said.words
    taken = parameters(member.function, method=True)
    assert named(said) <= {one.name for one in taken}, "an argument that is not taken"


@pytest.mark.parametrize(("name", "found"), FUNCTIONS + CLASSES, ids=[name for name, _ in FUNCTIONS + CLASSES])
def test_tensors_have_shapes(name, found):
    said = parsed(inspect.getdoc(found) or "")
    function = found.__init__ if inspect.isclass(found) else found
    tensors = [one.name for one in parameters(function) if "Tensor" in str(one.annotation)]
    for names, words in said.entries("Args"):
        if set(re.split(r",\s*", names)) & set(tensors):
            assert re.search(r"\[[^\[\]]+\]", words), f"{names}: {words}"
