"""Models whose text tokens look at text before them alone, and are computed once for all steps of a run."""

from __future__ import annotations

from collections.abc import Iterable

from ...edits.joint_products import JointProduct

__all__ = ["check_kept"]


def check_kept(terms: Iterable[tuple[int, object]]) -> None:
    """Raise ValueError where one of some rows' terms would make something else of the row's text tokens.

    Args:
        terms: each with its row.
    """
    for row, term in terms:
        if not isinstance(term, JointProduct) or not term.concerns("text"):
            continue
        if {term.query.text, term.key.text, term.value.text} != {row} or term.mixing is not None:
            raise ValueError(
                f"the edit changes what text tokens become, row {row} = {term.describe()}, and in this model they look "
                "at no image and are computed once for all steps, whose later ones read their keys and values: use an "
                'edit of image tokens or of words, such as FreePromptEdit(scope="image"), ConsistEdit or '
                "PromptToPromptEdit"
            )
