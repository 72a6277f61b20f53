"""What every editing processor is: a wrapper around a layer's processor that shows the wrapped one's keywords."""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

from .instructions import Order
from .record import LayerRecord

__all__ = ["AroundPlain", "ProcessorAround", "may_do_more"]


def may_do_more(processor: Any) -> str:
    """The reason against computing a layer in the stead of a processor that is not known."""
    return (
        f"its processor {type(processor).__name__} may do more than attention, which an edit would drop: leave the "
        "layer out with layers=, or allow the class with editing(..., override_processors=(…,))"
    )


class ProcessorAround:
    """A processor around another, which carries out an order where it has one.

    Args:
        inner: the layer's processor without the edit.
    """

    def __init__(self, inner: Any) -> None:
        self._keep(inner)
        self.order: Order | None = None
        # Whether its session has taken it off: whoever puts it back later, as it was found then, has the inner one.
        self.is_over = False
        # What became of the order in the call at hand. An attribute, not a call to whoever wants to know: a function of
        # each layer's own would make `torch.compile` trace each layer anew.
        self.record: LayerRecord | None = None
        # diffusers passes on only those keywords that it finds in `inspect.signature(processor.__call__)`.
        named = inspect.signature(inner.__call__).parameters
        own = inspect.signature(self.__call__).parameters  # type: ignore[operator]
        if not set(named) <= set(own):
            self.__dict__["__call__"] = _SignatureOf(inner, self)

    def _keep(self, inner: Any) -> None:
        self.inner = inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What a copy of the layer has, which is in no session: a copy of the processor without the edit."""
        return copy.deepcopy(self.inner, memo)


class AroundPlain(ProcessorAround):
    """A processor around one that is known by the name of its class."""

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
        known = type(processor).__name__ in cls.plain or type(processor) in override
        return [] if known else [may_do_more(processor)]


class _SignatureOf:
    """What ``inspect.signature`` sees as the ``__call__`` of a processor whose inner one names keywords of its own.

    Python calls the method of the class, not this attribute of the instance; here is only what is *looked at*.
    """

    def __init__(self, inner: Any, processor: Any) -> None:
        self.__signature__ = inspect.signature(inner.__call__)
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.processor(*args, **kwargs)
