"""Methods by name: the command line, the evaluation and Python run the same edit, from one table."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline import FreePromptPipeline, MasaCtrlEdit, make_edit
from fpe_pipeline.app import cli
from fpe_pipeline.edits.free_prompt import JOINT_STEPS
from fpe_pipeline.edits.method import REQUIRED, Method
from fpe_pipeline.edits.registry import METHODS, method_table, methods_of
from fpe_pipeline.models.sites import attention_sites
from fpe_pipeline.quality.methods.comparison import _Drawing
from fpe_pipeline.quality.methods.contenders import CONTENDERS, chosen
from fpe_pipeline.quality.methods.subjects import GENERATED, Subject
from fpe_pipeline.quality.request import Evaluation
from fpe_pipeline.runs.model_defaults import defaults_for
from fpe_pipeline.runs.settings import DEFAULTS, Settings
from tests.support.silent import SOURCE, TARGET, embedded
from tests.support.tiny_transformers import tiny_sd3
from tests.support.tiny_unets import tiny_unet

PROMPTS = [SOURCE, TARGET]
# Words that a method cannot find by itself, as each of the three is given them.
WORDS = {"fpe-regional": {"word": "car"}, "p2p-blend": {"words": ["red", "blue"]}, "kv-edit": {"mask": [[1.0, 0.0]]}}
SUBJECT = Subject("one", "colour", SOURCE, TARGET, ("blue",), ("red", "blue"), "car", seed=3)
STEPS = 6


@pytest.fixture(scope="module")
def pipe():
    return embedded(FreePromptPipeline)


def by_command(name, folder, *more):
    options = [f"--option={key}={json.dumps(value)}" for key, value in WORDS.get(name, {}).items()]
    given = ["--source", SOURCE, "--target", TARGET, "--method", name, "--seed", "3", "--no-control", "--quiet"]
    assert cli.main(["edit", *given, *options, *more, "-o", str(folder)]) == 0
    return np.asarray(Image.open(folder / "target-1.png"))


#: Run with the fast tests; the others are run with the slow ones.
QUICK = ("masactrl",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in methods_of("unet")]
)
def test_three_ways_to_one_picture(pipe, tmp_path, name):
    """With the defaults of the method for the model; to rounding, which may move a pixel by one level of 255."""
    command = by_command(name, tmp_path, "--steps", str(STEPS))
    edit = make_edit(name, PROMPTS, pipe.tokenizer, pipe, **WORDS.get(name, {}))
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3)}
    in_python = np.asarray(pipe(SOURCE, TARGET, edit=edit, **options).targets[0])
    contender = chosen([name])[0].edit_for(SUBJECT, pipe.tokenizer, pipe)
    assert contender == edit or name == "fpe-regional"  # a mask of a word is compared by its picture
    evaluated = _Drawing(pipe, SUBJECT, GENERATED, STEPS, DEFAULTS.guidance).edited(contender)[1]
    for picture in (in_python, evaluated):
        assert np.abs(picture.astype(int) - command).max() <= 1


@pytest.mark.slow
def test_the_pipelines_own_default_is_the_method_of_that_name(pipe, tmp_path):
    command = by_command("fpe", tmp_path, "--steps", str(STEPS))
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3)}
    plain = np.asarray(pipe(SOURCE, TARGET, **options).targets[0])
    assert np.abs(plain.astype(int) - command).max() <= 1


def test_the_same_settings():
    """Steps, guidance and window, wherever they are left out."""
    call = inspect.signature(FreePromptPipeline.__call__).parameters
    steps = inspect.signature(FreePromptPipeline.invert).parameters["num_inference_steps"].default
    settings = Settings("", ())
    evaluated = Evaluation()
    assert settings.steps == evaluated.steps == steps
    assert settings.guidance == evaluated.guidance == FreePromptPipeline.parent_default("guidance_scale")
    assert settings.self_replace == (0.0, evaluated.self_replace) == (0.0, call["self_replace_steps"].default)
    assert CONTENDERS[2:] == tuple(methods_of("unet"))


@pytest.mark.slow
def test_masactrl_runs_with_its_defaults(tmp_path):
    by_command("masactrl", tmp_path, "--steps", "5")
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["layers"] is None
    assert record["settings"]["options"] == {}


def test_layers_that_suit_the_model(pipe):
    """Counting as MasaCtrl's authors do ends before the embedded model's decoder; a choice of the caller's stands."""
    (count,) = {sum(name.endswith("attn1.processor") for name in pipe.unet.attn_processors)}
    assert count <= MasaCtrlEdit().start_layer
    assert make_edit("masactrl", PROMPTS, None, pipe).layers == ("up_blocks",)
    assert make_edit("masactrl", PROMPTS, None, pipe.unet, start_layer=2).layers is None
    assert make_edit("masactrl", PROMPTS, None).layers is None
    assert make_edit("fpe", PROMPTS, None, pipe, max_tokens=100).levels is None


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.window is not None])
def test_the_window_that_suits_the_model(pipe, name):
    """Shin et al.'s first fifth on joint attention, as the command and the pipeline's own default have it."""
    transformer = tiny_sd3()
    own = defaults_for("embedded-sd3", {"method": name})["self_replace"]
    assert own == (0.0, JOINT_STEPS)
    words = WORDS.get(name, {})
    assert make_edit(name, PROMPTS, pipe.tokenizer, transformer, **words).self_replace_steps == own
    assert make_edit(name, PROMPTS, pipe.tokenizer, pipe, **words).self_replace_steps == DEFAULTS.self_replace
    given = make_edit(name, PROMPTS, pipe.tokenizer, transformer, self_replace_steps=0.7, **words)
    assert given.self_replace_steps == (0.0, 0.7)


def test_masactrl_stays_out_of_an_encoder_of_many_layers():
    """SDXL has 24 layers of self-attention on the way down and 10 in the middle, and MasaCtrl counts to its 10th."""
    unet = tiny_unet("sdxl", transformer_layers_per_block=(1, 2, 10))
    sites = attention_sites(unet)
    chosen = make_edit("masactrl", PROMPTS, None, unet).select(sites)
    assert chosen == tuple(site for site in sites if site.kind == "self" and site.place == "up")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_option_is_one(pipe, method: Method):
    """What the table calls options is what the maker takes, and nothing else."""
    with pytest.raises(TypeError, match=f"{method.name} has no option zzz; it has {method.options[0]}"):
        make_edit(method.name, PROMPTS, pipe.tokenizer, zzz=1)
    made = inspect.signature(method.edit).parameters
    required = {option.name for option in method.choices if option.default is REQUIRED}
    for name in set(method.options) - required:
        if name in made and made[name].default is not inspect.Parameter.empty:
            value = {"strength": 0.5, "threshold": 0.3}.get(name, made[name].default)
            make_edit(method.name, PROMPTS, pipe.tokenizer, **{**WORDS.get(method.name, {}), name: value})


def test_the_readme_has_the_table():
    assert method_table() in (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")


def test_the_command_lists_them(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, method in METHODS.items():
        assert any(line.split()[:1] == [name] and method.title in line for line in lines)
