"""Models whose image tokens are turned by the length of captions: what of an edit they cannot serve, before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..edits import Edit
from ..edits.joint_products import JointProduct, MixedRows
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step

__all__ = ["check_captions", "check_turned"]


def check_captions(
    parts: Iterable[tuple[Edit, Sequence[Site]]],
    step: Step,
    roles: BatchRoles,
    lengths: Sequence[int],
    mixes: bool = True,
) -> None:
    """Refuse, at the first call of a run, what an edit would ask at any of its steps of captions of other lengths.

    Args:
        parts: of the edit, each with its sites.
        step: of the call, of which the schedule's length is taken.
        roles: of the call's rows.
        lengths: of each row's caption, in tokens.
        mixes: whether a mixing may lead from one length to another: what a caption has more of is padding then, that
            nobody attends to.

    Raises:
        ValueError: image tokens of two rows mixed, or a map over one row's text applied to another's, where the
            captions of the two differ in length.
    """
    if len(set(lengths)) == 1:
        return
    for edit, sites in parts:
        for site in (site for site in sites if site.kind == "joint"):
            for phase in edit.phases(step.total):
                then = Step(phase.start, step.total)
                for given in edit.products(site, then, roles).values() if edit.active(then) else ():
                    check_turned(given if isinstance(given, Sequence) else (given,), lengths, mixes)
            break  # the layers of a step are asked the same


def check_turned(terms: Iterable[object], lengths: Sequence[int], mixes: bool = True) -> None:
    """Raise ValueError for a term that captions of these lengths cannot serve."""
    for term in terms:
        if not isinstance(term, JointProduct):
            continue
        keys, values = term.key.text, term.value.text
        if keys is not None and values is not None and lengths[keys] != lengths[values]:
            if term.mixing is not None and not mixes:
                raise ValueError(
                    f"words of a caption of {lengths[keys]} tokens stand for those of one of {lengths[values]}, which "
                    "this model fills up with padding that it attends to: write prompts of about one length"
                )
            if term.mixing is None:
                raise ValueError(
                    f"a map over the {lengths[keys]} tokens of one row's caption is applied to the {lengths[values]} "
                    "of another's: write prompts of as many tokens, or use an edit of image tokens (FreePromptEdit "
                    'with scope="image") or of words (PromptToPromptEdit)'
                )
        for rows in (term.query.image, term.key.image):
            if isinstance(rows, MixedRows) and lengths[rows.kept] != lengths[rows.other]:
                raise ValueError(
                    "a mask takes image tokens of two rows whose captions differ in length, by which this model turns "
                    "them: write prompts of one length, or leave the mask out"
                )
