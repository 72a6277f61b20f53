"""Layers whose rows have one kind of tokens, written out densely: every map of every row, and rules that use them."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from fpe_pipeline.prompts.alignment import align_replace, tokenize

#: Of layers, by what their paths end with in most families: self- and cross-attention.
KINDS = ("attn1", "attn2")


class DenseRows:
    """A processor that writes every map out.

    Args:
        rule: ``rule(row, rows, maps, values)`` gives a row's output, or None for its own; ``maps(queries, keys)`` is
            the softmax of one row's queries and another's keys [H, N, M].
        across: whether queries and keys are normed over all heads at once, or each head by itself.
        turn: of queries or keys [rows, N, H, D] and the layer's tables, as the family's rotary embedding has them.
    """

    def __init__(self, rule, across=False, turn=None):
        self.rule, self.across, self.turn = rule, across, turn

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        is_own = encoder_hidden_states is None
        tokens = hidden_states if is_own else encoder_hidden_states
        picture, tokens = self.split(attn, tokens)
        query, key, value = (
            F.linear(given, layer.weight, layer.bias)
            for layer, given in ((attn.to_q, hidden_states), (attn.to_k, tokens), (attn.to_v, tokens))
        )
        query, key = self.normed(attn, query, attn.norm_q), self.normed(attn, key, attn.norm_k)
        if image_rotary_emb is not None:
            query = self.turn(query, image_rotary_emb)
            key = self.turn(key, image_rotary_emb) if is_own else key
        query, key, value = (part.transpose(1, 2) for part in (query, key, value.unflatten(-1, (attn.heads, -1))))
        rows = hidden_states.shape[0]
        bias = None if attention_mask is None else attention_mask.reshape(rows, 1, 1, -1)

        def map_of(queries, keys):
            scores = query[queries] @ key[keys].mT / query.shape[-1] ** 0.5
            return (scores if bias is None else scores + bias[keys]).softmax(-1)

        out = []
        for row in range(rows):
            given = self.rule(row, rows, map_of, value)
            out.append(map_of(row, row) @ value[row] if given is None else given)
        total = torch.stack(out)
        if picture is not None:
            total = total + self.of_picture(attn, query, picture)
        return F.linear(total.transpose(1, 2).flatten(2), attn.to_out[0].weight, attn.to_out[0].bias)

    def split(self, attn, tokens):
        return None, tokens

    def normed(self, attn, part, norm):
        if norm is None:
            return part.unflatten(-1, (attn.heads, -1))
        return norm(part).unflatten(-1, (attn.heads, -1)) if self.across else norm(part.unflatten(-1, (attn.heads, -1)))

    def of_picture(self, attn, query, picture):
        raise NotImplementedError


@contextmanager
def dense_rows(models, make, rules, steps, step_of, names=KINDS, within=""):
    """Layers by their kind, "attn1" of image tokens and "attn2" of text, whose rows follow a rule at some steps.

    Args:
        models: the transformers of a pipeline.
        make: a processor from a rule.
        rules: by kind of layer.
        steps: those in which the rules hold, or for each kind of layer its own.
        step_of: the step of the call that is about to be made.
        names: what the paths of the two kinds end with.
        within: what they begin with.
    """
    state, restore = {"step": -1, "calls": 0, "model": None}, []

    def follow(kind):
        wanted = steps[kind] if isinstance(steps, dict) else steps

        def rule(*given):
            return rules[kind](*given) if kind in rules and state["step"] in wanted else None

        return rule

    def note(module, *_):
        state.update(step=step_of(), calls=state["calls"] + 1, model=module)

    for model in models:
        for name, module in model.named_modules():
            kind = next((kind for kind, end in zip(KINDS, names, strict=True) if f".{name}".endswith(f".{end}")), None)
            if kind is not None and name.startswith(within):
                restore.append((module.set_processor, module.processor))
                module.set_processor(make(follow(kind)))
        restore.append((lambda hook: hook.remove(), model.register_forward_pre_hook(note)))
    try:
        yield state
    finally:
        for undo, what in restore:
            undo(what)


def of_source(row, rows, map_of, value):
    """Free-Prompt-Editing in a call of rows of one half, the source's first."""
    return map_of(0, 0) @ value[row] if row else None


def memory_of_source(row, rows, map_of, value):
    """MasaCtrl in such a call."""
    return map_of(row, 0) @ value[0] if row else None


#: What is not Free-Prompt-Editing in the first two steps: whether the other half follows, rules by kind, and steps.
OTHER_RULES = {
    "the unconditional call too": (True, {"attn1": of_source}, (0, 1)),
    "a step off": (False, {"attn1": of_source}, (1, 2)),
    "keys and values": (False, {"attn1": memory_of_source}, (0, 1)),
    "the text's layers": (False, {"attn2": of_source}, (0, 1)),
}


def farthest(one, other):
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


def halves(row, rows):
    """The first row of a row's half, in a batch of [unconditional, conditional]."""
    return row // (rows // 2) * (rows // 2)


def source_maps(row, rows, map_of, value):
    """Free-Prompt-Editing in the conditional half of a doubled batch."""
    source = rows // 2
    return map_of(source, source) @ value[row] if row > source else None


def source_memory(row, rows, map_of, value):
    """MasaCtrl in both halves of a doubled batch."""
    source = halves(row, rows)
    return map_of(row, source) @ value[source] if row > source else None


def source_columns(prompts, tokenizer, lengths: int | Iterable[int], doubled=True):
    """Prompt-to-Prompt with replaced words, for texts of so many tokens, or of several parts of so many."""
    lengths = (lengths,) if isinstance(lengths, int) else lengths
    mappers = [
        torch.block_diag(
            *(align_replace(tokenize(prompts[0], tokenizer, n), tokenize(prompt, tokenizer, n)).mapper for n in lengths)
        )
        for prompt in prompts
    ]

    def rule(row, rows, map_of, value):
        source = rows // 2 if doubled else 0
        return map_of(source, source) @ mappers[row - source] @ value[row] if row > source else None

    return rule


_OF_TORCH = torch.Tensor.float, torch.Tensor.to


@contextmanager
def wide():
    """Where diffusers narrows to float32 on the way, what is in float64 stays so: rules can be told to 1e-8.

    Whole numbers become float64 too, for the products of places with frequencies that some versions make of them, and
    so do the frequencies [rows, pairs, 1], which some versions narrow by `to`.
    """
    narrow, to = torch.Tensor.float, torch.Tensor.to

    def kept(self, *given, **options):
        if self.dtype is torch.float64:
            return self
        return narrow(self, *given, **options) if self.is_floating_point() else self.double()

    def moved(self, *given, **options):
        are_frequencies = self.ndim == 3 and self.shape[-1] == 1 and self.is_floating_point()
        if are_frequencies and options.keys() == {"dtype", "device"} and options["dtype"] is torch.float32:
            options["dtype"] = torch.float64
        return to(self, *given, **options)

    torch.Tensor.float, torch.Tensor.to = kept, moved
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = narrow, to


@contextmanager
def narrow():
    """As torch has it, also inside of `wide`: for what is computed in float32, where some versions' products of places
    with frequencies are of one dtype."""
    before = torch.Tensor.float, torch.Tensor.to
    torch.Tensor.float, torch.Tensor.to = _OF_TORCH
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = before
