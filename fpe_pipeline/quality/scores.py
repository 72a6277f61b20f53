"""Drawing sources and edits, and comparing the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..models.judge import Judge, Verdict
from ..models.measure import noise
from .conditions import Condition
from .pairs import EditPair

__all__ = ["Score", "evaluate"]


@dataclass(frozen=True)
class Score:
    """One edit under one condition.

    Attributes:
        pair: index of the pair.
        kind: of the edit.
        condition: its name.
        source_object, source_colour, source_background: whether the source shows what its prompt says.
        edit_object, edit_colour, edit_background: whether the edit shows what the target prompt says.
        iou: intersection over union of the two silhouettes, from 0 to 1.
        outside_psnr: PSNR in dB between source and edit where neither has its object.
    """

    pair: int
    kind: str
    condition: str
    source_object: bool
    source_colour: bool
    source_background: bool
    edit_object: bool
    edit_colour: bool
    edit_background: bool
    iou: float
    outside_psnr: float

    def to_json(self) -> dict[str, Any]:
        """A dictionary with numbers for truth values and four decimals."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def evaluate(
    pipe: Any,
    judge: Judge,
    pairs: Sequence[EditPair],
    conditions: Sequence[Condition],
    *,
    steps: int = 25,
    guidance: float = 5.0,
    chunk: int = 8,
    first: int = 0,
    on_chunk: Callable[[list[Score]], None] | None = None,
) -> list[Score]:
    """Draw every pair under every condition and score it.

    Args:
        pipe: a ``StableDiffusionPipeline`` with the embedded model's vocabulary.
        judge: of the same scenes.
        pairs: the edits.
        conditions: the ways of making them; one without an edit costs one picture, each edit two.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        chunk: pairs that are drawn at a time.
        first: index of the first pair, where the list is the rest of a longer one.
        on_chunk: called with the scores of each chunk as soon as they exist.

    Returns:
        One score for each pair and condition, pair by pair.
    """
    scores: list[Score] = []
    for start in range(0, len(pairs), chunk):
        part = pairs[start : start + chunk]
        drawn = _draw(pipe, part, conditions, steps, guidance)
        sources = drawn.pop("")
        seen = judge.look(sources)
        fresh = []
        for condition in conditions:
            edits = drawn[condition.name]
            verdict = judge.look(edits)
            fresh += [
                _score(first + start + i, pair, condition.name, i, sources, seen, edits, verdict)
                for i, pair in enumerate(part)
            ]
        fresh.sort(key=lambda score: score.pair)
        scores += fresh
        if on_chunk is not None:
            on_chunk(fresh)
    return scores


def _draw(
    pipe: Any, pairs: Sequence[EditPair], conditions: Sequence[Condition], steps: int, guidance: float
) -> dict[str, np.ndarray]:
    """Pictures of all conditions, uint8 ``[pairs, h, w, 3]`` each, and of the sources under the empty name.

    The conditions without an edit ride along with the first edit: to the session, such a row is its own source.
    """
    free = [condition for condition in conditions if condition.edit is None]
    edited = [condition for condition in conditions if condition.edit is not None]
    rounds: list[tuple[Condition | None, list[Condition]]] = [(c, []) for c in edited] or [(None, [])]
    rounds[0][1].extend(free)
    size, count = pipe.unet.config.sample_size, len(pairs)
    channels = pipe.unet.config.in_channels
    shared = noise((channels, size, size), [pair.seed for pair in pairs])
    other = noise((channels, size, size), [pair.other_seed for pair in pairs])
    result: dict[str, np.ndarray] = {}
    for condition, riders in rounds:
        names = ["", *([condition.name] if condition else []), *(rider.name for rider in riders)]
        latents = [shared, *([shared] if condition else []), *(shared if r.shared_noise else other for r in riders)]
        prompts = [pair.source_prompt for pair in pairs] + (len(names) - 1) * [pair.target_prompt for pair in pairs]
        sources = list(range(len(prompts)))
        if condition is not None:
            sources[count : 2 * count] = range(count)
        images = _call(pipe, prompts, torch.cat(latents), sources, condition, steps, guidance)
        for place, name in enumerate(names):
            result.setdefault(name, images[place * count : (place + 1) * count])
    return result


def _call(
    pipe: Any,
    prompts: list[str],
    latents: torch.Tensor,
    source_of: list[int],
    condition: Condition | None,
    steps: int,
    guidance: float,
) -> np.ndarray:
    from ..session import editing

    edit = condition.edit if condition is not None else None
    with editing(pipe, edit, source_of=source_of) if edit is not None else nullcontext():
        images = pipe(
            prompts,
            latents=latents.to(pipe.device, pipe.unet.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        ).images
    return (images * 255).round().astype(np.uint8)


def _score(
    index: int,
    pair: EditPair,
    condition: str,
    i: int,
    sources: np.ndarray,
    seen: Verdict,
    edits: np.ndarray,
    verdict: Verdict,
) -> Score:
    either = seen.masks[i] | verdict.masks[i]
    both = seen.masks[i] & verdict.masks[i]
    error = (sources[i].astype(np.float64) - edits[i].astype(np.float64))[~either]
    mean_square = float(np.square(error).mean()) if error.size else 0.0
    return Score(
        pair=index,
        kind=pair.kind,
        condition=condition,
        source_object=seen.objects[i] == pair.source[0],
        source_colour=seen.colours[i] == pair.source[1],
        source_background=seen.backgrounds[i] == pair.source[2],
        edit_object=verdict.objects[i] == pair.target[0],
        edit_colour=verdict.colours[i] == pair.target[1],
        edit_background=verdict.backgrounds[i] == pair.target[2],
        # Two pictures without an object have nothing in common to keep.
        iou=float(both.sum() / either.sum()) if either.any() else 0.0,
        # Eight-bit rounding alone leaves 59 dB; a cap keeps equal backgrounds from being infinite.
        outside_psnr=min(60.0, 10 * float(np.log10(255**2 / max(mean_square, 1e-9)))),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return round(value, 4) if isinstance(value, float) else value
