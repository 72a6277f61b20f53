"""Maps of a UNet's layers, written out beside what its own processors compute."""

from contextlib import contextmanager


class _Writer:
    def __init__(self, inner, maps):
        self.inner, self.maps = inner, maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x):
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        scores = heads(attn.to_q(hidden_states)) @ heads(attn.to_k(context)).transpose(2, 3) * attn.scale
        self.maps.append(scores.softmax(-1))
        return self.inner(attn, hidden_states, encoder_hidden_states=encoder_hidden_states)


@contextmanager
def written_out_maps(pipe):
    """By layer path in the order of execution, the maps [B, H, N, M] of each step of the calls in the block."""
    before, maps = dict(pipe.unet.attn_processors), {}
    around = {name: _Writer(inner, []) for name, inner in before.items()}
    pipe.unet.set_attn_processor(dict(around))
    try:
        yield maps
    finally:
        pipe.unet.set_attn_processor(before)
        order = {"down": 0, "mid": 1, "up": 2}
        for name in sorted(around, key=lambda name: order[name.split("_")[0]]):
            maps[name.removesuffix(".processor")] = around[name].maps
