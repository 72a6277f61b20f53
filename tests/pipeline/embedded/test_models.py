"""The embedded model: scenes, tokenizer, training from nothing, and what is shipped."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from fpe_pipeline.embedded import embedded_path, judge_path
from fpe_pipeline.embedded.card import render_card
from fpe_pipeline.embedded.scenes import scenes
from fpe_pipeline.embedded.training.captions import Captions
from fpe_pipeline.embedded.training.data import render_cache, start_rendering
from fpe_pipeline.embedded.training.export import SIZE_LIMIT, folder_bytes
from fpe_pipeline.embedded.training.loop import fit
from fpe_pipeline.embedded.training.presets import PRESETS, Fit, Shares
from fpe_pipeline.embedded.training.step import OptimiserStep, Weights
from fpe_pipeline.embedded.training.timebox import TimeBox
from fpe_pipeline.embedded.training.tokenizer import MAX_LENGTH, build_tokenizer, caption_words
from fpe_pipeline.embedded.training.train import GRACE, main, train

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

    def test_workers_draw_the_same_scenes_and_say_how_far_they_are(self, tmp_path):
        count = 300  # more than one process is started for
        alone = render_cache(tmp_path / "a", count, 16, seed=5)
        rendering = start_rendering(tmp_path / "b", count, 16, seed=5, workers=2)
        assert rendering.wait(10) >= 10
        assert rendering.wait() == count
        together = rendering.cache
        assert np.array_equal(alone.images, together.images) and np.array_equal(alone.masks, together.masks)
        assert alone.scenes == together.scenes
        assert json.loads((tmp_path / "b" / "settings.json").read_text())["count"] == count
        drawn = scenes.render(alone.scenes[7], 16)
        assert np.array_equal(alone.images[7], drawn.image)

    def test_a_worker_that_fails_is_told(self, tmp_path):
        rendering = start_rendering(tmp_path, 300, 8, workers=2)  # too small to draw
        with pytest.raises(RuntimeError, match="ended with status 1"):
            rendering.wait()

    @pytest.mark.parametrize("background", scenes.BACKGROUNDS)
    def test_what_stands_stands_on_the_ground(self, background):
        rng = np.random.default_rng(2)
        for name in ("car", "house", "boat", "mushroom", "cat"):
            scene = scenes.sample_scene(rng, triple=(name, "red", background))
            assert (scene.object, scene.colour, scene.background) == (name, "red", background)
            rows = np.flatnonzero(scenes.render(scene, 64).mask.max(axis=1) > 127)
            assert 0.7 < (rows[-1] + 1) / 64 < 0.95

    def test_captions_are_those_of_the_table_with_their_shares(self, folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        table, triple = Captions(tokenizer, "cpu"), ("fish", "orange", "snow")
        wordings = dict(scenes.captions(*triple))
        assert sum(wordings.values()) == pytest.approx(1.0)
        place = scenes.triples().index(triple)
        assert place == (7 * table.counts[1] + 1) * table.counts[2] + 3
        count = 4000
        labels = torch.tensor([[7, 1, 3]]).repeat(count, 1)
        tokens = table.draw(labels, torch.Generator().manual_seed(0))
        whole = tokenizer(list(wordings), padding="max_length", max_length=MAX_LENGTH).input_ids
        assert {tuple(ids) for ids in tokens.tolist()} == {tuple(ids) for ids in whole}
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        drawn = Counter(text.replace(" ,", ",") for text in texts)
        assert set(drawn) == set(wordings)
        for text, share in wordings.items():  # within five standard deviations
            assert abs(drawn[text] - count * share) < 5 * (count * share) ** 0.5, text
        dropped = table.draw(labels, torch.Generator().manual_seed(0), drop=0.25)
        assert (dropped == torch.tensor(tokenizer("", padding="max_length").input_ids)).all(dim=1).float().mean() == (
            pytest.approx(0.25, abs=5 * (0.25 * 0.75 / count) ** 0.5)
        )


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

        def draw(step, generator):
            return (torch.randn(8, 4, generator=generator),)

        def loss(network, inputs):
            return network(inputs).square().mean(), {}

        done = fit(module, draw, loss, Fit(steps=20, batch=8, ema=0.9), path, seed=1, **options)
        return bool(done), module.state_dict()

    def test_resumed_run_ends_with_the_same_weights(self, tmp_path):
        done, whole = self._run(tmp_path / "whole.pt")
        assert done
        assert self._run(tmp_path / "parts.pt", stop_after=7)[0] is False
        done, resumed = self._run(tmp_path / "parts.pt")
        assert done
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_a_finished_training_stays_finished(self, tmp_path):
        _, whole = self._run(tmp_path / "whole.pt", deadline=time.monotonic() + 0.05)
        done, again = self._run(tmp_path / "whole.pt")
        assert done
        assert all(torch.equal(whole[name], again[name]) for name in whole)

    def test_a_deadline_ends_a_run_with_its_learning_rate_at_the_end(self, tmp_path):
        module, rates = torch.nn.Linear(4, 1), []

        class Schedule(Fit):
            def rate(self, step, progress):
                rates.append(super().rate(step, progress))
                return rates[-1]

        def draw(step, generator):
            time.sleep(0.002)
            return (torch.randn(8, 4, generator=generator),)

        begun = time.monotonic()
        settings = Schedule(steps=10**6, batch=8, warmup=1, tail=0.5)
        done = fit(
            module, draw, lambda network, x: (network(x).square().mean(), {}), settings, None, deadline=begun + 1
        )
        assert done and done.steps < 10**6
        assert 1 <= time.monotonic() - begun < 2
        assert rates[0] == settings.learning_rate and rates[-1] < 0.1 * settings.learning_rate

    def test_clock_ends_a_run(self):
        settings = Fit(steps=100, batch=1, max_minutes=2.0, tail=0.5)
        assert settings.progress(10, 0.0) == 0.1
        assert settings.progress(10, 1.0) == 0.5
        assert settings.progress(10, 3.0) == 1.0
        assert settings.rate(99, 1.0) == pytest.approx(0.0)


class TestStep:
    @staticmethod
    def _network():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 3), torch.nn.Flatten(1)
        )

    @staticmethod
    def _loss(network, inputs):
        dtype = next(network.parameters()).dtype
        return 10 * (network(inputs.to(dtype)).float() - 1).square().mean(), {"mean": inputs.mean()}

    def _train(self, steps, **options):
        weights = Weights(self._network(), **options)
        optimiser = OptimiserStep(weights, self._loss, weight_decay=0.1, clip=0.5)
        losses = []
        for step in range(steps):
            inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            optimiser(step, (inputs,), 0.01, 0.5)
            losses.append(optimiser.figures()["loss"])
        return weights, losses

    def test_is_that_of_torch(self):
        module, average = self._network(), None
        optimiser = torch.optim.AdamW(module.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
        for step in range(12):
            inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            optimiser.zero_grad()
            self._loss(module, inputs)[0].backward()
            assert torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5) > 0.5  # clipping is at work
            optimiser.step()
            flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
            average = 0.5 * (self._start() if average is None else average) + 0.5 * flat
        weights, _ = self._train(12)
        assert torch.allclose(weights.values, flat, rtol=1e-4, atol=1e-6)
        assert torch.allclose(weights.average, average, rtol=1e-4, atol=1e-6)

    def _start(self):
        return torch.cat([parameter.detach().flatten() for parameter in self._network().parameters()])

    def test_a_bfloat16_copy_computes_and_float32_learns(self):
        weights, losses = self._train(60, half=True)
        exact, expected = self._train(60)
        assert {parameter.dtype for parameter in weights.network.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in weights.module.parameters()} == {torch.float32}
        assert losses[-1] < 0.5 * losses[0]
        assert losses == pytest.approx(expected, rel=0.1, abs=0.01 * expected[0])
        # A convolution lies in channels-last layout in both, and in the common one in what is handed on.
        assert weights.network[0].weight.is_contiguous(memory_format=torch.channels_last)
        found, wanted = weights.averaged(), exact.averaged()
        for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
            assert a.is_contiguous()
            assert torch.allclose(a, b, atol=0.1)
        assert torch.equal(weights.network[0].weight, weights.module[0].weight.to(torch.bfloat16))
        weights.finish()
        assert all(torch.equal(a, b) for a, b in zip(weights.module.parameters(), found.parameters(), strict=True))

    def test_a_gradient_that_is_not_finite_changes_nothing_but_the_decay(self):
        weights = Weights(self._network())
        before = weights.values.clone()

        def loss(network, inputs):
            return self._loss(network, inputs)[0] * float("nan"), {}

        OptimiserStep(weights, loss, weight_decay=0.1, clip=1.0)(0, (torch.randn(2, 3, 8, 8),), 0.01, 0.5)
        assert torch.allclose(weights.values, before * (1 - 0.01 * 0.1))


class _StandInGraph:
    """What a CUDA graph does, on a CPU: a capture changes nothing, a replay computes with what the buffers hold."""

    def __init__(self):
        self.captured = None

    def replay(self):
        self.captured()


class TestGraph:
    @pytest.fixture
    def cuda(self, monkeypatch):
        """CUDA's streams and graphs without a device; whatever is computed in a capture is undone."""

        @contextmanager
        def capture(graph, stream, capture_error_mode):
            step = self.step
            kept = {name: value.clone() for name, value in vars(step._weights).items() if torch.is_tensor(value)}
            graph.captured = step._compute
            yield
            for name, value in kept.items():
                getattr(step._weights, name).copy_(value)
            if self.refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nand so on")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        stand_ins = {"Stream": lambda: stream, "current_stream": lambda: stream, "synchronize": lambda: None}
        stand_ins |= {"stream": lambda stream: nullcontext(), "graph": capture, "CUDAGraph": _StandInGraph}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        self.refuses = False

    def _train(self, half, on_cuda):
        self.step = step = OptimiserStep(Weights(TestStep._network(), half=half), TestStep._loss, 0.1, 0.5)
        if on_cuda:
            step._cuda, step._capturable, step._stream = True, True, torch.cuda.Stream()
        losses = []
        for index in range(8):
            inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(index))
            step(index, (inputs,), 0.01 * (index + 1), 0.5)
            inputs.zero_()  # a graph reads buffers of its own
            losses.append(step.figures()["loss"])
        return losses, step._weights.average

    @pytest.mark.parametrize("half", [False, True])
    def test_a_graph_takes_the_same_steps(self, cuda, half):
        losses, average = self._train(half, on_cuda=False)
        graphed, found = self._train(half, on_cuda=True)
        assert self.step.graphed
        assert graphed == losses and torch.equal(found, average)

    def test_a_refused_capture_is_told_and_goes_on_without(self, cuda, caplog):
        losses, average = self._train(True, on_cuda=False)
        self.refuses = True
        with caplog.at_level(logging.WARNING):
            eager, found = self._train(True, on_cuda=True)
        assert not self.step.graphed
        assert [r.getMessage() for r in caplog.records] == [
            "no CUDA graph of the step, it runs eagerly and slower: operation not permitted when stream is capturing"
        ]
        assert eager == losses and torch.equal(found, average)


class TestTimeBox:
    def test_guard_ends_what_does_not_end(self, tmp_path):
        code = (
            "import logging, pathlib, time; from fpe_pipeline.embedded.training.timebox import TimeBox;"
            "logging.basicConfig();"
            f"TimeBox(0.005).guard(0.2, pathlib.Path({str(tmp_path)!r})); time.sleep(60)"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert ended.returncode == 3 and "no model in" in ended.stderr
        (tmp_path / "model_index.json").write_text("{}")
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert ended.returncode == 0 and "is whole" in ended.stderr

    @pytest.mark.slow
    def test_training_keeps_to_it_and_leaves_pictures_and_figures(self, tmp_path):
        box, report = TimeBox(0.6), tmp_path / "report"
        fits = ("autoencoder", "judge", "text", "diffusion")
        endless = {name: replace(getattr(PRESETS["smoke"], name), steps=10**6) for name in fits}
        preset = replace(PRESETS["smoke"], **endless, edits=0, shares=Shares(review=0.7))
        figures = train(preset, tmp_path, tmp_path / "model", report=report, box=box)
        assert box.left > -GRACE
        metrics = json.loads((report / "metrics.json").read_text())
        assert metrics["training"] == figures["training"] and figures["training"]["max_minutes"] == 0.6
        assert set(metrics["networks"]) == set(fits)
        assert all(metrics["networks"][name]["steps"] < 10**6 for name in fits)
        with Image.open(report / "contact_sheet.png") as sheet, Image.open(report / "samples.png") as grid:
            assert min(sheet.size) > 500 and grid.size == (5 * 64, 8 * 64)
        assert "--max-minutes 0.6`" in (tmp_path / "model" / "MODEL_CARD.md").read_text()


class TestTraining:
    def test_smoke_preset_trains_resumes_and_exports(self, tmp_path):
        from diffusers import StableDiffusionPipeline

        preset = PRESETS["smoke"]
        figures = train(preset, tmp_path / "whole", tmp_path / "whole" / "model")
        assert not (tmp_path / "whole" / "report").exists()
        assert set(figures) == {"training", "autoencoder", "judge", "generated"}
        for _ in range(8):  # each call stops in the middle of one of the three networks
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
    from fpe_pipeline.embedded.judge import Judge, load_judge, save_judge

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
        from fpe_pipeline.embedded.judge import load_judge

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
