"""From rows of the suite `tuning` to `fpe_kernels/backends/triton/tuned.py`: what measured faster than the rules.

An entry stands for every shape of an architecture, a head width, a packed width and a length class; where several
measured cases share one, the choice with the best geometric mean over all of them is taken. What does not gain
:data:`MARGIN` in four rounds of five leaves things as they are: the best of some forty choices owes part of its lead to
luck, and would not gain that much again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from math import prod
from pathlib import Path

from fpe_kernels.backends.triton import configs, tuned
from fpe_kernels.backends.triton.packing import chunks, split_width
from fpe_pipeline.atomic_folder import write_text

from .candidates import Candidate, Launches
from .cases import Case
from .cost import chip_of
from .rows import ROOT, Ratio, Row

TABLE = ROOT / "fpe_kernels" / "backends" / "triton" / "tuned.py"
MARGIN = 1.02

Key = tuple[str, int, int, int]


@dataclass
class Table:
    """The two tables of `tuned.py`."""

    forward: dict[Key, tuple] = field(default_factory=lambda: dict(tuned.FORWARD))
    together: dict[Key, bool] = field(default_factory=lambda: dict(tuned.TOGETHER))

    def text(self) -> str:
        """The module, formatted as it is committed."""
        return _MODULE.format(forward=_entries(self.forward), together=_entries(self.together))


_MODULE = '''\
"""What was measured faster than the rules of :mod:`.configs`; written by ``python -m benchmarks.tune --apply ROWS``."""

from __future__ import annotations

FORWARD: dict[tuple[str, int, int, int], tuple[int, int, int, int, bool, bool, int, bool, bool]] = {forward}
"""(architecture, head width, packed width, length class) -> the fields of a ``Config``, for 16-bit ``apply``."""

TOGETHER: dict[tuple[str, int, int, int], bool] = {together}
"""(architecture, head width, widest packed width, length class) -> whether a mixed batch is one launch."""
'''


def _entries(table: dict) -> str:
    lines = [f'    ("{key[0]}", {key[1]}, {key[2]}, {key[3]}): {table[key]},\n' for key in sorted(table)]
    return "{\n" + "".join(lines) + "}" if lines else "{}"


def key_of(case: Case, arch: str) -> Key:
    """The entry of the table that serves the widest launch of ``case``."""
    widest = max(
        chunk.branches * (chunk.stop - chunk.start)
        for chunk in chunks(case.map_index, case.maps, case.head_dim, configs.MAX_COLUMNS[2])
    )
    return arch, sum(split_width(case.head_dim)), sum(split_width(widest)), configs.length_class(case.tokens)


def architecture_of(row: Row) -> str:
    """The key of the rules for the GPU of ``row``.

    Raises:
        ValueError: if its data sheet is not in :data:`benchmarks.cost.SHEETS`.
    """
    chip = chip_of(row)
    if chip is not None:
        return chip.arch
    raise ValueError(
        f"which architecture is {row.device!r}? Say it with --arch, one of {', '.join(configs.SHARED_MEMORY)}."
    )


def learn(rows: Iterable[Row], arch: str | None = None) -> tuple[Table, list[str]]:
    """The committed table with what ``rows`` teach, and a line for each change.

    Args:
        rows: of the suite `tuning`, taken on a GPU in half precision; others are passed over.
        arch: key of ``configs.SHARED_MEMORY``; by default the device of the rows says it.
    """
    if arch is not None and arch not in configs.SHARED_MEMORY:
        raise ValueError(f"arch must be one of {', '.join(configs.SHARED_MEMORY)}; got {arch!r}.")
    chosen = [
        r for r in rows if r.suite == "tuning" and r.on_gpu and r.samples_ms and r.dtype in ("float16", "bfloat16")
    ]
    if not chosen:
        raise ValueError("no times of suite 'tuning' from a GPU in half precision: `make gpu` writes cuda-tuning.json")
    gains: dict[Key, list[dict[str, Ratio]]] = defaultdict(list)
    pairs: dict[Key, list[Ratio]] = defaultdict(list)
    by_case: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in chosen:
        by_case[row.case, row.device][row.provider] = row
    for (name, _), named in by_case.items():
        ours = {provider.split("@")[1]: row for provider, row in named.items() if provider.startswith("fpe-triton@")}
        case, committed = Case.parse(name), named.get("fpe-triton")
        key = key_of(case, arch or architecture_of(next(iter(named.values()))))
        one, two = (ours.pop(str(Launches(together)), None) for together in (True, False))
        if one and two:
            pairs[key].append(Ratio.of(one, two))
        elif committed and ours:
            gains[key].append({choice: Ratio.of(row, committed) for choice, row in ours.items()})
    table, lines = Table(), []
    for key, ratios in pairs.items():
        gain = _mean(ratio.median for ratio in ratios)
        sure = max(_mean(ratio.low for ratio in ratios), 1 / _mean(ratio.high for ratio in ratios))
        if sure >= MARGIN and table.together.get(key) != (gain > 1):
            table.together[key] = gain > 1
            lines.append(f"{key}: {Launches(gain > 1)}, {max(gain, 1 / gain):.2f} × faster than {Launches(gain <= 1)}")
    for key, found in gains.items():
        best = _best(found)
        if best and _mean(ratios[best].low for ratios in found) >= MARGIN:
            table.forward[key] = astuple(Candidate.parse(best))
            lines.append(f"{key}: {best}, {_mean(ratios[best].median for ratios in found):.2f} × faster than before")
    return table, lines


def _mean(factors: Iterable[float]) -> float:
    """The geometric mean."""
    listed = list(factors)
    return prod(listed) ** (1 / len(listed))


def _best(found: list[dict[str, Ratio]]) -> str:
    """The choice with the best mean of those that were measured in every case; "" where there is none."""
    common = sorted(set.intersection(*map(set, found)))
    return max(common, key=lambda choice: _mean(ratios[choice].median for ratios in found), default="")


def take_over(rows: Iterable[Row], arch: str | None = None, path: Path = TABLE) -> str:
    """Write what ``rows`` teach to ``path``; what was changed, and what comes next."""
    table, lines = learn(rows, arch)
    if not lines:
        return f"nothing gains {MARGIN - 1:.0%}: {path.name} stays as it is"
    write_text(path, table.text())
    return "\n".join([*lines, f"written to {path}; now `python -m benchmarks.offline --update`, and commit both"])
