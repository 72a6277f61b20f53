"""Training of the embedded transformer: what its short cut in attention is equal to, and the command end to end."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0

from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.embedded import EMBEDDED_SD3, embedded_path, judge_path
from fpe_pipeline.embedded.flow_card import render_flow_card
from fpe_pipeline.embedded.training.export import folder_bytes
from fpe_pipeline.embedded.training.flow import StandInAttention, build_transformer
from fpe_pipeline.embedded.training.flow_export import FLOW_SIZE_LIMIT
from fpe_pipeline.embedded.training.flow_presets import FLOW_PRESETS
from fpe_pipeline.embedded.training.train_flow import main, train
from fpe_pipeline.errors import InputError
from fpe_pipeline.models.loading import find_model

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
