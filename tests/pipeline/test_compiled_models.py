"""Edits of UNets compiled by Inductor, in whole and block by block."""

import pytest
import torch
from tiny_models import EVERYWHERE, draw
from tiny_pipelines import tiny_pipeline

from fpe_pipeline import FreePromptEdit, editing


def edited_and_plain(tiny):
    with editing(tiny, FreePromptEdit(0.5)):
        edited = draw(tiny, 2, steps=4)
    return edited, draw(tiny, 2, steps=4)


def test_blocks_compiled_one_by_one(pipe):
    """diffusers' regional compilation, without graph breaks: sites of one shape share a graph, edited or not."""
    tiny = tiny_pipeline(pipe)
    expected = edited_and_plain(tiny)
    torch.compiler.reset()
    tiny.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for actual, wanted in zip(edited_and_plain(tiny), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)
