"""Lists of small edits, and batches of them."""

import json

import pytest

from fpe_pipeline.batches.batch import run
from fpe_pipeline.batches.request import BatchRequest
from tests.support.tiny_cli import tiny_model_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def batch(jobs, output, said=None, *, defaults=(), **options):
    """A finished batch; what it said is added to ``said``."""
    request = BatchRequest(jobs=jobs, output=output, defaults=dict(defaults), **options)
    return run(request, say=[].append if said is None else said.append)


def pictures(folder):
    """The bytes of every picture below a folder, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
