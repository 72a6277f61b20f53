"""Whole UNet steps and whole edits: what an edit costs where people run it.

The bar is the unedited step. An edit that computes fewer maps and fewer projections than the unedited step
has no reason to take longer, or to hold more memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .editors import EDITORS
from .measure import interleaved
from .memory import peak_bytes
from .rows import Row
from .run import Bench, first_line, free_bytes
from .unets import CONFIGS, GRAPH, UNetCase, build, twin, unet_inputs

log = logging.getLogger("benchmarks")

IN_A_ROW = 3  # steps on a GPU that are timed at once

# Roundings of a residual stream that some tens of layers add to, in units of the last place.
ROUNDINGS = 8


def edit_plan(device: str, *, quick: bool = False) -> list[UNetCase]:
    """The cases for a device, the most telling first."""
    if device.startswith("cuda"):
        steps = [UNetCase("sd15", 512), UNetCase("sd15", 1024), UNetCase("sdxl", 1024)]
        if quick:
            return steps
        steps += [UNetCase("sd15", pixels, selection="all") for pixels in (1024, 512)]
        steps += [UNetCase("sd15", 512, targets=4)]
        steps += [UNetCase("sd15", pixels) for pixels in (768, 1536, 2048)]
        steps += [UNetCase("sdxl", pixels) for pixels in (1536, 2048)]
        return [*steps, UNetCase("sd21", 768), UNetCase("sd15", 512, steps=50), UNetCase("sdxl", 1024, steps=50)]
    if quick:
        return [UNetCase("tiny", 512, selection="all"), UNetCase("tiny", 512, targets=3, selection="all")]
    return [
        UNetCase("narrow", 512),
        UNetCase("narrow", 512, selection="all"),
        UNetCase("narrow", 512, targets=4),
        UNetCase("slimxl", 1024),
        *(UNetCase("tiny", pixels, selection="all") for pixels in (256, 512, 768)),
        UNetCase("tiny", 512, targets=3, selection="all"),
        UNetCase("tiny", 256, selection="all", steps=50),
    ]


def in_a_row(device: str, case: UNetCase) -> int:
    """How many calls are timed at once: on a GPU steps as a run makes them, one after the other without a wait."""
    return IN_A_ROW if device.startswith("cuda") and case.steps == 1 else 1


def run_edits(
    bench: Bench,
    cases: Sequence[UNetCase],
    names: Iterable[str] = tuple(EDITORS),
    report: Callable[[list[Row]], None] = lambda rows: None,
    time_left: Callable[[], float] = lambda: float("inf"),
) -> list[Row]:
    """All rows of some cases; stops where no time is left, and says at which case."""
    rows: list[Row] = []
    names = list(names)
    for number, case in enumerate(cases):
        if time_left() <= 0:
            log.warning("no time left: %d of %d edits measured", number, len(cases))
            break
        measured = run_edit(bench, case, names)
        report(measured)
        rows += measured
    return rows


@dataclass(frozen=True)
class Sampler:
    """A call without arguments: one UNet step, or a whole guided DDIM run."""

    unet: Any
    case: UNetCase
    set_step: Callable[[int], None]
    device: str
    inputs: tuple[Any, dict[str, Any]]  # of the UNet

    @classmethod
    def of(cls, unet: Any, case: UNetCase, set_step: Callable[[int], None], device: str, dtype: torch.dtype) -> Sampler:
        """On inputs of this dtype, which are made once: a copy to a GPU waits for what runs there."""
        return cls(unet, case, set_step, device, unet_inputs(case, unet, device, dtype))

    def __call__(self) -> Tensor:
        return self.first_step() if self.case.steps == 1 else self._sample()

    def first_step(self) -> Tensor:
        arguments, keywords = self.inputs
        self.set_step(0)
        return self.unet(*arguments, **keywords, return_dict=False)[0]

    def _sample(self, guidance: float = 7.5) -> Tensor:
        from diffusers import DDIMScheduler

        (latents, *_), keywords = self.inputs
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        )
        scheduler.set_timesteps(self.case.steps, device=self.device)
        half = latents[: self.case.rows // 2]
        for step, timestep in enumerate(scheduler.timesteps):
            self.set_step(step)
            noise = self.unet(torch.cat([half, half]), timestep, **keywords, return_dict=False)[0]
            empty, prompted = noise.chunk(2)
            half = scheduler.step(empty + guidance * (prompted - empty), timestep, half).prev_sample
        return half


def run_edit(bench: Bench, case: UNetCase, names: Iterable[str] = tuple(EDITORS)) -> list[Row]:
    """Rows of one case, its editors timed in the same rounds by the wall clock."""
    shared = {"suite": "edits", "case": case.name}
    unet = build(case.model, bench.device, bench.dtype)
    judge = judge_of(bench, case, unet)
    rows: list[Row] = []
    ready: dict[str, tuple[Callable[[], Tensor], dict[str, Any]]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            about = {**shared, "provider": name}
            needed = _dense_need(case, bench.dtype.itemsize) if name == "dense-original" else 0
            if needed > free_bytes(bench.device):
                reason = f"needs about {needed / 2**30:.0f} GiB, more than is free"
                rows.append(bench.row(**about, status="missing", reason=reason))
                continue
            try:
                module = twin(unet)
                set_step = stack.enter_context(EDITORS[name](module, case))
                call = Sampler.of(module, case, set_step, bench.device, bench.dtype)
                error, budget = judge(name, call.first_step())
                if case.steps > 1 and not bool(call().isfinite().all()):
                    error = float("inf")
            except Exception as problem:
                log.debug("%s failed in %s", name, case.name, exc_info=True)
                rows.append(bench.row(**about, status="failed", reason=first_line(problem)))
                continue
            if not error <= budget:
                reason = f"relative error {error:.2e} exceeds its budget of {budget:.2e}"
                rows.append(bench.row(**about, status="wrong", reason=reason, error=error, budget=budget))
                continue
            peak = peak_bytes(call, bench.device) / 1e6
            ready[name] = call, {**about, "error": error, "budget": budget, "peak_mb": peak}
            if bench.device.startswith("cuda") and case.steps == 1 and name != "dense-original":
                captured = _captured(bench, call, judge, name)
                if isinstance(captured, Row):
                    rows.append(replace(captured, case=case.name))
                else:
                    ready[f"{name}{GRAPH}"] = captured[0], {**captured[1], **shared, "budget": budget, "peak_mb": peak}
        calls, row = {n: c for n, (c, _) in ready.items()}, in_a_row(bench.device, case)
        samples = interleaved(calls, bench.device, bench.effort, wall=True, in_a_row=row)
    rows += [bench.row(**about, status="ok", samples_ms=samples[name]) for name, (_, about) in ready.items()]
    return rows


def _captured(bench: Bench, sampler: Sampler, judge: Callable, name: str) -> Row | tuple[Callable, dict[str, Any]]:
    """The step of a sampler as a CUDA graph, without Python's time: its replay, or a row that says why not."""
    about = {"suite": "edits", "case": sampler.case.name, "provider": f"{name}{GRAPH}"}
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            sampler.first_step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sampler.first_step()
        graph.replay()
        torch.cuda.synchronize()
        error, budget = judge(name, out)
    except Exception as problem:
        log.debug("%s cannot be captured", name, exc_info=True)
        return bench.row(**about, status="failed", reason=first_line(problem))
    if not error <= budget:
        reason = f"relative error {error:.2e} exceeds its budget of {budget:.2e}"
        return bench.row(**about, status="wrong", reason=reason, error=error, budget=budget)

    def replay(kept: Tensor = out) -> Tensor:
        graph.replay()
        return kept

    return replay, {"provider": about["provider"], "error": error}


def judge_of(bench: Bench, case: UNetCase, unet: Any) -> Callable[[str, Tensor], tuple[float, float]]:
    """Holds an editor's output against the same step at higher precision, computed by fused attention.

    The budget is twice the error of gathered SDPA at the working precision, and some roundings. A whole edit
    is judged by its first step, and has to stay finite: an error grows over fifty steps of a random network without
    meaning anything.
    """
    one = UNetCase(case.model, case.pixels, case.targets, case.selection)
    precise = torch.float64 if bench.dtype == torch.float32 else torch.float32
    wide = torch.nn.Module.to(build(case.model, bench.device, bench.dtype), precise)
    truth: dict[str, Tensor] = {}
    with torch.no_grad():
        for kind, editor in (("unedited", "unedited"), ("edited", "sdpa-gathered")):
            with EDITORS[editor](wide, one) as set_step:
                truth[kind] = Sampler.of(wide, one, set_step, bench.device, precise)().cpu()
        yardstick = twin(unet)
        with EDITORS["sdpa-gathered"](yardstick, one) as set_step:
            allowed = _error(Sampler.of(yardstick, one, set_step, bench.device, bench.dtype)(), truth["edited"])
    budget = 2 * allowed + ROUNDINGS * torch.finfo(bench.dtype).eps

    def judge(name: str, output: Tensor) -> tuple[float, float]:
        return _error(output, truth["unedited" if name == "unedited" else "edited"]), budget

    return judge


def _error(output: Tensor, expected: Tensor) -> float:
    return float((output.cpu().double() - expected.double()).abs().max() / expected.abs().max())


def _dense_need(case: UNetCase, itemsize: int) -> int:
    """Bytes of the largest layer's scores, their softmax and one copy."""
    config = CONFIGS[case.model]
    heads = config["attention_head_dim"]
    level = 1 if config.get("addition_embed_type") == "text_time" else 0
    finest = heads[level] if isinstance(heads, tuple) else heads
    return 3 * case.rows * finest * (case.side >> level) ** 4 * itemsize
