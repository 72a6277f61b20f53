"""Fixtures that the pipeline tests share. The pipeline is loaded once: a session has to leave it as it was."""

import pytest

from tests.support.dense_rows import wide
from tests.support.golden_cases import load_pipeline
from tests.support.tiny_pipelines import tiny_pipeline


@pytest.fixture(scope="session")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def tiny(pipe):
    """An SD 1.x pipeline with a UNet so small that a call takes tens of milliseconds."""
    return tiny_pipeline(pipe)


@pytest.fixture
def in_float64():
    """Where diffusers narrows to float32 on the way, what is in float64 stays so."""
    with wide():
        yield
