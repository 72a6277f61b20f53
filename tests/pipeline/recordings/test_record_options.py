"""What `pipe.record` takes: one list for the caller, type checkers and the request."""

from __future__ import annotations

import inspect
import typing

import pytest

from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.recordings.record_request import RecordOptions, RecordRequest
from tests.support.free_prompt_pipelines import free_prompt_pipeline


def test_the_signature_has_every_option_with_its_default():
    shown = inspect.signature(FreePromptPipeline.record).parameters
    defaults = {name: one.default for name, one in list(shown.items())[1:]}
    assert defaults == {name: getattr(RecordRequest(), name) for name in ("prompt", *RecordRequest.names())}


def test_type_checkers_know_the_same_options():
    assert RecordOptions.__annotations__.keys() == set(RecordRequest.names())
    known, held = typing.get_type_hints(RecordOptions), typing.get_type_hints(RecordRequest)
    assert known == {name: held[name] for name in known}


def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(pipe):
    own = free_prompt_pipeline(pipe)
    with pytest.raises(TypeError, match="unknown option placment; did you mean placement"):
        own.record("a red cat", placment="cpu")
