"""A disk that is full at one write, whichever, costs one job; the next run brings what is missing."""

import builtins
import errno
import io
import os
from pathlib import Path

import pytest

from fpe_pipeline.batches import summary, workers
from fpe_pipeline.batches.making import SOURCE, Made
from tests.pipeline.batches.conftest import batch, manifest, pictures, written

FULL = OSError(errno.ENOSPC, "No space left on device")
JOBS = 4


class StandIn:
    """Makes the bytes of files without a model."""

    def __init__(self, settings, weights):
        pass

    def make(self, group, wanted, sources=True):
        if sources:
            yield Made(SOURCE, b"the source", "0", {})
        for job in group.jobs:
            if job.name in wanted:
                yield Made(job.name, job.target.encode(), job.name, {"mse": float(job.name)})


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Maker", StandIn)
    rows = [{"source": f"source {n % 2}", "target": f"target {n}"} for n in range(JOBS)]
    return written(tmp_path / "jobs.jsonl", rows)


class Disk:
    """Counts what is written to and brought to the disk below a folder, and is full at one of these times."""

    def __init__(self, monkeypatch, folder, full_at=None):
        self.calls, self.full_at = 0, full_at
        self.folder = str(folder)
        self._wrap(monkeypatch, os, "fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
        self._wrap(monkeypatch, os, "replace", lambda source, target: str(target))
        self._wrap(monkeypatch, os, "mkdir", lambda path, *mode: "" if os.path.isdir(path) else str(path))
        self._wrap(monkeypatch, Path, "write_bytes", lambda path, data: str(path))
        self._wrap(monkeypatch, Path, "write_text", lambda path, text: str(path))
        real = io.open

        def opened(path, mode="r", *arguments, **options):
            if "a" in mode:
                self.spend(str(path))
            return real(path, mode, *arguments, **options)

        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)

    def _wrap(self, monkeypatch, owner, name, place):
        real = getattr(owner, name)

        def wrapped(*arguments, **options):
            self.spend(place(*arguments))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapped)

    def spend(self, place):
        if not place.startswith(self.folder):
            return
        self.calls += 1
        if self.calls - 1 == self.full_at:
            raise FULL


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_full_at_any_write(jobs, tmp_path, monkeypatch, every):
    monkeypatch.setattr(summary, "_plot", lambda lines, names, path: path.write_bytes(b"a plot"))
    undisturbed = tmp_path / "undisturbed"
    assert batch(jobs, undisturbed).failed == {}
    with monkeypatch.context() as patch:
        disk = Disk(patch, tmp_path / "counted")
        batch(jobs, tmp_path / "counted")
    assert disk.calls > 5 * JOBS  # a picture's bytes, its sync, its rename, its folder's sync, its line's
    costs = []
    for number in range(0, disk.calls, every):
        out = tmp_path / f"full-{number}"
        with monkeypatch.context() as patch:
            Disk(patch, out, full_at=number)
            finished = batch(jobs, out)
        costs.append(len(finished.failed))
        (reason,) = finished.failed.values() or [f"nothing said of write {number}"]
        assert "No space left" in reason
        missing = pictures(undisturbed).keys() - pictures(out).keys()
        assert len(missing) <= 1, f"write {number} cost {missing}"
        again = batch(jobs, out)
        assert again.failed == {}
        assert pictures(out) == pictures(undisturbed)
        assert (out / "manifest.jsonl").read_text() == (undisturbed / "manifest.jsonl").read_text()
        assert (out / "summary.csv").read_text() == (undisturbed / "summary.csv").read_text()
        assert not list(out.glob("**/*.part"))
    assert set(costs) == {1}


def test_every_line_of_the_manifest_is_a_line(jobs, tmp_path):
    """Though one was cut short: what follows begins anew."""
    out = tmp_path / "out"
    batch(jobs, out)
    text = (out / "manifest.jsonl").read_text()
    (out / "manifest.jsonl").write_text(text[: len(text) // 2])
    (out / "summary.csv").unlink()
    finished = batch(jobs, out)
    assert 0 < finished.kept < JOBS and finished.failed == {}
    assert (out / "manifest.jsonl").read_text() == text and len(manifest(out)) == JOBS + 2


def test_a_name_that_the_locale_cannot_spell_costs_its_job_alone(tmp_path, monkeypatch):
    """As under LC_ALL=en_US.ISO-8859-1."""
    monkeypatch.setattr(workers, "Maker", StandIn)

    def encode(name, real=os.fsencode):
        str(name).encode("ascii")
        return real(name)

    monkeypatch.setattr(os, "fsencode", encode)
    rows = [{"name": name, "source": "s", "target": "t"} for name in ("1", "\u0662", "3")]
    finished = batch(written(tmp_path / "jobs.jsonl", rows), tmp_path / "out")
    assert list(finished.failed) == ["\u0662"] and "set LC_ALL=C.UTF-8" in finished.failed["\u0662"]
    assert len(pictures(tmp_path / "out")) == 3
