"""The other ways to compute the same thing: PyTorch's fused attention and the packages around it.

Each serves the edit as a careful user of it would: rows that share a map are one call on `expand`ed queries
and keys (nothing is copied), or one call with their values side by side where the package takes values wider
than keys. Rows that do not share are another call; or queries and keys of all rows are gathered for one call
of the whole batch. Results are not concatenated, since a user could avoid that too.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .inputs import Inputs
from .providers import Answer, Call, DenseOriginal, Missing, Ours, Provider, groups, per_row, with_backward

# query, key [B, H, N, D], value [B, H, N, E] -> [B, H, N, E]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def shared_by_calls(
    attend: Attend, inputs: Inputs, query: Tensor, key: Tensor, value: Tensor, concat: bool, beside: bool = False
) -> Answer:
    """The case's product through a function that knows nothing of shared maps.

    With `beside`, captured columns stand beside the values of the rows that share the first row's map.
    """
    answer: Answer = []
    captured = None
    for group in groups(inputs.case.map_index):
        q, k, v = query[group.maps], key[group.maps], value[group.rows]
        if group.shared == 1:
            answer += per_row(attend(q, k, v))
        elif concat:
            values = v.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)  # [1, H, N, R·E]
            width = values.shape[-1]
            if beside and group.rows.start == 0:
                values = torch.cat([values, inputs.capture], dim=-1)
            wide = attend(q, k, values)
            answer += wide[0, ..., :width].unflatten(-1, (group.shared, -1)).unbind(-2)
            captured = wide[0, ..., width:] if values.shape[-1] > width else captured
        else:
            answer += per_row(attend(q.expand(group.shared, -1, -1, -1), k.expand(group.shared, -1, -1, -1), v))
    if captured is not None:
        answer.append(captured)
    elif inputs.case.op == "capture":
        columns = inputs.capture.shape[-1]
        # The fused calls want values as wide as keys: a row more, padded with columns of zeros.
        padded = F.pad(inputs.capture, (0, inputs.case.head_dim - columns)) if not concat else inputs.capture
        answer.append(attend(query[:1], key[:1], padded)[0, ..., :columns])
    return answer


@dataclass(frozen=True)
class Fused:
    """A fused attention function. `load` returns it, or raises `Missing`."""

    name: str
    load: Callable[[Inputs], Attend]
    concat: bool = False
    gathered: bool = False
    context: Callable[[], AbstractContextManager] = nullcontext

    def prepare(self, inputs: Inputs) -> Call:
        attend = self.load(inputs)
        if self.concat and not any(group.shared > 1 for group in groups(inputs.case.map_index)):
            raise Missing("no rows share a map, so there is nothing to put side by side")
        if self.gathered and len(groups(inputs.case.map_index)) == 1:
            raise Missing("one call serves all rows without a copy of their queries and keys")
        if self.gathered and inputs.case.op == "capture":
            raise Missing("captured columns belong to one row, not to all of a gathered batch")
        if self.concat and inputs.case.op == "capture":
            try:
                return self._probed(inputs, attend, beside=True)
            except Missing:
                pass  # so wide values are not taken: the columns get a call of their own
        return self._probed(inputs, attend)

    def _probed(self, inputs: Inputs, attend: Attend, beside: bool = False) -> Call:
        rows = torch.tensor(inputs.case.map_index, device=inputs.query.device)

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Answer:
            if self.gathered:
                return per_row(attend(query.index_select(0, rows), key.index_select(0, rows), value))
            return shared_by_calls(attend, inputs, query, key, value, self.concat, beside)

        if inputs.case.op == "backward":
            call = with_backward(inputs, forward)
        elif inputs.case.op == "adjoint":
            call = _adjoint_by_gradient(inputs, forward)
        else:
            call = lambda: forward(inputs.query, inputs.key, inputs.value)  # noqa: E731

        def guarded() -> Answer:
            with self.context():
                return call()

        probe(guarded)
        return guarded


def probe(call: Call) -> None:
    """Turn "no kernel takes this" into a reason; other errors are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
            said = [str(w.message).split(" (Triggered")[0].strip() for w in caught]
            reasons = [s for s in said if s and not s.endswith("because:")] or [str(error).split("\n")[0]]
            raise Missing("; ".join(dict.fromkeys(reasons))) from error


def _adjoint_by_gradient(inputs: Inputs, forward: Callable[[Tensor, Tensor, Tensor], Answer]) -> Call:
    """`A.T @ w` is the gradient of `A @ v` for v: the only way to it through a fused function."""
    value = inputs.value.detach().requires_grad_()

    def call() -> Answer:
        out = forward(inputs.query, inputs.key, value)
        (grad,) = torch.autograd.grad(out, value, list(inputs.weight.unbind(0)))
        return per_row(grad)

    return call


@dataclass(frozen=True)
class Unedited:
    """What the layer costs without an edit: every row has queries and keys of its own, PyTorch chooses the kernel.

    The rows' queries and keys are equal here but lie in memory of their own, so the answer is the same and the
    work is that of an unedited layer.
    """

    name: str = "unedited"
    context: Callable[[], AbstractContextManager] = nullcontext

    def prepare(self, inputs: Inputs) -> Call:
        if inputs.case.op not in ("apply", "backward"):
            raise Missing(f"an unedited layer has no {inputs.case.op}")
        if self.context is not nullcontext and inputs.query.device.type != "cuda":
            raise Missing("PyTorch has one fused kernel for a CPU, which it chooses by itself", everywhere=True)
        index = list(inputs.case.map_index)
        query, key = inputs.query[index], inputs.key[index]
        if inputs.case.op == "apply":

            def attend() -> Answer:
                with self.context():
                    return per_row(F.scaled_dot_product_attention(query, key, inputs.value))

            probe(attend)
            return attend
        if self.context is not nullcontext:
            raise Missing("gradients are compared with the kernel that PyTorch chooses")
        query, key, value = (t.detach().requires_grad_() for t in (query, key, inputs.value))

        def call() -> Answer:
            out = F.scaled_dot_product_attention(query, key, value)
            dq, dk, dv = torch.autograd.grad(out, (query, key, value), inputs.weight)
            # A map's gradient is the sum over the rows that share it, by slices: an index would wait for the device.
            summed = [_sums(grad, index) for grad in (dq, dk)]
            return [*summed[0], *summed[1], *per_row(dv)]

        return call


def _sums(grad: Tensor, index: Sequence[int]) -> Iterator[Tensor]:
    """Of each map in turn, the sum of its rows, which stand side by side."""
    for group in groups(index):
        yield from per_row(grad[group.rows]) if group.shared == 1 else [grad[group.rows].sum(0)]


def _sdpa(inputs: Inputs) -> Attend:
    return F.scaled_dot_product_attention


def _flex(inputs: Inputs) -> Attend:
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise Missing(f"this PyTorch has no FlexAttention ({error})", everywhere=True) from error
    # Past its limit of recompilations torch.compile runs the function as it is written, which materialises
    # the map; a fresh start for each case keeps it from getting there.
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def _package(name: str, inputs: Inputs) -> ModuleType:
    """The module, or `Missing`: not installed comes before not for this device."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed", everywhere=True) from error
    if inputs.query.device.type != "cuda":
        raise Missing(f"{name} needs a CUDA device", everywhere=True)
    return module


def _token_major(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """An attention function over [B, N, H, D] as one over [B, H, N, D]; transposed views, no copies."""
    return lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _flash2(inputs: Inputs) -> Attend:
    return _token_major(_package("flash_attn", inputs).flash_attn_func)


def _flash3(inputs: Inputs) -> Attend:
    function = _package("flash_attn_interface", inputs).flash_attn_func
    # Older versions return the log-sum-exp beside the output.
    return _token_major(lambda q, k, v: out[0] if isinstance(out := function(q, k, v), tuple) else out)


def _xformers(inputs: Inputs) -> Attend:
    return _token_major(_package("xformers.ops", inputs).memory_efficient_attention)


def _sage(inputs: Inputs) -> Attend:
    function = _package("sageattention", inputs).sageattn
    return lambda q, k, v: function(q, k, v, tensor_layout="HND")


def rivals() -> Iterator[Provider]:
    yield Unedited()
    for name in ("flash", "cudnn"):
        yield Unedited(f"unedited-{name}", partial(sdpa_kernel, SDPA_BACKENDS[name]))
    yield Fused("sdpa", _sdpa)
    for name, backend in SDPA_BACKENDS.items():
        context = lambda backend=backend: sdpa_kernel(backend)  # noqa: E731
        yield Fused(f"sdpa-{name}", _sdpa, context=context)
        yield Fused(f"sdpa-{name}-concat", _sdpa, concat=True, context=context)
        if name in ("flash", "cudnn"):
            yield Fused(f"sdpa-{name}-gathered", _sdpa, gathered=True, context=context)
    yield Fused("flex", _flex)
    yield Fused("flex-concat", _flex, concat=True)
    yield Fused("flash-attn-2", _flash2)
    yield Fused("flash-attn-3", _flash3)
    yield Fused("xformers", _xformers)
    yield Fused("sageattention", _sage)


def all_providers() -> dict[str, Provider]:
    """Every provider by name: ours first, then the original, then PyTorch's, then other packages'."""
    ours: list[Provider] = [Ours(backend) for backend in ("triton", "torch", "reference")]
    return {provider.name: provider for provider in [*ours, DenseOriginal(), *rivals()]}
