"""What our pipelines are to diffusers: each is around one of its classes, by whose name it is saved."""

from __future__ import annotations

import inspect
import json
from typing import Any, ClassVar

__all__ = ["AroundParent"]


class AroundParent:
    """Mixed into a pipeline of diffusers, before its class."""

    #: The pipeline of diffusers.
    parent: ClassVar[type]

    @classmethod
    def parent_default(cls, name: str) -> Any:
        """What an argument of a call is in diffusers where it is left out."""
        return inspect.signature(cls.parent.__call__).parameters[name].default

    @property
    def progress_is_hidden(self) -> bool:
        """Whether ``set_progress_bar_config(disable=True)`` asked for silence."""
        return bool(getattr(self, "_progress_bar_config", {}).get("disable"))

    def to_json_string(self) -> str:
        """The configuration that `save_pretrained` writes; it names diffusers' class, so that diffusers loads it."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = self.parent.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
