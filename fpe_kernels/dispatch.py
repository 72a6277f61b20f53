"""Which backend serves a call. Backends answer with reasons; only ``"auto"`` chooses; nothing falls back silently."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from .backends.protocol import Backend, BiasBackend, MergingBackend, ReadyBackend

BACKENDS = ("triton", "torch", "reference")


class TritonBackend(MergingBackend, ReadyBackend, Protocol):
    """The one that may be missing, on a chip or altogether."""

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]: ...
    def without(self, device: torch.device) -> str: ...


@cache
def load(name: str) -> Backend:
    """Import the backend ``name`` on first use, so that ``import fpe_kernels`` needs torch only."""
    if name == "triton":
        return _triton()
    if name == "torch":
        return load_torch()
    check_name(name, BACKENDS)
    from .backends import reference

    return reference


def load_torch() -> BiasBackend:
    """The backend that has the gradient of the bias."""
    from .backends import chunked

    return chunked


def load_merging(name: str) -> MergingBackend | None:
    """The backend ``name`` where it merges products in its launches."""
    return _triton() if name == "triton" else None


def load_ready(name: str) -> ReadyBackend | None:
    """The backend ``name`` where it can have calls ready."""
    if name == "triton":
        return _triton()
    if name == "torch":
        from .backends import chunked

        return chunked
    return None


def _triton() -> TritonBackend:
    from .backends.triton import backend

    return backend


@cache
def _triton_missing() -> str | None:
    """Why triton cannot be imported, or None."""
    try:
        _triton()
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton (Linux)"
    return None


def unsupported_reasons(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why backend ``name`` cannot serve tensors like these; an empty list means that it can."""
    if name != "triton":
        return []
    missing = _triton_missing()
    return [missing] if missing else _triton().unsupported_reasons(device, dtype, head_dim)


# A backend is imported to be asked, which torch.compile cannot trace; for given arguments the answer never changes.
# `torch.compiler.assume_constant_result` sets this mark and no more, but doubles the time of the import.
unsupported_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_name(name: object, names: tuple[str, ...] = (*BACKENDS, "auto")) -> str:
    """Return ``name`` if it names a backend or is ``"auto"``."""
    if name not in names:
        raise ValueError(f"backend must be one of {', '.join(map(repr, names))}; got {name!r}.")
    return str(name)


def select(name: object, query: Tensor) -> str:
    """Return the backend that serves ``query``; raise with every reason where a named one cannot.

    ``"auto"`` takes ``triton`` on a CUDA device that it supports and ``torch`` everywhere else. It never takes the
    Triton interpreter, which exists for tests, nor ``reference``, which materialises maps.
    """
    name = check_name(name)
    # Kernels are compiled for a head dim. torch.compile may hold it as a symbol, and repetition makes it a number.
    head_dim = len((None,) * query.shape[-1])
    if name == "auto":
        if query.device.type != "cuda":
            return "torch"
        return "torch" if unsupported_reasons("triton", query.device, query.dtype, head_dim) else "triton"
    reasons = unsupported_reasons(name, query.device, query.dtype, head_dim)
    if reasons:
        raise ValueError(
            f"backend {name!r} cannot serve this call: {'; '.join(reasons)}. Use backend='torch', which serves any "
            "device and float dtype in bounded memory, or backend='auto'."
        )
    return name


def backends() -> dict[str, str]:
    """Every backend with ``"available"``, or what it lacks, or the reason why it is not, on this machine.

    >>> backends()["torch"]
    'available'

    Returns:
        By name, in the order of preference: ``"available"``, what it goes without here, or every reason against it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answers = {}
    for name in BACKENDS:
        reasons = unsupported_reasons(name, device, torch.float32, 64)
        lacking = _triton().without(device) if name == "triton" and not reasons else ""
        answers[name] = "; ".join(reasons) or ", ".join(filter(None, ("available", lacking)))
    return answers
