"""A page that is served, and a browser that visits it.

The browser is Chromium: Debian's where it is installed (``apt install chromium``), else the one that playwright
downloads (``playwright install chromium``). Without either the tests are skipped by name; ``FPE_BROWSER=required``
fails them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from fpe_pipeline.embedded.scenes.scenes import Scene, render
from tests.support.golden_cases import load_pipeline
from tests.support.tiny_transformers import tiny_sd3_pipeline

ROOT = Path(__file__).parents[2]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOW = "no Chromium: `apt install chromium`, or `playwright install chromium` in the environment"


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        path = shutil.which("chromium") or driver.chromium.executable_path
        if not Path(path).exists():
            if os.environ.get("FPE_BROWSER") == "required":
                pytest.fail(HOW)
            pytest.skip(HOW)
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="session")
def transformer(tmp_path_factory):
    """A folder of a model as Stable Diffusion 3 is, of random numbers."""
    folder = tmp_path_factory.mktemp("models") / "transformer"
    pipe = tiny_sd3_pipeline(load_pipeline(), dtype=torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def address(browser, out, transformer):
    """`fpe app`, in a process of its own, with the embedded models and a transformer."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fpe_pipeline", "app"]
    command += [word for model in ("embedded", "embedded-80", transformer) for word in ("--model", model)]
    with open(out / "server.log", "w") as log:
        served = subprocess.Popen(
            [*command, "-o", str(out / "results")], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        line = served.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), (out / "server.log").read_text()
        yield line
        served.terminate()
        served.wait(30)


class Visit:
    """A page in a browser of its own; what it asked for elsewhere, and what went wrong in it."""

    def __init__(self, browser, address, size=DESKTOP):
        self.context = browser.new_context(viewport=size, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.elsewhere, self.errors = [], []
        self.page.on("request", lambda request: self._asked(request.url, address))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.locator("#run").wait_for()

    def _asked(self, url, address):
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()

    def few_steps(self, steps, *, pictured=False):
        """Fewer steps than anybody would take, unless there will be pictures of it."""
        steps = 25 if pictured and os.environ.get("FPE_SCREENSHOTS") else steps
        self.page.get_by_role("button", name="Sampling").click()
        field = self.page.get_by_label("number input for Steps")
        field.fill(str(steps))
        field.blur()
        self.page.get_by_role("button", name="Sampling").click()

    def generate(self):
        self.page.locator("#run").click()
        self.said("#status", "done in")

    def said(self, where, text):
        """Wait until a place says something; the whole of what it says."""
        self.page.locator(where, has_text=text).wait_for()
        return self.page.locator(where).inner_text()

    def widths(self):
        """(content, window), px."""
        return tuple(self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]"))


@pytest.fixture
def visit(browser, address):
    visits = []

    def begun(size=DESKTOP):
        visits.append(Visit(browser, address, size))
        return visits[-1]

    yield begun
    for each in visits:
        each.context.close()
        assert each.elsewhere == [] and each.errors == []


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "beach.png"
    Image.fromarray(render(Scene("car", "red", "beach"), 160).image).save(path)
    return path
