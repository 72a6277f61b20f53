"""How the page's events run, and the buttons that stop a run, let it go on, and end it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .desk import Desk, Shown
from .visitors import Visitor

__all__ = ["LONG", "QUICK", "Halt"]

#: Of events that answer at once.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
#: Of events that run the model: one at a time, whoever asks.
LONG: dict[str, Any] = {
    "concurrency_limit": 1,
    "concurrency_id": "model",
    "show_progress": "hidden",
    "api_visibility": "private",
}


@dataclass(frozen=True)
class Halt:
    """The buttons that stop a tab's run, let it go on, and end it."""

    stop: Any
    go_on: Any
    cancel: Any

    @classmethod
    def build(cls, name: str) -> Halt:
        """Where the layout stands."""
        return cls(
            gr.Button("Stop", elem_id=f"{name}-stop", scale=1, min_width=76),
            gr.Button("Go on", elem_id=f"{name}-go-on", scale=1, min_width=76, visible=False),
            gr.Button("Cancel", elem_id=f"{name}-cancel", scale=1, min_width=76),
        )

    def shows(self, each: Shown) -> Any:
        """What becomes of Go on: it is there while the run stands still."""
        return gr.update(visible=each.stands_still)

    @staticmethod
    def begins(
        button: Any, what: str, handler: Callable[..., Any], given: list[Any], outputs: list[Any], desk: Desk
    ) -> Any:
        """Wire a button to long work, a desk's ``what``, which waits for its turn: that is said, and known to Cancel.

        Args:
            given: to the handler; the visitor first.
            outputs: of the handler; the status first.
        """

        def asked(visitor: Visitor) -> str:
            return desk.ask(visitor, what)

        return button.click(asked, given[0], outputs[0], **QUICK).then(handler, given, outputs, **LONG)

    def wire(self, desk: Desk, visitor: Any, status: Any) -> None:
        """Let Stop and Cancel act, and say so in ``status``; what Go on shows is its tab's."""
        self.stop.click(desk.stop, visitor, status, **QUICK)

        def cancel(visitor: Visitor) -> list[Any]:
            return [desk.cancel(visitor), gr.update(visible=False)]

        self.cancel.click(cancel, visitor, [status, self.go_on], **QUICK)
