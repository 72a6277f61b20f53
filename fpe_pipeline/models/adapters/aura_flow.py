"""AuraFlow: dual blocks with a stream of image tokens and one of text tokens, then single blocks with one for both.

The order in a layer is text, image, and before every text stand tokens of the model's own (registers). The batch is
[unconditional, conditional] in one call, and padding of texts is attended to. The timestep is scaled: the step is the
scheduler's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import TextPart
from ..sites import Site, dual_and_single
from ..steps import Step, step_of_scheduler
from .adapter import ModelCall
from .transformer import TransformerAdapter

__all__ = ["AuraFlowAdapter"]


class AuraFlowAdapter(TransformerAdapter):
    """diffusers' ``AuraFlowTransformer2DModel``."""

    family = "aura_flow"

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        module: Any = self.module
        self.text_parts = (TextPart("tokenizer", ("text_encoder",), registers=module.register_tokens.shape[1]),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return dual_and_single(module, int(module.config.patch_size), dual="joint_transformer_blocks")

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        return ModelCall(sample, given["timestep"], sample.shape[-2:], arguments=(args, kwargs))

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)
