"""Training of the embedded transformer: what its short cut in attention is equal to, and the command end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0

from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.embedded import EMBEDDED_SD3, embedded_path, judge_path
from fpe_pipeline.embedded.flow_card import render_flow_card
from fpe_pipeline.embedded.training.data import render_cache, start_rendering
from fpe_pipeline.embedded.training.export import folder_bytes
from fpe_pipeline.embedded.training.flow import StandInAttention, build_transformer
from fpe_pipeline.embedded.training.flow_export import FLOW_SIZE_LIMIT
from fpe_pipeline.embedded.training.flow_presets import FLOW_PRESETS
from fpe_pipeline.embedded.training.flow_stages import kept_latents, posteriors
from fpe_pipeline.embedded.training.timebox import GRACE, TimeBox
from fpe_pipeline.embedded.training.train_flow import main, train
from fpe_pipeline.errors import InputError
from fpe_pipeline.models.sources import find_model

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.mark.parametrize("count", [1, 7, 256])
def test_one_token_of_zeros_stands_for_many(count):
    """To rounding, in every output: the short cut is exact, not an approximation."""
    torch.manual_seed(0)
    transformer = torch.nn.Module.to(build_transformer(4, 16, layers=3, heads=2), torch.float64)
    with torch.no_grad():
        for parameter in transformer.parameters():  # the blocks begin as the identity
            parameter.normal_(std=0.3)
    texts, zeros = torch.randn(2, 5, 16, dtype=torch.float64), torch.zeros(2, count, 16, dtype=torch.float64)
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 4, dtype=torch.float64),
        "pooled_projections": torch.randn(2, 16, dtype=torch.float64),
        "timestep": torch.tensor([100.0, 700.0]),
        "return_dict": False,
    }
    transformer.set_attn_processor(JointAttnProcessor2_0())
    whole = transformer(encoder_hidden_states=torch.cat([texts, zeros], dim=1), **inputs)[0]
    transformer.set_attn_processor(StandInAttention())
    stands_for = torch.full((2,), math.log(count), dtype=torch.float64)
    short = {**inputs, "encoder_hidden_states": torch.cat([texts, zeros[:, :1]], dim=1)}
    found = transformer(**short, joint_attention_kwargs={"stands_for": stands_for})[0]
    assert (found - whole).abs().max() <= 1e-10 * whole.abs().max()
    if count > 1:
        alone = transformer(**short)[0]
        assert (alone - whole).abs().max() > 1e-4 * whole.abs().max()


@pytest.mark.slow
def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path):
    preset = FLOW_PRESETS["smoke"]
    figures = train(preset, tmp_path / "whole", tmp_path / "whole" / "model")
    assert figures is not None and set(figures) == {"training", "autoencoder", "judge", "generated"}
    assert train(preset, tmp_path / "parts", tmp_path / "parts" / "model", stop_after=3) is None
    train(preset, tmp_path / "parts", tmp_path / "parts" / "model")
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"):
        whole, parts = (tmp_path / run / "model" / f"{name}.safetensors" for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name
    folder = tmp_path / "whole" / "model"
    stock = StableDiffusion3Pipeline.from_pretrained(folder, **NO_T5)
    assert {part.dtype for part in (stock.transformer, stock.text_encoder, stock.vae)} == {torch.float32}
    ours = FreePromptPipeline.from_pretrained(folder)
    assert ours.text_encoder_3 is None and ours.native_size == (64, 64)
    assert "--preset smoke`.\n" in (folder / "MODEL_CARD.md").read_text()
    for path in folder.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


@pytest.mark.parametrize(("left", "count"), [(100.0, 200), (30.0, 32)])
def test_a_time_box_leaves_scenes_undrawn_and_unencoded(left, count, tmp_path, monkeypatch):
    cache = render_cache(tmp_path / "scenes", 200, 16)
    asked = []
    drawn = SimpleNamespace(
        cache=cache, ready=200, stop=lambda: asked.append("stop"), wait=lambda *count, **limits: asked.append(limits)
    )
    stages = "fpe_pipeline.embedded.training.flow_stages"
    monkeypatch.setattr(f"{stages}.encode_all", lambda vae, images: torch.ones(len(images), 1))
    box = SimpleNamespace(limited=True, total=100.0, left=left)
    preset = replace(FLOW_PRESETS["smoke"], scenes=200, size=16)
    latents, labels = posteriors(preset, torch.nn.Linear(1, 1), drawn, tmp_path / "latents.pt", 0, box)
    assert asked == [{}, {"seconds": 20.0 if left == 100.0 else 0.0}, "stop"]
    assert len(latents) == count and np.array_equal(labels, cache.labels[:count])


def test_many_scenes_are_drawn_beside_the_process_that_waits_for_them(tmp_path):
    """Also where one process draws: a time box could not end it."""
    drawn = start_rendering(tmp_path, 4096, 64, workers=1)
    assert drawn.ready < 4096
    drawn.stop()


def test_the_command_ends_what_goes_on_beyond_its_time(tmp_path, monkeypatch):
    guarded = []
    monkeypatch.setattr(TimeBox, "guard", lambda box, grace, output: guarded.append((box.total, grace, output)))
    monkeypatch.setattr("fpe_pipeline.embedded.training.train_flow.train", lambda *_, **__: None)
    assert main(["--preset", "smoke", "--max-minutes", "2", "--output", str(tmp_path)]) == 0
    assert guarded == [(120, GRACE, tmp_path)]


_ABOUT = {"scenes": 8, "size": 64, "seed": 0, "autoencoder": "0123"}


class TestKeptLatents:
    def _keep(self, path, content):
        torch.save(content, path)
        return path

    def test_are_served_where_they_are_of_these_scenes(self, tmp_path):
        both = {"latents": torch.randn(8, 2, 4, 4, 4), "labels": torch.arange(24).view(8, 3)}
        latents, labels = kept_latents(self._keep(tmp_path / "kept.pt", {**both, "about": _ABOUT}), _ABOUT)
        assert torch.equal(latents, both["latents"]) and torch.equal(labels, both["labels"])

    @pytest.mark.parametrize("other", [{"seed": 1}, {"scenes": 9}, {"autoencoder": "4567"}])
    def test_are_refused_where_they_are_of_others(self, tmp_path, other):
        """A training would go on in pictures, or among latents, that it never saw."""
        path = self._keep(tmp_path / "kept.pt", {"latents": 0, "labels": 0, "about": {**_ABOUT, **other}})
        with pytest.raises(ValueError, match=r"kept\.pt holds latents of .*, not of .*: choose another work folder"):
            kept_latents(path, _ABOUT)

    def test_are_made_anew_where_they_do_not_say_of_what(self, tmp_path):
        assert kept_latents(self._keep(tmp_path / "kept.pt", torch.zeros(8)), _ABOUT) is None
        assert kept_latents(tmp_path / "none.pt", _ABOUT) is None


def test_a_gpu_that_is_asked_for_has_to_be_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--preset", "gpu", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_an_installation_without_it_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr("fpe_pipeline.embedded._HERE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"training\.train_flow --preset cpu"):
        embedded_path(EMBEDDED_SD3)
    with pytest.raises(InputError, match=r"has no embedded-sd3; .* or train it with `python -m .*train_flow`"):
        find_model(EMBEDDED_SD3)


class TestShipped:
    def test_size_card_and_record(self):
        folder = embedded_path(EMBEDDED_SD3)
        assert folder_bytes(folder) <= FLOW_SIZE_LIMIT
        assert (folder / "MODEL_CARD.md").read_text() == render_flow_card(folder)
        record = json.loads((folder / "measurements.json").read_text())["training"]
        preset = FLOW_PRESETS[record["preset"]]
        assert record["batch"] == preset.flow.batch and 0 < record["steps"] <= preset.flow.steps
        assert judge_path(folder) == judge_path()

    def test_is_loaded_by_its_name_and_edits(self):
        pipe = FreePromptPipeline.from_pretrained(EMBEDDED_SD3)
        pipe.set_progress_bar_config(disable=True)
        source, target = "a photo of a red car on the beach", "a photo of a blue car on the beach"
        made = pipe(source, target, num_inference_steps=5, max_sequence_length=1, output_type="np")
        assert len(made.report.layers) == len(pipe.transformer.transformer_blocks)
        assert abs(made.images[0] - made.images[1]).max() > 0.02

    @pytest.mark.slow
    def test_draws_what_the_prompt_says(self):
        from fpe_pipeline.embedded.measure import measure_generation

        folder = embedded_path(EMBEDDED_SD3)
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **NO_T5)
        options = {"steps": 20, "guidance": 4.0, "max_sequence_length": 1}
        figures = measure_generation(folder, 48, judge=judge_path(), pipe=pipe, **options)
        assert min(figures[name] for name in ("colour", "background", "object")) >= 0.8
