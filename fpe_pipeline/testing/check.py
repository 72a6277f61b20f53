"""Hold an edit in a whole run against written-out maps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..edits import Edit
from ..edits.base import prompts_of
from ..edits.registry import require_edit
from ..models.adapters.adapter import identity
from ..models.adapters.families import edited_model
from ..models.roles import BatchRoles
from ..models.sites import attention_sites
from ..models.steps import Step
from ..session.session import editing, session_of
from .models import guests_of, tiny_unet, words_tokenizer
from .shadow import Compared, Equation, Shadow

__all__ = ["TOLERANCE", "Difference", "EditCheck", "check_edit"]

#: What float64 may round differently in one layer, as a share of its largest value: some thousand roundings.
TOLERANCE = 1e-12
_GUIDANCE = 3.0


@dataclass(frozen=True)
class Difference:
    """Where a run and written-out maps differ most.

    Args:
        error: the largest difference of a value, as a share of the largest value that there should be.
        what: the layer's path; or the features of a module, or the latents.
        step: from 0.
        row: of the batch.
        product: what the row should be there.
    """

    error: float
    what: str
    step: int
    row: int
    product: str

    def __str__(self) -> str:
        return f"{self.error:.3g} at step {self.step} in {self.what}: row {self.row} should be {self.product}"


@dataclass(frozen=True)
class EditCheck:
    """What a check found.

    Args:
        edit: its name.
        worst: the largest difference.
        compared: layers, features and latents that were compared, over all steps.
        edited: of them, those that the edit changes.
        layers: the layers that it changes, each with its largest difference.
    """

    edit: str
    worst: Difference
    compared: int
    edited: int
    layers: dict[str, float]

    def __str__(self) -> str:
        return (
            f"{self.edit}: {self.edited} of {self.compared} outputs are edited; written-out maps differ by at most "
            f"{self.worst}"
        )


@torch.no_grad()
def check_edit(
    edit: Edit,
    pipe: Any = None,
    *,
    tokenizer: Any = None,
    expected: Equation | None = None,
    targets: int | None = None,
    steps: int = 10,
    size: tuple[int, int] | None = None,
    guided: bool = True,
    backend: str = "auto",
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> EditCheck:
    """Run an edit in a session, and compare every layer at every step with maps that are written out, in float64.

    Both get the same inputs, so that a difference is that layer's own. Compared are all attention layers, those that
    the edit leaves alone among them, injected features, and the latents of edits that blend them. What is written out
    is what the edit's products say, asked anew at every step and layer: a wrong kernel is found, and so is a ``phase``
    that calls two different steps equal. Whether the products are what the method's paper says, no products can tell:
    that is what ``expected`` is for.

    Args:
        edit: any.
        pipe: a pipeline, or a UNet, of which a copy in float64 is run; default: :func:`tiny_unet`.
        tokenizer: the one that an edit of words was made with; default: the pipeline's, or :func:`words_tokenizer`.
        expected: the edit as an equation of one's own in place of its products: a function of site, step, roles and
            :class:`DenseLayer` that gives the attention [H, N, E] of the rows that are edited.
        targets: prompts beside the source; default: those that the edit is written for, or one.
        steps: of the run.
        size: (height, width) of the latents.
        guided: whether the batch holds an unconditional half.
        backend: of ``shared_attention``.
        tolerance: as a share of the largest value of what is compared.
        seed: of latents and texts.

    Returns:
        What was compared, and the largest difference: ``print(check_edit(edit))``.

    Raises:
        AssertionError: a difference above ``tolerance``; the message says at which step, in which layer and row.
        ValueError: the edit did nothing in the run, so that nothing was checked.
    """
    require_edit(edit)
    unet, own_tokenizer = _copied(pipe, seed)
    prompts = 1 + (targets or max(1, len(prompts_of(edit)) - 1))
    height, width = size or ((8, 12) if pipe is None else (16, 24))
    halves = 2 if guided else 1
    roles = BatchRoles.from_batch(halves * prompts, classifier_free_guidance=guided)
    sites = [site.at(height, width) for site in attention_sites(unet)]
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, unet.config.in_channels, height, width, generator=random, dtype=torch.float64)
    latents = latents.to(unet.device).expand(prompts, -1, -1, -1)
    guests = guests_of(unet, halves * prompts, (tokenizer or own_tokenizer).model_max_length, random)
    shadow = Shadow(unet, edit, sites, roles, expected)
    name, against = type(edit).__name__, "written-out maps" if expected is None else "the equation that is expected"
    try:
        with shadow.beside(editing(unet, edit, classifier_free_guidance=guided, backend=backend)) as session:
            for index in range(steps):
                session.step(index, steps)
                shadow.at(Step(index, steps))
                prediction = unet(torch.cat([latents] * halves), 950 - 900 * index // steps, **guests).sample
                before = _next(latents, prediction, guided, steps)
                latents = session.after_step(before)
                shadow.after(before, latents)
    except FloatingPointError:  # a session refuses what is not finite; where it comes from has been seen before
        _judged(name, shadow.compared, tolerance, against)
        raise
    return _judged(name, shadow.compared, tolerance, against)


def _copied(pipe: Any, seed: int) -> tuple[Any, Any]:
    """A UNet in float64 that is nobody else's, and the tokenizer of its pipeline."""
    if pipe is None:
        return tiny_unet(seed=seed), words_tokenizer()
    given, unet = edited_model(pipe)
    if session_of(pipe) is not None:
        raise ValueError("the UNet is in an editing session: leave it first, the check begins one of its own")
    unet = copy.deepcopy(identity(unet)).double().eval().requires_grad_(False)
    return unet, getattr(given, "tokenizer", None) or words_tokenizer()


def _next(latents: torch.Tensor, prediction: torch.Tensor, guided: bool, steps: int) -> torch.Tensor:
    """The next latents of a sampler that takes a share of the guided prediction off."""
    if guided:
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + _GUIDANCE * (conditional - unconditional)
    out = latents.clone()  # an inpainting UNet's further channels stay
    out[:, : prediction.shape[1]] -= prediction / steps
    return out


def _judged(name: str, compared: Sequence[Compared], tolerance: float, against: str) -> EditCheck:
    edited = [one for one in compared if one.edited]
    if not edited:
        raise ValueError(
            f"{name} did nothing in the {compared[-1].step.total} steps of the check, so that nothing was checked: "
            "pass steps= that its window holds, or a pipe with layers that it selects"
        )
    worst = max(compared, key=lambda one: one.error)
    layers: dict[str, float] = {}
    for one in edited:
        layers[one.what] = max(one.error, layers.get(one.what, 0.0))
    said = Difference(worst.error, worst.what, worst.step.index, worst.row, worst.said)
    check = EditCheck(name, said, len(compared), len(edited), layers)
    wrong = [one for one in compared if not one.error <= tolerance]
    if wrong:
        first = wrong[0]
        raise AssertionError(
            f"{name} differs from {against} by {said} (shares of the largest value; {tolerance:g} is allowed). "
            f"{len(wrong)} of {len(compared)} outputs differ, the first at step {first.step.index} in {first.what}"
        )
    return check
