"""``Handler(pipe).register(StyleAlignedArgs(…))``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...models.adapters.adapter import ModelCall, identity, is_guided
from ...models.adapters.families import adapter_of
from ...models.roles import BatchRoles
from ...session.session import EditingSession
from ..sessions import leave
from ..switch import chosen_compat
from .edit import SharedAttention, StyleAlignedArgs, groups_of
from .norms import SharedGroupNorms

__all__ = ["Handler", "StyleAlignedArgs"]


class _Session(EditingSession):
    """A session whose batches are halves, whatever made them: what is shared is the first row's of each, so that it
    makes no difference which prompts were encoded, or how often their rows were repeated."""

    def _read_roles(self, call: ModelCall) -> BatchRoles:
        first = call.rows // 2 if _has_halves(self.pipe, call.rows) else 0
        return BatchRoles(tuple(row >= first for row in range(call.rows)), tuple(range(call.rows)))


class Handler(AbstractContextManager["Handler"]):
    """Lets the images of a pipeline's calls share the style of the first, until it is removed.

    Args:
        pipeline: of diffusers, with a UNet.
        compat: "original" takes every batch for two halves, each with a reference of its own, and counts layers for
            ``only_self_level`` as the UNet lists them: down, up, mid.

    Raises:
        TypeError: no pipeline.
        ValueError: a pipeline without a UNet.
    """

    def __init__(self, pipeline: Any, *, compat: str | None = None) -> None:
        compat = chosen_compat(compat)
        adapter = adapter_of(pipeline)
        if adapter.family != "unet":
            raise ValueError(
                f"expected a pipeline with a UNet, got one with {type(adapter.module).__name__}: StyleAligned is "
                "defined for layers in which image tokens attend to image tokens alone"
            )
        self.pipeline, self._compat, self._adapter = pipeline, compat, adapter
        self._session: EditingSession | None = None
        self._norms: SharedGroupNorms | None = None
        self._handle: Any = None
        self._groups: tuple[tuple[int, ...], ...] = ()

    def register(self, style_aligned_args: StyleAlignedArgs) -> Handler:
        """Share from here on; what was registered before, by another handler too, is taken off first.

        Returns:
            The handler, whose ``with`` block ends with :meth:`remove`.
        """
        if not isinstance(style_aligned_args, StyleAlignedArgs):
            raise TypeError(f"expected StyleAlignedArgs, got {type(style_aligned_args).__name__}")
        session = _Session(self.pipeline, SharedAttention(style_aligned_args, self._compat))
        unet = identity(self._adapter.module)
        _REGISTERED.get(unet, self).remove()
        session.__enter__()
        session.step(0, 1)  # all steps are alike, of loops that the scheduler knows nothing of too
        self._session = session
        _REGISTERED[unet] = self
        if style_aligned_args.share_group_norm:
            hook = torch.compiler.disable(self._read)
            self._handle = self._adapter.module.register_forward_pre_hook(hook, with_kwargs=True)
            self._norms = SharedGroupNorms(self._adapter.module, lambda: self._groups)
        return self

    def remove(self) -> None:
        """Leave the pipeline as it was found; a second time does nothing."""
        if self._norms is not None:
            self._norms.restore()
            self._handle.remove()
            self._norms = None
        session, self._session = self._session, None
        if session is not None:
            del _REGISTERED[identity(self._adapter.module)]
            leave(session)

    restore = remove

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _read(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = self._adapter.read(args, kwargs).rows
        self._groups = groups_of(rows, _has_halves(self.pipeline, rows), self._compat)


def _has_halves(pipe: Any, rows: int) -> bool:
    """Whether a batch holds an unconditional half; of a loop of the user's own, which the authors write for guidance,
    where there are two."""
    return is_guided(pipe, encoded=rows % 2 == 0)


_REGISTERED: WeakKeyDictionary[Any, Handler] = WeakKeyDictionary()
