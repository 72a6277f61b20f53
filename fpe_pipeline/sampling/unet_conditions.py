"""What a UNet is told of a prompt beside latents and a timestep, outside its pipeline's loop."""

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
        added: ``added_cond_kwargs`` of the UNet's calls, each [rows, …]; none where it takes text alone.
    """

    states: torch.Tensor
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def repeated(self, rows: int) -> UNetConditions:
        """Those of one row for so many."""
        added = {name: part.expand(rows, *part.shape[1:]) for name, part in self.added.items()}
        return UNetConditions(self.states.expand(rows, -1, -1), added)

    def to(self, device: Any) -> UNetConditions:
        """The same on another device."""
        return UNetConditions(self.states.to(device), {name: part.to(device) for name, part in self.added.items()})

    def with_states(self, states: torch.Tensor) -> UNetConditions:
        """The same beside other text embeddings, of as many rows."""
        return replace(self, states=states)

    def halves(self) -> tuple[UNetConditions, UNetConditions]:
        """The unconditional row's, and the conditional row's."""
        states = self.states.chunk(2)
        added = [{name: part.chunk(2)[half] for name, part in self.added.items()} for half in range(2)]
        return UNetConditions(states[0], added[0]), UNetConditions(states[1], added[1])

    def predict(self, unet: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The prediction [rows, C, h, w] for latents [1, C, h, w], which every row receives."""
        rows = sample.expand(self.states.shape[0], -1, -1, -1)
        added = {"added_cond_kwargs": dict(self.added)} if self.added else {}
        predicted: torch.Tensor = unet(rows, timestep, encoder_hidden_states=self.states, return_dict=False, **added)[0]
        return predicted
