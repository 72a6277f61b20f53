"""What the fpe command refuses before it loads anything, how it fails, and its smaller commands."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from fpe_pipeline import cli as public_cli
from fpe_pipeline.app import cli, commands
from fpe_pipeline.models import loading, sources
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.loading import load_pipeline
from tests.support.tiny_cli import SOURCE, edit_arguments, one_error, refuse_loading, tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def edit(model):
    return edit_arguments(model)


@pytest.fixture
def no_loading(monkeypatch):
    refuse_loading(monkeypatch)


class TestRefusals:
    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("invert", "PICTURE is missing: path of a picture (see fpe invert --help)"),
            ("batch", "LIST is missing: list of edits: .jsonl, .csv, .json or .yaml (see fpe batch --help)"),
        ],
    )
    def test_an_argument_that_is_not_there(self, capsys, command, message):
        assert cli.main([command]) == 2
        assert one_error(capsys) == f"fpe: error: {message}\n"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--model", "./nowhere"], "neither a folder nor a file"),
            (["--model", "nowhere"], "neither a folder nor a file"),
            (["--model", "."], "no model_index.json"),
            (["--model", __file__], "must end in .safetensors or .ckpt"),
            (["--size", "64"], "expected WIDTHxHEIGHT"),
            (["--size", "60x64"], "use 56x64 or 64x64"),
            (["--size", "0x64"], "positive multiples of 8"),
            (["--size", "100000x100000"], "at most 178956970 pixels"),
            (["--self-replace", "nan"], "expected one fraction"),
            (["--self-replace", "0.5,0.6,0.7"], "expected one fraction"),
            (["--self-replace", "0.8,0.1"], "start <= stop"),
            (["--self-replace", "1.5"], "[0, 1]"),
            (["--levels", "1", "--max-tokens", "64"], "name one of"),
            (["--levels", "one"], "whole numbers"),
            (["--steps", "0"], "steps must be at least 1"),
            (["--seed", "-1"], "seed must be at least 0, got -1"),
            (["--guidance", "inf"], "finite"),
            (["--target", " "], "target prompts with words"),
            (["--dtype", "int8"], "dtype must be one of float32, float16, bfloat16, auto, got 'int8'"),
            (["--device", "abacus"], "device 'abacus' is not available here"),
            (["--backend", "cudnn"], "attention backend 'cudnn' cannot be used here: there are auto, triton"),
            (["--self-replay", "0.8"], "there is no option --self-replay; did you mean --self-replace? (see fpe edit"),
            (["--model", "~nobodyatall/x"], "neither a folder nor a file"),
        ],
    )
    def test_before_loading(self, edit, tmp_path, capsys, no_loading, options, message):
        assert cli.main([*edit, "-o", str(tmp_path / "out"), *options]) == 2
        assert message in one_error(capsys)
        assert not (tmp_path / "out").exists()

    def test_missing_prompts(self, capsys):
        assert cli.main(["edit", "--source", SOURCE]) == 2
        assert "expected --target, or --from" in one_error(capsys)

    def test_output_that_is_a_file(self, edit, tmp_path, capsys, no_loading):
        (tmp_path / "taken").write_text("")
        for output in (tmp_path / "taken", tmp_path / "taken" / "below"):
            assert cli.main([*edit, "-o", str(output)]) == 2
            assert "cannot write into" in one_error(capsys)

    @pytest.mark.parametrize("inside", ["", "further/in"])
    def test_output_that_is_a_link_to_nothing(self, edit, tmp_path, capsys, no_loading, inside):
        (tmp_path / "out").symlink_to(tmp_path / "unmounted")
        assert cli.main([*edit, "-o", str(tmp_path / "out" / inside)]) == 2
        assert "is a link to nothing; pass another folder with -o" in one_error(capsys)

    def test_output_that_is_read_only(self, edit, capsys, no_loading):
        if not Path("/proc/self").exists():
            pytest.skip("needs a folder that even root cannot write")
        assert cli.main([*edit, "-o", "/proc/self/out"]) == 2
        assert "cannot write into '/proc/self/out'" in one_error(capsys)

    def test_layers_that_match_nothing(self, edit, tmp_path, capsys):
        assert cli.main([*edit, "--layers", "up_blocks.9,3", "-o", str(tmp_path / "out")]) == 2
        assert "layers ['up_blocks.9'] match none" in one_error(capsys)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["StableDiffusionXLInpaintPipeline", "HiDreamImagePipeline"])
    def test_other_kinds_of_model(self, edit, tmp_path, capsys, no_loading, name):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert cli.main([*edit, "--model", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
        error = one_error(capsys)
        assert f"holds a {name}" in error
        assert (
            "FLUX.1, FLUX.2, " in error
            and "HunyuanImage 2.1, Kandinsky 5, CogView 3 Plus and Bria FIBO, " in error
            and "editing(pipe, ...)" in error
        )

    def test_damaged_weights(self, edit, model, tmp_path, capsys):
        folder = tmp_path / "model"
        folder.mkdir()
        for entry in model.iterdir():
            (folder / entry.name).symlink_to(entry)
        (folder / "vae").unlink()
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").symlink_to(model / "vae" / "config.json")
        (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage")
        assert cli.main([*edit, "--model", str(folder), "-o", str(tmp_path / "out")]) == 2
        assert "could not be loaded" in one_error(capsys)


@pytest.mark.skipif(os.name == "nt", reason="home folders of POSIX")
def test_the_home_folder_where_shells_leave_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    places = ["~/jobs.jsonl", "--output=~/out", "--images=~/in", "--clip", "~/clip", "--option", "mask=~/mask.png"]
    request = commands.parsed(["batch", *places, "--negative", "~/no/place"]).args[0]
    home = Path("/home/me")
    assert (request.jobs, request.output, request.images) == (home / "jobs.jsonl", home / "out", home / "in")
    assert request.weights.clip == "/home/me/clip"
    assert request.defaults == {"options": {"mask": "/home/me/mask.png"}, "negative": "~/no/place"}
    given, record, output, *_ = commands.parsed(["edit", "--from=~/run.json", "--image=~/a.png", "-o", "~/out"]).args
    assert (given["image"], record, output) == ("/home/me/a.png", home / "run.json", home / "out")
    assert commands.parsed(["app", "--model=~/a", "--model", "b"]).args[0] == ("/home/me/a", "b")


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (RuntimeError("out of\nmemory"), 1, "fpe: error: out of memory\n"),
            (KeyboardInterrupt(), 130, "fpe: interrupted\n"),
        ],
    )
    def test_exit_codes(self, edit, tmp_path, capsys, monkeypatch, error, code, message):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(runs, "load_pipeline", fail)
        assert cli.main([*edit, "-o", str(tmp_path / "out")]) == code
        assert capsys.readouterr() == ("", message)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), 1, "fpe: error: [Errno 28] No space left on device\n"),
            (KeyboardInterrupt(), 130, "fpe: interrupted\n"),
        ],
    )
    def test_exit_codes_while_the_command_line_is_read(self, capsys, monkeypatch, error, code, message):
        monkeypatch.setattr(commands, "parsed", mock.Mock(side_effect=error))
        assert cli.main(["edit", "--help"]) == code
        assert capsys.readouterr() == ("", message)

    def test_ctrl_c_while_the_command_itself_is_imported(self, capsys, monkeypatch):
        interrupted = mock.Mock(find_spec=mock.Mock(side_effect=KeyboardInterrupt))
        monkeypatch.delitem(sys.modules, cli.__name__)
        monkeypatch.setattr(sys, "meta_path", [interrupted])
        assert public_cli.main(["info"]) == 130
        assert capsys.readouterr() == ("", "fpe: interrupted\n")

    @pytest.mark.slow
    @pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
    def test_ctrl_c(self, edit, tmp_path):
        arguments = [argument for argument in edit if argument != "--quiet"]
        command = [sys.executable, "-m", "fpe_pipeline", *arguments, "--steps", "900", "-o", str(tmp_path / "out")]
        environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
        # A shell that starts tests in the background has them, and all that they start, ignore the signal.
        heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **heed) as process:
            read = ""
            while "/900" not in read and (character := process.stderr.read(1)):
                read += character
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
        assert process.returncode == 130
        assert rest.endswith("fpe: interrupted\n")
        assert "Traceback" not in rest
        assert not (tmp_path / "out").exists()

    def test_an_output_that_is_full_is_one_line_with_json_too(self, capsys, monkeypatch):
        full = mock.Mock(
            encoding="utf-8", errors="strict", write=mock.Mock(side_effect=OSError(28, "No space left on device"))
        )
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["info", "--json"]) == 1
        assert capsys.readouterr().err == "fpe: error: [Errno 28] No space left on device\n"

    def test_traceback_on_request(self, edit, tmp_path, capsys, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(runs, "load_pipeline", fail)
        assert cli.main([*edit, "--traceback", "-o", str(tmp_path / "out")]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_a_full_disk_leaves_nothing_behind(self, edit, tmp_path, monkeypatch):
        (tmp_path / "source.png").write_bytes(b"earlier")
        save = Image.Image.save

        def fail(self, path, **kwargs):
            if Path(path).name == "target-2.png":
                raise OSError(28, "No space left on device")
            save(self, path, **kwargs)

        monkeypatch.setattr(Image.Image, "save", fail)
        assert cli.main([*edit, "-o", str(tmp_path)]) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["source.png"]
        assert (tmp_path / "source.png").read_bytes() == b"earlier"


class TestIdentity:
    """A model is known by what decides its images, wherever it lies."""

    @pytest.fixture
    def loaded(self, model):
        return load_pipeline(sources.find_model(str(model)), dtype=torch.float32, device="cpu")

    def test_of_the_same_model_elsewhere(self, loaded, tmp_path):
        loaded.save_pretrained(tmp_path)
        again = load_pipeline(sources.find_model(str(tmp_path)), dtype=torch.float32, device="cpu")
        assert loading.identity(again) == loading.identity(loaded)

    def test_of_other_weights_schedulers_and_dtypes(self, loaded):
        seen = {loading.identity(loaded)}
        with torch.no_grad():
            loaded.vae.decoder.conv_out.bias[0] += 1e-3
        seen.add(loading.identity(loaded))
        loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, beta_end=0.013)
        seen.add(loading.identity(loaded))
        loaded.to(torch.float16)
        seen.add(loading.identity(loaded))
        assert len(seen) == 4


class TestOtherCommands:
    @pytest.mark.parametrize("command", [[], ["edit"], ["evaluate"], ["demo"], ["info"]])
    @pytest.mark.parametrize("asked", ["-h", "--help"])
    def test_help(self, command, asked, capsys):
        assert cli.main([*command, asked]) == 0
        out, err = capsys.readouterr()
        assert out.strip().startswith(" ".join(["Usage: fpe", *command]))
        assert err == ""

    @pytest.mark.parametrize("command", ["edit", "evaluate", "demo", "info"])
    def test_help_needs_no_torch(self, command):
        code = (
            f"import sys; from fpe_pipeline.app.cli import main; main(['{command}', '--help']); "
            "sys.exit(bool({'torch', 'diffusers', 'numpy', 'scipy'} & sys.modules.keys()))"
        )
        root = str(Path(cli.__file__).parents[2])
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root, timeout=60, check=False)
        assert result.returncode == 0

    def test_info(self, capsys):
        assert cli.main(["info"]) == 0
        out = capsys.readouterr().out
        for name in ("torch", "diffusers", "triton", "reference", "devices"):
            assert name in out

    def test_demo(self, model, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(sources, "_embedded_folder", lambda name: model)
        assert cli.main(["demo", "--steps", "1", "--quiet", "-o", str(tmp_path)]) == 0
        paths = capsys.readouterr().out.splitlines()
        assert paths[0] == str(tmp_path / "demo.png")
        assert all(Path(path).is_file() for path in paths)
        assert sum(path.endswith("run.json") for path in paths) == 3
        settings, _ = runs.read_record(tmp_path / "colour" / "run.json")
        assert settings.model == "embedded"

    def test_no_embedded_model(self, tmp_path, capsys, monkeypatch):
        def absent(name):
            raise FileNotFoundError(name)

        monkeypatch.setattr(sources, "embedded_path", absent)
        assert cli.main(["demo", "-o", str(tmp_path / "out")]) == 2
        assert "no embedded model; pass --model" in one_error(capsys)
