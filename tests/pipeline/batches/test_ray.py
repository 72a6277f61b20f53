"""Two workers of Ray give the pictures of one process; one that dies costs its task, and the rest go on."""

import os

import pytest

from fpe_pipeline.errors import InputError
from tests.pipeline.batches.conftest import batch, pictures, written

pytestmark = pytest.mark.slow
SETTINGS = {"steps": 2, "size": (64, 64), "threads": 1, "device": "cpu"}
KILLER = '''
import os

from fpe_pipeline import FreePromptEdit


class Killer(FreePromptEdit):
    """Ends the process that would use it."""

    def select(self, sites):
        os._exit(1)
'''


@pytest.fixture(autouse=True)
def ray(monkeypatch):
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return pytest.importorskip("ray")


@pytest.fixture
def rows():
    return [
        {"source": f"a photo of a {colour} car", "target": f"a photo of a {other} car"}
        for colour in ("red", "blue", "green")
        for other in ("yellow", "purple")
    ]


def test_two_workers_give_the_pictures_of_one_process(rows, tmp_path):
    jobs = written(tmp_path / "jobs.jsonl", [*rows, {"source": "a"}])
    alone = batch(jobs, tmp_path / "alone", defaults=SETTINGS)
    both = batch(jobs, tmp_path / "both", defaults=SETTINGS, workers=2)
    assert both.failed == alone.failed and both.failed.keys() == {"row 7"}
    assert pictures(tmp_path / "both") == pictures(tmp_path / "alone")
    assert (tmp_path / "both" / "summary.md").read_text() == (tmp_path / "alone" / "summary.md").read_text()


def test_a_worker_that_dies(rows, tmp_path, monkeypatch):
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    rows[2]["method"] = "killer:Killer"
    jobs = written(tmp_path / "jobs.jsonl", rows)
    finished = batch(jobs, tmp_path / "out", defaults=SETTINGS, workers=2)
    assert finished.failed.keys() == {"0003", "0004"}
    assert all("its worker ended" in reason for reason in finished.failed.values())
    assert len(pictures(tmp_path / "out")) == 4 + 2


def test_workers_that_cannot_begin(rows, tmp_path):
    jobs = written(tmp_path / "jobs.jsonl", rows)
    (tmp_path / "clip").mkdir()
    with pytest.raises(InputError, match=r"a worker cannot begin: .*cannot be loaded for --clip"):
        batch(jobs, tmp_path / "out", defaults=SETTINGS, workers=2, weights={"clip": str(tmp_path / "clip")})
