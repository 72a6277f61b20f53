"""Each example runs, in few steps, and leaves what it says."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
#: By script, the arguments after the folder; the others take the number of steps.
ARGUMENTS = {"measure_a_shape": ("64", "2", "16")}
WITHOUT_PICTURES = ("map_algebra", "measure_a_shape", "shared_attention")


#: Scripts whose calls those of others and the documents' blocks make as well.
LONG = {"edit_a_photo", "own_edit", "own_processor", "prompt_to_prompt", "record_once"}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow if each in LONG else ()) for each in SCRIPTS]
)
def test_it_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "pictures", *ARGUMENTS.get(name, ("4",))])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    pictures = list(tmp_path.rglob("*.png"))
    if name in WITHOUT_PICTURES:
        assert not pictures and capsys.readouterr().out
    else:
        assert pictures
        assert {path.relative_to(tmp_path).parts[:2] for path in pictures} == {("pictures", name)}


@pytest.mark.slow
def test_a_photo_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32), "red").save("mine.png")
    words = ["--photo", "mine.png", "--source", "a red house", "--target", "a blue house"]
    monkeypatch.setattr(sys, "argv", ["edit_a_photo.py", "pictures", "2", *words])
    runpy.run_path(str(FOLDER / "edit_a_photo.py"), run_name="__main__")
    assert "1 edits" in capsys.readouterr().out
    source = Image.open(tmp_path / "pictures" / "edit_a_photo" / "edits" / "source.png")
    assert source.width > source.height  # as the photo, and no drawn scene


@pytest.mark.parametrize("name", [each for each in SCRIPTS if each not in ("map_algebra", "shared_attention")])
def test_it_says_what_it_takes(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for given, code, said in ((["--help"], 0, "usage:"), (["pictures", "many"], 2, "invalid int value: 'many'")):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert left.value.code == code and said in printed.out + printed.err
    assert not list(tmp_path.iterdir())


def test_the_list_names_each_and_none_is_long():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}.py]({name}.py)" in page for name in SCRIPTS)
    assert page.count(".py](") == len(SCRIPTS)
    for name in SCRIPTS:
        assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60, name
