"""Keeping back what diffusers and transformers say of their own accord."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

__all__ = ["only_errors", "quiet_libraries"]


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    """Keep back what diffusers and transformers report of every run: advice on packages, cut prompts in full."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    for log, _ in before:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, verbosity in before:
            log.set_verbosity(verbosity)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """`only_errors`, without the bars of a load that lasts a second."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in bars:
        log.disable_progress_bar()
    try:
        with only_errors(), warnings.catch_warnings():
            # diffusers renamed torch_dtype to dtype; the versions that this package supports take the old name.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch_dtype.*")
            # An argument of diffusers' to the hub, which is said with each model that is fetched.
            warnings.filterwarnings("ignore", category=UserWarning, message=".*local_dir_use_symlinks.*")
            yield
    finally:
        for log in bars:
            log.enable_progress_bar()
