"""Fields whose choices are those of the model that is chosen.

A browser may send what was a choice a moment ago: some of what it asks while another model comes is still of the model
before. Gradio refuses that in a box of its own and in the server's log, before anybody is asked. These take it, for
what is asked for is checked with the settings, which says what is wrong with it.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

import gradio as gr

__all__ = ["AnyOf", "ManyOf"]


def _unchecked(component: Any) -> Any:
    """A class of Gradio's whose values pass as they come.

    It is made past Gradio's own metaclass, which writes a file of types beside the module of every component's class.
    """
    changed = {"preprocess": lambda self, payload: payload, "is_template": True}  # the browser's part is the parent's
    return ABCMeta.__new__(type(component), component.__name__, (component,), changed)


#: One of a model's choices, and any of them.
AnyOf: Any = _unchecked(gr.Dropdown)
ManyOf: Any = _unchecked(gr.CheckboxGroup)
