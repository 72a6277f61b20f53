"""Processors around those that compute by diffusers' attention dispatcher, whose settings live on the processor."""

from __future__ import annotations

from typing import Any

from .around import ProcessorAround, may_do_more

__all__ = ["DispatchedAround", "dispatched_reasons"]


def dispatched_reasons(processor: Any, plain: tuple[str, ...], override: tuple[type, ...]) -> list[str]:
    """Why a layer with this processor cannot be edited; empty where it can.

    Args:
        processor: the one it has without the edit.
        plain: names of the classes that do no more than the family's attention.
        override: further processor classes that an edit may compute in the stead of.
    """
    reasons = []
    if type(processor).__name__ not in plain and type(processor) not in override:
        reasons.append(may_do_more(processor))
    if getattr(processor, "_parallel_config", None) is not None:
        reasons.append("context parallelism is on, and an edit needs all tokens of a layer in one process")
    return reasons


class DispatchedAround(ProcessorAround):
    """Hands on the settings that diffusers finds on a layer's processor."""

    # Settings that diffusers finds on a layer's processor belong to the one that computes unedited calls.

    @property
    def _attention_backend(self) -> Any:
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = config
