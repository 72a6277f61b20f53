"""Processors around those that compute by diffusers' attention dispatcher, whose settings live on the processor."""

from __future__ import annotations

from typing import Any

from .around import ProcessorAround

__all__ = ["DispatchedAround", "parallel_reasons"]


def parallel_reasons(processor: Any) -> list[str]:
    """Why a layer whose tokens lie in several processes cannot be edited; empty where they do not."""
    if getattr(processor, "_parallel_config", None) is None:
        return []
    return ["context parallelism is on, and an edit needs all tokens of a layer in one process"]


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
