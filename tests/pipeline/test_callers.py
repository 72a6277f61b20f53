"""Warnings name the line of the user's that they are of, so that each such line is told."""

import inspect
import warnings
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

import fpe_pipeline
from fpe_pipeline import FreePromptEdit, FreePromptPipeline, PromptToPromptEdit, editing

PROMPTS = ["a red car", "a blue car"]


def run(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, num_inference_steps=2, height=16, width=16, output_type="latent", **options)


def no_call(pipe):
    with editing(pipe, FreePromptEdit(1.0)):
        pass


def an_edit_that_is_over_before_it_begins(pipe):
    with editing(pipe, FreePromptEdit(0.1)):
        run(pipe)


def words_that_nobody_knows(pipe):
    PromptToPromptEdit(["a zzqqxx", "a qqzzxx"], pipe.tokenizer)
    FreePromptPipeline.from_pipe(pipe)("a zzqqxx", "a qqzzxx", num_inference_steps=2, output_type="latent")


def a_negative_prompt_without_guidance(pipe):
    made = FreePromptPipeline.from_pipe(pipe)
    made("a car", "a cat", negative_prompt="bad", guidance_scale=1.0, num_inference_steps=2, output_type="latent")


def processors_that_were_replaced(pipe):
    session = editing(pipe, FreePromptEdit(1.0))
    with session:
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        run(pipe)


@pytest.fixture
def stock(tiny):
    processors = tiny.unet.attn_processors
    yield StableDiffusionPipeline(**tiny.components)
    tiny.unet.set_attn_processor(processors)


@pytest.mark.parametrize(
    "asks",
    [
        no_call,
        an_edit_that_is_over_before_it_begins,
        words_that_nobody_knows,
        a_negative_prompt_without_guidance,
        processors_that_were_replaced,
    ],
)
def test_the_line_is_the_users(stock, asks):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        asks(stock)
    ours = [warning for warning in told if warning.category.__module__.startswith(("fpe_", "builtins"))]
    ours = [warning for warning in ours if not issubclass(warning.category, DeprecationWarning | FutureWarning)]
    assert ours
    lines, first = inspect.getsourcelines(asks)
    helper, start = inspect.getsourcelines(run)
    allowed = {*range(first, first + len(lines)), *range(start, start + len(helper))}
    assert [(warning.filename, warning.lineno in allowed, str(warning.message)) for warning in ours] == [
        (__file__, True, str(warning.message)) for warning in ours
    ]


def test_each_line_is_told_once(stock):
    """As Python shows warnings where nobody has asked for anything else."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            no_call(stock)
        with editing(stock, FreePromptEdit(1.0)):
            pass
    assert ["ended without a call" in str(warning.message) for warning in told] == [True, True]


def test_no_other_module_counts_frames():
    package = Path(fpe_pipeline.__file__).parent
    counting = [path.name for path in package.rglob("*.py") if "stacklevel" in path.read_text(encoding="utf-8")]
    assert counting == ["callers.py"]
