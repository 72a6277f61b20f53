"""What the kernel for Hopper serves, with the reason where it does not, and how it cuts a launch; without a device."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

import triton

from fpe_kernels import dispatch
from fpe_kernels.backends.triton import configs, hopper
from fpe_kernels.backends.triton.configs import Config
from fpe_kernels.backends.triton.packing import Chunk

ASKED = Config(128, 64, 4, 2, gluon=True)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton were there to compile, and had Gluon."""
    module = ModuleType("hopper_kernel")
    module.hopper_kernel = None
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(hopper, "kernels", lambda: module)


def heads(tokens: int = 100, dim: int = 64, dtype: torch.dtype = torch.float16, batch: int = 2) -> torch.Tensor:
    return torch.zeros(batch, tokens, 3, dim, dtype=dtype).transpose(1, 2)


def refusal(query=None, key=None, value=None, scale: float = 0.1, config: Config = ASKED) -> str:
    query, key, value = (heads() if tensor is None else tensor for tensor in (query, key, value))
    return hopper.refusal(query, key, value, Chunk(((0, 0, 1),), 0, value.shape[3], True), scale, config)


@pytest.mark.parametrize("dim", [8, 16, 40, 64, 72, 80, 128, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_projections_give_is_served(dim, dtype) -> None:
    assert refusal(*[heads(dim=dim, dtype=dtype)] * 3) == ""


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    # One element further, so that it starts at no multiple of 16 bytes.
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(2, 100, 3, 64).transpose(1, 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"query": heads(dtype=torch.float32)}, "tiles are float16 or bfloat16, the tensors torch.float32"),
        ({"config": Config(128, 64, 4, 1, gluon=True)}, "rings have two slots or more, not 1"),
        ({"scale": 0.0}, "the scale must be positive, it is 0"),
        ({"scale": -0.1}, "the scale must be positive, it is -0.1"),
        ({"scale": 1e-50}, "the scale must be positive, it is 1e-50, too small for float32"),
        ({"key": heads(dim=128)[..., ::2]}, "no descriptor holds the key: neighbours in the last axis are 2 elements"),
        ({"query": misaligned(heads())}, "no descriptor holds the query: it does not start at a multiple of 16 bytes"),
        ({"value": heads(dim=65)[..., :64]}, r"no descriptor holds the value: its strides are \[.*\] bytes"),
        ({"value": heads()[:1].expand(2, 3, 100, 64)}, "no descriptor holds the value: its strides are"),
        ({"key": heads(tokens=0)}, "no descriptor holds the key: it is empty"),
        ({"config": Config(96, 64, 4, 2, gluon=True)}, "tiles have 64, 128, 192 or 256 rows"),
        ({"config": Config(128, 64, 8, 2, gluon=True)}, "4 warps are counted"),
        ({"config": Config(128, 48, 4, 2, gluon=True)}, "tiles of keys have 16, 32, 64, 128 or 256 rows, not 48"),
        ({"config": Config(256, 128, 4, 2, gluon=True)}, "the tiles of .* do not fit"),
        ({"config": Config(128, 64, 4, 20, gluon=True)}, "the tiles of .* do not fit"),
    ],
    ids=str,
)
def test_what_it_cannot_hold_is_said(arguments, reason) -> None:
    said = refusal(**arguments)
    assert re.search(reason, said), said


def test_the_interpreter_and_a_triton_without_gluon_are_said(monkeypatch) -> None:
    monkeypatch.setattr(hopper, "kernels", lambda: "Triton 3.0.0 has no Gluon for Hopper (No module named 'gluon')")
    assert "has no Gluon for Hopper" in refusal()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert refusal() == "the interpreter runs no Gluon"


def test_an_import_that_fails_is_a_reason(monkeypatch) -> None:
    name = "fpe_kernels.backends.triton.hopper"
    monkeypatch.setitem(sys.modules, f"{name}_kernel", None)
    monkeypatch.delattr(sys.modules["fpe_kernels.backends.triton"], "hopper_kernel", raising=False)
    again = importlib.util.module_from_spec(importlib.util.find_spec(name))
    again.__spec__.loader.exec_module(again)  # one that remembers no earlier answer
    assert f"Triton {triton.__version__} has no Gluon for Hopper" in again.kernels()


def test_a_chip_that_goes_without_says_so(monkeypatch) -> None:
    hopper_chip, other = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 0 else (8, 0))
    assert hopper.missing(hopper_chip) == ""
    monkeypatch.setattr(hopper, "kernels", lambda: "Triton 3.0.0 has no Gluon")
    assert hopper.missing(hopper_chip) == "without the kernel for Hopper: Triton 3.0.0 has no Gluon"
    assert hopper.missing(other) == hopper.missing(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "unsupported_reasons", lambda *arguments: [])
    monkeypatch.setattr(torch, "device", lambda *arguments: hopper_chip)
    assert dispatch.backends()["triton"] == "available, without the kernel for Hopper: Triton 3.0.0 has no Gluon"


@pytest.mark.parametrize("block_m", hopper.TILE_ROWS)
def test_rows_of_a_program_are_dealt_to_warpgroups(block_m) -> None:
    groups, rows = hopper.warpgroups(block_m)
    assert groups * rows == block_m and rows in (64, 128)
    # The register file holds what its warpgroups may have, beside the warp that fetches.
    assert groups * 128 * hopper.REGISTERS[groups] <= 65536 - 32 * 24


@pytest.mark.parametrize("dim", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("block_m", hopper.TILE_ROWS)
@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("beside", [hopper.LEAST_HELD, hopper.MOST_HELD])
def test_branches_end_where_registers_or_shared_memory_do(dim, block_m, block_n, beside) -> None:
    config = Config(block_m, block_n, 4, 2, gluon=True)
    most = hopper.most_branches(dim, dim, config, beside)
    groups, rows = hopper.warpgroups(block_m)
    width = sum(hopper.split_width(dim))
    # Of a thread: scores and accumulators in single, probabilities in half precision.
    held = lambda branches: rows * (block_n + block_n / 2 + branches * width) / 128  # noqa: E731
    shared = lambda branches: 2 * width * (block_m + 2 * block_n * (1 + branches))  # noqa: E731
    fits = lambda branches: (  # noqa: E731
        held(branches) <= hopper.REGISTERS[groups] - beside
        and shared(branches) <= configs.SHARED_MEMORY["sm_90"] - 1024
    )
    assert most == max([branches for branches in range(1, 5) if fits(branches)], default=0)


def test_an_assembler_that_holds_less_gets_smaller_tiles_not_more_launches() -> None:
    of = lambda *tile: Config(*tile[:2], 4, tile[2], gluon=True)  # noqa: E731
    for (dim, branches, tile), smaller in {
        (40, 2, (256, 64, 3)): (256, 32, 3),
        (80, 2, (256, 32, 3)): (128, 32, 3),
        (160, 2, (128, 64, 2)): (128, 32, 2),
        (64, 2, (128, 128, 2)): (128, 128, 2),
        (64, 1, (192, 128, 2)): (192, 64, 2),
        (160, 2, (128, 128, 2)): (128, 64, 2),  # two launches by either
    }.items():
        assert hopper.fitted(dim, dim, branches, of(*tile), hopper.LEAST_HELD) == of(*tile)
        found = hopper.fitted(dim, dim, branches, of(*tile), hopper.MOST_HELD)
        assert found == of(*smaller), (dim, branches, tile)
        wanted = min(branches, hopper.most_branches(dim, dim, of(*tile), hopper.LEAST_HELD))
        assert hopper.most_branches(dim, dim, found, hopper.MOST_HELD) >= wanted


@pytest.mark.parametrize(("branches", "parts"), [(1, [1]), (2, [2]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3])])
def test_branches_that_do_not_fit_are_dealt_to_launches_of_which_the_later_know_the_statistics(branches, parts) -> None:
    query, value = heads(batch=1), heads(batch=branches)
    chunk = Chunk(((0, *range(branches)),), 0, 64, True)
    out, logsumexp = heads(batch=branches), torch.zeros(1, 3, 100)
    made = list(hopper.launches(query, query, value, chunk, 0.1, out, logsumexp, False, ASKED))
    assert [launch.constants["BRANCHES"] for launch in made] == parts
    assert [launch.constants["KNOWN"] for launch in made] == [False] + [True] * (len(parts) - 1)
    tables = [launch.tensors["table_ptr"].view(-1).tolist() for launch in made]
    assert all(table[0] == 0 for table in tables)
    assert [row for table in tables for row in table[1:]] == list(range(branches))


@pytest.mark.parametrize(
    ("branches", "width", "together"),
    [(2, 64, 2), (4, 64, 4), (2, 128, 2), (4, 128, 2), (3, 64, 1), (2, 32, 2), (2, 256, 1)],
)
def test_branches_share_a_product_of_at_most_256_columns(branches, width, together) -> None:
    assert hopper.bundle(branches, width) == together
    assert together * width <= 256 and branches % together == 0


def test_programs_are_as_many_as_run_at_once_or_as_tiles() -> None:
    query, value = heads(batch=1), heads(batch=2)
    chunk = Chunk(((0, 0, 1),), 0, 64, True)
    out, logsumexp = heads(batch=2), torch.zeros(1, 3, 100)
    for count, single in ((100, False), (3, False), (3, True)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(hopper, "resident", lambda device, config, count=count: count)
            config = replace(ASKED, single=single)
            (launch,) = hopper.launches(query, query, value, chunk, 0.1, out, logsumexp, False, config)
        tiles = -(-query.shape[2] // config.block_m) * query.shape[1]
        assert launch.numbers["programs"] == tiles
        assert launch.programs == (tiles if single else min(tiles, count))
