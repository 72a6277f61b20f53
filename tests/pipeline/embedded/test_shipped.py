"""The embedded model as it is shipped: its size, its card, what it draws, and its judge."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from fpe_pipeline.embedded import embedded_path, judge_path
from fpe_pipeline.embedded.card import render_card
from fpe_pipeline.embedded.judge import Judge, load_judge, save_judge
from fpe_pipeline.embedded.scenes import scenes
from fpe_pipeline.embedded.training.export import SIZE_LIMIT, folder_bytes
from fpe_pipeline.embedded.training.presets import PRESETS
from fpe_pipeline.errors import InputError
from fpe_pipeline.quality.evaluated import EvaluatedModel


def test_a_judge_looks_at_the_size_that_it_learned(tmp_path):
    judge = Judge(40).eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    loaded = load_judge(tmp_path / "judge.safetensors")
    assert loaded.size == 40
    assert torch.equal(loaded.mask.weight, judge.mask.weight.half().float())


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_judge_is_named(tmp_path, damage):
    from safetensors.torch import save_file

    path = tmp_path / "judge.safetensors"
    if damage == "cut":
        path.write_bytes(judge_path().read_bytes()[:3000])
    else:
        save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is damaged or no judge"):
        load_judge(path)
    model = replace(EvaluatedModel.find(None, judged=True), judge=path)
    with pytest.raises(InputError, match=r"judge\.safetensors' is damaged or no judge: .*; copy the model folder anew"):
        model.load("cpu")


class TestShipped:
    def test_size_and_card(self):
        folder = embedded_path()
        assert folder_bytes(folder) <= SIZE_LIMIT
        assert (folder / "MODEL_CARD.md").read_text() == render_card(folder)

    def test_record_is_of_its_preset(self):
        """The schedule that rebuilds the weights is the one that they were trained with."""
        record = json.loads((embedded_path() / "measurements.json").read_text())["training"]
        preset = PRESETS[record["preset"]]
        assert sum(stage["steps"] for stage in record["autoencoder_renders"]) == record["autoencoder_steps"]
        assert record["autoencoder_renders"][-1]["pixels"] == preset.size
        assert record["diffusion_batch"] == preset.diffusion.batch
        if "max_minutes" in record:  # by the clock
            assert 0 < record["scenes"] <= preset.scenes
            assert 0 < record["diffusion_steps"] <= preset.diffusion.steps
        else:
            assert (record["scenes"], record["diffusion_steps"]) == (preset.scenes, preset.diffusion.steps)
            assert record["autoencoder_steps"] == preset.autoencoder.steps

    def test_settings_name_no_folder_of_the_machine_that_trained_it(self):
        for path in embedded_path().rglob("*.json"):
            assert "_name_or_path" not in path.read_text(), path

    def test_loads_in_one_precision_without_warnings(self, caplog):
        from diffusers import StableDiffusionPipeline

        with caplog.at_level(logging.WARNING):
            pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
        assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype
        assert pipe.scheduler.config.beta_schedule == "scaled_linear"
        assert not [r for r in caplog.records if "not initialized" in r.message]

    @pytest.mark.slow
    def test_judge_knows_renders(self):
        rng = np.random.default_rng(11)
        drawn = [scenes.render(scenes.sample_scene(rng, held=True)) for _ in range(64)]
        verdict = load_judge(judge_path()).look(np.stack([d.image for d in drawn]))
        assert np.mean([a == d.scene.object for a, d in zip(verdict.objects, drawn, strict=True)]) >= 0.98
        assert np.mean([a == d.scene.colour for a, d in zip(verdict.colours, drawn, strict=True)]) >= 0.98

    @pytest.mark.slow
    def test_draws_what_the_prompt_says(self):
        from fpe_pipeline.embedded.measure import measure_generation

        figures = measure_generation(embedded_path(), 24, steps=20)
        assert min(figures[name] for name in ("colour", "background", "object")) >= 0.95
