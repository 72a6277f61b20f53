"""A case's tensors, what the right answer is, and the gate that a provider passes before it is timed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .cases import CAPTURE_COLUMNS, Case

# Query rows of a map that are compared with float64. All of them where there are no more than this; the
# rest are still checked for numbers that are not finite, which is what an unwritten element shows as.
CHECKED_ROWS = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Inputs:
    """query, key [G, H, N, D]: the distinct maps. value, weight [B, H, N, D]. capture [1, H, N, C]."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    capture: Tensor

    @classmethod
    def make(cls, case: Case, device: str, dtype: torch.dtype) -> Inputs:
        """Random inputs, the same for the same case, with the strides that a projection and its heads have."""
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

        def heads(rows: int, width: int) -> Tensor:
            flat = torch.randn(rows, case.tokens, case.heads * width, generator=generator)
            return flat.to(device, dtype).unflatten(-1, (case.heads, width)).transpose(1, 2)

        return cls(
            case,
            query=heads(case.maps, case.head_dim),
            key=heads(case.maps, case.head_dim),
            value=heads(case.batch, case.head_dim),
            weight=heads(case.batch, case.head_dim),
            capture=heads(1, CAPTURE_COLUMNS),
        )

    @property
    def scale(self) -> float:
        return self.case.head_dim**-0.5

    @cached_property
    def rows(self) -> Tensor:
        """Indices of the query rows that are compared: the first, the last, and a fixed draw between."""
        tokens, most = self.case.tokens, CHECKED_ROWS[self.query.device.type]
        if tokens <= most or self.case.op in ("adjoint", "backward"):
            return torch.arange(tokens)
        drawn = torch.randperm(tokens - 2, generator=torch.Generator().manual_seed(0))[: most - 2] + 1
        return torch.cat([torch.tensor([0, tokens - 1]), drawn]).sort().values

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.case, *(t.to(dtype) for t in (self.query, self.key, self.value, self.weight, self.capture)))

    @cached_property
    def expected(self) -> list[Tensor]:
        """The answer in float64, by the equations."""
        return plain(self.to(torch.float64), self.rows)

    @cached_property
    def yardstick(self) -> list[Tensor]:
        """Plain PyTorch at the inputs' own dtype: how wrong one may be without being wrong."""
        return plain(self, self.rows)


def plain(inputs: Inputs, rows: Tensor) -> list[Tensor]:
    """What `inputs.case` asks for, written as its equation, head by head so that float64 maps stay small."""
    case = inputs.case
    if case.op == "backward":
        return _plain_backward(inputs)
    parts: list[list[Tensor]] = []
    for head in range(case.heads):
        maps = [
            torch.softmax(inputs.scale * inputs.query[g, head, rows] @ inputs.key[g, head].mT, dim=-1)
            for g in range(case.maps)
        ]
        if case.op == "adjoint":
            out = [maps[g].mT @ inputs.weight[b, head] for b, g in enumerate(case.map_index)]
        else:
            out = [maps[g] @ inputs.value[b, head] for b, g in enumerate(case.map_index)]
        if case.op == "capture":
            out.append(maps[0] @ inputs.capture[0, head])
        parts.append(out)
    return [torch.stack(row) for row in zip(*parts, strict=True)]


def _plain_backward(inputs: Inputs) -> list[Tensor]:
    """[dQ | dK] of each map, then dV of each row; every entry [H, N, D]."""
    case = inputs.case
    grads: list[list[Tensor]] = []
    for head in range(case.heads):
        query, key, value = (t[:, head].detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
        maps = torch.softmax(inputs.scale * query @ key.mT, dim=-1)
        out = maps[list(case.map_index)] @ value
        of_tensors = torch.autograd.grad(out, (query, key, value), inputs.weight[:, head])
        grads.append([row for grad in of_tensors for row in grad])
    return [torch.stack(row) for row in zip(*grads, strict=True)]


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference over the largest expected entry, row by row of the batch; the worst row counts."""
    return max(float((g.double() - e).abs().max() / e.abs().max()) for g, e in zip(got, expected, strict=True))


@dataclass(frozen=True)
class Verdict:
    error: float
    budget: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


def judge(inputs: Inputs, outputs: Sequence[Tensor]) -> Verdict:
    """Hold a provider's outputs, each [H, N, E], against float64.

    The error may be twice that of plain PyTorch at the same dtype plus one rounding of the result; of float32,
    whose sums have no wider accumulator behind them, eight.
    """
    expected = inputs.expected
    roundings = 8 if inputs.query.dtype == torch.float32 else 1
    budget = 2 * relative_error(inputs.yardstick, expected) + roundings * torch.finfo(inputs.query.dtype).eps
    if len(outputs) != len(expected):
        return Verdict(float("inf"), budget, f"{len(outputs)} outputs where the case has {len(expected)}")
    if not all(bool(out.isfinite().all()) for out in outputs):
        return Verdict(float("inf"), budget, "the result has elements that are not finite")
    by_query = inputs.case.op not in ("adjoint", "backward")
    rows = inputs.rows.to(inputs.query.device)
    got = [out.detach()[:, rows] if by_query else out.detach() for out in outputs]
    wrong_shape = [i for i, (g, e) in enumerate(zip(got, expected, strict=True)) if g.shape != e.shape]
    if wrong_shape:
        i = wrong_shape[0]
        return Verdict(float("inf"), budget, f"output {i} is {list(got[i].shape)}, expected {list(expected[i].shape)}")
    error = relative_error(got, expected)
    if not error <= budget:
        return Verdict(error, budget, f"relative error {error:.2e} exceeds its budget of {budget:.2e}")
    return Verdict(error, budget)
