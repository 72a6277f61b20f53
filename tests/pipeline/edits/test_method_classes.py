"""A method of one's own: an edit's class, by the command line, in a comparison and in a record."""

import hashlib
import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline import FreePromptEdit, make_edit
from fpe_pipeline.app import cli
from fpe_pipeline.edits import registry
from fpe_pipeline.edits.method import Method, Option, argument_help
from fpe_pipeline.edits.registry import find_method
from fpe_pipeline.errors import InputError
from fpe_pipeline.quality.methods.contenders import chosen, contenders
from fpe_pipeline.runs.settings import Settings
from tests.support.silent import SOURCE, TARGET

MODULE = '''
"""Edits of somebody."""
from dataclasses import dataclass
from fpe_pipeline import Edit, FreePromptEdit, Product

print("imported", flush=True)


@dataclass(frozen=True)
class Late(FreePromptEdit):
    """From a step on. And more.

    Args:
        first: the first step, counted from 0; there is no last.
        layers, first: something else.
    """

    first: int = 2

    def active(self, step):
        return step.index >= self.first


@dataclass(frozen=True)
class Worded(Edit):
    prompts: tuple
    tokenizer: object
    needed: float

    def products(self, site, step, roles):
        return {}


class Undecorated(Edit):
    speed: int = 3

    def products(self, site, step, roles):
        return {}


class Abstract(Edit):
    pass


class Stranger:
    pass


number = 3
'''
LATE = "others.edits:Late"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a package of edits in it, which is the current one."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "edits.py").write_text(MODULE)
    (tmp_path / "broken_edits.py").write_text("import no_such_thing\n")
    (tmp_path / "raising_edits.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("others", "broken_edits", "raising_edits")):
            del sys.modules[name]


def command(folder, *more):
    given = ["--source", SOURCE, "--target", TARGET, "--steps", "3", "--seed", "3", "--no-control", "--quiet"]
    return cli.main(["edit", *given, *more, "-o", str(folder)])


def test_the_fields_are_the_options(place):
    method = find_method(LATE)
    assert (method.title, method.about) == ("Late", "From a step on. And more")
    assert method.options[-1] == "compat" and "first" in method.options and "levels" in method.options
    assert str(next(option for option in method.choices if option.name == "first")) == (
        "first: the first step, counted from 0 (default: 2)"
    )
    assert make_edit(LATE, [SOURCE, TARGET], None, first=1).first == 1


def test_prompts_and_tokenizer_are_the_calls(place):
    method = find_method("others.edits:Worded")
    assert method.options == ("needed",) and method.aligns
    edit = make_edit("others.edits:Worded", [SOURCE, TARGET], "a tokenizer", needed=2)
    assert (edit.prompts, edit.tokenizer, edit.needed) == ((SOURCE, TARGET), "a tokenizer", 2)
    with pytest.raises(TypeError, match="needs the option needed"):
        make_edit("others.edits:Worded", [SOURCE, TARGET], "a tokenizer")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing_here:Late", "there is no module nothing_here in .* or on sys.path"),
        ("others.no_such:Late", r"there is no module others\.no_such in"),
        ("broken_edits:Late", "importing broken_edits failed: No module named 'no_such_thing'"),
        ("raising_edits:Late", "importing raising_edits failed: ZeroDivisionError"),
        ("others.edits:Lat", r"others\.edits has no class Lat; did you mean Late\? its edits are Late, Worded"),
        ("others.edits:Stranger", "is the class Stranger, which is no Edit: write class Stranger"),
        ("others.edits:number", "is an object of int, which is no Edit"),
        ("others.edits:Abstract", "has no products"),
        ("others.edits:Undecorated", "declares speed and is no dataclass"),
        ("others.edits:", "as package.module:Class"),
        (":Late", "as package.module:Class"),
        ("others/edits.py:Late", "as package.module:Class"),
        ("others.edits", "or an edit's class as package.module:Class, got 'others.edits'$"),
        ("masactr", r"did you mean masactrl\?$"),
    ],
)
def test_names_that_are_refused(place, name, message, capsys):
    with pytest.raises(ValueError, match=message):
        find_method(name)
    assert command(place / "out", "--method", name) == 2
    assert capsys.readouterr().err.startswith("fpe: error: ")
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("fpe", "strenght=0.5", "fpe has no option strenght; did you mean strength? it has"),
        (LATE, "frist=1", f"{LATE} has no option frist; did you mean first? it has"),
        ("others.edits:Worded", "need=1", "did you mean needed?"),
    ],
)
def test_options_that_it_has_not(place, method, option, message, capsys):
    assert command(place / "out", "--method", method, "--option", option) == 2
    assert message in capsys.readouterr().err


def test_a_plain_name_imports_nothing(place, capsys):
    (place / "fpe.py").write_text("raise RuntimeError('imported')\n")
    (place / "masactrl.py").write_text("raise RuntimeError('imported')\n")
    for name in ("fpe", "masactrl"):
        assert find_method(name) is registry.METHODS[name]
    with pytest.raises(ValueError, match="method must be one of"):
        find_method("others")
    assert not {"others", "others.edits", "masactrl"} & set(sys.modules)
    path = list(sys.path)
    find_method(LATE)
    assert sys.path == path and capsys.readouterr().out == "imported\n"


def test_the_help_of_options(capsys):
    assert cli.main(["info", "--method", "masactrl"]) == 0
    assert "  start_step: the first step, counted from 0, as in the original (default: 4)\n" in capsys.readouterr().out
    assert cli.main(["info", "--method", "magic"]) == 2
    for method in registry.METHODS.values():
        for option in method.choices:
            assert option.about and "\n" not in str(option), f"{method.name}: {option.name}"
            assert len(str(option)) < 160


def test_models_of_a_method_are_those_that_the_command_takes(capsys, tmp_path):
    """Others, which are edited in Python, are named by a page, and not as if `--model` took them."""
    assert cli.main(["info", "--method", "masactrl"]) == 0
    (served,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  of ")]
    assert "of --model Stable Diffusion 3, FLUX.1, " in served
    (tmp_path / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    assert (
        cli.main(["edit", "--model", str(tmp_path), "--source", "a", "--target", "b", "-o", str(tmp_path / "o")]) == 2
    )
    assert "holds a MochiPipeline" in capsys.readouterr().err and "Mochi" not in served


def test_help_is_read_of_docstrings():
    class Base:
        """A base.

        Args:
            one: of the base. And more.
            two, three: of both; at most one.

        Raises:
            four: nothing.
        """

    class Own(Base):
        """Own.

        Args:
            one, two: not so.
            three: ``code`` of a :class:`.Thing` that
                goes on.
        """

    assert argument_help(Own) == {"one": "of the base", "two": "of both", "three": "code of a Thing that goes on"}
    assert argument_help(int) == {}


def test_a_new_method_is_one_entry(monkeypatch, capsys):
    """The command line, its help and the comparison have it."""

    @dataclass(frozen=True)
    class Mine(FreePromptEdit):
        """Mine.

        Args:
            speed: how fast.
        """

        speed: float = 1.0

    entry = Method(
        "mine",
        "My method",
        "at speed 2 {window}",
        Mine,
        further=(Option("speed", 2.0, "how fast"),),
        settings=lambda wanted: {"speed": float(len(wanted.new_words))},
        window="self_replace_steps",
    )
    monkeypatch.setitem(registry.METHODS, "mine", entry)
    assert cli.main(["info"]) == 0 and "My method: speed, self_replace_steps" in capsys.readouterr().out
    assert cli.main(["info", "--method", "mine"]) == 0
    assert "  speed: how fast (default: 2.0)" in capsys.readouterr().out
    settings = Settings(SOURCE, (TARGET,), method="mine", options={"speed": 3}, self_replace=(0.0, 0.5))
    assert settings.edit() == Mine((0.0, 0.5), speed=3)
    (contender,) = (c for c in contenders(0.6) if c.name == "mine")
    assert contender.about == "at speed 2 in the first 60 % of the steps"
    assert contender.options(type("Wanted", (), {"new_words": ("blue", "car")})) == {
        "self_replace_steps": 0.6,
        "speed": 2.0,
    }


def test_a_run_says_whose_edit_it_was_and_is_repeated(place, capsys):
    assert command(place / "out", "--method", LATE, "--option", "first=1", "--levels", "1") == 0
    record = json.loads((place / "out" / "run.json").read_text(encoding="utf-8"))
    file = place / "others" / "edits.py"
    assert record["settings"]["method"] == LATE and record["settings"]["options"] == {"first": 1}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["edit"] == {"class": LATE, "file": str(file.resolve()), "sha256": digest}
    edited, source = (np.asarray(Image.open(place / "out" / n)) for n in ("target-1.png", "source.png"))
    assert not np.array_equal(edited, source)

    again = ["edit", "--from", str(place / "out" / "run.json"), "--quiet", "-o", str(place / "again")]
    assert cli.main(again) == 0
    assert "bit for bit" in capsys.readouterr().err

    file.write_text(MODULE + "# changed\n")
    assert cli.main(again) == 2
    error = capsys.readouterr().err
    assert "is now another file" in error and digest[:12] in error and f"--method {LATE}" in error
    assert cli.main([*again, "--method", LATE, "--steps", "1", "--option", "first=0"]) == 0


@pytest.mark.slow
def test_a_record_whose_class_is_gone(place, capsys, monkeypatch, tmp_path_factory):
    assert command(place / "out", "--method", LATE, "--option", "first=1") == 0
    for name in ("others.edits", "others"):
        sys.modules.pop(name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert cli.main(["edit", "--from", str(place / "out" / "run.json"), "--quiet", "-o", str(place / "again")]) == 2
    error = capsys.readouterr().err
    assert str(place / "others" / "edits.py") in error and "there is no module others" in error
    record = json.loads((place / "out" / "run.json").read_text(encoding="utf-8"))
    del record["edit"]
    (place / "bare.json").write_text(json.dumps(record), encoding="utf-8")
    assert cli.main(["edit", "--from", str(place / "bare.json"), "--quiet", "-o", str(place / "again")]) == 2
    assert "does not say which file" in capsys.readouterr().err


def test_a_class_takes_part_in_a_comparison(place):
    digest = hashlib.sha256((place / "others" / "edits.py").read_bytes()).hexdigest()[:8]
    names = [contender.name for contender in chosen([LATE, "pnp", LATE])]
    assert names == ["pnp", f"{LATE}@{digest}"]  # another version of the file is another row
    with pytest.raises(InputError, match="needs needed, and a comparison takes its defaults"):
        chosen(["others.edits:Worded"])
    with pytest.raises(InputError, match="there is no module nowhere"):
        chosen(["nowhere:Late"])
    with pytest.raises(InputError, match=r"unknown methods 'masactr'; did you mean masactrl\?"):
        chosen(["masactr"])


@pytest.mark.slow
def test_it_is_evaluated(place):
    out = place / "scores"
    given = ["--images", "generated", "--pairs", "1", "--kinds", "colour", "--steps", "3", "-o", str(out)]
    assert cli.main(["evaluate", *given, "--methods", LATE]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    (row,) = result["scores"]["rows"]
    assert any(str(value).startswith(f"{LATE}@") for value in row)
    assert cli.main(["evaluate", *given, "--methods", "fpe"]) == 0  # goes on in the same folder
    assert len(json.loads((out / "evaluation.json").read_text())["scores"]["rows"]) == 2
