"""The fpe command: what it writes, what it says where, and that a record repeats its run bit for bit."""

import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from golden_cases import GOLDEN
from PIL import Image

from fpe_pipeline import cli, loading, runs

SOURCE, TARGET, OTHER = "a photo of a red car", "a photo of a blue car", "a photo of a red boat"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model, with 64 px as its own size."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    for entry in (GOLDEN / "models" / "tiny-sd15").iterdir():
        if entry.name != "unet":
            (folder / entry.name).symlink_to(entry)
    (folder / "unet").mkdir()
    unet = GOLDEN / "models" / "tiny-sd15" / "unet"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(unet / "diffusion_pytorch_model.safetensors")
    config = json.loads((unet / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 8}))
    return folder


@pytest.fixture(scope="module")
def edit(model):
    """Arguments of a small edit, without the folder."""
    return [
        "edit", "--source", SOURCE, "--target", TARGET, "--target", OTHER, "--model", str(model), "--steps", "2",
        "--seed", "5", "--self-replace", "0,0.9", "--quiet",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(edit, tmp_path_factory):
    """The folder of one run."""
    folder = tmp_path_factory.mktemp("made") / "not" / "yet"
    assert cli.main([*edit, "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(runs, "load_pipeline", lambda *a, **k: pytest.fail("weights were loaded before the checks"))


class TestEdit:
    def test_files(self, made):
        names = ["comparison", "source", "target-1", "target-1-no-control", "target-2", "target-2-no-control"]
        assert sorted(path.name for path in made.iterdir()) == sorted([*(f"{name}.png" for name in names), "run.json"])
        for name in names[1:]:
            assert Image.open(made / f"{name}.png").size == (64, 64)
        assert Image.open(made / "comparison.png").width > 3 * 256

    def test_images_are_different_things(self, made):
        pixels = {path.name: Image.open(path).tobytes() for path in made.glob("*.png")}
        assert len(set(pixels.values())) == len(pixels)

    def test_record(self, made, model):
        record = json.loads((made / "run.json").read_text())
        assert record["settings"] == {
            "source": SOURCE, "targets": [TARGET, OTHER], "negative": None, "model": str(model), "seed": 5, "steps": 2,
            "guidance": 7.5, "method": "fpe", "options": {},
            "self_replace": [0.0, 0.9], "levels": None, "max_tokens": None, "layers": None,
            "size": [64, 64], "image": None, "inversion": "ddim", "inversion_guidance": 1.0,
            "control": True, "backend": "auto", "dtype": "float32", "device": "cpu",
            "threads": record["settings"]["threads"],
        }  # fmt: skip
        assert set(record["versions"]) >= {"fpe", "torch", "diffusers", "transformers", "triton", "python"}
        assert set(record["seconds"]) == {"load", "edit", "no control"}
        assert record["model"]["scheduler"]["class"] == "DDIMScheduler"
        for name, image in record["images"].items():
            assert runs.pixel_hash(Image.open(made / name)) == image["pixels_sha256"]
        assert record["images"]["target-2.png"]["prompt"] == OTHER

    def test_results_on_stdout_progress_on_stderr(self, edit, tmp_path, capfd):
        assert cli.main([*(a for a in edit if a != "--quiet"), "--no-control", "-o", str(tmp_path)]) == 0
        out, err = capfd.readouterr()
        names = ["comparison.png", "source.png", "target-1.png", "target-2.png", "run.json"]
        assert out.splitlines() == [str(tmp_path / name) for name in names]
        assert "edit" in err
        assert "2/2" in err
        assert "Warning" not in err

    def test_options_reach_the_pipeline(self, edit, tmp_path):
        options = [
            "--size",
            "80x48",
            "--levels",
            "1",
            "--negative",
            "boats",
            "--guidance",
            "1",
            "--backend",
            "reference",
        ]
        assert cli.main([*edit, *options, "-o", str(tmp_path)]) == 0
        settings, _ = runs.read_record(tmp_path / "run.json")
        assert (settings.size, settings.levels, settings.negative) == ((80, 48), (1,), "boats")
        assert (settings.guidance, settings.backend) == (1.0, "reference")
        assert Image.open(tmp_path / "target-1.png").size == (80, 48)

    def test_a_second_run_replaces_the_first(self, edit, made, tmp_path):
        first = (made / "target-1.png").read_bytes()
        assert cli.main([*edit, "--seed", "1", "-o", str(tmp_path)]) == 0
        assert (tmp_path / "target-1.png").read_bytes() != first
        assert cli.main([*edit, "-o", str(tmp_path)]) == 0
        assert (tmp_path / "target-1.png").read_bytes() == first
        assert not list(tmp_path.glob(".fpe-*"))


class TestFromRecord:
    def test_same_bits_in_another_process(self, made, tmp_path):
        command = [sys.executable, "-m", "fpe_pipeline", "edit", "--from", str(made / "run.json"), "-o", str(tmp_path)]
        root = str(Path(cli.__file__).parent.parent)
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": root}
        )
        assert result.returncode == 0, result.stderr
        assert "those of the record, bit for bit" in result.stderr
        for path in made.glob("*.png"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()

    def test_options_beside_it_replace_its_settings(self, made, tmp_path):
        options = ["--from", str(made / "run.json"), "--target", "a photo of a green car", "--levels", "0,1", "--quiet"]
        assert cli.main(["edit", *options, "-o", str(tmp_path)]) == 0
        settings, _ = runs.read_record(tmp_path / "run.json")
        assert settings.targets == ("a photo of a green car",)
        assert settings.levels == (0, 1)
        assert settings.seed == 5
        assert (tmp_path / "source.png").read_bytes() == (made / "source.png").read_bytes()

    def test_threads_of_the_record(self, made, tmp_path):
        record = json.loads((made / "run.json").read_text())
        record["settings"]["threads"] = 2
        (tmp_path / "run.json").write_text(json.dumps(record))
        before = torch.get_num_threads()
        assert cli.main(["edit", "--from", str(tmp_path / "run.json"), "-o", str(tmp_path), "--quiet"]) == 0
        assert runs.read_record(tmp_path / "run.json")[0].threads == 2
        assert torch.get_num_threads() == before != 2

    def test_differences_are_reported(self, made, tmp_path, capsys):
        record = json.loads((made / "run.json").read_text())
        record["images"]["target-2.png"]["pixels_sha256"] = "0" * 64
        record["versions"]["torch"] = "1.0"
        (tmp_path / "run.json").write_text(json.dumps(record))
        assert cli.main(["edit", "--from", str(tmp_path / "run.json"), "-o", str(tmp_path / "again"), "--quiet"]) == 0
        error = capsys.readouterr().err
        assert "these images differ from the record's: target-2.png (torch was 1.0 and is " in error

    def test_another_model_is_refused_unless_asked_for(self, made, model, tmp_path, capsys):
        record = json.loads((made / "run.json").read_text())
        record["model"]["identity_sha256"] = "0" * 64
        path = tmp_path / "run.json"
        path.write_text(json.dumps(record))
        assert cli.main(["edit", "--from", str(path), "-o", str(tmp_path / "a"), "--quiet"]) == 2
        assert "is not the one of the record" in capsys.readouterr().err
        assert not (tmp_path / "a").exists()
        arguments = ["edit", "--from", str(path), "--model", str(model), "-o", str(tmp_path / "a"), "--quiet"]
        assert cli.main(arguments) == 0

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not a run record"),
            ("[]", "expected a run record of format 1"),
            ('{"format": 2}', "has 2"),
            ('{"format": 1}', "missing source, targets"),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"], "steps": "8"}}', "mistyped steps"),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"], "size": [8]}}', "mistyped size"),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"], "colour": 3}}', "unknown colour"),
        ],
    )
    def test_damaged_records(self, tmp_path, capsys, no_loading, content, message):
        path = tmp_path / "run.json"
        path.write_text(content)
        assert cli.main(["edit", "--from", str(path), "-o", str(tmp_path / "out")]) == 2
        assert message in _one_error(capsys)
        assert not (tmp_path / "out").exists()


def _one_error(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fpe: error: ")
    assert err.count("\n") == 1
    return err


class TestRefusals:
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
            (["--self-replace", "nan"], "expected one fraction"),
            (["--self-replace", "0.5,0.6,0.7"], "expected one fraction"),
            (["--self-replace", "0.8,0.1"], "start <= stop"),
            (["--self-replace", "1.5"], "[0, 1]"),
            (["--levels", "1", "--max-tokens", "64"], "name one of"),
            (["--levels", "one"], "whole numbers"),
            (["--steps", "0"], "steps must be at least 1"),
            (["--seed", "-1"], "seed must be from 0"),
            (["--guidance", "inf"], "finite"),
            (["--target", " "], "target prompts with words"),
            (["--dtype", "int8"], "invalid choice"),
            (["--device", "abacus"], "device 'abacus' is not available here"),
            (["--backend", "cudnn"], "attention backend 'cudnn' cannot be used here: there are auto, triton"),
            (["--self-replay", "0.8"], "unrecognized arguments"),
        ],
    )
    def test_before_loading(self, edit, tmp_path, capsys, no_loading, options, message):
        assert cli.main([*edit, "-o", str(tmp_path / "out"), *options]) == 2
        assert message in _one_error(capsys)
        assert not (tmp_path / "out").exists()

    def test_missing_prompts(self, capsys):
        assert cli.main(["edit", "--source", SOURCE]) == 2
        assert "expected --target, or --from" in _one_error(capsys)
        assert cli.main([]) == 2
        assert "COMMAND" in _one_error(capsys)

    def test_output_that_is_a_file(self, edit, tmp_path, capsys, no_loading):
        (tmp_path / "taken").write_text("")
        for output in (tmp_path / "taken", tmp_path / "taken" / "below"):
            assert cli.main([*edit, "-o", str(output)]) == 2
            assert "cannot write into" in _one_error(capsys)

    def test_output_that_is_read_only(self, edit, capsys, no_loading):
        if not Path("/proc/self").exists():
            pytest.skip("needs a folder that even root cannot write")
        assert cli.main([*edit, "-o", "/proc/self/out"]) == 2
        assert "cannot write into '/proc/self/out'" in _one_error(capsys)

    def test_layers_that_match_nothing(self, edit, tmp_path, capsys):
        assert cli.main([*edit, "--layers", "up_blocks.9,3", "-o", str(tmp_path / "out")]) == 2
        assert "layers ['up_blocks.9'] match none" in _one_error(capsys)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline"])
    def test_other_kinds_of_model(self, edit, tmp_path, capsys, no_loading, name):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert cli.main([*edit, "--model", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
        assert f"holds a {name}" in _one_error(capsys)

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
        assert "could not be loaded" in _one_error(capsys)


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

    @pytest.mark.slow
    @pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
    def test_ctrl_c(self, edit, tmp_path):
        arguments = [argument for argument in edit if argument != "--quiet"]
        command = [sys.executable, "-m", "fpe_pipeline", *arguments, "--steps", "900", "-o", str(tmp_path / "out")]
        environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            read = ""
            while "/900" not in read and (character := process.stderr.read(1)):
                read += character
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
        assert process.returncode == 130
        assert rest.endswith("fpe: interrupted\n")
        assert "Traceback" not in rest
        assert not (tmp_path / "out").exists()

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
        return loading.load_pipeline(loading.find_model(str(model)), dtype=torch.float32, device="cpu")

    def test_of_the_same_model_elsewhere(self, loaded, tmp_path):
        loaded.save_pretrained(tmp_path)
        again = loading.load_pipeline(loading.find_model(str(tmp_path)), dtype=torch.float32, device="cpu")
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
    @pytest.mark.parametrize("command", [[], ["edit"], ["demo"], ["info"]])
    def test_help(self, command, capsys):
        assert cli.main([*command, "--help"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(" ".join(["usage: fpe", *command]))
        assert err == ""

    def test_help_needs_no_torch(self):
        code = (
            "import sys; from fpe_pipeline.cli import main; main(['edit', '--help']); "
            "sys.exit(bool({'torch', 'diffusers'} & sys.modules.keys()))"
        )
        root = str(Path(cli.__file__).parent.parent)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root, timeout=60, check=False)
        assert result.returncode == 0

    def test_info(self, capsys):
        assert cli.main(["info"]) == 0
        out = capsys.readouterr().out
        for name in ("torch", "diffusers", "triton", "reference", "devices"):
            assert name in out

    def test_demo(self, model, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(loading, "_embedded_folder", lambda: model)
        assert cli.main(["demo", "--steps", "1", "--quiet", "-o", str(tmp_path)]) == 0
        paths = capsys.readouterr().out.splitlines()
        assert paths[0] == str(tmp_path / "demo.png")
        assert all(Path(path).is_file() for path in paths)
        assert sum(path.endswith("run.json") for path in paths) == 3
        settings, _ = runs.read_record(tmp_path / "colour" / "run.json")
        assert settings.model == "embedded"

    def test_no_embedded_model(self, tmp_path, capsys, monkeypatch):
        from fpe_pipeline import models

        monkeypatch.delattr(models, "embedded_path", raising=False)
        assert cli.main(["demo", "-o", str(tmp_path / "out")]) == 2
        assert "no embedded model; pass --model" in _one_error(capsys)

    def test_evaluate_appears_with_its_module(self, capsys, monkeypatch):
        name = "fpe_pipeline.quality"
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.add_arguments = lambda parser: parser.add_argument("--pairs", type=int)
        module.run = lambda options: print(f"{options.pairs} pairs")
        monkeypatch.setitem(sys.modules, name, module)
        assert cli.main(["evaluate", "--pairs", "3"]) == 0
        assert capsys.readouterr().out == "3 pairs\n"
        assert cli.main(["--help"]) == 0
        assert "evaluate" in capsys.readouterr().out
