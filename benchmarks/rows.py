"""One measurement, one row: the schema that everything in `results/` follows.

A row is complete by itself: what ran, on what, at which commit, how often, how long, how much memory, how
wrong. Tables, figures and tests read rows and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fpe_pipeline.atomic_folder import write_text

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "diffusers", "fpe-kernels", "flash-attn", "xformers", "sageattention")

STATUSES = {
    "ok": "correct, and measured",
    "missing": "the provider cannot run here; `reason` says why",
    "wrong": "the result misses its error budget, so it gets no time",
    "failed": "the provider raised; `reason` says what",
}


@dataclass(frozen=True)
class Environment:
    """What a measurement depends on and a case does not say."""

    device: str
    threads: int
    versions: dict[str, str]
    commit: str
    date: str

    @classmethod
    def read(cls, device: str) -> Environment:
        """`device` is "cpu" or "cuda"; its marketing name goes into the rows."""
        import torch

        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
        # The module's own word for it: a source tree on sys.path has no distribution metadata.
        versions["torch"] = str(torch.__version__)
        return cls(
            device=f"{device.split(':')[0]}: {device_name(device)}",
            threads=torch.get_num_threads(),
            versions=versions,
            commit=commit(),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )


@cache
def device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model} ({os.cpu_count()} cores)"


@cache
def commit() -> str:
    """The short commit, with "+" after it where the tree differs from it.

    A tree that travels without its history says its commit in the environment variable FPE_COMMIT.
    """
    if os.environ.get("FPE_COMMIT"):
        return os.environ["FPE_COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # What a run writes is not what it measures: a row taken after others were saved is still of this commit.
        written = [":!benchmarks/results", ":!benchmarks/figures", ":!*.md"]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Row:
    """One case of one provider. Times in milliseconds, memory in MB (10^6 bytes), errors relative."""

    suite: str
    case: str
    provider: str
    dtype: str
    device: str
    status: str
    reason: str = ""
    # One number a round, in the order of the rounds: providers of one case and run share their rounds, so
    # the i-th sample of two of them were taken moments apart and their quotient means something.
    samples_ms: tuple[float, ...] = ()
    peak_mb: float | None = None
    flops: int | None = None
    limit_ms: float | None = None
    error: float | None = None
    budget: float | None = None
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {self.status!r}")
        if self.samples_ms and self.status != "ok":
            raise ValueError(f"a row that is {self.status} ({STATUSES[self.status]}) carries no time")
        object.__setattr__(self, "samples_ms", tuple(self.samples_ms))

    @classmethod
    def new(cls, environment: Environment, **values: Any) -> Row:
        return cls(**asdict(environment), **values)

    @property
    def on_gpu(self) -> bool:
        return not self.device.startswith("cpu")

    @property
    def machine(self) -> str:
        """Device, dtype, versions and commit in a line: what stands beside a table."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if name != "fpe-kernels")
        threads = "" if self.on_gpu else f", {self.threads} thread{'s' * (self.threads > 1)}"
        name = self.device.split(": ", 1)[-1]
        return f"{name}{threads}, {self.dtype}; {versions}; commit {self.commit}, {self.date}"

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a row unique in a file."""
        versions = ",".join(f"{name}={version}" for name, version in sorted(self.versions.items()))
        return (self.suite, self.case, self.provider, self.device, self.dtype, versions, self.commit, str(self.threads))

    def quantile(self, share: float) -> float | None:
        return quantile(self.samples_ms, share) if self.samples_ms else None

    @property
    def median_ms(self) -> float | None:
        return self.quantile(0.5)

    @property
    def p20_ms(self) -> float | None:
        return self.quantile(0.2)

    @property
    def p80_ms(self) -> float | None:
        return self.quantile(0.8)

    @property
    def percent_of_limit(self) -> float | None:
        """How near the machine's own ceilings for the work that the case needs."""
        if self.limit_ms is None or self.median_ms is None:
            return None
        return 100 * self.limit_ms / self.median_ms


def quantile(samples: Sequence[float], share: float) -> float:
    """The quantile by linear interpolation between order statistics."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Ratio:
    """How many times faster one row is than another, by the quotients of paired samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, faster: Row, slower: Row) -> Ratio:
        if len(faster.samples_ms) != len(slower.samples_ms) or not faster.samples_ms:
            raise ValueError(
                f"{faster.provider} has {len(faster.samples_ms)} samples of {faster.case} and {slower.provider} has "
                f"{len(slower.samples_ms)}: a ratio needs rounds that both took part in"
            )
        quotients = [s / f for f, s in zip(faster.samples_ms, slower.samples_ms, strict=True)]
        return cls(statistics.median(quotients), quantile(quotients, 0.2), quantile(quotients, 0.8))

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.low:.2f}–{self.high:.2f})"


def merge(*groups: Iterable[Row]) -> list[Row]:
    """All rows, each key once; the later row stands where two have the same key."""
    rows: dict[tuple[str, ...], Row] = {}
    for group in groups:
        for row in group:
            rows.pop(row.key, None)
            rows[row.key] = row
    return list(rows.values())


def replaced(before: Iterable[Row], now: Iterable[Row]) -> list[Row]:
    """``now`` after the rows of ``before`` whose cases it does not measure again, at this or another commit.

    A case goes as a whole: rows of different rounds have no ratio. Those of providers that are missing everywhere stand
    for themselves.
    """

    def subject(row: Row) -> tuple[object, ...]:
        return (row.suite, row.case, row.provider if row.case == "any" else "", row.device, row.dtype, row.threads)

    now = list(now)
    again = {subject(row) for row in now}
    return [*(row for row in before if subject(row) not in again), *now]


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON, one a line, so that a change to one of them is a change to one line."""
    lines = [json.dumps(_plain(row), ensure_ascii=False) for row in merge(rows)]
    text = f'{{"schema": {SCHEMA}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    write_text(path, text)


def read(path: str | Path) -> list[Row]:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: rows of schema {content.get('schema')!r}; this version reads schema {SCHEMA}")
    known = {f.name for f in fields(Row)}
    rows = []
    for number, values in enumerate(content["rows"], 1):
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"{path}: row {number} has unknown fields: {', '.join(sorted(unknown))}")
        rows.append(Row(**values))
    if len({row.key for row in rows}) != len(rows):
        fields_of_key = "suite, case, provider, device, dtype, versions, commit, threads"
        raise ValueError(f"{path}: two rows have the same key ({fields_of_key})")
    return rows


def read_all(folder: str | Path) -> list[Row]:
    """The rows of every file named after a kind of device; other results lie in the same folder."""
    paths = [path for kind in ("cpu", "cuda") for path in sorted(Path(folder).glob(f"{kind}-*.json"))]
    return [row for path in paths for row in read(path)]


def _plain(row: Row) -> dict[str, Any]:
    """The row as JSON holds it: absent values left out, samples to four figures."""
    values = {name: value for name, value in asdict(row).items() if value not in (None, "", ())}
    if row.samples_ms:
        values["samples_ms"] = [float(f"{sample:.4g}") for sample in row.samples_ms]
    for name in ("peak_mb", "limit_ms", "error", "budget"):
        if name in values:
            values[name] = float(f"{values[name]:.4g}")
    return values
