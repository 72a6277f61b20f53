"""Edits of whole pipelines whose UNet is compiled, entire or block by block."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fpe_pipeline import FreePromptEdit, editing
from tests.support.tiny_models import draw
from tests.support.tiny_pipelines import tiny_pipeline

pytestmark = pytest.mark.slow  # tracing takes seconds a layer

HALF = FreePromptEdit(0.5)


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pipeline_of_levels(pipe, *channels):
    """As in SD 1.x, head dims differ between levels."""
    return tiny_pipeline(
        pipe,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
    )


def with_and_without_an_edit(tiny, edit=HALF):
    with editing(tiny, edit):
        edited = draw(tiny, 2, steps=4)
    plain = draw(tiny, 2, steps=4)
    assert (edited - plain)[1].abs().max() > 1e-3
    return torch.stack([edited, plain])


def test_blocks_share_graphs(pipe):
    """diffusers' regional compilation without a graph break: nothing of a layer but its shape is in an edit's graph."""
    tiny = pipeline_of_levels(pipe, 8, 16, 32)
    expected = with_and_without_an_edit(tiny)
    counter = CompileCounter()
    tiny.unet.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(with_and_without_an_edit(tiny), expected, rtol=0, atol=1e-4)
    graphs = counter.frame_count
    assert graphs < 10  # of ten blocks, each of them with an edit and without
    torch.testing.assert_close(with_and_without_an_edit(tiny), expected, rtol=0, atol=1e-4)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_a_run_makes_two_graphs(pipe, in_place):
    """One for the steps of the edit's window and one for those after it: no graph knows the number of its step."""
    tiny = tiny_pipeline(
        pipe, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",)
    )
    edit = FreePromptEdit(0.5, levels=(0, 1))
    with editing(tiny, edit):
        expected = draw(tiny, 2, steps=50)
    counter = CompileCounter()
    if in_place:
        tiny.unet.compile(backend=counter)
    else:
        tiny.unet = torch.compile(tiny.unet, backend=counter)
    for _ in range(2):
        with editing(tiny, edit) as session:
            torch.testing.assert_close(draw(tiny, 2, steps=50), expected, rtol=0, atol=1e-4)
        assert set(map(tuple, session.report().layers.values())) == {tuple(range(25))}
    assert counter.frame_count == 2


def test_inductor_on_blocks(pipe):
    tiny = pipeline_of_levels(pipe, 8, 16)
    expected = with_and_without_an_edit(tiny)
    tiny.unet.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(with_and_without_an_edit(tiny), expected, rtol=0, atol=1e-4)


def test_inductor_on_the_unet(pipe):
    tiny = tiny_pipeline(
        pipe, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    edit = FreePromptEdit(0.5, layers="mid_block")
    expected = with_and_without_an_edit(tiny, edit)
    tiny.unet = torch.compile(tiny.unet)
    torch.testing.assert_close(with_and_without_an_edit(tiny, edit), expected, rtol=0, atol=1e-4)
