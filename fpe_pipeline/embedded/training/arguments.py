"""What both trainings are told on the command line, and what they refuse of it. Nothing here imports torch at once."""

from __future__ import annotations

import argparse

__all__ = ["check_device", "minutes", "seed", "threads"]

_SEEDS = 2**32


def minutes(text: str) -> float:
    """A time box; what is no number is none either, rather than a box without an end."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text}")
    return value


def seed(text: str) -> int:
    """A seed that numpy and torch both take."""
    value = int(text)
    if not 0 <= value < _SEEDS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {_SEEDS - 1}, got {text}")
    return value


def threads(text: str) -> int:
    """How many threads; there is at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End with the parser's error where a training cannot run on the device, before any of it has begun."""
    if device == "cpu":  # without torch: scenes are drawn while it is being imported
        return
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        parser.error(f"argument --device: expected cpu or cuda, got {device}: precisions are chosen for these")
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"device {device} asked for, but torch finds no CUDA device; --device cpu trains slowly")
