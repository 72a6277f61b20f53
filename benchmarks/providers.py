"""Who is measured. A provider turns a case's inputs into a call without arguments that returns the answer.

Answers are lists of [H, N, E], one a batch row in the batch's order (for `backward`: dQ and dK of each map,
then dV of each row), so that every provider is judged by the same function.

A provider that cannot serve raises `Missing` with the reason, which becomes a row of its own: a table that
leaves a rival out without a word is not to be believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .cases import Case
from .inputs import Inputs

Answer = list[Tensor]
Call = Callable[[], Answer]


class Missing(Exception):
    """The provider cannot run this case here; the message says why.

    `everywhere` says that no other case on this machine would fare better, so that one row is enough.
    """

    def __init__(self, reason: str, *, everywhere: bool = False) -> None:
        super().__init__(reason)
        self.everywhere = everywhere


class Provider(Protocol):
    @property
    def name(self) -> str:
        """The name that rows carry."""
        ...

    def prepare(self, inputs: Inputs) -> Call:
        """Do what is done once (import, compile, choose) and return the call that is timed."""
        ...


def per_row(out: Tensor) -> Answer:
    """[B, H, N, E] as one [H, N, E] a row: views, no copies."""
    return list(out.unbind(0))


@dataclass(frozen=True)
class Group:
    """Batch rows that one fused call can serve without copying a query: either all on one map, or each on its own."""

    maps: slice
    rows: slice

    @property
    def shared(self) -> int:
        """How many rows share the map; 1 where every row has its own."""
        return (self.rows.stop - self.rows.start) // (self.maps.stop - self.maps.start)


def groups(map_index: Sequence[int]) -> list[Group]:
    """Split a batch into the fewest calls in which queries need to be expanded only, never gathered.

    >>> groups([0, 1, 2, 2])
    [Group(maps=slice(0, 2, None), rows=slice(0, 2, None)), Group(maps=slice(2, 3, None), rows=slice(2, 4, None))]
    """
    runs: list[list[int]] = []  # [map, first row, end row]
    for row, index in enumerate(map_index):
        if runs and runs[-1][0] == index:
            runs[-1][2] = row + 1
        else:
            runs.append([index, row, row + 1])
    found: list[Group] = []
    for index, first, end in runs:
        last = found[-1] if found else None
        if end - first == 1 and last is not None and last.shared == 1 and last.maps.stop == index:
            found[-1] = Group(slice(last.maps.start, index + 1), slice(last.rows.start, end))
        else:
            found.append(Group(slice(index, index + 1), slice(first, end)))
    return found


@dataclass(frozen=True)
class Ours:
    """`fpe_kernels` with one of its backends."""

    backend: str

    @property
    def name(self) -> str:
        return f"fpe-{self.backend}"

    def prepare(self, inputs: Inputs) -> Call:
        from fpe_kernels import AttentionMap, shared_attention
        from fpe_kernels.dispatch import unsupported_reasons

        case, backend = inputs.case, self.backend
        if backend == "triton" and inputs.query.device.type != "cuda":
            raise Missing("needs a CUDA device (the interpreter is for tests; its times mean nothing)", everywhere=True)
        reasons = unsupported_reasons(backend, inputs.query.device, inputs.query.dtype, case.head_dim)
        if reasons:
            raise Missing("; ".join(reasons))

        if case.op == "apply":
            return lambda: per_row(
                shared_attention(inputs.query, inputs.key, inputs.value, case.map_index, backend=backend)
            )
        if case.op == "backward":
            return with_backward(
                inputs, lambda q, k, v: per_row(shared_attention(q, k, v, case.map_index, backend=backend))
            )
        if case.layout != "pair":
            raise Missing(f"{case.op} is measured on the shared rows alone (layout 'pair')")

        known = AttentionMap(inputs.query, inputs.key, backend=backend)
        if case.op == "adjoint":
            known.logsumexp  # noqa: B018 - evaluated once, as a recorded map's is
            # One product with all rows' columns side by side, which is how the operator is meant to be used.
            return lambda: _split_columns(known.T @ _side_by_side(inputs.weight), case.batch)
        values = tuple(inputs.value.split(1))
        if case.op == "replay":
            known.logsumexp  # noqa: B018
            return lambda: [out[0] for out in known @ values]
        if case.op == "capture":
            values = (*values, inputs.capture)
            return lambda: [out[0] for out in AttentionMap(inputs.query, inputs.key, backend=backend) @ values]
        raise Missing(f"no such operation: {case.op}")


def _side_by_side(rows: Tensor) -> Tensor:
    """[B, H, N, E] as [1, H, N, B·E]."""
    return rows.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)


def _split_columns(columns: Tensor, batch: int) -> Answer:
    """[1, H, M, B·E] as B times [H, M, E]."""
    return list(columns[0].unflatten(-1, (batch, -1)).unbind(-2))


def with_backward(inputs: Inputs, forward: Callable[[Tensor, Tensor, Tensor], Answer]) -> Call:
    """The call that runs `forward` and then its gradients, for the fixed output gradient `inputs.weight`."""
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))

    def call() -> Answer:
        out = forward(*leaves)
        grads = torch.autograd.grad(out, leaves, list(inputs.weight.unbind(0)))
        return [row for grad in grads for row in grad.unbind(0)]

    return call


@dataclass(frozen=True)
class DenseOriginal:
    """What the editors' public implementations do: every row's map is computed, then overwritten.

    Scores and softmax for all rows by baddbmm and softmax over [B·H, N, N], the source's map copied over the
    targets', one bmm: the processor and the controller of the original, without the parts that do not compute.
    """

    name: str = "dense-original"

    def prepare(self, inputs: Inputs) -> Call:
        case = inputs.case
        if case.op == "backward":
            return with_backward(inputs, lambda q, k, v: self._attend(inputs, q, k, v))
        if case.op == "adjoint":
            return lambda: per_row(self._maps(inputs, inputs.query, inputs.key).mT @ inputs.weight)
        return lambda: self._attend(inputs, inputs.query, inputs.key, inputs.value)

    def _maps(self, inputs: Inputs, query: Tensor, key: Tensor) -> Tensor:
        case = inputs.case
        index = list(case.map_index)
        # The original has projected every row: its own queries, which the overwritten maps then make useless.
        query = query[index].flatten(0, 1)
        key = key[index].flatten(0, 1)
        scores = torch.baddbmm(
            query.new_empty(query.shape[0], query.shape[1], key.shape[1]), query, key.mT, beta=0, alpha=inputs.scale
        )
        maps = scores.softmax(dim=-1).unflatten(0, (case.batch, case.heads))
        for group in groups(case.map_index):
            if group.shared > 1:
                # Autograd's version counter refuses an overwritten map, so gradients take a new tensor.
                replaced = maps[group.rows.start].expand(group.shared - 1, -1, -1, -1)
                later = slice(group.rows.start + 1, group.rows.stop)
                if maps.requires_grad:
                    maps = torch.cat([maps[: later.start], replaced, maps[later.stop :]])
                else:
                    maps[later] = replaced
        return maps

    def _attend(self, inputs: Inputs, query: Tensor, key: Tensor, value: Tensor) -> Answer:
        maps = self._maps(inputs, query, key)
        out = torch.bmm(maps.flatten(0, 1), value.flatten(0, 1)).unflatten(0, maps.shape[:2])
        answer = per_row(out)
        if inputs.case.op == "capture":
            answer.append(maps[0] @ inputs.capture[0])
        return answer


def first_answer(provider: Provider, inputs: Inputs) -> tuple[Call, Answer]:
    """The provider's call and its first answer, which also warms it up; `Missing` where it cannot serve."""
    call = provider.prepare(inputs)
    return call, call()


def case_label(case: Case) -> str:
    """A case in words, for tables."""
    rows = {"pair": f"1 source, {case.targets} target{'s' * (case.targets > 1)}"}
    rows["halves"] = f"two halves of {rows['pair']}"
    rows["guided"] = f"guided, {rows['pair']}"
    return f"{case.tokens} tokens, {case.heads} heads of {case.head_dim}, {rows[case.layout]}"
