"""What the tests of other tools' surfaces share."""

import pytest

from fpe_kernels import AttentionMap, LinearMap


@pytest.fixture
def no_whole_maps(monkeypatch):
    """Nobody asks for a map written out, whole or nearly so: fewer columns or rows than half of it."""

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"{self!r} was written out")

    monkeypatch.setattr(LinearMap, "dense", refuse)
    monkeypatch.setattr(AttentionMap, "_entries", refuse)
