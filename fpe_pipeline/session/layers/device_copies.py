"""What an edit holds on the host, copied to the device once and not at every layer of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...edits.joint_products import AnyProduct, JointProduct, MixedRows, SegmentRows

__all__ = ["Place", "Placement"]

_Key = tuple[torch.device, torch.dtype, int, bool]


class Placement:
    """Copies of tensors by device and dtype, each made once and kept for as long as the tensor itself lives.

    Edits give the same mixings and weights to many layers, and from step to step until something changes; a copy from
    the host makes it wait for the device. A tensor that was changed in place is copied anew, and one with a gradient
    history, or without a record of its changes (an inference tensor), at each call.
    """

    def __init__(self) -> None:
        self._copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def copy(self, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``tensor.to(device, dtype)``."""
        if tensor.device == device and tensor.dtype == dtype:
            return tensor
        if tensor.requires_grad or tensor.is_inference():
            return tensor.to(device, dtype)
        copies: dict[_Key, torch.Tensor] = self._copies.setdefault(tensor, {})
        # What is made in inference mode cannot take part in a graph outside it.
        key = (device, dtype, tensor._version, torch.is_inference_mode_enabled())
        if key not in copies:
            for outdated in [other for other in copies if other[2] != tensor._version]:
                del copies[outdated]
            copies[key] = tensor.to(device, dtype)
        return copies[key]


@dataclass(frozen=True)
class Place:
    """Where, and at which precision, the layers of one UNet call compute."""

    placement: Placement
    device: torch.device
    dtype: torch.dtype

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, of the layers' dtype."""
        return self.placement.copy(tensor, self.device, self.dtype)

    def products(self, products: Mapping[int, AnyProduct | Sequence[AnyProduct]]) -> dict[int, Any]:
        """An edit's products with their tensors on the device: mixings of the layers' dtype, weights of float32 at
        least."""
        return {
            row: tuple(map(self._product, given)) if isinstance(given, Sequence) else self._product(given)
            for row, given in products.items()
        }

    def _product(self, product: AnyProduct) -> AnyProduct:
        weight = product.weight
        if isinstance(weight, torch.Tensor):
            wide = torch.promote_types(self.dtype, torch.float32)
            weight = self.placement.copy(weight, self.device, wide)
        mixing = None if product.mixing is None else self.tensor(product.mixing)
        if not isinstance(product, JointProduct):
            return replace(product, mixing=mixing, weight=weight)
        query, key, value = map(self._segments, (product.query, product.key, product.value))
        return replace(product, query=query, key=key, value=value, mixing=mixing, weight=weight)

    def _segments(self, rows: SegmentRows) -> SegmentRows:
        if not isinstance(rows.image, MixedRows):
            return rows
        wide = torch.promote_types(self.dtype, torch.float32)
        share = self.placement.copy(rows.image.share, self.device, wide)
        return SegmentRows(replace(rows.image, share=share), rows.text)
