"""No map is materialised: an edited UNet step holds what the unedited step holds.

Allocations are counted, not timed: the numbers are the same on every machine and on every run.
"""

from functools import cache

import pytest
import torch

from benchmarks.editors import EDITORS
from benchmarks.edits import Sampler
from benchmarks.memory import peak_bytes
from benchmarks.unets import UNetCase, build

# 64 × 64 latents: 4096 tokens at the first level; two of the four rows are a source and its target.
TOKENS = 4096


@cache
def peak(editor: str, selection: str, model: str = "tiny", pixels: int = 512) -> int:
    case = UNetCase(model, pixels, selection=selection)
    unet = build(case.model, "cpu", torch.float32)
    with torch.no_grad(), EDITORS[editor](unet, case) as set_step:
        return peak_bytes(Sampler.of(unet, case, set_step, "cpu", torch.float32))


@pytest.mark.parametrize("selection", ["default", "all"])
def test_an_edited_step_holds_no_more_than_an_unedited_one(selection):
    assert peak("fpe", selection) <= 1.05 * peak("unedited", selection)


@pytest.mark.slow
def test_a_step_of_sdxls_layers_at_1024_pixels_holds_no_more_edited():
    case = ("default", "slimxl", 1024)
    assert peak("fpe", *case) <= 1.05 * peak("unedited", *case)


@pytest.mark.slow
def test_the_dense_original_holds_more_than_five_times_as_much():
    """Were this to fail, the counter would not see maps, and the test above would mean nothing."""
    unedited, dense = peak("unedited", "all"), peak("dense-original", "all")
    assert dense > 5 * unedited
    assert UNetCase("tiny", 512).side ** 2 == TOKENS
    one_map_for_each_row = 4 * TOKENS**2 * 4
    assert dense > 2 * one_map_for_each_row  # scores and probabilities at once
