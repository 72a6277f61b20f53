"""The intervals of evaluations are scipy's, which only tests need."""

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from fpe_pipeline.quality import bootstrap_interval, share_interval


@pytest.mark.parametrize("trials", [1, 2, 6, 36, 200])
def test_shares(trials):
    for successes in {0, 1, trials // 2, trials}:
        known = binomtest(successes, trials).proportion_ci(0.95, "wilson")
        assert share_interval(successes, trials) == pytest.approx((known.low, known.high), abs=1e-12)


@pytest.mark.parametrize("count", [2, 6, 36, 200])
def test_means(count):
    values = np.random.default_rng(count).normal(size=count)
    known = bootstrap(
        (values,), np.mean, n_resamples=10_000, batch=500, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_interval(values) == pytest.approx((known.low, known.high), abs=1e-12)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, float("nan")])
def test_levels_are_shares(level):
    for interval in (lambda: share_interval(1, 2, level=level), lambda: bootstrap_interval(np.ones(2), level=level)):
        with pytest.raises(ValueError, match=r"expected a level between 0 and 1, such as 0\.95"):
            interval()


def test_a_mean_is_resampled_at_least_once():
    with pytest.raises(ValueError, match="expected a resample at least, got 0"):
        bootstrap_interval(np.ones(2), resamples=0)
