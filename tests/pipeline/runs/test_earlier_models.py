"""What was made with an embedded model that has been replaced since still repeats: records find its weights.

``tests/data/embedded_80`` was made by the version that shipped the 80 px model: ``fpe edit --steps 4 --no-control``,
and ``pipe.record(SOURCE, num_inference_steps=2, height=32, width=32, max_tokens=1024, self_replace_steps=0.5)`` from
``torch.Generator().manual_seed(0)``, with the latents that ``pipe.edit`` made of it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fpe_pipeline import FreePromptPipeline, Recording
from fpe_pipeline.app import cli
from fpe_pipeline.embedded import EARLIER, embedded_path
from fpe_pipeline.models import sources
from fpe_pipeline.quality.evaluated import EvaluatedModel
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.repeatable import threads_for

DATA = Path(__file__).parents[2] / "data" / "embedded_80"
RUN = DATA / "run" / "run.json"
SOURCE, TARGET = "a photo of a red car on the beach", "a photo of a blue car on the beach"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def pipeline(name):
    pipe = FreePromptPipeline.from_pretrained(embedded_path(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def again(record, folder, *options):
    return cli.main(["edit", "--from", str(record), *options, "--quiet", "-o", str(folder)])


class TestRuns:
    def test_a_record_repeats_with_the_weights_of_its_time(self, tmp_path, capsys):
        assert again(RUN, tmp_path) == 0
        assert "made with an earlier embedded model, embedded-80" in capsys.readouterr().err
        for name in ("source.png", "target-1.png"):
            # Another processor or version rounds differently: a grey value at most.
            assert np.abs(pixels(tmp_path / name) - pixels(RUN.parent / name)).max() <= 1
        made, before = (json.loads(path.read_text()) for path in (tmp_path / "run.json", RUN))
        assert made["model"]["identity_sha256"] == before["model"]["identity_sha256"]
        assert made["settings"] == before["settings"] | {"model": "embedded-80"}

    @pytest.mark.slow
    def test_what_is_made_with_it_by_name_repeats_too(self, tmp_path, capsys):
        options = ["--source", SOURCE, "--target", TARGET, "--steps", "1", "--no-control", "--model", "embedded-80"]
        assert cli.main(["edit", *options, "--quiet", "-o", str(tmp_path / "a")]) == 0
        assert runs.read_record(tmp_path / "a" / "run.json")[0].model == "embedded-80"
        assert pixels(tmp_path / "a" / "source.png").shape == (80, 80, 3)
        assert again(tmp_path / "a" / "run.json", tmp_path / "b") == 0
        assert "bit for bit" in capsys.readouterr().err

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [pytest.param(["--dtype", "bfloat16"], marks=pytest.mark.slow), ["--device", "cpu"], ["--guidance", "3"]],
    )
    def test_options_beside_a_record_keep_its_weights(self, tmp_path, options):
        assert again(RUN, tmp_path, "--steps", "1", *options) == 0
        assert runs.read_record(tmp_path / "run.json")[0].model == "embedded-80"

    def test_a_model_that_is_asked_for_is_taken(self, tmp_path):
        assert again(RUN, tmp_path, "--steps", "1", "--size", "32x32", "--model", "embedded") == 0
        made = json.loads((tmp_path / "run.json").read_text())
        assert made["settings"]["model"] == "embedded"
        assert made["model"]["identity_sha256"] != json.loads(RUN.read_text())["model"]["identity_sha256"]

    def test_a_record_that_names_the_folder(self):
        settings, record = runs.read_record(RUN)
        by_path = settings.changed(model=str(embedded_path()))
        assert runs.with_its_model(by_path, record).model == str(embedded_path("embedded-80"))

    def test_weights_that_are_nowhere_are_refused(self, tmp_path, capsys):
        record = json.loads(RUN.read_text())
        record["model"]["identity_sha256"] = "0" * 64
        (tmp_path / "run.json").write_text(json.dumps(record))
        assert again(tmp_path / "run.json", tmp_path / "out") == 2
        assert "model 'embedded' is not the one of the record" in capsys.readouterr().err

    @pytest.mark.slow
    def test_records_of_the_embedded_model_of_today_stay_with_it(self, tmp_path, capsys):
        options = ["--source", SOURCE, "--target", TARGET, "--steps", "1", "--no-control", "--size", "32x32"]
        assert cli.main(["edit", *options, "--quiet", "-o", str(tmp_path / "a")]) == 0
        assert again(tmp_path / "a" / "run.json", tmp_path / "b") == 0
        assert runs.read_record(tmp_path / "b" / "run.json")[0].model == "embedded"
        assert "earlier" not in capsys.readouterr().err


class TestRecordings:
    @pytest.fixture
    def recording(self):
        """Its fingerprint holds the version of transformers, which writes itself into every configuration."""
        import transformers

        made_with = json.loads(RUN.read_text())["versions"]["transformers"]
        if transformers.__version__ != made_with:
            pytest.skip(f"the recording was made with transformers {made_with}")
        return Recording.load(DATA / "recording")

    def test_a_recording_is_edited_with_the_weights_of_its_time(self, recording):
        made = pipeline("embedded-80").edit(recording, TARGET, output_type="latent").images
        expected = load_file(DATA / "edited.safetensors")["latents"]
        assert (made - expected).abs().max() <= 1e-4 * expected.abs().max()

    def test_the_embedded_model_of_today_names_them(self, recording):
        with pytest.raises(ValueError, match=r"another model.*model 'embedded-80'.*embedded_path\(\"embedded-80\"\)"):
            pipeline("embedded").edit(recording, TARGET)


class TestNames:
    @pytest.mark.parametrize("name", EARLIER)
    def test_earlier_models_are_whole_and_are_found(self, name):
        folder = embedded_path(name)
        assert sources.find_model(name) == sources.find_model(str(folder))
        assert EvaluatedModel.find(Path(name), judged=True).folder == folder
        assert f'embedded_path("{name}")' in (folder / "MODEL_CARD.md").read_text()

    def test_they_are_computed_as_the_embedded_model_is(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert threads_for("embedded-80", "cpu") == threads_for("embedded", "cpu") == 1
        made = [runs.Settings(SOURCE, (TARGET,), model=name).edit() for name in ("embedded", "embedded-80")]
        assert made[0] == made[1]

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match=r"embedded, embedded-sd3, embedded-80, got 'embedded-40'"):
            embedded_path("embedded-40")

    def test_a_copy_elsewhere_has_replaced_nothing(self, tmp_path):
        shutil.copytree(embedded_path(), tmp_path / "copy")
        assert sources.replaced_models(str(tmp_path / "copy")) == []
        assert sources.replaced_models("embedded") == list(EARLIER)


def test_the_embedded_model_is_another_one():
    """Else nothing above would say anything."""
    now, before = (pipeline(name).unet.state_dict() for name in ("embedded", "embedded-80"))
    assert now.keys() == before.keys()
    assert not any(torch.equal(now[name], before[name]) for name in now)
