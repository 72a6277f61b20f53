"""The error budget: how far from float64 a result may be."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..backends.grouping import rows_by_map
from .cases import Case, score_magnitude


def rounding_band(dtype: torch.dtype, magnitude: float, scores: float) -> float:
    """What one rounding of each kind may cost a result whose terms add up to ``magnitude``.

    Operands, probabilities and outputs are rounded to ``dtype``; scores, whose terms add up to ``scores``, to the dtype
    of the statistics, and an error of a score is a relative error of a probability.
    """
    statistics = validation.accumulator_dtype(dtype)
    relative = torch.finfo(dtype).eps + torch.finfo(statistics).eps * (1.0 + scores)
    return relative * magnitude + torch.finfo(dtype).smallest_normal


def worst_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual − exact|, infinite where a value is NaN or an infinity stands on one side only."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} where {tuple(exact.shape)} was expected")
    actual, exact = actual.detach().to(torch.float64), exact.to(torch.float64)
    if actual.numel() == 0:
        return 0.0
    error = torch.where(actual == exact, 0.0, (actual - exact).abs())
    return float(error.nan_to_num(nan=float("inf")).max())


def error_budget(
    plain: Tensor, exact: Tensor, dtype: torch.dtype, magnitude: float | None = None, scores: float = 0.0
) -> float:
    """The error that a result of ``dtype`` may have: 2 × that of plain PyTorch, plus one rounding band.

    Args:
        plain: the result of plain PyTorch at ``dtype``.
        exact: the result in float64.
        dtype: of the inputs.
        magnitude: sum of the absolute values of the terms of an element; None takes the largest |exact|.
        scores: the same for the scores that the result depends on.
    """
    if magnitude is None:
        finite = exact[exact.isfinite()]
        magnitude = float(finite.abs().max()) if finite.numel() else 0.0
    band = rounding_band(dtype, magnitude, scores)
    # At float64 plain PyTorch is the oracle itself, rounding and all: its error is unknown, and counts as one band.
    error = band if dtype == torch.float64 else worst_error(plain, exact)
    # Half precision overflows in plain PyTorch where a fused kernel must not: such an error allows nothing.
    return 2.0 * (error if error < float("inf") else 0.0) + band


def assert_within_budget(
    actual: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    magnitude: float | None = None,
    scores: float = 0.0,
    name: str = "result",
) -> None:
    """Raise AssertionError if ``actual`` is farther from ``exact`` than :func:`error_budget` allows."""
    error, budget = worst_error(actual, exact), error_budget(plain, exact, dtype, magnitude, scores)
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3e} against float64 passes the budget of {budget:.3e} ({dtype})")


def assert_matches(case: Case, **actual: Tensor) -> None:
    """Check results of ``case``, named as in :data:`RESULTS`, against the budget; maps that no row names are left out.

    >>> from fpe_kernels.testing import make_case, results_of
    >>> case = make_case(seed=1)
    >>> assert_matches(case, out=results_of(case)["out"])
    """
    groups = [group for group, rows in enumerate(rows_by_map(case.map_index, case.query.shape[0])) if rows]
    scores = score_magnitude(case)
    for name, tensor in actual.items():
        exact, plain = case.exact[name], case.plain[name]
        if name == "logsumexp":
            # Nothing computes the statistics of a map that no row names.
            tensor, exact, plain = tensor[groups], exact[groups], plain[groups]
            dtype = validation.accumulator_dtype(case.query.dtype)
        else:
            dtype = case.query.dtype
        assert_within_budget(tensor, plain, exact, dtype, case.magnitude[name], scores, name)
