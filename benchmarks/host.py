"""`python -m benchmarks.host`: the host's time of a call and of an edited layer, with the GPU taken away.

A GPU waits for the host wherever a layer is short, so what Python does before a launch is part of an edit's price. Here
kernels are compiled for a chip that need not be there (sm_90) and their launches do nothing, so that what is left is
the host's work, on any machine. Times are CPU time of this process, in rounds that all of a case's providers share: a
busy neighbour lengthens them, and all of them alike.

====================  ==================================================================================================
`call`                 `shared_attention` of a guided pair beside `torch.library` operators of the same arguments: one
                       that allocates its two outputs and does no more, and one that returns what was there before
`layer`                a self-attention layer of diffusers, edited by Free-Prompt-Editing and unedited
`step`                 a UNet of random weights and next to no work, with all of its self-attention layers edited, the
                       session's own work included, and unedited
====================  ==================================================================================================

Unedited layers call PyTorch's fused attention for CPUs on a few tokens, whose host time is about that of a GPU's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .rows import Environment, Row, read, replaced, write

CHIP = "sm_90"
HEADS, TOKENS, HEAD_DIM = 2, 16, 16
MAPS, INDEX = 3, (0, 1, 2, 2)
CASES = ("call", "layer", "step")
# What is unedited, or does nothing, and what is held against it.
PAIRS = {"call": ("empty-operator", "shared-attention"), "layer": ("unedited", "fpe"), "step": ("unedited", "fpe")}
_UNET = {
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "attention_head_dim": HEADS,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
_STEPS = 50

Call = Callable[[], object]


class _NoLaunch:
    """In the place of what launches a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class NoLaunches:
    """As much of a Triton driver as a call asks for."""

    launcher_cls = _NoLaunch

    def __init__(self) -> None:
        properties = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), (name, device), 0, 0, 1024),
            get_device_properties=lambda device: properties,
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(CHIP[3:]), 32)

    @classmethod
    def install(cls) -> None:
        """For the rest of this process, which must not have imported the kernels for the interpreter."""
        from triton.runtime import driver

        from fpe_kernels.backends.triton import backend
        from fpe_pipeline.session import finite_watch

        if backend.INTERPRETED:
            raise RuntimeError("kernels are interpreted here: start a process without TRITON_INTERPRET")
        driver.set_active(cls())  # type: ignore[arg-type]
        backend.unsupported_reasons = lambda *arguments: []  # type: ignore[assignment]
        # Nothing writes the outputs, so they hold whatever lay there: a session still looks, and goes on.
        look = finite_watch.is_finite
        finite_watch.is_finite = lambda tensor: look(tensor) or True


def heads_split(batch: int) -> Tensor:
    """[batch, heads, tokens, head dim] as a projection leaves it."""
    return torch.randn(batch, TOKENS, HEADS, HEAD_DIM).half().transpose(1, 2)


def empty_operators() -> tuple[Any, Any]:
    """Operators with the schema of `fpe_kernels::apply`: one that allocates its outputs, one that does not do that."""
    library = torch.library.Library("fpe_benchmarks", "DEF")
    kept = heads_split(len(INDEX)), torch.empty(MAPS, HEADS, TOKENS)

    def allocate(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        out = value.new_empty((len(INDEX), TOKENS, HEADS, HEAD_DIM)).transpose(1, 2)
        return out, query.new_empty((MAPS, HEADS, TOKENS), dtype=torch.float32)

    for name, run in (("allocate", allocate), ("nothing", lambda *arguments: kept)):
        library.define(
            f"{name}(Tensor query, Tensor key, Tensor value, Tensor? bias, int[] map_index, float scale, str backend,"
            " Tensor? row_weight=None) -> (Tensor, Tensor)"
        )
        library.impl(name, run, "CompositeExplicitAutograd")
    _KEPT.append(library)  # an operator goes with its library
    return torch.ops.fpe_benchmarks.allocate, torch.ops.fpe_benchmarks.nothing


_KEPT: list[Any] = []


@contextmanager
def providers(case: str) -> Iterator[tuple[dict[str, Call], int]]:
    """Calls by name, and how many edited layers one of them has."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if case == "call":
            yield _calls(), 1
            return
        yield stack.enter_context(_edits(case))


def _calls() -> dict[str, Call]:
    from fpe_kernels import shared_attention

    allocate, nothing = empty_operators()
    query, key, value = heads_split(MAPS), heads_split(MAPS), heads_split(len(INDEX))
    arguments = (query, key, value, None, list(INDEX), HEAD_DIM**-0.5, "triton", None)
    return {
        "empty-operator": lambda: allocate(*arguments),
        "idle-operator": lambda: nothing(*arguments),
        "shared-attention": lambda: shared_attention(query, key, value, INDEX, backend="triton"),
    }


@contextmanager
def _edits(case: str) -> Iterator[tuple[dict[str, Call], int]]:
    from diffusers import UNet2DConditionModel

    from fpe_pipeline import FreePromptEdit, editing

    torch.manual_seed(0)
    edited, unedited = (
        torch.nn.Module.to(UNet2DConditionModel(sample_size=4, **_UNET), torch.half).eval().requires_grad_(False)
        for _ in range(2)
    )
    latents, text = torch.randn(len(INDEX), 4, 4, 4).half(), torch.randn(len(INDEX), 7, 32).half()
    timestep, steps = torch.tensor(500), iter(range(sys.maxsize))
    edit = FreePromptEdit(1.0, levels=(0, 1))
    with editing(edited, edit, classifier_free_guidance=True, backend="triton") as session:

        def step() -> object:
            session.step(next(steps) % _STEPS, _STEPS)
            return edited(latents, timestep, text, return_dict=False)

        step()
        layers = len(session.report().layers)
        if case == "step":
            yield {"unedited": lambda: unedited(latents, timestep, text, return_dict=False), "fpe": step}, layers
            return
        hidden = torch.randn(len(INDEX), 4, 32).half()
        own, plain = (unet.mid_block.attentions[0].transformer_blocks[0].attn1 for unet in (edited, unedited))
        yield {"unedited": lambda: plain(hidden), "fpe": lambda: own(hidden)}, 1


def sampled(calls: Mapping[str, Call], rounds: int, repeats: int) -> dict[str, tuple[float, ...]]:
    """Milliseconds of this process's CPU time a call, one number a round, in rounds that all calls share."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    names = list(calls)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            call, start = calls[name], time.process_time_ns()
            for _ in range(repeats):
                call()
            samples[name].append((time.process_time_ns() - start) / repeats / 1e6)
    return {name: tuple(values) for name, values in samples.items()}


def measure(case: str, rounds: int) -> tuple[dict[str, tuple[float, ...]], int]:
    """Samples by provider, and the edited layers in each."""
    with providers(case) as (calls, layers):
        return sampled(calls, rounds, 2 if case == "step" else 50), layers


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n\n")[0])
    arguments.add_argument("--rounds", type=int, default=41)
    arguments.add_argument("--json", type=Path, help="folder to write the rows to, as cpu-host.json")
    options = arguments.parse_args(argv)
    torch.set_num_threads(1)
    NoLaunches.install()
    environment, rows = Environment.read("cpu"), []
    for case in CASES:
        samples, layers = measure(case, options.rounds)
        name = f"{case}/guided-1/{layers} layers" if case == "step" else f"{case}/guided-1"
        for provider, times in samples.items():
            about = {"suite": "host", "case": name, "provider": provider, "dtype": "float16", "status": "ok"}
            rows.append(Row.new(environment, **about, samples_ms=times))
            print(f"{name:28} {provider:18} {1e3 * statistics.median(times):9.1f} µs")
        base, ours = (samples[provider] for provider in PAIRS[case])
        ratio = statistics.median(ours) / statistics.median(base)
        extra = statistics.median((b - a) / layers * 1e3 for a, b in zip(base, ours, strict=True))
        print(f"{'':28} {PAIRS[case][1]} ÷ {PAIRS[case][0]}: {ratio:.2f}, {extra:+.1f} µs an edited layer")
    if options.json:
        path = options.json / "cpu-host.json"
        write(path, replaced(read(path) if path.exists() else [], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
