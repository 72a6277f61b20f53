"""The pictures of the documents are those that their scripts draw, and each stands on a page."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from docs.figures.__main__ import FIGURES, FOLDER

PAGES = sorted(FOLDER.parent.glob("*.md"))


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_is_as_its_script_draws_it(name):
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == FIGURES[name](), "python -m docs.figures"


def test_every_picture_stands_on_a_page_with_words_for_those_who_cannot_see_it():
    shown = {}
    for page in PAGES:
        shown |= {
            path: words for words, path in re.findall(r"!\[([^\]]*)\]\((figures/[^)]+)\)", page.read_text("utf-8"))
        }
    assert set(shown) == {f"figures/{path.name}" for path in FOLDER.glob("*.svg")}
    assert {f"figures/{name}.svg" for name in FIGURES} == set(shown)
    assert all(shown.values())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.svg")), ids=lambda path: path.stem)
def test_nothing_is_drawn_outside_of_a_picture(path):
    root = ElementTree.parse(path).getroot()
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y = (float(element.get(name, 0)) for name in ("x", "y"))
        assert x >= 0 and x + float(element.get("width")) <= width, element.attrib
        assert y >= 0 and y + float(element.get("height")) <= height, element.attrib
