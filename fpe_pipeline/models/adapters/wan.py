"""Wan 2.1 and 2.2: blocks of self-attention over all tokens of a video and of cross-attention over text tokens.

A layer's maps are those of a UNet's, of one size throughout, and the frames' tokens follow one another. Pipelines guide
by a second call, in contexts named "cond" and "uncond". Wan 2.2 has two transformers, one for the noisy steps and one
for those after the boundary; an edit's layers are counted in each of them from 0.

SkyReels-V2's blocks are the same, and so are those of ChronoEdit, which makes a picture's edit as a video and may leave
out the frames between its ends on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sites import Site
from ..steps import Step, step_of_scheduler
from .adapter import ModelCall, identity
from .named_calls import NamedCallsAdapter
from .transformer import self_and_cross

__all__ = ["WanAdapter"]

_NAMES = ("transformer", "transformer_2")


class WanAdapter(NamedCallsAdapter):
    """diffusers' ``WanTransformer3DModel``, and the second one of a pipeline that has two."""

    family = "wan"
    repeats_pictures = True

    @property
    def models(self) -> Mapping[str, Any]:
        found = {name: getattr(self.pipe, name, None) for name in _NAMES}
        return super().models if None in found.values() else found

    def layer(self, path: str) -> Any:
        for name, model in self.models.items():
            if path.startswith(f"{name}."):
                return identity(model).get_submodule(path.removeprefix(f"{name}."))
        return super().layer(path)

    def find_sites(self) -> tuple[Site, ...]:
        sites: list[Site] = []
        for name, model in self.models.items():
            module: Any = identity(model)
            _, patch, _ = module.config.patch_size
            sites += self_and_cross(f"{name}.blocks".removeprefix("."), module.blocks, patch)
        return tuple(sites)

    def step(self, call: ModelCall) -> Step:
        # The pipeline that begins with a video tells the scheduler nothing of where it starts.
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler, call.timestep)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        module: Any = self.module
        given = self.named(args, kwargs)
        if given.get("enable_diffusion_forcing"):
            raise ValueError(
                "with diffusion forcing the frames of a video are at different steps of the run, and an edit's window "
                "is of steps: use SkyReelsV2Pipeline or SkyReelsV2ImageToVideoPipeline"
            )
        sample = given["hidden_states"]
        frames, height, width = sample.shape[-3:]
        size = (height, width, frames // module.config.patch_size[0])
        return ModelCall(sample, given["timestep"], size, half=self._half(), arguments=(args, kwargs))
