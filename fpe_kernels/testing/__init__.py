"""Inputs and the error budget that every test and every benchmark shares.

Inputs are seeded and come in the memory layouts that attention processors make. Results are judged by one rule, that of
FlashAttention's tests: the error of a kernel is at most twice the error of plain PyTorch at the same dtype, plus one
rounding band, both against float64. No test brings a tolerance of its own.
"""

from .budget import assert_matches, assert_within_budget, error_budget, rounding_band, worst_error
from .cases import RESULTS, Case, Recipe, causal_bias, make_case, padding_bias, results_of, score_magnitude
from .layouts import LAYOUTS, generator, make

__all__ = [
    "LAYOUTS",
    "RESULTS",
    "Case",
    "Recipe",
    "assert_matches",
    "assert_within_budget",
    "causal_bias",
    "error_budget",
    "generator",
    "make",
    "make_case",
    "padding_bias",
    "results_of",
    "rounding_band",
    "score_magnitude",
    "worst_error",
]
