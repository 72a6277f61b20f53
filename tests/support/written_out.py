"""Maps of a UNet's layers, written out beside what its own processors compute."""

from contextlib import contextmanager


def _heads(attn, x):
    return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)


class _Writer:
    def __init__(self, inner, maps):
        self.inner, self.maps = inner, maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = _heads(attn, attn.to_q(hidden_states)), _heads(attn, attn.to_k(context))
        self.maps.append((query @ key.transpose(2, 3) * attn.scale).softmax(-1))
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


class _Dense:
    def __init__(self, path, attend):
        self.path, self.attend = path, attend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            _heads(attn, projected) for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        out = self.attend(self.path, query, key, value, attn.scale)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@contextmanager
def dense_attention(unet, attend):
    """Every layer's attention [B, H, N, E] is ``attend(path, query, key, value, scale)``, with maps written out."""
    before = dict(unet.attn_processors)
    unet.set_attn_processor({name: _Dense(name.removesuffix(".processor"), attend) for name in before})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def softmax_map(query, key, scale):
    """[B, H, N, M]."""
    return (query @ key.transpose(-1, -2) * scale).softmax(-1)
