"""Null-text optimisation holds a bounded amount of memory, counted, not timed."""

import numpy as np
import pytest

from benchmarks.memory import peak_bytes
from fpe_pipeline import NullText
from tests.support.free_prompt_pipelines import SOURCE, free_prompt_pipeline


@pytest.fixture(scope="module")
def tiny(pipe):
    return free_prompt_pipeline(pipe)


def peak(tiny, *, steps=2, inner_steps=1, **settings):
    photo = np.random.default_rng(3).random((24, 32, 3))
    method = NullText(inner_steps=inner_steps, early_stop=0, **settings)
    return peak_bytes(lambda: tiny.invert(photo, SOURCE, num_inference_steps=steps, method=method))


@pytest.mark.slow
def test_checkpointing_halves_it(tiny):
    peaks = [peak(tiny, gradient_checkpointing=on) for on in (True, False)]
    assert peaks[0] <= 0.55 * peaks[1]


@pytest.mark.slow
def test_it_does_not_grow_with_the_iterations(tiny):
    """Of each step a latent and an embedding are kept, and nothing of the way to them."""
    one = peak(tiny)
    assert peak(tiny, inner_steps=4) <= 1.05 * one
    inversion = tiny.invert(np.zeros((24, 32, 3)), SOURCE, num_inference_steps=1, method=NullText(inner_steps=1))
    kept = inversion.unconditional[0].nbytes + inversion.latents[0].nbytes
    assert peak(tiny, steps=6) <= 1.05 * one + 2 * 4 * kept
