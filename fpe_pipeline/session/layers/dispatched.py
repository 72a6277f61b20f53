"""Processors around those that compute by diffusers' attention dispatcher, whose settings live on the processor."""

from __future__ import annotations

from typing import Any

from .around import AroundPlain

__all__ = ["DispatchedAround"]


class DispatchedAround(AroundPlain):
    """Hands on the settings that diffusers finds on a layer's processor."""

    @classmethod
    def unsupported_reasons(cls, attn: Any, processor: Any, override: tuple[type, ...] = ()) -> list[str]:
        reasons = super().unsupported_reasons(attn, processor, override)
        if getattr(processor, "_parallel_config", None) is not None:
            reasons.append("context parallelism is on, and an edit needs all tokens of a layer in one process")
        return reasons

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
