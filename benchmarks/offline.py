"""`python -m benchmarks.offline`: what the compiler makes of every launch configuration, chip by chip, without a GPU.

Rows hold registers, spilled bytes, shared memory and matrix instructions. ``--update`` writes them to
``benchmarks/results/offline.json``, beside those of other versions of Triton; without it they are compared with what is
written there for this one, and the exit status is 1 if a program spills, does not fit into shared memory, misses its
matrix instruction, or takes more than it did, or if one of the kernel for Hopper stalls by what :mod:`.sass` reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
import triton

from fpe_kernels.backends.triton import adjoint, apply_launch, configs, forward, gradient_launch, hopper
from fpe_kernels.backends.triton.experimental import boxes
from fpe_kernels.backends.triton.launch import Launch
from fpe_kernels.backends.triton.offline import compile_for, resources
from fpe_kernels.backends.triton.packing import Chunk
from fpe_pipeline.atomic_folder import write_text

from . import hopper_tiles, sass
from .candidates import Candidate

TABLE = Path(__file__).parent / "results" / "offline.json"
FIELDS = ("config", "registers", "spills", "shared", "matrix_instructions")  # of a row, in the table

# (head dim, branches): SD 1.5 and SDXL alone, as pairs and with several targets; then the other head dims, and some
# between two, which are held in the tiles of the larger.
WIDTHS = ((40, 1), (40, 2), (40, 5), (64, 1), (64, 2), (64, 5), (80, 2), (80, 4), (160, 1), (160, 2))
LARGE_WIDTHS = ((120, 2), (128, 1), (192, 1), (224, 1), (256, 1))
SMALL_WIDTHS = ((8, 1), (16, 1), (32, 2), (72, 1), (96, 1))
JOINT_WIDTHS = ((64, 1), (64, 2), (64, 4), (88, 1), (96, 2), (112, 1), (128, 1), (128, 2), (160, 2), (256, 1))
BOX_WIDTHS = ((32, 2), (64, 1), (64, 2), (64, 4), (128, 1), (128, 2))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
MATRIX_INSTRUCTION = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
PRODUCTS, GRADIENTS = ("apply", "replay", "adjoint"), ("grad_query", "grad_key")

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Program:
    """One compiled program: a kernel for a chip, a dtype, a width and a kind of input.

    ``inputs`` names what sets it apart, joined by "+": even (whole tiles) or ragged (masked ones); short (few tokens);
    cross (77 keys); bias (for every score), padding (one for all queries) or rows (one for all keys); weighted (every
    query); mixed (a map with fewer rows in the same launch); later (not the first chunk of columns); wide (offsets
    past 2³¹); lengths (a number of keys for each map); grouped (four query heads share one of keys and values);
    unrounded (a float32 output, to be merged) or prior (merged with one over other keys); the kernel for Hopper adds
    its tiles, such as 128x128s2. The dtype "tf32" is float32 whose products may be rounded.
    """

    kernel: str  # apply, replay, boxes, gluon, gluon_replay, adjoint, grad_query or grad_key
    arch: str
    dtype: str
    head_dim: int
    branches: int
    inputs: str

    @property
    def key(self) -> str:
        return "/".join(str(field) for field in asdict(self).values())


def programs(quick: bool, architectures: Sequence[str] = ARCHITECTURES, only: str = "") -> Iterator[Program]:
    """What is compiled: all of it, or in half a minute the pairs that editing spends its time in.

    Args:
        quick: whether it is half a minute.
        architectures: for these chips.
        only: kernels whose name begins so.
    """
    for arch in architectures:
        for program in _quick(arch) if quick else _every(arch):
            if program.kernel.startswith(only):
                yield program


def _quick(arch: str) -> Iterator[Program]:
    if arch in ("sm_80", "sm_90", "sm_100"):
        for head_dim, branches in ((40, 2), (64, 2), (80, 2), (160, 2)):
            yield Program("apply", arch, "float16", head_dim, branches, "even")
        yield Program("apply", arch, "float16", 160, 2, "ragged")
    if arch == "sm_90":
        yield Program("boxes", arch, "float16", 64, 2, "ragged")
        yield Program("gluon", arch, "float16", 40, 2, "ragged+128x64s3")
        yield Program("adjoint", arch, "float16", 64, 2, "ragged+bias")
        yield Program("apply", arch, "float16", 160, 2, "ragged+bias+weighted")
        yield Program("grad_key", arch, "float16", 80, 2, "ragged+bias")
        yield Program("grad_query", arch, "tf32", 160, 1, "ragged")
    if arch == "gfx942":
        for kernel in ("apply", "adjoint", "grad_key"):
            yield Program(kernel, arch, "float16", 64, 2, "ragged")


def _every(arch: str) -> Iterator[Program]:
    def of(kernels: Sequence[str], widths: Sequence[tuple[int, int]], *inputs: str, dtype: str = "float16") -> Iterator:
        for (head_dim, branches), kernel, kind in product(widths, kernels, inputs):
            yield Program(kernel, arch, dtype, head_dim, branches, kind)

    pairs, edges = ((40, 2), (64, 2), (80, 2), (160, 2)), ((64, 2), (160, 2), (256, 1))
    if arch in ("sm_86", "sm_89", "sm_120"):  # the rules of sm_80, with less shared memory
        yield from of(("apply", "adjoint"), (*WIDTHS, *LARGE_WIDTHS), "even")
        yield from of(("apply",), (*WIDTHS, *LARGE_WIDTHS), "ragged+bias+weighted")
        yield from of(("adjoint", *GRADIENTS), ((40, 2), (64, 2), (160, 2), (256, 1)), "ragged", "ragged+bias")
        for dtype in ("float32", "tf32"):
            # Rounded products at 256 columns spill 16 bytes on sm_120 whatever the tile; exact ones do not. Gradients
            # are exact there.
            rounded = arch == "sm_120" and dtype == "tf32"
            widest, gradients = (edges[:2], ()) if rounded else (edges, GRADIENTS)
            yield from of(("apply", "adjoint", *gradients), widest, "ragged+bias", dtype=dtype)
            yield from of(("adjoint",), widest, "ragged", dtype=dtype)
        return
    widths: Sequence[tuple[int, int]] = pairs
    large: Sequence[tuple[int, int]] = (*pairs, (64, 5), (120, 2), (160, 1), (256, 1))  # the widest of each rule
    if arch in ("sm_80", "sm_90"):
        widths, large = WIDTHS, (*WIDTHS, *LARGE_WIDTHS)
        yield from of(("apply",), SMALL_WIDTHS, "even", "ragged+bias+weighted")
        yield from of(("adjoint", "grad_key"), SMALL_WIDTHS, "ragged+bias")
    yield from of(("apply",), large, "even", "ragged", "ragged+bias+weighted")
    yield from of(("apply",), large, "short+ragged", "short+ragged+bias+weighted")
    yield from of(("adjoint", *GRADIENTS), large, "ragged", "ragged+bias")
    yield from of(("apply",), widths, "cross", "ragged+weighted")
    yield from of(("replay",), widths, "ragged")
    yield from of(("apply",), pairs, "short+mixed", "even+bias", "cross+padding")
    yield from of(("grad_query",), pairs, "cross")
    yield from of(("adjoint",), (*pairs, (160, 1)), "short+ragged", "short+ragged+bias")
    yield from of(("replay",), edges, "ragged+weighted", "ragged+bias+weighted")
    yield from of(("apply", "adjoint", *GRADIENTS), edges, "ragged+padding", "ragged+rows", "ragged+wide")
    yield from of(("adjoint", *GRADIENTS), edges, "even")
    yield from of(GRADIENTS, edges, "ragged+bias+later")
    yield from of(("apply", "adjoint", *GRADIENTS), ((64, 2),), "ragged", dtype="bfloat16")
    for dtype in ("float32", "tf32"):
        yield from of(("apply", "adjoint", *GRADIENTS), edges, "ragged+bias", dtype=dtype)
        yield from of(("apply", "grad_query"), edges, "ragged", dtype=dtype)
    if arch in ("sm_80", "sm_90", "sm_100"):
        yield from of(("apply",), JOINT_WIDTHS, "ragged+unrounded", "cross+prior", "cross+lengths+prior")
        yield from of(("replay",), JOINT_WIDTHS, "cross+prior")
        yield from of(("apply", "adjoint", *GRADIENTS), ((64, 2), (128, 1), (256, 1)), "ragged+lengths+grouped")
        yield from of(("apply",), pairs, "ragged+bias+weighted+lengths+grouped", "ragged+bias+weighted+prior")
        yield from of(("adjoint", *GRADIENTS), edges, "ragged+bias+lengths+grouped")
    if arch == "sm_90":
        yield from of(("boxes",), BOX_WIDTHS, "ragged", "ragged+unrounded")
        yield from _gluon(arch)


def _gluon(arch: str) -> Iterator[Program]:
    """The kernel for Hopper: what the tuner offers, where it takes one launch."""
    for head_dim, branches in hopper_tiles.TILES:
        names = hopper_tiles.in_one_launch(head_dim, branches)
        for name in names:
            yield Program("gluon", arch, "float16", head_dim, branches, f"ragged+{name}")
        for name in names[:1]:
            yield Program("gluon_replay", arch, "float16", head_dim, branches, f"ragged+{name}")
            if branches == 2:
                yield Program("gluon", arch, "float16", head_dim, branches, f"even+{name}")
    for head_dim, branches in ((64, 2), (64, 4), (128, 1), (128, 2)):
        name = hopper_tiles.in_one_launch(head_dim, branches)[0]
        yield Program("gluon", arch, "float16", head_dim, branches, f"ragged+unrounded+{name}")
    for name in hopper_tiles.SHORT:
        yield Program("gluon", arch, "float16", 64, 2, f"short+ragged+{name}")
    for head_dim in (40, 64):
        yield Program("gluon", arch, "float16", head_dim, 3, "ragged+128x64s3")  # each a product of its own
    yield Program("gluon", arch, "bfloat16", 64, 2, "ragged+128x128s2")


def launch_of(program: Program) -> Launch:
    """The launch, on tensors without storage, laid out as a processor's projections are."""
    dtype, kinds, heads = _DTYPES[program.dtype], program.inputs.split("+"), 8
    tokens = (256 if "short" in kinds else 4096) - ("ragged" in kinds)
    keys = 77 if "cross" in kinds else tokens
    gradient = program.kernel in GRADIENTS
    limit = configs.MAX_GRADIENT_COLUMNS if gradient else configs.MAX_COLUMNS[dtype.itemsize]
    limit = forward.MAX_MERGED_COLUMNS if "prior" in kinds else limit
    value_dim = min(program.head_dim, limit)
    branches = min(program.branches, limit // value_dim)
    # As many rows as pass 2³¹ elements.
    batch = 2**31 // (tokens * heads * value_dim) + 2 if "wide" in kinds else branches

    def projection(batch: int, length: int, width: int, heads: int = heads, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(batch, length, heads, width, dtype=dtype, device="meta").transpose(1, 2)

    key_heads, lengths = heads // (4 if "grouped" in kinds else 1), (keys,) if "lengths" in kinds else None
    query, key = projection(1, tokens, program.head_dim), projection(1, keys, program.head_dim, key_heads)
    wide, value = projection(batch, tokens, value_dim), projection(batch, keys, value_dim, key_heads)
    by_head = projection(batch, keys, value_dim)
    single = projection(batch, tokens, value_dim, dtype=torch.float32)
    product, prior = (single if "unrounded" in kinds else wide), (single if "prior" in kinds else None)
    logsumexp = torch.empty(1, heads, tokens, device="meta")
    bias = None
    for kind, extent in (("bias", (heads, tokens, keys)), ("padding", (1, 1, keys)), ("rows", (heads, tokens, 1))):
        if kind in kinds:
            bias = torch.empty(1, *extent, dtype=dtype, device="meta").expand(1, heads, tokens, keys)
    row_weight = torch.empty(batch, heads, tokens, dtype=dtype, device="meta") if "weighted" in kinds else None
    table = ((0, *range(branches)), *([(1, *[0] * branches)] if "mixed" in kinds else []))
    chunk = Chunk(table, 0, value_dim, first="later" not in kinds)
    shape = (program.arch, program.head_dim, branches * value_dim, dtype.itemsize, bias is not None)
    tf32 = program.dtype == "tf32"
    if gradient:
        of_query = program.kernel == "grad_query"
        own, other, x, y = (query, key, wide, value) if of_query else (key, query, value, wide)
        own_bias = bias if bias is None or of_query else bias.transpose(2, 3)
        # Of a key that several query heads share, each gives its part, in float32.
        summed = not chunk.first or ("grouped" in kinds and not of_query)
        out_dtype = torch.float32 if summed else dtype
        out = projection(1, own.shape[2], program.head_dim, dtype=out_dtype)
        config = configs.score_config(*shape, other.shape[2], tf32)
        gradients = gradient_launch.GradientTensors(own, other, x, y, own_bias, out, logsumexp, logsumexp)
        launch = gradient_launch.prepare(gradients, chunk, 0.1, of_query, config, lengths)
    elif program.kernel == "adjoint":
        config = configs.resident_config(*shape, heads, keys, tokens, tf32)
        products = adjoint.AdjointTensors(query, key, wide, bias, by_head, logsumexp)
        launch = adjoint.prepare(products, chunk, 0.1, config, lengths)
    else:
        extents = len(chunk.table) * heads, tokens, keys, tf32
        config = configs.forward_config(*shape, *extents)
        if config.gluon:  # these kernels serve what that one refuses
            config = configs.resident_config(*shape, *extents, adjoint=False)
        config = configs.for_unrounded(config, branches * value_dim) if "unrounded" in kinds else config
        if program.kernel.startswith("gluon"):
            config, known = hopper_tiles.config_of(kinds[-1]), program.kernel == "gluon_replay"
            (launch,) = hopper.launches(query, key, value, chunk, 0.1, product, logsumexp, known, config)
            return launch
        if program.kernel == "boxes":
            config = replace(config.general(), descriptors=True)
            return boxes.prepare(query, key, value, chunk, 0.1, product, logsumexp, config)
        priors = prior, None if prior is None else logsumexp
        tensors = apply_launch.ApplyTensors(query, key, value, bias, product, logsumexp, row_weight, *priors)
        launch = apply_launch.prepare(tensors, chunk, 0.1, program.kernel == "replay", prior is None, config, lengths)
    return replace(launch, constants={**launch.constants, "PRECISION": "tf32"}) if tf32 else launch


def compile_program(program: Program) -> dict:
    """The row of one program."""
    launch = launch_of(program)
    compiled = compile_for(launch, program.arch)
    taken = resources(compiled, program.arch)
    row = {
        **asdict(program),
        "config": str(Candidate.of(launch.config)),
        "registers": taken.registers,
        "spills": taken.spills,
        "shared": taken.shared,
        "matrix_instructions": list(taken.matrix_instructions),
    }
    if program.kernel.startswith("gluon"):
        found = sass.read(sass.disassemble(compiled.asm["cubin"]))
        row["stalls"] = sass.stalls(found, products_of(launch), shuffles_of(launch))
    return row


def products_of(launch: Launch) -> int:
    """How many products with values are in flight together in a launch of the kernel for Hopper."""
    constants = launch.constants
    return constants["BRANCHES"] // constants["BUNDLE"] * (2 if constants["VALUE_1"] else 1)


def shuffles_of(launch: Launch) -> int:
    """How many shuffles a tile of such a launch needs: two a row of a thread, whose maximum four threads find."""
    return 0 if launch.constants["KNOWN"] else 2 * (launch.constants["ROWS"] // 32)


def complaints(row: dict, committed: dict | None) -> list[str]:
    """What is wrong with a row, by itself and beside the committed one (of the same compiler)."""
    found = list(row.get("stalls", ()))
    if row["spills"]:
        found.append(f"spills {row['spills']} bytes a thread")
    if row["shared"] > configs.SHARED_MEMORY[row["arch"]]:
        found.append(f"takes {row['shared']} bytes of shared memory of {configs.SHARED_MEMORY[row['arch']]}")
    # Rounded products of float32 have no layout for the newest instructions at every width.
    expected = MATRIX_INSTRUCTION.get(row["arch"], "mma.sync") if row["dtype"] != "tf32" else ""
    if row["dtype"] != "float32" and not any(name.startswith(expected) for name in row["matrix_instructions"]):
        found.append(f"has no {expected or 'matrix instruction'}")
    if committed is not None:
        found += [
            f"takes {row[name]} {name}, {committed[name]} before"
            for name in ("registers", "shared")
            if row[name] > committed[name]
        ]
    return found


def read_table(path: Path = TABLE) -> dict[str, dict[str, dict]]:
    """The committed rows by version of triton and key of the program; empty without a file."""
    if not path.exists():
        return {}
    written = json.loads(path.read_text(encoding="utf-8"))
    fields = written.pop("fields")
    return {
        version: {key: dict(zip(fields, values, strict=True)) for key, values in rows.items()}
        for version, rows in written.items()
    }


def write_table(table: dict[str, dict[str, dict]], path: Path = TABLE) -> None:
    """The inverse of :func:`read_table`: a line a program."""
    parts = [f' "fields": {json.dumps(FIELDS)}']
    for version in sorted(table):
        rows = table[version]
        lines = [f"  {json.dumps(key)}: {json.dumps([rows[key][name] for name in FIELDS])}" for key in sorted(rows)]
        parts.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    path.parent.mkdir(exist_ok=True)
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=__doc__.split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="compile the configurations of pairs only")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="only for these chips")
    parser.add_argument("--only", default="", metavar="KERNEL", help="kernels whose name begins so, such as gluon")
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name} instead of comparing with it")
    arguments = parser.parse_args(argv)
    if arguments.update and arguments.quick:
        parser.error("--update writes the whole table: leave out --quick")
    table = read_table()
    committed = {} if arguments.update else table.get(triton.__version__, {})
    rows, failed = {}, 0
    for program in programs(arguments.quick, arguments.arch, arguments.only):
        row = rows[program.key] = compile_program(program)
        found = complaints(row, committed.get(program.key))
        failed += bool(found)
        print(
            f"{program.key:52} {row['config']:12} {row['registers']:4} registers {row['shared']:7} bytes shared  "
            f"{', '.join(row['matrix_instructions']) or 'scalar':16} {'; '.join(found) or 'ok'}",
            flush=True,
        )
    if arguments.update:
        others = {
            key: row
            for key, row in table.get(triton.__version__, {}).items()
            if key.split("/")[1] not in arguments.arch or not key.startswith(arguments.only)
        }
        write_table({**table, triton.__version__: {**others, **rows}})
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
