"""Tensors of edits: copied to the layers' device and dtype once, and anew where they change."""

import gc

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpe_pipeline import FreePromptEdit, LocalBlend, Product, PromptToPromptEdit, editing
from fpe_pipeline.session.layers.device_copies import Place, Placement
from tests.support.tiny_pipelines import PROMPTS, sample

CPU = torch.device("cpu")


def test_one_copy_for_each_device_and_dtype():
    placement, tensor = Placement(), torch.ones(3, dtype=torch.float64)
    copy = placement.copy(tensor, CPU, torch.float32)
    assert copy.dtype == torch.float32
    assert placement.copy(tensor, CPU, torch.float32) is copy
    assert placement.copy(tensor, CPU, torch.float64) is tensor
    assert placement.copy(tensor, torch.device("meta"), torch.float32).device.type == "meta"
    assert placement.copy(tensor, CPU, torch.float32) is copy
    assert placement.copy(torch.ones(3, dtype=torch.float64), CPU, torch.float32) is not copy


def test_a_tensor_changed_in_place_is_copied_anew():
    placement, tensor = Placement(), torch.ones(3, dtype=torch.float64)
    placement.copy(tensor, CPU, torch.float32)
    tensor[1] = 2.0
    assert placement.copy(tensor, CPU, torch.float32).tolist() == [1.0, 2.0, 1.0]


def test_gradients_and_inference_tensors():
    placement, leaf = Placement(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # a kept copy's graph would be gone the second time
        placement.copy(leaf, CPU, torch.float32).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [2.0] * 3
    tensor = torch.ones(3, dtype=torch.float64)
    with torch.inference_mode():
        born, copy = torch.ones(3, dtype=torch.float64), placement.copy(tensor, CPU, torch.float32)
        placement.copy(born, CPU, torch.float32)
        born[1] = 2.0
        assert placement.copy(born, CPU, torch.float32)[1] == 2.0
    assert copy.is_inference() and not placement.copy(tensor, CPU, torch.float32).is_inference()


def test_copies_go_with_their_tensors():
    placement, tensor = Placement(), torch.ones(3, dtype=torch.float64)
    placement.copy(tensor, CPU, torch.float32)
    assert len(placement._copies) == 1
    del tensor
    gc.collect()
    assert len(placement._copies) == 0


def test_products_of_half_precision_layers():
    """Weights stay as exact as the statistics that they multiply."""
    mixing, weight = torch.eye(4, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    products = {0: Product(0, (0,), (0,)), 1: [Product(0, (0,), (1,), weight=weight, mixing=mixing)]}
    placed = Place(Placement(), CPU, torch.float16).products(products)
    assert placed[0] == products[0]
    (product,) = placed[1]
    assert (product.mixing.dtype, product.weight.dtype) == (torch.float16, torch.float32)


class Copies(TorchDispatchMode):
    """Shapes of the float64 tensors that are converted."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def half(size):
    return np.repeat(np.arange(size)[None] < size // 2 + 3, size, 0)


@pytest.mark.parametrize("steps", [2, 6])
def test_a_run_copies_each_tensor_once(tiny, steps):
    """However many layers, rows and steps use it."""
    edit = PromptToPromptEdit(
        PROMPTS[:2], tiny.tokenizer, cross_replace_steps={"default_": 1.0, "blue": 0.5}, self_replace_steps=0
    )
    with Copies() as copies, editing(tiny, edit + LocalBlend(PROMPTS[:2], tiny.tokenizer, ["car", "car"])):
        sample(tiny, steps=steps)
    # M diag(α) before and after the word's window, its complement after; a column of each prompt's word.
    assert sorted(copies.shapes) == [(77, 1)] * 2 + [(77, 77)] * 3

    edit = FreePromptEdit(1.0, mask=half(64), strength=0.5, levels=1)
    with Copies() as copies, editing(tiny, edit):
        sample(tiny, steps=steps)
    assert copies.shapes == [(16,)] * 2
