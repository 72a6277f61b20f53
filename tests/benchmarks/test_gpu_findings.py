"""What stages of a GPU session say and leave: which rows are failures, which files a training packs."""

import tarfile

import pytest

from benchmarks.gpu import records
from benchmarks.gpu.training import pack
from benchmarks.rows import Row
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
