r"""One optimiser step over flat vectors: gradient, clipping, AdamW, moving average, and its CUDA graph.

With the gradient :math:`g`, its clipped form and moments :math:`m, v`,

.. math::
    g &\leftarrow g \min(1, c / \lVert g \rVert) \\
    m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
    w &\leftarrow (1 - \eta \lambda) w
        - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \varepsilon} \\
    a &\leftarrow \alpha a + (1 - \alpha) w

(Loshchilov and Hutter, "Decoupled Weight Decay Regularization"). Every symbol is one vector over all parameters, so
that the step beside the network is a dozen kernels. The rates :math:`\eta`, :math:`\alpha` and the bias corrections are
read from the device: a graph of the step stays right when they change.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["OptimiserStep", "Weights", "compute", "entering"]

log = logging.getLogger(__name__)

_BETAS, _EPSILON = (0.9, 0.99), 1e-8
_KEPT = ("values", "first", "second", "average")  # in a checkpoint
_WARM = 3  # steps before a capture: libraries choose and load their kernels in them


def entering(network: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Pictures or latents in the precision of a network and, on a CUDA device, in its layout."""
    layout = torch.channels_last if given.is_cuda else torch.contiguous_format
    return given.to(next(network.parameters()).dtype, memory_format=layout)


def compute(network: nn.Module) -> torch.autocast:
    """The precision that a loss computes in: bfloat16, by autocast where the network's weights are float32."""
    parameter = next(network.parameters())
    return torch.autocast(parameter.device.type, torch.bfloat16, enabled=parameter.dtype == torch.float32)


class Weights:
    """A module's parameters as one vector, with moments and moving average of the same length.

    Args:
        module: what is trained, float32.
        half: whether the network that computes is a bfloat16 copy of the module, with convolutions in channels-last
            layout, rather than the module itself; by default on CUDA devices.

    Args:
        module: holds the float32 parameters, which are views of ``values``.
        network: what losses call.
        values, first, second, average, gradient: float32 ``[p]``.
    """

    def __init__(self, module: nn.Module, *, half: bool | None = None) -> None:
        self.module, device = module, next(module.parameters()).device
        self._half = device.type == "cuda" if half is None else half
        count = sum(parameter.numel() for parameter in module.parameters())
        self.values = torch.empty(count, device=device)
        for parameter, view in self._views(module, self.values):
            view.copy_(parameter.detach())
            parameter.data = view
        self.first, self.second = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.average, self.gradient = self.values.clone(), torch.zeros_like(self.values)
        # Nothing here drops units, so training mode would only cost the copies of dropouts that drop nothing.
        self.network = _lowered(module) if self._half else module.eval()
        self._computed = self.values.to(torch.bfloat16) if self._half else self.values
        self._received = torch.zeros_like(self._computed) if self._half else self.gradient
        for parameter, view in self._views(self.network, self._computed):
            parameter.data = view
        self._parts = [view for _, view in self._views(self.network, self._received)]

    def _views(
        self, module: nn.Module, vector: torch.Tensor, channels_last: bool | None = None
    ) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each parameter with its part of a vector, in its shape; the vector has this one's layout unless said."""
        start, last = 0, self._half if channels_last is None else channels_last
        for parameter in module.parameters():
            part, shape = vector[start : start + parameter.numel()], parameter.shape
            if last and len(shape) == 4:
                yield parameter, part.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
            else:
                yield parameter, part.view(shape)
            start += parameter.numel()

    def clear(self) -> None:
        """Forget the network's gradients: the backward pass hands on its own tensors rather than add to any."""
        for parameter in self.network.parameters():
            parameter.grad = None

    def receive(self) -> None:
        """Gather the network's gradients, in float32; parameters without one keep zero."""
        grads = [(part, p.grad) for part, p in zip(self._parts, self.network.parameters(), strict=True)]
        parts, found = zip(*((part, grad) for part, grad in grads if grad is not None), strict=True)
        torch._foreach_copy_(list(parts), list(found))
        if self._half:
            self.gradient.copy_(self._received)

    def publish(self) -> None:
        """Have the network compute with the present values."""
        if self._half:
            self._computed.copy_(self.values)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the vectors, and the layout that convolutions have in them."""
        vectors = {name: getattr(self, name).cpu() for name in _KEPT}
        return {**vectors, "channels_last": self._half}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, of whichever layout; raises ``ValueError`` where it is of another network."""
        # Files that do not say their layout were written where this one is used.
        layout = state.get("channels_last", self._half)
        for name in _KEPT:
            mine, theirs = getattr(self, name), state[name]
            if mine.shape != theirs.shape:
                raise ValueError(f"expected {mine.numel():,} parameters, got {theirs.numel():,}")
            for (_, part), (_, saved) in zip(
                self._views(self.module, mine), self._views(self.module, theirs, layout), strict=True
            ):
                part.copy_(saved)
        self.publish()

    def averaged(self) -> Any:
        """A float32 copy of the module with the averaged weights."""
        module = copy.deepcopy(self.module)
        for parameter, view in self._views(module, self.average):
            parameter.data = view.clone(memory_format=torch.contiguous_format)
        return module.eval()

    def finish(self) -> None:
        """Leave the averaged weights in the module, each parameter with memory of its own, and drop the gradients."""
        for parameter, view in self._views(self.module, self.average):
            parameter.data, parameter.grad = view.clone(memory_format=torch.contiguous_format), None


def _lowered(module: nn.Module) -> nn.Module:
    """A bfloat16 copy; by torch's own conversion, since models' own keep back what they advise against."""
    return nn.Module.to(copy.deepcopy(module), torch.bfloat16).eval()


class OptimiserStep:
    """Steps of one training.

    Args:
        weights: what is trained.
        loss: maps (network, *inputs) to a loss and figures.
        weight_decay, clip: AdamW's decay and the largest gradient norm.
    """

    def __init__(
        self,
        weights: Weights,
        loss: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]],
        weight_decay: float,
        clip: float,
    ) -> None:
        self._weights, self._loss, self._decay, self._clip = weights, loss, weight_decay, clip
        self._cuda = weights.values.is_cuda
        self._numbers = torch.zeros(4, device=weights.values.device)  # η, 1 / (1 - β₁ᵗ), 1 / (1 - β₂ᵗ), 1 - α
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._names: list[str] = []
        self._reported = torch.zeros(0)
        self._lost = torch.zeros((), device=weights.values.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm, self._capturable = 0, self._cuda
        self._stream = torch.cuda.Stream() if self._cuda else None

    @property
    def graphed(self) -> bool:
        """Whether steps run as a CUDA graph."""
        return self._graph is not None

    def figures(self) -> dict[str, float]:
        """What the loss reported at the last step; waits for it."""
        return dict(zip(self._names, self._reported.tolist(), strict=True))

    def lost(self) -> int:
        """How many steps up to the last, without one between them, had a gradient that is not finite; waits for it."""
        return int(self._lost.item())

    def __call__(self, step: int, inputs: tuple[torch.Tensor, ...], rate: float, decay: float) -> None:
        """Take step ``step`` (the first is 0) at a learning rate and with a decay of the moving average."""
        corrections = (1 / (1 - beta ** (step + 1)) for beta in _BETAS)
        self._numbers.copy_(torch.tensor([rate, *corrections, 1 - decay]), non_blocking=True)
        if not self._cuda:
            self._inputs = inputs
            self._compute()
            return
        if not self._inputs:
            self._inputs = tuple(value.clone() for value in inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        if self._capturable and self._graph is None and self._warm >= _WARM:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._aside()

    def _aside(self) -> None:
        """A step on a stream of its own, as a capture wants those before it."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._warm += 1

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._compute()
        except Exception as error:  # any library call may refuse; the step itself is known to work
            self._capturable = False
            torch.cuda.synchronize()
            log.warning("no CUDA graph of the step, it runs eagerly and slower: %s", str(error).splitlines()[0])
            return
        self._graph = graph

    def _compute(self) -> None:
        weights = self._weights
        weights.clear()
        value, figures = self._loss(weights.network, *self._inputs)
        value.backward()
        weights.receive()
        with torch.no_grad():
            self._update()
            figures = {"loss": value.detach(), **figures}
            self._names = list(figures)
            self._reported = torch.stack([figure.detach().float() for figure in figures.values()])

    def _update(self) -> None:
        weights, gradient = self._weights, self._weights.gradient
        rate, first, second, blend = self._numbers.unbind()
        norm = gradient.norm()
        self._lost.add_(1).mul_(~norm.isfinite())
        # A gradient that is not finite counts as none.
        gradient.nan_to_num_(0.0, 0.0, 0.0)
        gradient.mul_((self._clip / (norm + 1e-6)).nan_to_num(0.0).clamp(max=1.0))
        weights.first.lerp_(gradient, 1 - _BETAS[0])
        weights.second.lerp_(gradient.square_(), 1 - _BETAS[1])
        spread = (weights.second * second).sqrt_().add_(_EPSILON)
        weights.values.mul_(1 - rate * self._decay)
        weights.values.sub_((weights.first / spread).mul_(rate * first))
        weights.average.lerp_(weights.values, blend)
        weights.publish()
