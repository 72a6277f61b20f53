"""`fpe doctor` finds what is planted: a package that breaks, a kernel that is wrong, a process that dies."""

import json
import time

import pytest

from fpe_kernels.testing import self_test as kernels
from fpe_pipeline import extras
from fpe_pipeline.app import cli, doctor, self_test


@pytest.fixture
def few(monkeypatch):
    """Only packages that are fast to import; no process for kernels."""
    monkeypatch.setattr(extras, "KERNELS", ("numpy",))
    monkeypatch.setattr(extras, "PIPELINE", ("PIL", "broken_here"))
    monkeypatch.setattr(extras, "APP", ("rich",))
    monkeypatch.setattr(extras, "OTHERS", {"cluster": ("nobody_has_this",)})
    monkeypatch.setattr(extras, "missing", lambda modules: [name for name in modules if name in ("nobody_has_this",)])


@pytest.fixture
def broken(tmp_path, monkeypatch):
    (tmp_path / "broken_here.py").write_text("raise OSError('no such\\nlibrary')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_an_interruption_ends_the_process_too(monkeypatch):
    begun = []

    def interrupted(process, *_, **__):
        begun.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(doctor._lines_of(["-c", "import time; time.sleep(5)"], None, time.monotonic() + 60))
    assert begun[0].wait(timeout=4) != 0


def test_packages(few, broken, capsys):
    assert cli.main(["doctor", "--no-self-test", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in said["findings"]}
    assert not said["ok"]
    assert found["broken_here"]["state"] == "broken" and "OSError: no such library" in found["broken_here"]["detail"]
    assert "pip install --force-reinstall broken_here" in found["broken_here"]["remedy"]
    assert found["PIL"]["state"] == "ok" and found["PIL"]["detail"][0].isdigit()
    absent = found["nobody_has_this"]
    assert (absent["state"], absent["remedy"]) == ("not here", "pip install 'fpe-kernels[cluster]'")
    assert found["cpu"]["about"] == "devices" and found["torch"]["about"] == "backends"


def test_packages_that_there_was_no_time_for_are_said(few, monkeypatch):
    monkeypatch.setattr(doctor, "IMPORTS", 0.0)
    unseen = {finding.name: finding for finding in doctor._packages() if "not looked at" in finding.detail}
    assert set(unseen) == {"numpy", "PIL", "broken_here", "rich"}
    assert {finding.state for finding in unseen.values()} == {"not here"}


def test_packages_behind_one_that_crashes_are_said(few, tmp_path, monkeypatch):
    (tmp_path / "broken_here.py").write_text("import os; os._exit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(extras, "PIPELINE", ("broken_here", "PIL"))
    found = {finding.name: finding for finding in doctor._packages()}
    assert "ended with status 9" in found["broken_here"].detail
    assert found["PIL"].detail.startswith("not looked at: an import before it crashed")


def test_in_words_and_quietly(few, monkeypatch, capsys):
    monkeypatch.setattr(extras, "PIPELINE", ("PIL",))
    assert cli.main(["doctor", "--no-self-test"]) == 0
    words = capsys.readouterr().out
    assert "packages\n" in words and "\n  not here  nobody_has_this; pip install" in words
    assert words.endswith("what is installed works\n")
    assert cli.main(["doctor", "--no-self-test", "--quiet"]) == 0
    quiet = capsys.readouterr().out
    assert "nobody_has_this" in quiet and " ok " not in quiet


def test_versions_that_are_too_old(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=2.6", "rich>=99; extra == 'pipeline'"])
    assert doctor._other_version("rich", "pipeline", "15.0") == "15.0, and >=99 is needed"
    assert doctor._other_version("rich", "app", "15.0") == doctor._other_version("torch", "", "2.13.0+cpu") == ""


class TestKernels:
    def test_the_torch_backend(self):
        found = dict(kernels.self_test("torch", "cpu"))
        assert len(found) == len(kernels.CASES) and not any(found.values())

    def test_a_planted_error_is_found_in_every_case(self, monkeypatch):
        real = kernels.shared_attention
        monkeypatch.setattr(kernels, "shared_attention", lambda *given, **options: real(*given, **options) * 1.001)
        assert all(reason for _, reason in kernels.self_test("torch", "cpu"))

    def test_a_backend_that_cannot_serve(self, capsys):
        assert kernels.main(["nobody", "cpu"]) == 1
        name, reason = json.loads(capsys.readouterr().out.splitlines()[0])
        assert name == "one map for three rows, float32" and "backend must be one of" in reason

    def test_time_that_is_spent(self):
        assert len(list(kernels.self_test("torch", "cpu", seconds=0))) == 1


@pytest.mark.parametrize(
    ("code", "expected", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", ["numpy"], "ended with status -9"),
        ("raise SystemExit('no room')", [], "ended with status 1: no room"),
        ('print(\'["a", ""]\'); import os; os.abort()', ["a", "b"], "ended with status -6"),
    ],
)
def test_a_process_that_dies_names_what_it_was_at(code, expected, reason):
    *_, (name, said) = doctor._lines_of(["-c", code], tuple(expected), doctor.time.monotonic() + 60)
    assert said.startswith(reason) and name == (expected[-1] if expected else "the process")


def test_a_process_that_takes_too_long():
    code = 'import sys, time; print(\'["a", ""]\', flush=True); time.sleep(60)'
    lines = list(doctor._lines_of(["-c", code], (), doctor.time.monotonic() + 1.5))
    assert lines in ([("a", "")], [])  # as far as it came
    assert doctor._judged("x", [], "pass").state == "not here"
    assert doctor._judged("x", [("a", "wrong")], "pass").state == "broken"


def test_edits(monkeypatch, capsys):
    monkeypatch.setattr(self_test, "_embedded", lambda: None)
    assert self_test.main() == 0
    monkeypatch.setattr(self_test, "_tiny_edit", lambda: [][0])
    assert self_test.main() == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["an edit in float64", ""], ["the embedded model", ""],
        ["an edit in float64", "list index out of range"], ["the embedded model", ""],
    ]  # fmt: skip


@pytest.mark.slow
def test_all_of_it(capsys):
    assert cli.main(["doctor"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "torch on cpu: 5 cases agree with float64" in out and "triton on cpu (interpreter)" in out
    assert "broken" not in out
