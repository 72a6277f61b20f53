"""What is read from a tensor's numbers once."""

import gc
import weakref

import torch

from fpe_pipeline.models.adapters.once import once_a_tensor


def test_a_tensor_is_read_once_until_it_is_written_to_and_is_not_kept():
    read = []

    @once_a_tensor
    def total(tensor):
        read.append(tensor.shape)
        return float(tensor.sum())

    numbers, others = torch.ones(3), torch.ones(4)
    assert [total(numbers), total(others), total(numbers), total(others)] == [3.0, 4.0, 3.0, 4.0]
    assert len(read) == 2
    numbers += 1
    assert [total(numbers), total(numbers), len(read)] == [6.0, 6.0, 3]
    assert total(torch.ones(3)) == 3.0  # an equal one is another one
    gone = weakref.ref(others)
    del others
    gc.collect()
    assert gone() is None
    with torch.inference_mode():
        unversioned = torch.ones(2)
        assert total(unversioned) == 2.0
        unversioned += 1
        assert total(unversioned) == 4.0
