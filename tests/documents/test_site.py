"""The documentation's site: every page has a place, it is built without a warning and without the network."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.gallery import __main__ as gallery
from fpe_pipeline.runs import run as runs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIGURATION = DOCS / "site" / "mkdocs.yml"
#: Refuses every connection of a process, and says to whom it was.
NO_NETWORK = """
import socket
def refused(self, address, *rest):
    raise OSError(f"a build of the site connects to {address}")
socket.socket.connect = socket.socket.connect_ex = refused
"""


def nav(entry):
    for each in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else [entry]:
        yield from nav(each) if isinstance(each, list | dict) else [each]


def test_every_document_has_a_place_in_the_navigation():
    pages = set(nav(yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))["nav"]))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages == there
    index = (DOCS / "decisions" / "README.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in index for path in (DOCS / "decisions").glob("0*.md"))


def test_messages_that_it_explains_are_said():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    packages = [path for name in ("fpe_kernels", "fpe_pipeline") for path in (ROOT / name).rglob("*.py")]
    said = "".join(path.read_text(encoding="utf-8") for path in packages)
    said = re.sub(r'"\s*\n\s*f?"', "", said)
    messages = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(messages) > 5
    for message in messages:
        assert all(part.strip() in said for part in message.removesuffix("()").split("…")), message


class TestGallery:
    def test_the_page_is_as_the_script_writes_it(self):
        written = (gallery.FOLDER / "README.md").read_text(encoding="utf-8")
        assert written == gallery.page(), "python -m docs.gallery"

    @pytest.mark.parametrize("name", gallery.ENTRIES)
    def test_a_picture_is_of_its_settings(self, name):
        settings, _ = runs.read_record(gallery.FOLDER / f"{name}.png")
        asked = gallery.ENTRIES[name]
        filled_in = ("size", "device", "dtype", "threads")
        assert settings.with_values(**{field: getattr(asked, field) for field in filled_in}) == asked

    def test_no_picture_is_left_over(self):
        assert {path.stem for path in gallery.FOLDER.glob("*.png")} == set(gallery.ENTRIES)


@pytest.mark.slow
@pytest.mark.parametrize("url", ["", "https://example.org/fpe-kernels"])
def test_it_builds_without_a_warning_and_without_the_network(tmp_path, url):
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module}: pip install 'fpe-kernels[docs]'")
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
    paths = [str(tmp_path / "guard"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FPE_PROJECT_URL": url}
    environment |= {"HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1"}  # the second: an announcement of another version
    command = ["-m", "mkdocs", "build", "--strict", "-f", str(CONFIGURATION), "-d", str(tmp_path / "site")]
    built = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0 and "WARNING -" not in built.stderr, built.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path for path in (tmp_path / "site").rglob("*.html")}
    for path in DOCS.rglob("*.md"):
        page = path.relative_to(DOCS).with_suffix(".html").as_posix().replace("README", "index")
        assert page in pages
    reference = pages["reference/fpe_pipeline.html"].read_text(encoding="utf-8")
    assert 'id="editing"' in reference and "Raises" in reference
    assert not re.search(r":\w+:<code>", reference), "roles of reStructuredText are shown as they are written"
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r"""<(?:script|img|iframe|source)[^>]*?src=["'](https?:[^"']+)""", text)
        linked = [tag for tag in re.findall(r"<link[^>]*>", text) if "canonical" not in tag]
        fetched += [tag for tag in linked if re.search(r"href=.?https?:", tag)]
        assert fetched == [], name
        if name == "404.html":  # shown at any address, it links from the root
            continue
        for link in re.findall(r"""href=["']?([^"' >]+)""", text):
            target = link.partition("#")[0]
            if target and not re.match(r"https?:|mailto:|data:", target):
                assert (path.parent / target).exists(), f"{name} leads to {link}"
