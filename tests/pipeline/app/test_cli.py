"""The fpe command: what it writes, what it says where, and that a record repeats its run bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline.app import cli
from fpe_pipeline.images.distance import distance, pixel_hash
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.repeatable import threads_for
from tests.support.tiny_cli import OTHER, SOURCE, TARGET, edit_arguments, one_error, refuse_loading, tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def edit(model):
    return edit_arguments(model)


@pytest.fixture(scope="module")
def made(edit, tmp_path_factory):
    """The folder of one run."""
    folder = tmp_path_factory.mktemp("made") / "not" / "yet"
    assert cli.main([*edit, "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def no_loading(monkeypatch):
    refuse_loading(monkeypatch)


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
            "inner_steps": 10, "early_stop": 1e-5,
            "control": True, "backend": "auto", "dtype": "float32", "device": "cpu",
            "threads": record["settings"]["threads"],
        }  # fmt: skip
        assert set(record["versions"]) >= {"fpe", "torch", "diffusers", "transformers", "triton", "python"}
        assert set(record["seconds"]) == {"load", "edit", "no control"}
        assert record["model"]["scheduler"]["class"] == "DDIMScheduler"
        for name, image in record["images"].items():
            assert pixel_hash(Image.open(made / name)) == image["pixels_sha256"]
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

    @pytest.mark.slow
    def test_a_second_run_replaces_the_first(self, edit, made, tmp_path):
        first = (made / "target-1.png").read_bytes()
        assert cli.main([*edit, "--seed", "1", "-o", str(tmp_path)]) == 0
        assert (tmp_path / "target-1.png").read_bytes() != first
        assert cli.main([*edit, "-o", str(tmp_path)]) == 0
        assert (tmp_path / "target-1.png").read_bytes() == first
        assert not list(tmp_path.glob(".fpe-*"))


class TestFromRecord:
    @pytest.mark.slow
    def test_same_bits_in_another_process(self, made, tmp_path):
        command = [sys.executable, "-m", "fpe_pipeline", "edit", "--from", str(made / "run.json"), "-o", str(tmp_path)]
        root = str(Path(cli.__file__).parents[2])
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
        # One target fewer is another batch, whose rows may round differently.
        assert distance(Image.open(tmp_path / "source.png"), Image.open(made / "source.png")).levels <= 1

    @pytest.mark.parametrize(
        ("model", "device", "chosen"), [("embedded", "cpu", 1), ("embedded", "cuda", None), ("./sd15", "cpu", None)]
    )
    def test_threads_that_nobody_named(self, model, device, chosen, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert threads_for(model, device) == chosen
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert threads_for(model, device) is None

    @pytest.mark.slow
    def test_threads_of_the_record(self, made, tmp_path):
        record = json.loads((made / "run.json").read_text())
        before = torch.get_num_threads()
        record["settings"]["threads"] = before + 1
        (tmp_path / "run.json").write_text(json.dumps(record))
        assert cli.main(["edit", "--from", str(tmp_path / "run.json"), "-o", str(tmp_path), "--quiet"]) == 0
        assert runs.read_record(tmp_path / "run.json")[0].threads == before + 1
        assert torch.get_num_threads() == before

    @pytest.mark.slow
    def test_on_another_cpu_it_says_how_far_it_is(self, made, tmp_path):
        """Other instructions sum in another order: every picture comes back to rounding, and the run succeeds."""
        command = [sys.executable, "-m", "fpe_pipeline", "edit", "--from", str(made / "run.json"), "-o", str(tmp_path)]
        other = "avx2" if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else "default"
        environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
        environment |= {"ATEN_CPU_CAPABILITY": other, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
        result = subprocess.run(
            [*command, "--quiet"], capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        assert result.returncode == 0, result.stderr
        for path in made.glob("t*.png"):
            found = distance(Image.open(path), Image.open(tmp_path / path.name))
            assert found.levels <= 1
            assert not found.levels or f"{path.name} ({found})" in result.stderr
        assert "bit for bit" in result.stderr or "cpu capability was" in result.stderr

    def test_differences_are_reported(self, made, tmp_path, capsys):
        record = json.loads((made / "run.json").read_text())
        pixels = np.array(Image.open(made / "target-2.png"))
        rows = slice(0, len(pixels) // 2)
        pixels[rows] = np.where(pixels[rows] < 128, pixels[rows] + 3, pixels[rows] - 3)
        changed = Image.fromarray(pixels)
        changed.save(tmp_path / "target-2.png")
        record["images"]["target-2.png"]["pixels_sha256"] = pixel_hash(changed)
        record["images"]["target-1.png"]["pixels_sha256"] = "0" * 64
        record["versions"]["torch"] = "1.0"
        (tmp_path / "run.json").write_text(json.dumps(record))
        # Into the folder of the record: its pictures are compared before they are replaced.
        assert cli.main(["edit", "--from", str(tmp_path / "run.json"), "-o", str(tmp_path), "--quiet"]) == 0
        error = capsys.readouterr().err
        psnr = 10 * np.log10(255**2 / (3**2 / 2))
        assert f"target-2.png (at most 3 of 255 levels, {psnr:.1f} dB); torch was 1.0 and is " in error
        assert f"target-1.png (how far is not known: {tmp_path / 'target-1.png'} cannot be read)" in error
        assert "source.png" not in error

    @pytest.mark.slow
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
            ('{"format": 1}', "source is missing; targets is missing"),
            (
                '{"format": 1, "settings": {"source": "a", "targets": ["b"], "steps": "8"}}',
                "steps must be a whole number, got '8'",
            ),
            (
                '{"format": 1, "settings": {"source": "a", "targets": ["b"], "size": [8]}}',
                "size must be a longer list, got (8,)",
            ),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"], "colour": 3}}', "there is no setting colour"),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"], "setps": 3}}', "did you mean steps?"),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"], "seed": -1}}', "seed must be at least 0"),
            ('{"format": 1, "settings": {"source": "a", "targets": "b"}}', "targets must be a list, got 'b'"),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"], "guidance": NaN}}', "a finite number"),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"], "layers": [1.5]}}', "layers[0] must be"),
            ('{"format": 1, "settings": 3}', "does not hold settings of this version"),
            ('{"format": 1, "settings": {"source": "a", "targets": ["b"]}}', "what it says of its model is missing"),
            (
                '{"format": 1, "settings": {"source": "a", "targets": ["b"]}, "model": "m", "images": {"a.png": 1}}',
                "what it says of its model and images is missing or damaged",
            ),
            ("[" * 100_000, "is not a run record"),
        ],
    )
    def test_damaged_records(self, tmp_path, capsys, no_loading, content, message):
        path = tmp_path / "run.json"
        path.write_text(content)
        assert cli.main(["edit", "--from", str(path), "-o", str(tmp_path / "out")]) == 2
        assert message in one_error(capsys)
        assert not (tmp_path / "out").exists()
