"""StyleAligned against dense float64 mathematics written from the paper."""

import pytest
import torch
from torch.nn import functional as F

from fpe_pipeline import StyleAlignedEdit, editing
from tests.support.tiny_unets import tiny_unet, unet_inputs


class DenseStyleAligned:
    """Equations 3 to 5 of the paper, image by image, in batches of [u_reference, u_1, u_2, reference, 1, 2]."""

    def __init__(self, normalise, shift):
        self.normalise, self.shift = normalise, shift

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        batch, tokens, _ = hidden_states.shape

        def heads(projection):
            return projection(hidden_states).reshape(batch, tokens, attn.heads, -1).transpose(1, 2)

        def as_reference(x, reference):
            if not self.normalise:
                return x
            deviation, goal = ((y.var(1, keepdim=True) + 1e-5).sqrt() for y in (x, reference))
            return goal * (x - x.mean(1, keepdim=True)) / deviation + reference.mean(1, keepdim=True)

        query, key, value = heads(attn.to_q), heads(attn.to_k), heads(attn.to_v)
        rows = []
        for row in range(batch):
            reference = 0 if row < batch // 2 else batch // 2
            q, k, v = query[row], key[row], value[row]
            if row != reference:
                q, k = as_reference(q, query[reference]), as_reference(k, key[reference])
                k, v = torch.cat([key[reference], k], 1), torch.cat([value[reference], v], 1)
            logits = q @ k.transpose(1, 2) * attn.scale
            if row != reference:
                logits[..., :tokens] += self.shift
            rows.append((logits.softmax(-1) @ v).transpose(0, 1).reshape(tokens, -1))
        return F.linear(torch.stack(rows), attn.to_out[0].weight, attn.to_out[0].bias)


@pytest.mark.parametrize(("normalise", "shift"), [(True, 0.0), (True, 0.7), (False, -1.2)])
@torch.no_grad()
def test_a_whole_unet(normalise, shift):
    unet = tiny_unet("sd1")
    args, kwargs = unet_inputs(unet, 6)
    unedited = unet(*args, **kwargs).sample
    with editing(unet, StyleAlignedEdit(1.0, normalise, shift), classifier_free_guidance=True) as session:
        session.step(0, 1)
        actual = unet(*args, **kwargs).sample
    for site in session.sites:
        if site.kind == "self":
            unet.get_submodule(site.path).set_processor(DenseStyleAligned(normalise, shift))
    expected = unet(*args, **kwargs).sample
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    moved = (expected - unedited).abs().amax((1, 2, 3))
    assert moved[[0, 3]].max() < 1e-10
    assert moved[[1, 2, 4, 5]].min() > 1e-4


def test_a_shift_has_to_be_finite():
    with pytest.raises(ValueError, match="finite"):
        StyleAlignedEdit(shared_score_shift=float("nan"))
