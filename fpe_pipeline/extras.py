"""What this package needs beside torch, and what to say where it is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

__all__ = ["APP", "COMMAND", "KERNELS", "OTHERS", "PIPELINE", "app_hint", "hint", "missing"]

#: Modules that the `fpe` command is read and answered with.
COMMAND = ("pydantic", "rich", "typer")
#: Modules of the extra ``pipeline``; :mod:`fpe_kernels` does without them.
PIPELINE = ("PIL", "diffusers", "numpy", "safetensors", "transformers", *COMMAND)
#: Modules of the extra ``app`` beyond those of ``pipeline``.
APP = ("gradio",)
#: Modules of :mod:`fpe_kernels`; triton has wheels for Linux alone.
KERNELS = ("torch", "triton")
#: Modules of further extras, which single options ask for.
OTHERS = {"cluster": ("ray",), "metrics": ("torchmetrics", "torchvision", "matplotlib")}


def missing(modules: Iterable[str] = PIPELINE) -> list[str]:
    """Those of ``modules`` that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def hint(modules: Iterable[str]) -> str:
    """One line that says what is missing and how to install it."""
    return (
        f"{', '.join(modules)} cannot be imported: editing pictures needs the extra 'pipeline', "
        "pip install 'fpe-kernels[pipeline]' or, in a checkout, pip install '.[pipeline]'"
    )


def app_hint(modules: Iterable[str]) -> str:
    """The same for the page."""
    return (
        f"{', '.join(modules)} cannot be imported: the page needs the extra 'app', pip install 'fpe-kernels[app]' or, "
        "in a checkout, pip install '.[app]'"
    )
