"""Modules of diffusers that narrow to float32 on the way, made to keep what is in float64."""

from contextlib import contextmanager

import torch

from tests.support.dense_rows import wide


class _WideTorch:
    """torch, in which what is called narrow is wide."""

    float = float32 = torch.float64
    complex64 = torch.complex128

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def widened(*modules):
    """Where these modules narrow to float32 on the way, what is in float64 stays so."""
    with wide():
        for module in modules:
            module.torch = _WideTorch()
        try:
            yield
        finally:
            for module in modules:
                module.torch = torch
