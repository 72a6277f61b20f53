"""Models whose image tokens are turned by the length of captions: from where, and what of an edit they cannot serve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ...edits import Edit
from ...edits.joint_products import AnyProduct, JointPlan, JointProduct
from ...models.roles import BatchRoles
from ...models.sites import Site
from ...models.steps import Step
from .instructions import Order

__all__ = ["check_captions", "check_turned", "lengths_asked", "origins_of", "products_of_a_run", "stands_of"]


def origins_of(order: Order, places: torch.Tensor) -> torch.Tensor | None:
    """What a layer's image tokens are turned by in common, for each row of the batch and each recorded one.

    Recorded tokens stand as if no text came before them, and those of a batch are told where they stand when they are
    recorded or stand beside others.

    Args:
        order: of the layer, in a model that is told its captions' lengths.
        places: of the rows' image tokens, complex [rows, tokens, D / 2].

    Returns:
        Complex [rows, D / 2], and behind them where images stand beside recorded texts (:func:`stands_of`); None where
        all stand in one place.
    """
    assert order.text_lengths is not None
    recorded = 0 if order.recorded is None else max(order.recorded.rows) + 1 - len(places)
    if len(set(order.text_lengths)) == 1 and not recorded and order.receive is None:
        return None
    origins = places[:, 0]
    known = () if order.recorded is None else [origin[None].to(origins) for origin in order.recorded.origins.values()]
    return torch.cat([origins, origins.new_ones(recorded, origins.shape[1]), *known])


def stands_of(order: Order) -> dict[int, int]:
    """Of recorded rows whose text is known, which of :func:`origins_of` an image stands at that looks at the text."""
    if order.recorded is None:
        return {}
    first = max(order.recorded.rows) + 1
    return {row: first + index for index, row in enumerate(order.recorded.origins)}


def lengths_asked(order: Order, lengths: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """What an order needs of texts in a layer whose captions have these lengths.

    Returns:
        The lengths with those of recorded rows behind them, and by how many tokens the longest caption of the batch is
        shorter than a recorded one, or than the texts among which words were placed (of prompts that have left it).
    """
    assert isinstance(order.plan, JointPlan)
    longest = max(lengths)
    known = order.lengths(longest) or tuple(lengths)
    mixings = (term.mixing for term in order.plan.products if term.mixing is not None)
    words = (given.shape[0] for given in (*order.columns.values(), *mixings))
    return known, max((*known, *words)) - longest


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
        ValueError: a map over one row's text applied to another's, where the captions of the two differ in length; text
            tokens of a row that ask in the place of more of another's.
    """
    if len(set(lengths)) == 1:
        return
    for given in products_of_a_run(parts, step, roles):
        for row, terms in given.items():
            check_turned([(row, term) for term in terms], lengths, mixes)


def products_of_a_run(
    parts: Iterable[tuple[Edit, Sequence[Site]]], step: Step, roles: BatchRoles
) -> Iterator[dict[int, Sequence[AnyProduct]]]:
    """What parts of an edit ask of joint attention at any of a run's steps, as the terms of each row.

    Args:
        parts: of the edit, each with its sites.
        step: of a call, of which the schedule's length is taken.
        roles: of the call's rows.
    """
    for edit, sites in parts:
        for site in (site for site in sites if site.kind == "joint"):
            for phase in edit.phases(step.total):
                then = Step(phase.start, step.total)
                given = edit.products(site, then, roles) if edit.active(then) else {}
                yield {row: terms if isinstance(terms, Sequence) else (terms,) for row, terms in given.items()}
            break  # the layers of a step are asked the same


def check_turned(terms: Iterable[tuple[int, object]], lengths: Sequence[int], mixes: bool = True) -> None:
    """Raise ValueError for a row's term that captions of these lengths cannot serve."""
    for row, term in terms:
        if not isinstance(term, JointProduct):
            continue
        queries, keys, values = term.query.text, term.key.text, term.value.text
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
        if queries is not None and term.concerns("text") and lengths[queries] < lengths[row]:
            raise ValueError(
                f"the {lengths[queries]} tokens of one row's caption ask in the place of the {lengths[row]} of "
                "another's: write prompts of as many tokens, or let text tokens ask for themselves, as in "
                "JointProduct((s, t), …)"
            )
