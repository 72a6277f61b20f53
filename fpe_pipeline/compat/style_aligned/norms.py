"""Group norms whose statistics are an image's and the reference's together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["SharedGroupNorms", "shared_group_norm"]


def shared_group_norm(norm: nn.GroupNorm, features: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """Normalise each row as if the reference's pixels stood beside its own.

    With the mean m and variance v of an image's group of channels and m', v' of the reference's, which has as many
    pixels, those of both are (m + m')/2 and (v + v')/2 + ((m − m')/2)².

    Args:
        norm: whose number of groups, weights and epsilon are used.
        features: [B, C, ...].
        groups: rows that share, the reference first.
    """
    rows, channels = features.shape[:2]
    wide = torch.promote_types(features.dtype, torch.float32)
    by_group = features.reshape(rows, norm.num_groups, -1).to(wide)
    variance, mean = torch.var_mean(by_group, dim=-1, correction=0)  # [B, groups]
    # The reference of each row, without an index tensor, which would have to be copied to the device.
    first = torch.cat([x[group[0]].expand(len(group), -1) for x in (mean,) for group in groups])
    spread = torch.cat([variance[group[0]].expand(len(group), -1) for group in groups])
    half = (mean - first) / 2
    factor = ((variance + spread) / 2 + half**2 + norm.eps).rsqrt()
    out = (by_group - (mean - half).unsqueeze(-1)) * factor.unsqueeze(-1)
    out = out.reshape(rows, channels, -1)
    if norm.affine:
        out = out * norm.weight.to(wide)[:, None] + norm.bias.to(wide)[:, None]
    return out.reshape(features.shape).to(features.dtype)


class SharedGroupNorms:
    """A UNet's group norms, shared until :meth:`restore`.

    Args:
        unet: whose norms they are.
        groups: rows of the call at hand that share; a function, as batches differ from call to call.
    """

    def __init__(self, unet: nn.Module, groups: Any) -> None:
        self._before: list[tuple[nn.GroupNorm, Any, Any]] = []
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                forward = self._shared(module, groups)
                self._before.append((module, vars(module).get("forward"), forward))
                module.forward = forward  # type: ignore[method-assign]

    @staticmethod
    def _shared(module: nn.GroupNorm, groups: Any) -> Any:
        def forward(features: torch.Tensor) -> torch.Tensor:
            return shared_group_norm(module, features, groups())

        return forward

    def restore(self) -> None:
        """Let the norms be those that were found."""
        for module, before, own in self._before:
            if vars(module).get("forward") is own:
                del module.forward
                if before is not None:
                    module.forward = before  # type: ignore[method-assign]
        self._before = []
