"""What a check computes, as a value: from it follow the inputs, the exact answer, and the programs to compile ahead.

out_b = w_b ⊙ softmax(scale · Q_g K_gᵀ + bias_g) V_b, its log-sum-exp, its adjoint and its gradients
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fpe_kernels.backends.triton.launch import Launch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """Shapes, dtype and kinds of input of one check.

    `results` is "forward" (the product and its log-sum-exp), "replay" (the product, from a known log-sum-exp) or "all"
    (forward, adjoint, and the gradients of query, key and value). `choice` names a launch configuration as
    :class:`benchmarks.tune.Candidate` does; left out, the committed rules choose.
    """

    map_index: tuple[int, ...]
    queries: int
    keys: int
    head_dim: int
    dtype: str = "float16"
    heads: int = 3
    results: str = "forward"
    bias: tuple[bool, bool, bool, bool] | None = None
    row_weight: tuple[bool, bool, bool] | None = None
    choice: str = ""

    @property
    def name(self) -> str:
        rows = "".join(map(str, self.map_index))
        kinds = [f"{self.queries}x{self.keys}", f"{self.heads}x{self.head_dim}", f"maps {rows}", self.dtype]
        if self.bias:
            kinds.append("bias over " + "".join(axis for axis, varies in zip("ghnm", self.bias, strict=True) if varies))
        if self.row_weight:
            kinds.append("row weights")
        return f"{self.results}: " + ", ".join([*kinds, *([self.choice] if self.choice else [])])

    @property
    def maps(self) -> int:
        return max(self.map_index) + 1

    def chosen(self) -> Any:
        """Forward launches inside the block are made as `choice` says."""
        from ..candidates import Candidate

        return Candidate.parse(self.choice).installed() if self.choice else nullcontext()

    def launches(self, arch: str) -> list[Launch]:
        """What the `triton` backend launches, on tensors without storage, by the rules for `arch`."""
        from fpe_kernels.backends.protocol import Factors, Maps
        from fpe_kernels.backends.triton import adjoint, forward, gradients
        from fpe_kernels.ops import empty_heads, empty_logsumexp

        like = torch.empty(0, dtype=DTYPES[self.dtype], device="meta")
        rows, scale = len(self.map_index), self.head_dim**-0.5
        query, key, value, weight = (
            empty_heads(like, batch, self.heads, tokens, self.head_dim)
            for batch, tokens in (
                (self.maps, self.queries),
                (self.maps, self.keys),
                (rows, self.keys),
                (rows, self.queries),
            )
        )
        bias = row_weight = None
        if self.bias:
            score_axes = zip((self.maps, self.heads, self.queries, self.keys), self.bias, strict=True)
            bias = like.new_empty([n if varies else 1 for n, varies in score_axes])
        if self.row_weight:
            extents = (rows, self.heads, self.queries)
            row_weight = like.new_empty(
                [n if varies else 1 for n, varies in zip(extents, self.row_weight, strict=True)]
            )
        logsumexp = empty_logsumexp(query)
        with launches_of(arch) as made, self.chosen():
            known = self.results == "replay"
            maps = Maps(query, key, bias, self.map_index, scale)
            forward.apply(maps, value, torch.empty_like(weight), logsumexp, known, row_weight)
            if self.results == "all":
                adjoint.adjoint(maps, weight, empty_heads(weight, *value.shape), logsumexp)
                factors = Factors(weight, value, logsumexp, logsumexp)
                outputs = empty_heads(query, *query.shape), empty_heads(key, *key.shape)
                gradients.score_gradient(maps, factors, *outputs)
        return made


@contextmanager
def launches_of(arch: str) -> Iterator[list[Launch]]:
    """Inside the block the `triton` backend plans by the rules for `arch` and launches nothing: the list has it all."""
    from fpe_kernels.backends.triton import adjoint, configs, forward, gradients

    made: list[Launch] = []

    def collect(plan: Any, tensors: tuple, settings: tuple) -> None:
        made.extend(plan(tensors, settings))

    modules = (forward, adjoint, gradients)
    before = [module.launch_all for module in modules], configs.architecture
    configs.architecture = lambda device: arch  # type: ignore[assignment]
    for module in modules:
        module.launch_all = collect  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        configs.architecture = before[1]
        for module, launch_all in zip(modules, before[0], strict=True):
            module.launch_all = launch_all  # type: ignore[attr-defined]


def check(problem: Problem, device: str, backend: str = "triton") -> dict[str, float]:
    """Compute `problem` and hold it against float64.

    Returns:
        The largest error of any result, and the share of its budget that it takes.

    Raises:
        AssertionError: if a result passes its budget; which one is said.
    """
    from fpe_kernels import AttentionMap, shared_attention
    from fpe_kernels.testing import assert_matches, make_case
    from fpe_kernels.testing.budget import worst_error

    case = make_case(
        seed=problem.queries + problem.head_dim,
        maps=problem.maps,
        map_index=problem.map_index,
        heads=problem.heads,
        queries=problem.queries,
        keys=problem.keys,
        head_dim=problem.head_dim,
        dtype=DTYPES[problem.dtype],
        device=device,
        layout="heads_split",
        bias=problem.bias,
        masked=0.2 if problem.bias else 0.0,
        row_weight=problem.row_weight,
    )
    shared: dict[str, Any] = {"bias": case.bias, "backend": backend}
    found: dict[str, Tensor] = {}
    poison(device, case.weight.numel() * case.weight.element_size())
    with problem.chosen():
        if problem.results == "replay":
            # One map a row, so that the operator's own statistics are those of the whole batch.
            operator = AttentionMap(case.query, case.key, **shared)
            operator.logsumexp  # noqa: B018  known from here on
            found["out"] = operator @ case.value
        elif problem.results == "forward":
            found["out"] = shared_attention(
                case.query, case.key, case.value, case.map_index, weight=case.row_weight, **shared
            )
        else:
            leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
            out = shared_attention(leaves[0], leaves[1], leaves[2], case.map_index, **shared)
            gradients = torch.autograd.grad(out, leaves, case.weight)
            found |= {"out": out.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}
            _, found["logsumexp"] = torch.ops.fpe_kernels.apply(
                case.query, case.key, case.value, case.bias, list(case.map_index), case.factor, backend
            )
            found["adjoint"] = torch.ops.fpe_kernels.adjoint(
                case.query,
                case.key,
                case.weight,
                case.bias,
                found["logsumexp"],
                list(case.map_index),
                case.factor,
                backend,
            )
    assert_matches(case, **found)
    return {"error": max(worst_error(found[name], case.exact[name]) for name in found if name != "logsumexp")}


GRADIENTS = ("grad_query", "grad_key", "grad_value")


def poison(device: str, size: int) -> None:
    """Leave NaN where the next tensors of about this size will lie, so that an element that is not written shows."""
    blocks = [torch.full((max(16, size // 2),), float("nan"), dtype=torch.float16, device=device) for _ in range(6)]
    del blocks
