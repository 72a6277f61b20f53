"""Ways to compute one step of a transformer with joint attention: unedited, ours, dense, gathered by hand, and stored.

The rivals are written here as their users write them: processors on every layer, the batch halved by position, the
source's image queries and keys copied over the targets'; or, as editors of inverted pictures do, a call for the source
that keeps two tensors of every layer, and one for the targets that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .joint_models import JointCase

__all__ = ["EDITORS", "Attention", "attention_inputs", "stored_bytes"]

STEPS = 50
Attention = tuple[Tensor, Tensor, Tensor]
Inputs = dict[str, Any]
Step = Callable[[Inputs], Tensor]
Product = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _called(model: Any) -> Step:
    def step(inputs: Inputs) -> Tensor:
        out: Tensor = model(**inputs, return_dict=False)[0]
        return out

    return step


@contextmanager
def _unedited(model: Any, case: JointCase) -> Iterator[Step]:
    yield _called(model)


@contextmanager
def _ours(model: Any, case: JointCase) -> Iterator[Step]:
    from fpe_pipeline import FreePromptEdit, editing

    call = _called(model)
    with editing(model, FreePromptEdit(1.0), **_layout(case)) as session:

        def step(inputs: Inputs) -> Tensor:
            session.step(0, STEPS)
            return call(inputs)

        yield step


def _layout(case: JointCase) -> dict[str, Any]:
    return {"classifier_free_guidance": case.family == "sd3"}


@contextmanager
def _gathered(model: Any, case: JointCase) -> Iterator[Step]:
    with _computing(model, case, _sdpa_gathered):
        yield _called(model)


@contextmanager
def _dense(model: Any, case: JointCase) -> Iterator[Step]:
    with _computing(model, case, _dense_gathered):
        yield _called(model)


@contextmanager
def _stored(model: Any, case: JointCase) -> Iterator[Step]:
    """Two calls: the source's keeps its image queries and keys of every layer, the targets' reads them.

    A whole edit keeps them of every step.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    call = _called(model)
    # Once, and where the model is: for an index from the host's memory every step would wait for the device.
    every = torch.arange(case.rows, device=model.device).reshape(-1, 1 + case.targets)  # a half of the batch a line
    sources, targets = every[:, 0], every[:, 1:].flatten()

    def keep(query: Tensor, key: Tensor, value: Tensor, case: JointCase) -> Tensor:
        image = _images(query, case)
        kept.append((query[-1:, :, image].clone(), key[-1:, :, image].clone()))
        return F.scaled_dot_product_attention(query, key, value)

    def read(query: Tensor, key: Tensor, value: Tensor, case: JointCase) -> Tensor:
        image = _images(query, case)
        for tensor, stored in zip((query, key), kept.pop(0), strict=True):
            tensor[-case.targets :, :, image] = stored
        return F.scaled_dot_product_attention(query, key, value)

    def step(inputs: Inputs) -> Tensor:
        with _computing(model, case, keep):
            made = call(_of_rows(inputs, sources, case))
        with _computing(model, case, read):
            edited = call(_of_rows(inputs, targets, case))
        out = torch.empty(case.rows, *made.shape[1:], dtype=made.dtype, device=made.device)
        out[sources], out[targets] = made, edited
        return out

    yield step


def _of_rows(inputs: Inputs, rows: Tensor, case: JointCase) -> Inputs:
    """Arguments of some rows; places of tokens are all rows'."""
    return {name: value if name.endswith("_ids") else value[rows] for name, value in inputs.items()}


EDITORS = {"unedited": _unedited, "fpe": _ours, "sdpa-gathered": _gathered, "dense-original": _dense, "stored": _stored}


def _images(query: Tensor, case: JointCase) -> slice:
    """The places of the latents' tokens, which FLUX.1 puts after the text and before those of references."""
    first = 0 if case.family == "sd3" else case.texts
    return slice(first, first + case.side**2)


def _exchange(query: Tensor, key: Tensor, case: JointCase) -> None:
    """The source's image queries and keys over its targets', in the conditional rows."""
    first, image = len(query) - (1 + case.targets), _images(query, case)
    for tensor in (query, key):
        tensor[first + 1 :, :, image] = tensor[first, :, image]


def _sdpa_gathered(query: Tensor, key: Tensor, value: Tensor, case: JointCase) -> Tensor:
    _exchange(query, key, case)
    return F.scaled_dot_product_attention(query, key, value)


def _dense_gathered(query: Tensor, key: Tensor, value: Tensor, case: JointCase) -> Tensor:
    _exchange(query, key, case)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


@contextmanager
def attention_inputs(model: Any, case: JointCase, kept: list[Attention]) -> Iterator[None]:
    """Keep queries, keys and values of every layer of the calls in a block."""

    def keep(query: Tensor, key: Tensor, value: Tensor, case: JointCase) -> Tensor:
        kept.append((query, key, value))
        return F.scaled_dot_product_attention(query, key, value)

    with _computing(model, case, keep):
        yield


def stored_bytes(attention: Iterable[Attention], case: JointCase) -> int:
    """What `stored` keeps of one step whose attention is given: of every layer the source's image queries and keys."""
    return sum(part[-1:, :, _images(part, case)].nbytes for layer in attention for part in layer[:2])


@contextmanager
def _computing(model: Any, case: JointCase, product: Any) -> Iterator[None]:
    """Processors around a product of queries, keys and values [B, H, N, D] in every layer."""
    kind = _SD3Processor if case.family == "sd3" else _FluxProcessor
    before = model.attn_processors
    model.set_attn_processor(kind(case, product))
    try:
        yield
    finally:
        model.set_attn_processor(before)


def _heads(attn: Any, states: Tensor, norm: Any) -> Tensor:
    split = states.unflatten(-1, (attn.heads, -1))
    return split if norm is None else norm(split)


class _SD3Processor:
    def __init__(self, case: JointCase, product: Any) -> None:
        self._case, self._product = case, product

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        count = hidden_states.shape[1]
        image = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        text = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None)
        joint = [
            torch.cat([_heads(attn, i(hidden_states), a), _heads(attn, t(encoder_hidden_states), b)], dim=1)
            for (i, a), (t, b) in zip(image, text, strict=True)
        ]
        out = self._product(*(part.transpose(1, 2) for part in joint), self._case).transpose(1, 2).flatten(2)
        seen, read = attn.to_out[0](out[:, :count]), out[:, count:]
        return seen, read if attn.context_pre_only else attn.to_add_out(read)


class _FluxProcessor:
    def __init__(self, case: JointCase, product: Any) -> None:
        self._case, self._product = case, product

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        from diffusers.models.embeddings import apply_rotary_emb

        named = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        joint = [_heads(attn, project(hidden_states), norm) for project, norm in named]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None)
            texts = [_heads(attn, project(encoder_hidden_states), norm) for project, norm in added]
            joint = [torch.cat(parts, dim=1) for parts in zip(texts, joint, strict=True)]
        query, key = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in joint[:2])
        turned = (part.transpose(1, 2) for part in (query, key, joint[2]))
        out = self._product(*turned, self._case).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        count = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, count:]), attn.to_add_out(out[:, :count])
