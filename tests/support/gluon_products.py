"""Products that are in flight until they are waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .gluon_memory import Shared
from .gluon_schedule import NOW, WARPS, Fault


@dataclass
class Product:
    """In flight until it is waited for."""

    left: Any
    right: Shared
    accumulator: Any
    result: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.issued_with = [_operand(self.left).clone(), _operand(self.right).clone()]

    def complete(self) -> None:
        for operand, before in zip((self.left, self.right), self.issued_with, strict=True):
            if not torch.equal(_operand(operand).view(torch.int16), before.view(torch.int16)):
                raise Fault("shared memory changes while a product reads it")
        left = _operand(self.left)
        product = left.double() @ _operand(self.right).double()
        if self.accumulator is not None:
            product += _value(self.accumulator).double()
        self.result = product.float()


def _operand(operand: Any) -> torch.Tensor:
    return operand.read().contiguous() if isinstance(operand, Shared) else operand.contiguous()


def _value(product: Any) -> torch.Tensor:
    if not isinstance(product, Product):
        return product
    if product.result is None:
        raise Fault("a product is used while it is in flight")
    return product.result


def multiply(left: Any, right: Shared, accumulator: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async and tuple(accumulator.shape if torch.is_tensor(accumulator) else ()) != (0,)
    product = Product(left, right, accumulator if use_acc else None)
    WARPS.in_flight.append(product)
    NOW.schedule.switch()
    return product


def wait_products(left: int, deps: Any) -> Any:
    NOW.schedule.switch()
    while len(WARPS.in_flight) > left:
        WARPS.in_flight.pop(0).complete()
    values = tuple(_value(product) for product in deps)
    return values[0] if len(values) == 1 else values
