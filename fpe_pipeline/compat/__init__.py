"""Other tools' surfaces: their names and arguments, on current diffusers and without stored attention maps.

A module a tool: ``from fpe_pipeline.compat import prompt_to_prompt``. Beside them stand :mod:`.lazy`, the map that
behaves as the tensor that a tool's users expect, and :mod:`.controlled`, which puts it into a pipeline's layers.
:func:`accelerate` serves diffusers' own pipelines that keep maps, and :class:`set_compat` asks all tools for the
originals' own behaviour.
"""

import pkgutil

from .diffusers_maps import accelerate
from .names import unknown_name
from .switch import set_compat

__all__ = ["accelerate", "set_compat"]

_COMMON = ("controlled", "diffusers_maps", "given", "lazy", "names", "sessions", "switch")


_TOOLS = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _COMMON]

__getattr__ = unknown_name(__name__, "fpe_pipeline.compat", _TOOLS, modules=_TOOLS)
