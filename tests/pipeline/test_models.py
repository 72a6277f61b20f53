"""The embedded model: scenes, tokenizer, training from nothing, and what is shipped."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from fpe_pipeline.models import embedded_path, judge_path, scenes
from fpe_pipeline.models.card import render_card
from fpe_pipeline.models.data import render_cache
from fpe_pipeline.models.export import SIZE_LIMIT, folder_bytes
from fpe_pipeline.models.loop import Fit, fit
from fpe_pipeline.models.tokenizer import MAX_LENGTH, build_tokenizer, caption_words
from fpe_pipeline.models.train import PRESETS, main, train

SCENE = scenes.Scene("car", "red", "beach", seed=3)


class TestScenes:
    def test_equal_scenes_give_equal_bytes(self):
        first, second = scenes.render(SCENE), scenes.render(SCENE)
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.mask, second.mask)

    def test_every_field_shows(self):
        drawn = scenes.render(SCENE).image
        other = {"object": "cat", "colour": "blue", "background": "snow", "x": 0.4, "y": 0.5, "scale": 0.9}
        for field, value in {**other, "angle": 10.0, "flip": True, "seed": 4}.items():
            assert not np.array_equal(scenes.render(replace(SCENE, **{field: value})).image, drawn), field

    @pytest.mark.parametrize("name", scenes.OBJECTS)
    def test_silhouette_is_antialiased_and_inside_the_picture(self, name):
        mask = scenes.render(replace(SCENE, object=name)).mask
        assert mask.min() == 0 and mask.max() == 255
        edge = (mask > 0) & (mask < 255)
        assert 0 < edge.sum() < (mask > 0).sum() / 2
        assert not mask[0].any() and not mask[-1].any() and not mask[:, 0].any() and not mask[:, -1].any()
        assert 0.05 < (mask > 127).mean() < 0.4

    @pytest.mark.parametrize("name", scenes.OBJECTS)
    def test_mask_is_where_the_colour_changes_the_picture(self, name):
        red, blue = (scenes.render(replace(SCENE, object=name, colour=c)) for c in ("red", "blue"))
        assert np.array_equal(red.mask, blue.mask)
        changed = (red.image != blue.image).any(axis=-1)
        assert not changed[red.mask == 0].any()
        assert changed[red.mask == 255].mean() > 0.4

    def test_size_is_free_and_too_small_is_refused(self):
        assert scenes.render(SCENE, 40).image.shape == (40, 40, 3)
        with pytest.raises(ValueError, match="at least 16"):
            scenes.render(SCENE, 8)

    def test_held_out_triples_leave_every_pair_in_training(self):
        seen = scenes.triples(held=False)
        assert len(scenes.triples(held=True)) == 32 and len(seen) == 288
        for first, second in ((0, 1), (0, 2), (1, 2)):
            pairs = {(t[first], t[second]) for t in scenes.triples()}
            assert {(t[first], t[second]) for t in seen} == pairs
        rng = np.random.default_rng(0)
        for _ in range(20):
            scene = scenes.sample_scene(rng, held=True)
            assert scenes.held_out(scene.object, scene.colour, scene.background)

    def test_captions_name_what_is_drawn(self):
        assert scenes.prompt("car", "red", "beach") == "a photo of a red car on the beach"
        assert scenes.prompt("fish", "orange", "snow") == "a photo of an orange fish in the snow"
        assert scenes.prompt("car", "red", "beach") in scenes.phrasings("car", "red", "beach")
        rng = np.random.default_rng(0)
        assert all("car" in scenes.caption(SCENE, rng) for _ in range(50))

    def test_cache_does_not_depend_on_its_length_and_refuses_other_settings(self, tmp_path):
        short = render_cache(tmp_path / "a", 3, 32, seed=5)
        long = render_cache(tmp_path / "b", 5, 32, seed=5)
        assert np.array_equal(short.images, long.images[:3])
        assert np.array_equal(render_cache(tmp_path / "a", 3, 32, seed=5).images, short.images)
        with pytest.raises(ValueError, match="choose another folder"):
            render_cache(tmp_path / "a", 3, 32, seed=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


class TestTokenizer:
    def test_loads_as_clip_and_makes_one_token_of_each_caption_word(self, folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        assert tokenizer.model_max_length == MAX_LENGTH
        for word in caption_words():
            assert len(tokenizer(word).input_ids) == 3, word

    def test_round_trip(self, folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        text = "a photo of a purple mushroom in the meadow"
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text

    @pytest.mark.parametrize("text", ["", "Über 漢字 🙂", "a crimson zeppelin, 42!", "x" * 500])
    def test_any_text_becomes_tokens(self, folder, text):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == MAX_LENGTH and max(ids) < len(tokenizer)


class TestLoop:
    @staticmethod
    def _run(path, **options):
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 1)

        def loss(step, generator):
            value = module(torch.randn(8, 4, generator=generator)).square().mean()
            return value, {"loss": value.item()}

        done = fit(module, loss, Fit(steps=20, batch=8, ema=0.9), path, seed=1, **options)
        return done, module.state_dict()

    def test_resumed_run_ends_with_the_same_weights(self, tmp_path):
        done, whole = self._run(tmp_path / "whole.pt")
        assert done
        assert self._run(tmp_path / "parts.pt", stop_after=7)[0] is False
        done, resumed = self._run(tmp_path / "parts.pt")
        assert done
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_clock_ends_a_run(self):
        settings = Fit(steps=100, batch=1, max_minutes=2.0, tail=0.5)
        assert settings.progress(10, 0.0) == 0.1
        assert settings.progress(10, 1.0) == 0.5
        assert settings.progress(10, 3.0) == 1.0
        assert settings.rate(99, 1.0) == pytest.approx(0.0)


class TestTraining:
    def test_smoke_preset_trains_resumes_and_exports(self, tmp_path):
        from diffusers import StableDiffusionPipeline

        preset = PRESETS["smoke"]
        figures = train(preset, tmp_path / "whole", tmp_path / "whole" / "model")
        assert set(figures) == {"training", "autoencoder", "judge", "generated"}
        for _ in range(6):  # each call stops in the middle of one of the three networks
            resumed = train(preset, tmp_path / "parts", tmp_path / "parts" / "model", stop_after=3)
            if resumed is not None:
                break
        assert resumed is not None
        for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "judge.safetensors"):
            whole, parts = (tmp_path / run / "model" / name for run in ("whole", "parts"))
            assert whole.read_bytes() == parts.read_bytes(), name
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "model")
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a photo of a red car on the beach", num_inference_steps=2).images[0].size == (64, 64)
        card = (tmp_path / "whole" / "model" / "MODEL_CARD.md").read_text()
        assert f"{figures['autoencoder']['psnr']:.4g}" in card
        assert "--preset smoke`.\n" in card

    def test_gpu_preset_without_a_gpu_says_so(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            main(["--preset", "gpu"])
        assert "no CUDA device" in capsys.readouterr().err


def test_a_judge_looks_at_the_size_that_it_learned(tmp_path):
    from fpe_pipeline.models.judge import Judge, load_judge, save_judge

    judge = Judge(40).eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    loaded = load_judge(tmp_path / "judge.safetensors")
    assert loaded.size == 40
    assert torch.equal(loaded.mask.weight, judge.mask.weight.half().float())


class TestShipped:
    def test_size_and_card(self):
        folder = embedded_path()
        assert folder_bytes(folder) <= SIZE_LIMIT
        assert (folder / "MODEL_CARD.md").read_text() == render_card(folder)

    def test_record_is_of_its_preset(self):
        """The schedule that rebuilds the weights is the one that they were trained with."""
        record = json.loads((embedded_path() / "measurements.json").read_text())["training"]
        preset = PRESETS[record["preset"]]
        assert (record["scenes"], record["latents"]) == (preset.scenes, preset.latents)
        assert (record["diffusion_steps"], record["diffusion_batch"]) == (
            preset.diffusion.steps,
            preset.diffusion.batch,
        )
        assert sum(stage["steps"] for stage in record["autoencoder_renders"]) == preset.autoencoder.steps
        assert record["autoencoder_steps"] == preset.autoencoder.steps
        assert record["autoencoder_renders"][-1]["pixels"] == preset.size

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
        from fpe_pipeline.models.judge import load_judge

        rng = np.random.default_rng(11)
        drawn = [scenes.render(scenes.sample_scene(rng, held=True)) for _ in range(64)]
        verdict = load_judge(judge_path()).look(np.stack([d.image for d in drawn]))
        assert np.mean([a == d.scene.object for a, d in zip(verdict.objects, drawn, strict=True)]) >= 0.98
        assert np.mean([a == d.scene.colour for a, d in zip(verdict.colours, drawn, strict=True)]) >= 0.98

    @pytest.mark.slow
    def test_draws_what_the_prompt_says(self):
        from fpe_pipeline.models.measure import measure_generation

        figures = measure_generation(embedded_path(), 24, steps=20)
        assert figures["colour"] >= 0.8 and figures["background"] >= 0.9 and figures["object"] >= 0.7
