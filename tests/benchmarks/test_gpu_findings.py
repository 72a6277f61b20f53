"""What stages of a GPU session say and leave: which rows are failures, which files a training packs."""

import tarfile

import pytest

from benchmarks.gpu import records
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.training import ENDING, PACKING, pack
from benchmarks.rows import Row
from fpe_pipeline.embedded.training.timebox import GRACE
from tests.support.planted_faults import HERE


@pytest.mark.parametrize(
    ("suite", "provider", "fails"),
    [
        ("kernels", "fpe-triton", True),
        ("edits", "fpe-graph", True),
        ("recordings", "full-source-dropped", True),
        ("recordings", "recorded-device", True),
        ("kernels", "fpe-reference", False),  # the equations as they stand
        ("tuning", "fpe-triton@128x64w8s3", False),
        ("kernels", "sdpa-cudnn", False),
        ("edits", "unedited-graph", False),
    ],
)
def test_a_row_of_ours_that_is_wrong_is_a_failure_of_the_session(capsys, suite, provider, fails):
    about = {"suite": suite, "case": "a", "provider": provider, "dtype": "float16"}
    records.say_row(Row.new(HERE, **about, status="wrong", reason="relative error 1 exceeds its budget"))
    said = [records.heard(line)["kind"] for line in capsys.readouterr().out.split("\n")[:-1]]
    assert said == (["row", "failure"] if fails else ["row"])


def test_parts_of_an_earlier_archive_do_not_stand_behind_those_of_a_smaller_one(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(range(256)) * 40)
    first = pack(folder, tmp_path, 100)
    (folder / "weights").write_bytes(b"small")
    second = pack(folder, tmp_path, 100)
    assert 1 < len(second) < len(first)
    assert sorted(tmp_path.glob("model.tar.gz*")) == second
    whole = tmp_path / "whole.tar.gz"
    whole.write_bytes(b"".join(part.read_bytes() for part in sorted(tmp_path.glob("model.tar.gz*"))))
    with tarfile.open(whole) as archive:
        assert archive.extractfile("model/weights").read() == b"small"


@pytest.mark.parametrize("option", ["--max-mib=0", "--max-mib=nan", "--budget=nan", "--budget=-1", "--budget=inf"])
def test_bounds_are_numbers_above_0(option, tmp_path, capsys, monkeypatch):
    """Parts of 0 MiB were none, and the archive was deleted; `nan` seconds were no bound."""
    monkeypatch.setattr("benchmarks.gpu.__main__.Session", pytest.fail)
    with pytest.raises(SystemExit) as left:
        main(["train", "--dry-run", "--out", str(tmp_path), option])
    name, given = option.split("=")
    assert (
        left.value.code == 2 and f"argument {name}: expected a number above 0, got {given}" in capsys.readouterr().err
    )


def test_a_training_may_end_by_itself_before_it_is_killed():
    """At the end of its time it has the grace of its own guard; then there is time left to pack."""
    assert GRACE < ENDING < PACKING
