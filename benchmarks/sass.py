"""Read what the assembler made of a program: the loops over tiles, and what in them waits for what.

Registers and spills do not show it when the assembler gives up on asynchronous products and waits for each one; the
order of a loop's instructions does. Of Hopper's instructions, HGMMA is a product of a warpgroup, in flight until a
WARPGROUP.DEPBAR allows fewer products in flight than there are; MUFU.EX2 is an exponential, BAR.SYNC a barrier of
several warps, SHFL a number from another thread of the warp, LDS and STS copy between registers and shared memory, LDL
and STL spill.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_JUMPS = ("BRA", "BRX", "EXIT", "RET", "JMP")


@dataclass(frozen=True)
class Loop:
    """A loop that multiplies: its instructions from its head on, without predicates."""

    instructions: tuple[str, ...]

    def count(self, *operations: str) -> int:
        """How many instructions are one of these operations."""
        return sum(instruction.startswith(operations) for instruction in self.instructions)

    @property
    def products(self) -> int:
        return self.count("HGMMA")

    @property
    def waits(self) -> list[int]:
        """How many products each wait leaves in flight, in order."""
        return [depth for name, depth in self._events() if name == "wait"]

    @property
    def hidden_exponentials(self) -> float:
        """The share of exponentials that are taken while products are in flight."""
        hidden, total, in_flight = 0, 0, False
        for name, depth in self._events():
            if name == "exponential":
                total += 1
                hidden += in_flight
            else:
                in_flight = name == "product" or depth > 0
        return hidden / total if total else 0.0

    @property
    def barriers(self) -> int:
        return self.count("BAR.")

    @property
    def copies(self) -> int:
        """Instructions that copy between registers and shared memory: V that is not read where it lies."""
        return self.count("LDS", "STS")

    @property
    def serialised(self) -> bool:
        """Whether (nearly) every product is waited for before the next."""
        waits = sum(depth == 0 for depth in self.waits)
        return self.products >= 4 and waits >= self.products - 1

    def _events(self) -> list[tuple[str, int]]:
        found = []
        for instruction in self.instructions:
            if instruction.startswith("HGMMA"):
                found.append(("product", 1))
            elif instruction.startswith("MUFU.EX2"):
                found.append(("exponential", 0))
            elif instruction.startswith("WARPGROUP.DEPBAR"):
                found.append(("wait", int(instruction.rsplit(",", 1)[1], 16)))
        return found


@dataclass(frozen=True)
class Program:
    """A program's loops that multiply, one for each kind of warp that does, and what it spills anywhere."""

    loops: tuple[Loop, ...]
    spills: int  # instructions that write registers to memory or read them back

    @property
    def serialised(self) -> bool:
        return any(loop.serialised for loop in self.loops)


def disassemble(cubin: bytes) -> str:
    """The text of a compiled program, by the tool that Triton brings.

    Raises:
        subprocess.CalledProcessError: for what is no program.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def read(text: str) -> Program:
    """What :func:`disassemble` printed."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label.group(1)] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            # What a conditional jump skips is next; without a predicate nothing is.
            always = "@" not in line.split("*/", 1)[1][:24]
            instructions.append(instruction.group(1) + ("" if always else " ?"))
    loops = []
    for places in _innermost(_followers(instructions, labels), instructions):
        body = [instructions[place].removesuffix(" ?") for place in places]
        if any(instruction.startswith("HGMMA") for instruction in body):
            loops.append(Loop(tuple(body)))
    spills = sum(instruction.startswith(("LDL", "STL")) for instruction in instructions)
    return Program(tuple(loops), spills)


def _innermost(followers: list[list[int]], instructions: list[str]) -> list[list[int]]:
    """The cycles that multiply and hold no other cycle that does: a loop over tiles holds the one over their keys."""
    found = []
    for places in _cycles(followers):
        if not any(instructions[place].startswith("HGMMA") for place in places):
            continue
        inside = set(places[1:])  # without its head, what is still a cycle is another loop
        rest = [
            [to for to in follows if to in inside] if place in inside else [] for place, follows in enumerate(followers)
        ]
        found += _innermost(rest, instructions) or [places]
    return found


def _followers(instructions: list[str], labels: dict[str, int]) -> list[list[int]]:
    """Where each instruction may go on. Jumps by a table (to what a warp of this kind does) are left out."""
    followers = []
    for place, instruction in enumerate(instructions):
        name = instruction.split()[0].split(".")[0]
        jumps = name in _JUMPS
        to = [labels[target] for target in _TARGET.findall(instruction) if target in labels] if name == "BRA" else []
        # A jump to itself ends a program.
        on = [place + 1] if (not jumps or instruction.endswith("?")) and place + 1 < len(instructions) else []
        followers.append([follower for follower in to + on if follower != place])
    return followers


def _cycles(followers: list[list[int]]) -> list[list[int]]:
    """The sets of instructions that reach one another, each from its first entry on: Tarjan's algorithm."""
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    kept: list[int] = []
    on_stack: set[int] = set()
    cycles = []
    for root in range(len(followers)):
        if root in order:
            continue
        work = [(root, iter(followers[root]))]
        order[root] = lowest[root] = len(order)
        kept.append(root)
        on_stack.add(root)
        while work:
            place, rest = work[-1]
            follower = next(rest, None)
            if follower is None:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[place])
                if lowest[place] == order[place]:
                    members: list[int] = []
                    while not members or members[-1] != place:
                        members.append(kept.pop())
                        on_stack.discard(members[-1])
                    if len(members) > 1:
                        cycles.append(_from_head(sorted(members), place))
            elif follower not in order:
                order[follower] = lowest[follower] = len(order)
                kept.append(follower)
                on_stack.add(follower)
                work.append((follower, iter(followers[follower])))
            elif follower in on_stack:
                lowest[place] = min(lowest[place], order[follower])
    return cycles


def _from_head(places: list[int], head: int) -> list[int]:
    cut = places.index(head)
    return places[cut:] + places[:cut]


def stalls(program: Program, products: int | None = None, shuffles: int | None = None) -> list[str]:
    """What keeps the tensor cores waiting in a program of the kernel for Hopper; nothing is what is wanted.

    Args:
        program: compiled for sm_90.
        products: products of probabilities and values in a step, in flight together; default: any number.
        shuffles: of a tile, what finding the maxima of a thread's rows takes; default: any number.
    """
    found = [f"spills ({program.spills} instructions)"] if program.spills else []
    if not program.loops:
        return [*found, "has no loop of products"]
    for loop in program.loops:
        depths = loop.waits
        if loop.serialised:
            found.append(f"waits for every product ({len(depths)} waits, {loop.products} products)")
        elif len(depths) != 2 or depths[0] == 0 or depths[1] != 0 or (products and depths[0] != products):
            found.append(f"waits down to {depths} products in flight, not to [{products or 'some'}, 0]")
        if loop.hidden_exponentials < 1.0:
            found.append(f"takes {1 - loop.hidden_exponentials:.0%} of the exponentials with no product in flight")
        if loop.barriers > MOST_BARRIERS:
            found.append(f"has {loop.barriers} barriers a tile, at most {MOST_BARRIERS} wanted")
        if loop.copies:
            found.append(f"copies between registers and shared memory ({loop.copies} instructions a tile)")
        if shuffles is not None and loop.count("SHFL") > shuffles:
            found.append(f"shuffles {loop.count('SHFL')} times a tile, at most {shuffles} wanted")
    return list(dict.fromkeys(found))


MOST_BARRIERS = 5
"""Of a warpgroup, a tile: before it says which slot is empty and whose turn is next, and what the compiler adds."""
