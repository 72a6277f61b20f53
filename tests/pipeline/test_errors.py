"""What a library refuses is told as what was asked for cannot be served."""

import pytest

from fpe_pipeline.errors import InputError, Lacking, refusals


@pytest.mark.parametrize(("error", "kinds"), [(ValueError, ()), (UnicodeError, ()), (TypeError, (TypeError,))])
def test_an_error_of_a_kind_is_told_in_its_words(error, kinds):
    cause = error("expected one, got two")
    with pytest.raises(InputError, match=r"^expected one, got two$") as told, refusals(*kinds):
        raise cause
    assert told.value.__cause__ is cause


@pytest.mark.parametrize("error", [InputError("as it is"), Lacking("its keys", "record it again"), TypeError("ours")])
def test_others_are_raised_as_they_are(error):
    with pytest.raises(type(error)) as told, refusals():
        raise error
    assert told.value is error
