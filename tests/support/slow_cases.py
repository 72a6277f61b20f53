"""Cases of a test, of which few run by default and all of them with the slow ones."""

import pytest

__all__ = ["few"]


def few(cases, *always):
    """Parameters from a mapping, or from names: those that are named run always, the others where slow tests do."""
    named = cases if isinstance(cases, dict) else {name: name for name in cases}
    assert set(always) <= set(named), f"no such cases: {set(always) - set(named)}"
    return [
        pytest.param(case, id=name, marks=() if name in always else pytest.mark.slow) for name, case in named.items()
    ]
