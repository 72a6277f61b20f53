"""The train stage: models by name, each trained in a process of its own within its share of the time, and resumable.

What comes back is bounded: the exported model and the checkpoints that a later run goes on from are packed into
archives, which are cut into parts no larger than the bound.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fpe_pipeline import endings
from fpe_pipeline.embedded.training.timebox import GRACE

from ..rows import ROOT
from .records import say

if TYPE_CHECKING:
    from .context import Context

PACKING = 15.0  # seconds that are kept for it
# Of these, for a training to end by itself: its own guard does so GRACE seconds after its time, with its model whole.
ENDING = GRACE + 3
CACHES = ("scenes", "held_out", "latents.pt")  # are made again in less time than they take to travel


@dataclass(frozen=True)
class Recipe:
    """`command` trains into a work folder, exports into another, and ends by itself after the minutes it is given."""

    command: Callable[[Path, Path, float, bool], list[str]]


def _embedded(work: Path, output: Path, minutes: float, dry: bool) -> list[str]:
    command = [sys.executable, "-u", "-m", "fpe_pipeline.embedded.training.train"]
    command += [
        "--preset",
        "smoke" if dry else "gpu",
        "--device",
        "cpu" if dry else "cuda",
        "--max-minutes",
        f"{minutes:.3f}",
    ]
    return [*command, "--work", str(work), "--output", str(output)]


def _embedded_sd3(work: Path, output: Path, minutes: float, dry: bool) -> list[str]:
    command = [sys.executable, "-u", "-m", "fpe_pipeline.embedded.training.train_flow"]
    command += ["--preset", "smoke" if dry else "gpu", "--device", "cpu" if dry else "cuda"]
    return [*command, "--max-minutes", f"{minutes:.3f}", "--work", str(work), "--output", str(output)]


RECIPES = {"embedded": Recipe(_embedded), "embedded-sd3": Recipe(_embedded_sd3)}


def train_models(context: Context) -> None:
    """Train what the option `models` names, one after the other, each with an equal share of what is left."""
    names = context.option("models", "embedded").split(",")
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        say("failure", what="train", why=f"unknown models {', '.join(unknown)}; known are {', '.join(RECIPES)}")
        names = [name for name in names if name in RECIPES]
    bound = int(float(context.option("max-mib", "16")) * 2**20)
    for number, name in enumerate(names):
        share = context.left() / (len(names) - number) - PACKING
        if share <= 0:
            say("failure", what=f"training {name}", why="no time was left for it")
            continue
        say("begin", what=f"training {name}")
        work, output = context.out / f"{name}-work", context.out / f"{name}-model"
        problem = _train(RECIPES[name].command(work, output, share / 60, context.dry), share + ENDING)
        if problem:
            say("failure", what=f"training {name}", why=problem)
        packed = [part for folder in (output, work) if folder.exists() for part in pack(folder, context.out, bound)]
        files = ", ".join(part.name for part in packed) or "nothing"
        say("note", text=f"{name}: {files}; unpacked beside each other, `make gpu-train` goes on from there")
        say("end", what=f"training {name}")


def _train(command: list[str], seconds: float) -> str:
    """What went wrong; "" for nothing."""
    begun = time.monotonic()
    with endings.orderly(), subprocess.Popen(command, cwd=ROOT) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"killed after {time.monotonic() - begun:.0f} s: it did not end by itself; its checkpoints stay"
        except KeyboardInterrupt:  # of the stage's processes together: the training keeps its last step, and ends
            process.wait()
            raise
    return f"exit status {status}" if status else ""


def pack(folder: Path, out: Path, bound: int, without: Iterable[str] = CACHES) -> list[Path]:
    """`folder` as a compressed archive in `out`, in parts of at most `bound` bytes; the parts, in order.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     source = Path(place) / "model"
    ...     source.mkdir()
    ...     _ = (source / "weights").write_bytes(bytes(range(256)) * 40)
    ...     parts = pack(source, Path(place), 100)
    ...     all(part.stat().st_size <= 100 for part in parts), len(parts) > 1
    (True, True)
    """
    left_out = set(without)
    whole = out / f"{folder.name}.tar.gz"
    for earlier in out.glob(f"{whole.name}*"):  # parts of a larger archive would stand behind those of this one
        earlier.unlink()
    with tarfile.open(whole, "w:gz", compresslevel=6) as archive:
        for path in sorted(folder.iterdir()):
            if path.name not in left_out:
                archive.add(path, f"{folder.name}/{path.name}")
    if whole.stat().st_size <= bound:
        return [whole]
    parts: list[Path] = []
    with whole.open("rb") as file:
        while chunk := file.read(bound):
            parts.append(out / f"{whole.name}.{len(parts):03}")
            parts[-1].write_bytes(chunk)
    whole.unlink()
    return parts
