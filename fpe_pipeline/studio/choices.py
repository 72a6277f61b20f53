"""Fields whose choices are those of the model that is chosen.

A browser may send what was a choice a moment ago: some of what it asks while another model comes is still of the model
before. Gradio refuses that in a box of its own and in the server's log, before anybody is asked. These take it, for
what is asked for is checked with the settings, which says what is wrong with it.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

__all__ = ["AnyOf", "ManyOf"]


class AnyOf(gr.Dropdown):
    """One of a model's choices."""

    is_template = True  # the browser's part is the parent's

    def preprocess(self, payload: Any) -> Any:
        return payload


class ManyOf(gr.CheckboxGroup):
    """Any of a model's choices."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        return payload
