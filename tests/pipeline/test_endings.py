"""Ends that are asked for by signals: one line, an exit code that shells know, and nothing half made."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fpe_pipeline.app import cli
from fpe_pipeline.embedded.training import data, train, train_flow
from fpe_pipeline.endings import Ended, orderly, put_off
from fpe_pipeline.runs import run as runs
from tests.support.tiny_cli import edit_arguments, tiny_model_folder

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals"),
    pytest.mark.usefixtures("answered_signals"),
]
ENDS = [("SIGTERM", 143), ("SIGHUP", 129)]


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """Signals do what they do by default, whatever started the tests: nohup and CI runners ignore some."""
    before = {name: signal.signal(signal.Signals[name], signal.SIG_DFL) for name, _ in ENDS}
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


def _send(name):
    assert signal.getsignal(signal.Signals[name]) is not signal.SIG_DFL  # or the test run would end here
    signal.raise_signal(signal.Signals[name])


@pytest.mark.parametrize("name, code", ENDS)
def test_a_command_that_a_signal_ends(name, code, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.Signals[name])
    edit = edit_arguments(tiny_model_folder(tmp_path / "tiny"))
    monkeypatch.setattr(runs, "load_pipeline", lambda *_, **__: _send(name))
    assert cli.main([*edit, "-o", str(tmp_path / "out")]) == code
    assert capsys.readouterr() == ("", f"fpe: ended by {name}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert signal.getsignal(signal.Signals[name]) == before


@pytest.mark.parametrize("name, code", ENDS)
@pytest.mark.parametrize("module", [train, train_flow])
def test_a_training_that_a_signal_ends(module, name, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "train", lambda *_, **__: _send(name))
    assert module.main(["--preset", "smoke", "--work", str(tmp_path)]) == code
    assert capsys.readouterr().err.endswith(f": ended by {name}; run it again to go on\n")


def test_a_second_signal_ends_the_process_at_once():
    for name, _ in ENDS:
        with pytest.raises(Ended), orderly():
            try:
                _send(name)
            finally:
                assert signal.getsignal(signal.Signals[name]) is signal.SIG_DFL


def test_a_signal_that_the_caller_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with orderly():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_ctrl_c_while_python_ends_is_no_traceback():
    code = (
        "import atexit, signal, sys\n"
        "from fpe_pipeline.endings import tell\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "atexit.register(signal.raise_signal, signal.SIGINT)\n"
        "sys.exit(tell(KeyboardInterrupt(), 'fpe'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT and ended.stderr == "fpe: interrupted\n"


def test_ctrl_c_leaves_those_that_draw_scenes_to_their_training(tmp_path):
    drawing = data.start_rendering(tmp_path, 100_000, 32, workers=1)
    (worker,) = drawing._workers
    try:
        drawing.wait(1)
        worker.send_signal(signal.SIGINT)
        assert drawing.wait(drawing.ready + 64) and worker.poll() is None
    finally:
        drawing.stop()


class TestPutOff:
    def test_the_first_signal_waits_for_the_end_of_the_block(self):
        did = []
        with pytest.raises(Ended) as raised, orderly(), put_off() as ended:
            assert not ended()
            signal.raise_signal(signal.SIGTERM)
            assert ended()
            did.append("the rest of the block")
        assert did and raised.value.number == signal.SIGTERM

    def test_a_second_one_does_not(self):
        with pytest.raises(KeyboardInterrupt), put_off():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_what_nobody_answers_ends_the_process_as_before(self):
        before = signal.getsignal(signal.SIGTERM)
        with put_off() as ended:
            assert signal.getsignal(signal.SIGTERM) is before
        assert not ended()

    def test_other_threads_hear_no_signals(self):
        with ThreadPoolExecutor() as pool:
            assert pool.submit(self._heard).result() is False

    @staticmethod
    def _heard():
        with put_off() as ended:
            return ended()
