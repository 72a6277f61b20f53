"""Options of edits that are True or False: a text, which would count as True, is refused."""

import numpy as np
import pytest
import torch

from fpe_pipeline import ConsistEdit, FreePromptEdit, StyleAlignedEdit, WordMask

SWITCHES = {
    "both_halves": [lambda given: FreePromptEdit(both_halves=given), lambda given: ConsistEdit(both_halves=given)],
    "normalise": [lambda given: StyleAlignedEdit(normalise=given)],
}
CASES = [(name, make) for name, makes in SWITCHES.items() for make in makes]


@pytest.mark.parametrize(("name", "make"), CASES)
@pytest.mark.parametrize("given", ["False", "", 1, None, np.array([True])], ids=repr)
def test_what_is_neither_is_refused(name, make, given):
    with pytest.raises(ValueError, match=f"expected {name} to be True or False, got"):
        make(given)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_numpys_and_torchs_are_switches(name, make):
    for given in (np.bool_(False), torch.tensor(False)):
        assert make(given) == make(False) != make(True)


def test_masks_of_words(pipe):
    with pytest.raises(ValueError, match="expected invert to be True or False, got 'False'"):
        WordMask("a photo of a red car", "car", pipe.tokenizer, invert="False")
    assert WordMask("a photo of a red car", "car", pipe.tokenizer, invert=np.bool_(True)).invert is True
