"""Within it nobody writes a map out, whole or a block of rows at a time."""

from fpe_kernels import AttentionMap
from fpe_kernels.views import MapViews
from fpe_pipeline.compat.lazy import LazyMap


def refuse(*args, **kwargs):
    raise AssertionError("the matrix was written out")


def refuse_matrices(monkeypatch):
    """Until ``monkeypatch.undo()``."""
    for where, method in (
        (MapViews, "dense"),
        (MapViews, "_entries"),
        (AttentionMap, "_entries"),
        (LazyMap, "numbers"),
    ):
        monkeypatch.setattr(where, method, refuse)
    for module in ("arithmetic", "storage", "view"):
        for made in ("entries", "blocks_of_rows"):
            monkeypatch.setattr(f"fpe_pipeline.compat.lazy.{module}.{made}", refuse, raising=False)
