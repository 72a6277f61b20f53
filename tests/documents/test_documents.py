"""Every block of code in every document and every example in a docstring runs as printed.

Names of models on the hub are answered by a tiny model, and "cuda" by the CPU. Where no number of steps is printed, few
are made. Commands that no test can run are listed in `NOT_RUN` with the reason.
"""

import doctest
import functools
import importlib
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from PIL import Image

import benchmarks
import fpe_kernels
import fpe_pipeline
from fpe_pipeline.app import cli
from fpe_pipeline.app.commands import parsed
from fpe_pipeline.models import sources
from fpe_pipeline.pipelines.unet_editing import UNetEditing
from tests.support.free_prompt_pipelines import free_prompt_xl_pipeline
from tests.support.golden_cases import load_pipeline
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.tiny_pixart import tiny_pixart_pipeline
from tests.support.tiny_transformers import tiny_flux_pipeline, tiny_sd3_pipeline

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("build", "out") for part in path.relative_to(ROOT).parts)
)
# Beginnings of commands that are not run, and why.
NOT_RUN = {
    "make demo": "makes an environment; test_cli_refusals.py runs fpe demo",
    "make test": "is what runs these tests",
    "make lint": "checks the code, not the documents",
    "make bench": "measures for an hour; tests/benchmarks runs each of its parts",
    "make figures": "rewrites documents; tests/benchmarks/test_tables.py compares them",
    "make gpu": "needs a GPU",
    "python -m benchmarks": "measures from minutes to hours; tests/benchmarks runs each of its parts",
    "pytest benchmarks": "measures for minutes; tests/benchmarks runs each of its parts",
    "make notebooks": "writes the notebooks; test_notebooks.py runs them",
    "make site": "builds the site; test_site.py does",
    "docker": "needs Docker; tests/integrations reads what it builds from",
    "mkdir": "makes a folder for Docker",
    "cp -r integrations/comfyui": "needs ComfyUI; tests/integrations runs the nodes",
    "python -m integrations.kernels_hub": "tests/integrations runs it",
    "fpe app": "serves until it is ended; tests/pages visits it",
    "fpe batch PIE-Bench": "needs PIE-Bench and weights; tests/pipeline/batches reads such lists and weights",
    "fpe batch jobs.jsonl --workers": "needs Ray; tests/pipeline/batches/test_ray.py runs it",
    "fpe doctor": "takes a minute; tests/pipeline/app/test_doctor.py runs it",
    "fpe evaluate": "takes hours; its arguments are parsed, and test_quality.py runs it on few pairs",
}
FEW_STEPS = ["--steps", "3"]
FEW = 5  # steps of a call that says no number
DENOISING = ("batch", "edit", "heatmap", "invert")
# An evaluation of so few pairs is run all the same.
FEW_PAIRS = "--pairs 1 "
# The first line of a block that is a file, which the page has the reader save.
SAVED = re.compile(r"# (\w+)\.py\n")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("console", "bash")
PACKAGES = (fpe_kernels, fpe_pipeline, benchmarks)


def blocks(document):
    """(line, language, text) of each fenced block; the line is that of its first line of code."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m[1], m[2]) for m in FENCE.finditer(text)]


def commands(language, text):
    """The commands of a block, without prompts and comments; a line that ends in a backslash goes on."""
    lines = text.replace("\\\n", " ").splitlines()
    if language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words):
    line = " ".join(words)
    if words[:2] in (["fpe", "batch"], ["fpe", "evaluate"]):
        parsed(words[1:])
    if FEW_PAIRS in line or not any(line.startswith(beginning) for beginning in NOT_RUN):
        assert words[0] == "fpe", f"neither run nor listed in NOT_RUN: {line}"
        # As printed, but for the number of steps: fifty of them show no more than a few.
        said = {"--steps", "--from", "--recording"} & set(words)
        few = FEW_STEPS if words[1] in DENOISING and not said else []
        quiet = ["--quiet"] if words[1] in (*DENOISING, "demo") else []
        assert cli.main([*words[1:], *few, *quiet]) == 0, line


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder of a model with as many layers as SD 1.5, but none at the latent's resolution: fast at any size."""
    shape = {
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    }
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(load_pipeline(), **shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def xl_stand_in(tmp_path_factory):
    """A folder of a model as SDXL is, of 32 pixels."""
    folder = tmp_path_factory.mktemp("models") / "xl"
    free_prompt_xl_pipeline(load_pipeline(), torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def transformer_stand_in(tmp_path_factory):
    """A folder of a model as Stable Diffusion 3.5 is, whose own size is small: documents name none."""
    folder = tmp_path_factory.mktemp("models") / "transformer"
    pipe = tiny_sd3_pipeline(load_pipeline(), "sd3.5", torch.float32)
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux_stand_in(tmp_path_factory):
    """A folder of a model as FLUX.1 is, of three blocks."""
    folder = tmp_path_factory.mktemp("models") / "flux"
    pipe = tiny_flux_pipeline(load_pipeline(), torch.float32)
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixart_stand_in(tmp_path_factory):
    """A folder of a model as PixArt is, of three blocks."""
    folder = tmp_path_factory.mktemp("models") / "pixart"
    tiny = tiny_pixart_pipeline(
        load_pipeline(), "alpha", torch.float32, sample_size=16, use_additional_conditions=False
    )
    tiny.save_pretrained(folder)
    return folder


def of_few_steps(method):
    """A method of a pipeline, whose own number of steps is small."""

    @functools.wraps(method)
    def call(*arguments, **options):
        if "inversion" not in options:  # which says its own number
            options.setdefault("num_inference_steps", FEW)
        return method(*arguments, **options)

    return call


@pytest.fixture
def workplace(stand_in, xl_stand_in, transformer_stand_in, flux_stand_in, pixart_stand_in, tmp_path, monkeypatch):
    """A folder with photos and a list of edits, on a machine with a hub and a GPU, as documents assume."""
    load, move = DiffusionPipeline.from_pretrained.__func__, DiffusionPipeline.to
    look = DiffusionPipeline.load_config.__func__

    def here(kind, name):
        """The folder that stands in for a name on the hub."""
        if not isinstance(name, str) or name.count("/") != 1 or Path(name).exists():
            return name
        known = {StableDiffusion3Pipeline: transformer_stand_in, FluxPipeline: flux_stand_in}
        known[PixArtAlphaPipeline] = pixart_stand_in
        unet = xl_stand_in if "-xl-" in name else stand_in
        return next((folder for parent, folder in known.items() if issubclass(kind, parent)), unet)

    def from_pretrained(kind, name, **options):
        options = {option: value for option, value in options.items() if value is not torch.float16}  # a GPU's
        pipe = load(kind, here(kind, name), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load_config(kind, name, **options):
        return look(kind, here(kind, name), **options)

    def to(pipe, *arguments, **options):
        return move(pipe, *("cpu" if argument == "cuda" else argument for argument in arguments), **options)

    for kind in (StableDiffusionPipeline, UNetEditing):
        for name in ("__call__", "invert", "record"):
            if name in vars(kind):
                monkeypatch.setattr(kind, name, of_few_steps(getattr(kind, name)))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(DiffusionPipeline, "load_config", classmethod(load_config))
    monkeypatch.setattr(DiffusionPipeline, "to", to)
    monkeypatch.setattr(sources, "_without_weights", lambda name: stand_in)  # what the hub says of a model
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("photo.jpg", "beach.jpg"):
        Image.fromarray(pixels).save(name)
    Path("jobs.jsonl").write_text('{"source": "a photo of a cat", "target": "a photo of a dog"}\n')
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # as in a checkout
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if _lies_in(module, tmp_path)]:
        del sys.modules[name]


def _lies_in(module, folder):
    return str(getattr(module, "__file__", None) or "").startswith(str(folder))


#: Documents whose blocks take long, beside others that run the same commands and calls.
LONG = {
    "docs/batches.md",
    "docs/gallery/README.md",
    "docs/guides/high-resolution.md",
    "docs/guides/your-own-tool.md",
    "docs/recordings.md",
    "docs/write-an-edit.md",
    "fpe_pipeline/embedded/earlier/embedded_80/MODEL_CARD.md",
    "fpe_pipeline/embedded/sd3/MODEL_CARD.md",
    "fpe_pipeline/embedded/weights/MODEL_CARD.md",
}


@pytest.mark.parametrize(
    "document", [pytest.param(each, marks=pytest.mark.slow if each in LONG else ()) for each in DOCUMENTS]
)
def test_blocks_run_as_printed(document, workplace):
    """In the order of the page: a block may use what those before it have defined."""
    known = {"__name__": "__main__"}
    for line, language, text in blocks(document):
        if language == "python" and (saved := SAVED.match(text)):
            (workplace / f"{saved[1]}.py").write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile("\n" * (line - 1) + text, str(ROOT / document), "exec"), known)
        elif language in SHELLS:
            for words in commands(language, text):
                run_command(words)
        else:
            assert language in ("bibtex", "text"), f"{document}:{line} is a block of {language}, which nothing checks"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_block_is_left_out(document):
    """A fence that is indented, or names no language, would be skipped; a command in a block of text as well."""
    text = (ROOT / document).read_text(encoding="utf-8")
    fences = re.findall(r"^[ >]*(?:`{3,}|~{3,}).*", text, re.MULTILINE)
    assert len(fences) == 2 * len(blocks(document)), [fence for fence in fences if fence != "```"]
    told = [line for _, language, block in blocks(document) if language == "text" for line in block.splitlines()]
    assert [line for line in told if line.startswith(("$ ", "fpe "))] == []


def test_the_list_of_what_is_not_run_has_no_spare_entries():
    printed = [
        " ".join(words)
        for document in DOCUMENTS
        for _, language, text in blocks(document)
        if language in SHELLS
        for words in commands(language, text)
    ]
    assert printed
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in printed), beginning


def modules():
    for package in PACKAGES:
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith(("__main__", "test_regression")):
                yield found.name


def with_examples():
    """Dotted names of modules in whose source an example stands."""
    for name in modules():
        found = importlib.util.find_spec(name)
        if found.origin and ">>> " in Path(found.origin).read_text(encoding="utf-8"):
            yield name


@pytest.mark.parametrize("name", list(with_examples()))
def test_docstrings(name, workplace):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed
