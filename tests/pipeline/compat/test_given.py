"""What users of other tools pass by mistake is refused with its name, what was expected and what came."""

import numpy as np
import pytest
import torch

from fpe_pipeline.compat import free_prompt_editing, prompt_to_prompt
from fpe_pipeline.compat.prompt_to_prompt import ptp_utils
from tests.support.tiny_pipelines import PROMPTS

TWO = PROMPTS[:2]
#: What is no share of the steps: the first four, and a third number of a pair, changed what was edited in silence.
NO_SHARES = [80, -0.2, (0.8, 0), True, (0, 0.4, 0.8), "0.8", None, float("nan"), torch.ones(2, 2)]


@pytest.mark.parametrize("value", NO_SHARES, ids=str)
def test_windows_that_are_no_shares(value):
    with pytest.raises(ValueError, match=r"^cross_replace_steps: expected (a|the) "):
        prompt_to_prompt.AttentionReplace(TWO, 10, value, 0.4)
    with pytest.raises(ValueError, match=r"^cross_replace_steps\['blue'\]: expected (a|the) "):
        prompt_to_prompt.AttentionReplace(TWO, 10, {"default_": 0.8, "blue": value}, 0.4)
    with pytest.raises(ValueError, match=r"^self_replace_steps: expected (a|the) "):
        prompt_to_prompt.AttentionReplace(TWO, 10, 0.8, value)
    if value is not None:  # where the original's third argument is the share
        with pytest.raises(ValueError, match=r"^self_replace_steps: expected (a|the) "):
            free_prompt_editing.SelfAttentionControlEdit(TWO, 10, self_replace_steps=value)


@pytest.mark.parametrize("share", [np.float32(0.5), np.array([0, 0.5]), torch.tensor(0.5), [0, 0.5]], ids=str)
def test_shares_of_any_kind(share, pipe):
    controller = prompt_to_prompt.AttentionReplace(TWO, 10, share, share, tokenizer=pipe.tokenizer)
    assert controller.num_self_replace == (0, 5)
    assert controller.cross_replace_alpha[:5].all() and not controller.cross_replace_alpha[5:].any()
    assert free_prompt_editing.SelfAttentionControlEdit(TWO, 10, 16, share).num_self_replace == (0, 5)


@pytest.mark.parametrize("steps", ["10", 10.0, 0, -1, None, True])
def test_steps_that_are_no_number(steps, pipe):
    with pytest.raises(ValueError, match="num_steps must be a whole number from 1 on"):
        prompt_to_prompt.AttentionReplace(TWO, steps, 0.8, 0.4)
    with pytest.raises(ValueError, match="num_steps must be a whole number from 1 on"):
        free_prompt_editing.SelfAttentionControlEdit(TWO, steps, 0.8)
    with pytest.raises(ValueError, match="num_steps must be a whole number from 1 on"):
        ptp_utils.get_time_words_attention_alpha(TWO, steps, 0.8, pipe.tokenizer)


def test_a_side_in_the_place_of_the_share():
    with pytest.raises(ValueError, match="res must be a whole number"):
        free_prompt_editing.SelfAttentionControlEdit(TWO, 10, 0.8, 0.4)  # Prompt-to-Prompt's two shares
