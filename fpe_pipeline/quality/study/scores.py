"""Drawing sources and edits, and comparing the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ...edits import Edit
from ...embedded.judge import Judge, Verdict
from ...embedded.measure import noise
from ...runs.settings import DEFAULTS
from ...sampling.flow_models import flow_model, is_flow_model
from ...session.session import editing
from ..similarity import iou, psnr
from ..store import plain
from .conditions import Condition, edit_by_condition
from .pairs import EditPair

__all__ = ["Score", "draw_pairs", "evaluate"]


@dataclass(frozen=True)
class Score:
    """One edit under one condition.

    Args:
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
        return {name: plain(value) for name, value in asdict(self).items()}


def evaluate(
    pipe: Any,
    judge: Judge,
    pairs: Sequence[EditPair],
    conditions: Sequence[Condition],
    *,
    steps: int = DEFAULTS.steps,
    guidance: float = DEFAULTS.guidance,
    chunk: int = 8,
    first: int = 0,
    backend: str = "auto",
    on_chunk: Callable[[list[Score]], None] | None = None,
    **options: Any,
) -> list[Score]:
    """Draw every pair under every condition and score it.

    Args:
        pipe: a ``StableDiffusionPipeline`` or ``StableDiffusion3Pipeline`` with the embedded model's vocabulary.
        judge: of the same scenes.
        pairs: the edits.
        conditions: the ways of making them; each costs one picture a pair, beside the source's.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        chunk: pairs that are drawn at a time.
        first: index of the first pair, where the list is the rest of a longer one.
        backend: of the edited attention.
        on_chunk: called with the scores of each chunk as soon as they exist.
        **options: of the pipeline's calls.

    Returns:
        One score for each pair and condition, pair by pair.
    """
    scores: list[Score] = []
    for start in range(0, len(pairs), chunk):
        part = pairs[start : start + chunk]
        drawn = draw_pairs(pipe, part, conditions, steps=steps, guidance=guidance, backend=backend, **options)
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


def draw_pairs(
    pipe: Any,
    pairs: Sequence[EditPair],
    conditions: Sequence[Condition],
    *,
    steps: int = 25,
    guidance: float = 5.0,
    backend: str = "auto",
    **options: Any,
) -> dict[str, np.ndarray]:
    """Pictures of all conditions, uint8 ``[pairs, h, w, 3]`` each, and of the sources under the empty name.

    Edits that do without the prompts are rows of one batch, in which each source is computed once.
    """
    together = [condition for condition in conditions if condition.method is None]
    options = {"num_inference_steps": steps, "guidance_scale": guidance, **options}
    blocks = _call(pipe, pairs, together, edit_by_condition((None, *(c.edit for c in together))), backend, options)
    drawn = dict(zip(("", *(condition.name for condition in together)), blocks, strict=True))
    for condition in conditions:
        if condition.method is not None:
            drawn[condition.name] = _call(pipe, pairs, [condition], condition, backend, options)[1]
    return drawn


def _call(
    pipe: Any,
    pairs: Sequence[EditPair],
    conditions: Sequence[Condition],
    edit: Edit | Condition | None,
    backend: str,
    options: Mapping[str, Any],
) -> list[np.ndarray]:
    """One call of the pipeline: the sources' pictures, then each condition's, uint8 ``[pairs, h, w, 3]``."""
    count, size, channels = len(pairs), _latent_side(pipe), pipe.vae.config.latent_channels
    shared = noise((channels, size, size), [pair.seed for pair in pairs])
    other = noise((channels, size, size), [pair.other_seed for pair in pairs])
    latents = torch.cat([shared, *(shared if condition.shared_noise else other for condition in conditions)])
    if is_flow_model(pipe):
        latents = flow_model(pipe).latents(latents)
    prompts = [pair.source_prompt for pair in pairs]
    prompts += len(conditions) * [pair.target_prompt for pair in pairs]
    edited = [False, *(condition.edit is not None or condition.method is not None for condition in conditions)]
    # To the session, what is drawn without an edit is its own source.
    source_of = [i if edits else place * count + i for place, edits in enumerate(edited) for i in range(count)]
    chosen = edit.edit_for(prompts, pipe.tokenizer, source_of, pipe) if isinstance(edit, Condition) else edit
    session: AbstractContextManager[Any] = nullcontext()
    if chosen is not None and any(edited):
        session = editing(pipe, chosen, source_of=source_of, backend=backend)
    with session:
        images = pipe(
            prompts,
            latents=latents.to(pipe.device, pipe.vae.dtype),
            output_type="np",
            **options,
        ).images
    if not np.isfinite(images).all():
        raise FloatingPointError("a picture holds values that are not finite: lower the guidance scale")
    pictures = (images * 255).round().astype(np.uint8)
    return [pictures[start : start + count] for start in range(0, len(pictures), count)]


def _latent_side(pipe: Any) -> int:
    """Width and height of the latents of a pipeline's own pictures."""
    unet = getattr(pipe, "unet", None)
    side: int = pipe.default_sample_size if unet is None else unet.config.sample_size
    return side


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
        iou=iou(seen.masks[i], verdict.masks[i]),
        outside_psnr=psnr(sources[i], edits[i], ~(seen.masks[i] | verdict.masks[i])),
    )
