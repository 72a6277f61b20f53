"""``Handler(pipe).register(StyleAlignedArgs(…))``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from ...models.adapter import is_guided
from ...models.families import adapter_of
from ...session.session import EditingSession
from ..sessions import leave
from ..switch import chosen_compat
from .edit import SharedAttention, StyleAlignedArgs, groups_of
from .norms import SharedGroupNorms

__all__ = ["Handler", "StyleAlignedArgs"]


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
        """Share from here on; what was registered before is taken off first.

        Returns:
            The handler, whose ``with`` block ends with :meth:`remove`.
        """
        if not isinstance(style_aligned_args, StyleAlignedArgs):
            raise TypeError(f"expected StyleAlignedArgs, got {type(style_aligned_args).__name__}")
        session = EditingSession(self.pipeline, SharedAttention(style_aligned_args, self._compat))
        self.remove()
        session.__enter__()
        self._session = session
        if style_aligned_args.share_group_norm:
            unet = self._adapter.module
            hook = torch.compiler.disable(self._read)
            self._handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
            self._norms = SharedGroupNorms(unet, lambda: self._groups)
        return self

    def remove(self) -> None:
        """Leave the pipeline as it was found; a second time does nothing."""
        if self._norms is not None:
            self._norms.restore()
            self._handle.remove()
            self._norms = None
        session, self._session = self._session, None
        if session is not None:
            leave(session)

    restore = remove

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _read(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = self._adapter.read(args, kwargs).rows
        guided = self._compat == "original" or is_guided(self.pipeline)
        self._groups = groups_of(rows, guided, self._compat)
