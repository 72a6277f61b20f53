"""pnp-diffusers (Plug-and-Play): ``pnp_utils``' functions, for sampling loops that their users wrote.

``from pnp_utils import *`` becomes ``from fpe_pipeline.compat.pnp_diffusers import *``.

Reference: Tumanyan et al., "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation", CVPR 2023.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..edits.base import Features, Windows
from ..edits.plug_and_play import PlugAndPlayEdit
from ..edits.products import Product
from ..edits.self_attention import SelfAttentionEdit
from ..models.adapters.adapter import ModelCall, identity
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..session.session import EditingSession
from .names import unknown_name
from .sessions import leave
from .switch import chosen_compat

__all__ = [
    "Registration",
    "load_source_latents_t",
    "register_attention_control_efficient",
    "register_conv_control_efficient",
    "register_time",
    "seed_everything",
]

__getattr__ = unknown_name(__name__, "pnp_utils", __all__)

#: The noisiest timestep that a schedule may name; steps count down from it.
NOISIEST = 1000
_FEATURES = PlugAndPlayEdit().feature_modules


@dataclass(frozen=True)
class _Injection(SelfAttentionEdit):
    """At the timesteps of a schedule, self-attention maps and features of every branch are the source's.

    Args:
        attention: the timesteps at which maps are injected; None where they are not registered.
        conv: those at which features are.
    """

    attention: frozenset[int] | None = None
    conv: frozenset[int] | None = None

    def active(self, step: Step) -> bool:
        return self._in(self.attention, step) or self._in(self.conv, step)

    def windows(self) -> Windows:
        return ()

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return () if self.attention is None else PlugAndPlayEdit().default_sites(sites)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        if not self._in(self.attention, step):
            return {}
        return {t: Product(query=s, keys=(s,), values=(t,)) for s, t in roles.pairs(conditional=None)}

    @property
    def feature_modules(self) -> tuple[str, ...]:
        """Paths of the modules whose output is injected."""
        return () if self.conv is None else _FEATURES

    def features(self, step: Step, roles: BatchRoles) -> Features:
        """The rows whose output is another row's, by module."""
        rows = {target: source for source, target in roles.pairs(conditional=None)}
        return dict.fromkeys(_FEATURES, rows) if self._in(self.conv, step) else {}

    @staticmethod
    def _in(schedule: frozenset[int] | None, step: Step) -> bool:
        return schedule is not None and NOISIEST - step.index in schedule


class _Session(EditingSession):
    """A session whose batches are branches of equally many rows, the first of which is the source."""

    branches = 3

    def _read_roles(self, call: ModelCall) -> BatchRoles:
        rows, branches = call.rows, self.branches
        if rows % branches:
            raise ValueError(
                f"expected a batch of {branches} branches, {_named(branches)}, got {rows} rows: pass branches=2 for "
                "[source, prompt], without guidance"
            )
        count = rows // branches
        conditional = [branch != 1 or branches == 2 for branch in range(branches) for _ in range(count)]
        return BatchRoles(tuple(conditional), tuple(range(count)) * branches)


class Registration(AbstractContextManager["Registration"]):
    """What was registered on a model, until `restore` or the end of a ``with`` block.

    Args:
        model: what the functions were given.
    """

    def __init__(self, model: Any) -> None:
        self._unet = _unet(model)
        self._edit = _Injection()
        self._session: _Session | None = None
        self._handle: Any = None
        self.time: int | None = None

    def register(self, branches: int, schedules: Mapping[str, Any]) -> None:
        """Let these schedules hold from here on, beside those that were registered before."""
        edit = replace(self._edit, **schedules)
        session = _Session(self._unet, edit)
        session.branches = branches
        self._leave()
        self._handle = self._unet.register_forward_pre_hook(torch.compiler.disable(self._require_time))
        try:
            session.__enter__()
        except BaseException:
            self._leave()
            raise
        self._edit, self._session = edit, session
        _REGISTERED[identity(self._unet)] = self
        if self.time is not None:
            self.at(self.time)

    def at(self, time: int) -> None:
        """The timestep of the calls that follow."""
        self.time = time
        if self._session is not None:
            self._session.step(NOISIEST - time, NOISIEST + 1)

    def restore(self) -> None:
        """Leave the UNet as it was found; a second time does nothing."""
        self._leave()
        if _REGISTERED.get(identity(self._unet)) is self:
            del _REGISTERED[identity(self._unet)]

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def _leave(self) -> None:
        session, self._session = self._session, None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if session is not None:
            leave(session)

    def _require_time(self, module: Any, args: Any) -> None:
        if self.time is None:
            raise RuntimeError("the timestep is not known: call register_time(model, t) before each call of the UNet")


_REGISTERED: WeakKeyDictionary[Any, Registration] = WeakKeyDictionary()


def register_attention_control_efficient(
    model: Any, injection_schedule: Iterable[Any] | None, *, branches: int = 3, compat: str | None = None
) -> Registration:
    """At some timesteps, the decoder's self-attention maps of all branches are the source's.

    The layers are those of `PlugAndPlayEdit`: the decoder's, but for its first attention module.

    Args:
        model: with a ``unet``, or a UNet.
        injection_schedule: timesteps, such as ``scheduler.timesteps[:25]``; a timestep counts where it is among them.
            None for none.
        branches: 3 for batches [source, negative, prompt], 2 for [source, prompt]; each of as many rows.
        compat: "original" injects at timestep 1000 whatever the schedule.

    Raises:
        TypeError: no model with a UNet.
        ValueError: no list of timesteps, others than whole numbers from 0 to 1000, or another number of branches.

    Returns:
        What restores the UNet: ``.restore()``, or a ``with`` block. `register_conv_control_efficient` on the same model
        returns the same.
    """
    return _register(model, branches, attention=_schedule(injection_schedule, compat))


def register_conv_control_efficient(
    model: Any, injection_schedule: Iterable[Any] | None, *, branches: int = 3, compat: str | None = None
) -> Registration:
    """At some timesteps, features of one residual block of the decoder are the source's in all branches.

    Arguments, and what is returned, are those of `register_attention_control_efficient`.
    """
    return _register(model, branches, conv=_schedule(injection_schedule, compat))


def register_time(model: Any, t: Any) -> None:
    """Say the timestep of the UNet's calls that follow.

    Args:
        model: on which a control was registered.
        t: a whole number from 0 to 1000, or a tensor of one.

    Raises:
        RuntimeError: nothing was registered on the model.
        ValueError: another number.
    """
    registered = _REGISTERED.get(identity(_unet(model)))
    if registered is None:
        raise RuntimeError(
            "nothing is registered on this model: register_attention_control_efficient(model, schedule) first"
        )
    registered.at(_timestep(t))


def load_source_latents_t(t: int, latents_path: str) -> torch.Tensor:
    """The latents of a timestep that the preprocessing of the original wrote: ``noisy_latents_<t>.pt``."""
    path = Path(latents_path, f"noisy_latents_{t}.pt")
    if not path.is_file():
        raise FileNotFoundError(f"missing latents at t {t}: there is no {path}")
    return torch.load(path, weights_only=True)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _register(model: Any, branches: int, **schedules: frozenset[int]) -> Registration:
    if branches not in (2, 3):
        raise ValueError(f"expected branches to be 3, {_named(3)}, or 2, {_named(2)}, got {branches!r}")
    registered = _REGISTERED.get(identity(_unet(model))) or Registration(model)
    registered.register(branches, schedules)
    return registered


def _schedule(timesteps: Iterable[Any] | None, compat: str | None) -> frozenset[int]:
    compat = chosen_compat(compat)
    always = (NOISIEST,) if compat == "original" and timesteps is not None else ()
    if isinstance(timesteps, str) or getattr(timesteps, "ndim", 1) != 1 or not isinstance(timesteps, Iterable | None):
        raise ValueError(
            f"expected a list of timesteps, such as scheduler.timesteps[:25], got {timesteps!r}: write [t] "
            "for one of them"
        )
    return frozenset((*map(_timestep, () if timesteps is None else timesteps), *always))


def _timestep(t: Any) -> int:
    number = t.reshape(-1).tolist() if hasattr(t, "reshape") else [t]
    number = number[0] if len(number) == 1 else number
    if isinstance(number, bool) or not isinstance(number, int | float) or number % 1:  # true of NaN and of infinity
        raise ValueError(f"expected a timestep as a whole number, got {t!r}: schedules of this tool are DDIM's")
    if not 0 <= number <= NOISIEST:
        raise ValueError(f"expected a timestep from 0 to {NOISIEST}, got {t!r}")
    return int(number)


def _unet(model: Any) -> Any:
    unet = getattr(model, "unet", model)
    if not hasattr(unet, "attn_processors"):
        raise TypeError(f"expected a model with a unet, or a UNet, got {type(model).__name__}")
    return unet


def _named(branches: int) -> str:
    return "[source, negative, prompt]" if branches == 3 else "[source, prompt]"
