"""What a UNet, or a transformer that is called as one, is told of a prompt beside latents and a timestep, outside its
pipeline's loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

__all__ = ["UNetConditions"]


@dataclass(frozen=True, eq=False)
class UNetConditions:
    """Conditions of one row or, guided, of two, the unconditional first.

    Args:
        states: ``encoder_hidden_states`` [rows, tokens, channels].
        added: ``added_cond_kwargs`` of the model's calls, each [rows, …]; none where it takes text alone.
        mask: ``encoder_attention_mask`` [rows, tokens], 1 where a token is no padding; None where every token counts.
        named: whether what is added are arguments of the model's calls by their own names.
    """

    states: torch.Tensor
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    named: bool = False

    def repeated(self, rows: int) -> UNetConditions:
        """Those of one row for so many."""
        added = {name: part.expand(rows, *part.shape[1:]) for name, part in self.added.items()}
        mask = None if self.mask is None else self.mask.expand(rows, -1)
        return replace(self, states=self.states.expand(rows, -1, -1), added=added, mask=mask)

    def to(self, device: Any) -> UNetConditions:
        """The same on another device."""
        added = {name: part.to(device) for name, part in self.added.items()}
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, states=self.states.to(device), added=added, mask=mask)

    def with_states(self, states: torch.Tensor) -> UNetConditions:
        """The same beside other text embeddings, of as many rows."""
        return replace(self, states=states)

    def halves(self) -> tuple[UNetConditions, UNetConditions]:
        """The unconditional row's, and the conditional row's."""
        states, masks = self.states.chunk(2), (None, None) if self.mask is None else self.mask.chunk(2)
        added = [{name: part.chunk(2)[half] for name, part in self.added.items()} for half in range(2)]
        away, towards = zip(states, added, masks, strict=True)
        return UNetConditions(*away, self.named), UNetConditions(*towards, self.named)

    def call(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        """Arguments of the model's call for latents [1, C, h, w], which every row receives: by place and by name."""
        rows = self.states.shape[0]
        named: dict[str, Any] = {"timestep": timestep.expand(rows), "encoder_hidden_states": self.states}
        if self.named:
            named |= self.added
        elif self.added:
            named["added_cond_kwargs"] = dict(self.added)
        if self.mask is not None:
            named["encoder_attention_mask"] = self.mask
        return (sample.expand(rows, -1, -1, -1),), named

    def predict(self, model: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction [rows, C, h, w] for latents [1, C, h, w], without a variance that the model may add to it."""
        latents, named = self.call(sample, timestep)
        predicted: torch.Tensor = model(*latents, **named, return_dict=False)[0]
        return predicted[:, : sample.shape[1]]
