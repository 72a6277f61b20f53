"""`python -m benchmarks.offline`: what the compiler makes of every launch configuration, chip by chip, without a GPU.

Rows hold registers, spilled bytes, shared memory and matrix instructions. ``--update`` writes them to
``benchmarks/results/offline.json``; without it they are compared with what is written there, and the exit status is 1
if a program spills, does not fit into shared memory, misses its matrix instruction, or takes more than it did.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from fpe_kernels.backends.triton import adjoint, apply, backward, boxes, configs
from fpe_kernels.backends.triton.launch import Launch
from fpe_kernels.backends.triton.offline import compile_offline
from fpe_kernels.backends.triton.packing import Chunk

TABLE = Path(__file__).parent / "results" / "offline.json"

# (head dim, branches): SD 1.5 and SDXL alone, as pairs and with several targets; then the other head dims.
WIDTHS = ((40, 1), (40, 2), (40, 5), (64, 1), (64, 2), (64, 5), (80, 2), (80, 4), (160, 1), (160, 2))
OTHER_WIDTHS = ((8, 1), (16, 1), (32, 2), (72, 1), (96, 1), (128, 1), (256, 1))
BOX_WIDTHS = ((32, 2), (64, 1), (64, 2), (64, 4), (128, 1), (128, 2))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
MATRIX_INSTRUCTION = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}

_TOKENS = {"even": 4096, "ragged": 4095, "bias": 4096, "weighted": 4096, "short": 256, "mixed": 256}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Program:
    """One compiled program: a kernel for a chip, a dtype, a width and a kind of input."""

    kernel: str  # apply, replay, boxes, adjoint, grad_query or grad_key
    arch: str
    dtype: str
    head_dim: int
    branches: int
    # even: whole tiles; ragged: masked tiles; bias: for every score; weighted: for every query; short: few tokens;
    # mixed: a map with fewer rows in the same launch
    inputs: str

    @property
    def key(self) -> str:
        return "/".join(str(field) for field in asdict(self).values())


def programs(quick: bool) -> Iterator[Program]:
    """What is compiled: all of it, or in a quarter of a minute the pairs that editing spends its time in."""
    if quick:
        for arch in ("sm_80", "sm_90", "sm_100"):
            for head_dim, branches in ((40, 2), (64, 2), (80, 2), (160, 2)):
                yield Program("apply", arch, "float16", head_dim, branches, "even")
            yield Program("apply", arch, "float16", 160, 2, "ragged")
        yield Program("boxes", "sm_90", "float16", 64, 2, "ragged")
        for kernel in ("apply", "adjoint", "grad_key"):
            yield Program(kernel, "gfx942", "float16", 64, 2, "ragged")
        return
    for arch in ARCHITECTURES:
        for head_dim, branches in WIDTHS + OTHER_WIDTHS:
            for inputs in ("even", "ragged", "bias"):
                yield Program("apply", arch, "float16", head_dim, branches, inputs)
            yield Program("apply", arch, "float16", head_dim, branches, "short")
            for kernel in ("replay", "adjoint", "grad_query", "grad_key"):
                yield Program(kernel, arch, "float16", head_dim, branches, "ragged")
        for head_dim, branches in ((40, 2), (64, 2), (80, 2), (160, 1), (160, 2)):
            yield Program("apply", arch, "float16", head_dim, branches, "weighted")
            if branches > 1:
                yield Program("apply", arch, "float16", head_dim, branches, "mixed")
        for kernel in ("apply", "adjoint", "grad_query", "grad_key"):
            for head_dim, branches in ((64, 2), (160, 1), (256, 1)):
                yield Program(kernel, arch, "float32", head_dim, branches, "ragged")
            yield Program(kernel, arch, "bfloat16", 64, 2, "ragged")
    for head_dim, branches in BOX_WIDTHS:
        yield Program("boxes", "sm_90", "float16", head_dim, branches, "ragged")


def launch_of(program: Program) -> Launch:
    """The launch, on tensors without storage, laid out as a processor's projections are."""
    dtype, tokens, heads = _DTYPES[program.dtype], _TOKENS[program.inputs], 8
    gradient = program.kernel.startswith("grad")
    limit = configs.MAX_GRADIENT_COLUMNS if gradient else configs.MAX_COLUMNS[dtype.itemsize]
    value_dim = min(program.head_dim, limit)
    branches = min(program.branches, limit // value_dim)

    def projection(batch: int, width: int) -> torch.Tensor:
        return torch.empty(batch, tokens, heads, width, dtype=dtype, device="meta").transpose(1, 2)

    query, value = projection(1, program.head_dim), projection(branches, value_dim)
    logsumexp = torch.empty(1, heads, tokens, device="meta")
    bias = torch.empty(1, heads, tokens, tokens, dtype=dtype, device="meta") if program.inputs == "bias" else None
    row_weight = value[..., 0].contiguous() if program.inputs == "weighted" else None
    table = ((0, *range(branches)), *([(1, *[0] * branches)] if program.inputs == "mixed" else []))
    chunk = Chunk(table, 0, value_dim, first=True)
    shape = (program.arch, program.head_dim, branches * value_dim, dtype.itemsize, bias is not None)
    if gradient:
        return backward.prepare(
            query,
            query,
            value,
            value,
            bias,
            query,
            logsumexp,
            logsumexp,
            chunk,
            0.1,
            program.kernel == "grad_query",
            configs.score_config(*shape),
        )
    if program.kernel == "adjoint":
        config = configs.resident_config(*shape, heads, tokens)
        return adjoint.prepare(query, query, value, bias, logsumexp, chunk, 0.1, value, config)
    config = configs.forward_config(*shape, len(chunk.table) * heads, tokens)
    if program.kernel == "boxes":
        described = replace(config, descriptors=True)
        return boxes.prepare(query, query, value, chunk, 0.1, value, logsumexp, described)
    known = program.kernel == "replay"
    return apply.prepare(query, query, value, bias, chunk, 0.1, value, logsumexp, known, row_weight, True, config)


def compile_program(program: Program) -> dict:
    """The row of one program."""
    launch = launch_of(program)
    resources = compile_offline(launch, program.arch)
    return {
        **asdict(program),
        "config": asdict(launch.config),
        "registers": resources.registers,
        "spills": resources.spills,
        "shared": resources.shared,
        "matrix_instructions": list(resources.matrix_instructions),
    }


def complaints(row: dict, committed: dict | None) -> list[str]:
    """What is wrong with a row, by itself and beside the committed one (of the same compiler)."""
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']} bytes a thread")
    if row["shared"] > configs.SHARED_MEMORY[row["arch"]]:
        found.append(f"takes {row['shared']} bytes of shared memory of {configs.SHARED_MEMORY[row['arch']]}")
    expected = MATRIX_INSTRUCTION.get(row["arch"], "mma.sync")
    if row["dtype"] != "float32" and not any(name.startswith(expected) for name in row["matrix_instructions"]):
        found.append(f"has no {expected}")
    if committed is not None:
        found += [
            f"takes {row[name]} {name}, {committed[name]} before"
            for name in ("registers", "shared")
            if row[name] > committed[name]
        ]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=__doc__.split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="compile the configurations of pairs only")
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name} instead of comparing with it")
    arguments = parser.parse_args(argv)
    if arguments.update and arguments.quick:
        parser.error("--update writes the whole table: leave out --quick")
    table = json.loads(TABLE.read_text()) if TABLE.exists() and not arguments.update else {"rows": {}}
    same_compiler = table.get("triton") == triton.__version__
    rows, failed = {}, 0
    for program in programs(arguments.quick):
        row = rows[program.key] = compile_program(program)
        found = complaints(row, table["rows"].get(program.key) if same_compiler else None)
        failed += bool(found)
        print(
            f"{program.key:48} {row['registers']:4} registers {row['shared']:7} bytes shared  "
            f"{', '.join(row['matrix_instructions']) or 'scalar':16} {'; '.join(found) or 'ok'}",
            flush=True,
        )
    if arguments.update:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
