"""Processors around those that compute by diffusers' attention dispatcher, whose settings live on the processor."""

from __future__ import annotations

from typing import Any, ClassVar

from .around import ProcessorAround, may_do_more

__all__ = ["DispatchedAround"]


class DispatchedAround(ProcessorAround):
    """Hands on the settings that diffusers finds on a layer's processor."""

    plain: ClassVar[tuple[str, ...]] = ()
    """Names of the processors that do no more than the family's attention, which an edit computes in their stead."""

    @classmethod
    def unsupported_reasons(cls, attn: Any, processor: Any, override: tuple[type, ...] = ()) -> list[str]:
        """Why a layer with this processor cannot be edited; empty where it can.

        Args:
            attn: the layer.
            processor: the one it has without the edit.
            override: further processor classes that an edit may compute in the stead of.
        """
        reasons = []
        if type(processor).__name__ not in cls.plain and type(processor) not in override:
            reasons.append(may_do_more(processor))
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
