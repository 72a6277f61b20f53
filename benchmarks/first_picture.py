"""How long somebody waits for a first picture: on the page, and from a clone with nothing but README.

    python -m benchmarks.first_picture page --output benchmarks/results/cpu-first-picture.json
    python -m benchmarks.first_picture clone --output benchmarks/results/cpu-first-picture.json

``page``: a round starts `fpe app` in a fresh process, opens its page in a browser that waits for it, presses Generate,
and ends when the picture is there. Beside it stand, in the same round and in fresh processes, the imports of torch,
diffusers and gradio, and the same edit by the API, with its model to load and everything imported.

``clone``: the repository is cloned and `make demo` run in an environment that it makes, from wheels that were
downloaded before. ``download`` is the time of these, ``beyond`` that of everything after them; ``demo`` that of the
demo alone once more, with the environment there, and ``ours`` what passes in that until its first edited picture.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rows import ROOT, Environment, Row, read, replaced, write

__all__ = ["IMPORTS", "clone_rows", "page_rows"]

#: What a page of this kind imports whoever writes it.
IMPORTS = "import torch, gradio; from diffusers import StableDiffusionPipeline"
#: The page's first edit, as the page makes it of its fields; prints its seconds.
_EDIT = """
import time
from fpe_pipeline.pipelines.free_prompt import FreePromptPipeline
from fpe_pipeline.runs.run import execute
from fpe_pipeline.studio.requests import first_fields, settings_of
import fpe_pipeline.edits, fpe_pipeline.session
fields = first_fields()
begun = time.perf_counter()
execute(settings_of(fields, "embedded"))
print(time.perf_counter() - begun)
"""


def page_rows(rounds: int) -> list[Row]:
    """Rows of the page, of the imports and of the same edit by the API; a sample a round."""
    from playwright.sync_api import sync_playwright

    samples: dict[str, list[float]] = {"imports": [], "api": [], "page": []}
    with sync_playwright() as driver:
        path = shutil.which("chromium") or driver.chromium.executable_path
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for _ in range(rounds):
            samples["imports"].append(_seconds(lambda: _python(IMPORTS)))
            samples["api"].append(float(_python(_EDIT).split()[-1]))
            samples["page"].append(_page_seconds(browser))
        browser.close()
    return _rows("embedded/page", samples)


def clone_rows(index: Sequence[str]) -> list[Row]:
    """Rows of a clone, with one sample each.

    Args:
        index: options of pip that say where packages come from.
    """
    with tempfile.TemporaryDirectory() as folder:
        clone, wheels = Path(folder, "clone"), Path(folder, "wheels")
        samples = {"clone": [_seconds(lambda: _run("git", "clone", "--quiet", str(ROOT), str(clone)))]}
        packages = ["pip", "setuptools", "wheel", f"{clone}[pipeline]"]
        fetch = [sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), "-c", str(clone / "constraints.txt")]
        samples["download"] = [_seconds(lambda: _run(*fetch, *index, *packages))]
        demo = ["make", "-C", str(clone), "demo", f"PYTHON={sys.executable}"]
        local = f"PIP_ARGS=--no-index --find-links {wheels}"
        samples["beyond"] = [_seconds(lambda: _run(*demo, local))]
        first, whole = _until_a_picture([*demo, local, "OUT_DIR=out/again"], clone / "out/again")
        samples |= {"ours": [first], "demo": [whole]}
    return _rows("embedded/clone", samples)


def _rows(case: str, samples: dict[str, list[float]]) -> list[Row]:
    about: dict[str, Any] = {"suite": "first-picture", "case": case, "dtype": "float32", "status": "ok"}
    environment = Environment.read("cpu")
    return [
        Row.new(environment, **about, provider=name, samples_ms=tuple(1e3 * each for each in seconds))
        for name, seconds in samples.items()
    ]


def _page_seconds(browser: Any) -> float:
    """From the start of `fpe app` until its first edit is to be seen."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fpe_pipeline", "app", "-o", folder]
        begun = time.perf_counter()
        served = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_env())
        try:
            assert served.stdout is not None
            context = browser.new_context()
            page = context.new_page()
            page.set_default_timeout(300_000)
            page.goto(served.stdout.readline().strip())
            page.locator("#run").click()
            page.locator(".fpe-tiles a img").nth(1).wait_for()
            seconds = time.perf_counter() - begun
            context.close()
            return seconds
        finally:
            served.terminate()
            served.wait(30)


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _until_a_picture(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds of a command until it has left an edited picture below a folder, and until its end.

    Raises:
        RuntimeError: it left none, or failed.
    """
    first, begun = None, time.perf_counter()
    with subprocess.Popen(command, env=_env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            if first is None and any(folder.glob("*/target-1.png")):
                first = time.perf_counter() - begun
            time.sleep(0.05)
    if running.returncode or first is None:
        raise RuntimeError(f"expected {' '.join(command[:4])} to leave {folder}/*/target-1.png, it did not")
    return first, time.perf_counter() - begun


def _python(code: str) -> str:
    return _run(sys.executable, "-c", code)


def _run(*command: str) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    made = subprocess.run(command, env=_env(), capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"expected {command[0]} {command[1]} to succeed, it said: {made.stderr[-2000:]}")
    return made.stdout


def _env() -> dict[str, str]:
    """No network, and this tree before an installed one."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_picture", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("page", "clone"))
    parser.add_argument("--rounds", type=int, default=5, help="of the page (default: 5)")
    parser.add_argument("--index", nargs="*", default=[], help="pip's options for the download of `clone`")
    parser.add_argument("--output", type=Path, help="file for the rows")
    options = parser.parse_args(argv)
    rows = page_rows(options.rounds) if options.what == "page" else clone_rows(options.index)
    for row in rows:
        print(f"{row.case} {row.provider:<10}{(row.median_ms or 0) / 1e3:8.1f} s, {len(row.samples_ms)} times")
    if options.output is not None:
        write(options.output, replaced(read(options.output) if options.output.exists() else [], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
